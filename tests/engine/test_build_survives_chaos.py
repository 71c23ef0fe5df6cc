"""A build with dying workers, nodes and drivers, a full disk, torn files and a bad server ends in the usual bytes.

`python -m bench.chaos` is the long version.
"""

import pytest

from bench.chaos import SETTINGS, torment
from tests.helpers.builds import PLAIN

# Actors without a model to load, so that a killed one restarts within seconds.
LIGHT = (*SETTINGS, *PLAIN)


@pytest.mark.slow
def test_a_build_under_faults_of_every_kind_ends_in_the_same_bytes(tmp_path, capsys):
    said: list[str] = []
    size = {"num_faults": 10, "num_kinds": 5, "num_videos": 2, "num_nodes": 1}
    summary = torment(tmp_path, seed=2, say=said.append, settings=LIGHT, **size)
    with capsys.disabled():
        print(f"\n{summary}")
    assert summary.wrong == [], "\n".join(map(str, [summary, *said]))
    assert summary.faults.total() >= 10 and len(+summary.faults) >= 5
