"""A fingerprint changes with the settings that shape the output, and with no others."""

from clipmill.base.settings import Settings, added_later, operational


class Before(Settings):
    size: int = 3
    workers: int = operational(1)


class Later(Before):
    trim: bool = added_later(True)


def test_a_later_setting_at_its_default_leaves_finished_work_done():
    assert Later().fingerprint() == Later(workers=2).fingerprint() == Before().fingerprint()


def test_any_other_value_of_it_makes_a_new_fingerprint():
    fingerprints = {Before().fingerprint(), Later(trim=False).fingerprint(), Later(size=4).fingerprint()}
    assert len(fingerprints | {Later(size=4, trim=False).fingerprint()}) == 4
