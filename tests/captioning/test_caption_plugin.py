"""Captioner plug-ins: the example in docs/captioning.md runs unchanged."""

import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioning.captioner import Caption, Captioner, fingerprint_of, load_captioner
from captioning.settings import CaptionSettings
from clipmill.base.errors import ItemError, UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "captioning.md"


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    example = re.search(r"```python\n(# brightness\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    assert example, "docs/captioning.md has no example"
    path = tmp_path / "brightness.py"
    path.write_text(example.group(1))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("brightness", None)


def test_the_example_of_the_docs_captions_frames(module):
    settings = CaptionSettings(
        captioner="brightness:load", options={"dark": "a dark frame", "bright": "a bright frame"}
    )
    captioner = load_captioner(settings)
    assert isinstance(captioner, Captioner)
    assert captioner.fingerprint == fingerprint_of(settings)
    answers = captioner.caption([jpeg((250, 250, 250)), b"broken", Image.new("RGB", (8, 8))])
    assert [answers[0].text, answers[2].text] == ["a bright frame", "a dark frame"]
    assert isinstance(answers[0], Caption) and isinstance(answers[1], ItemError)


def test_editing_the_module_or_its_options_changes_the_fingerprint(module):
    settings = CaptionSettings(captioner="brightness:load", options={"dark": "night"})
    before = fingerprint_of(settings)
    assert fingerprint_of(CaptionSettings(captioner="brightness:load", options={"dark": "dusk"})) != before
    module.write_text(module.read_text() + "\n# another line\n")
    assert fingerprint_of(settings) != before


def test_a_name_that_the_module_lacks_is_the_users_mistake(module):
    with pytest.raises(UserError, match="caption.captioner = brightness:nothing"):
        load_captioner(CaptionSettings(captioner="brightness:nothing"))


def test_a_factory_that_makes_no_captioner_is_the_users_mistake(module):
    module.write_text("load = dict\n")
    with pytest.raises(UserError, match="caption.captioner = brightness:load"):
        load_captioner(CaptionSettings(captioner="brightness:load"))


def test_the_imports_of_plug_ins_for_the_first_version_still_work():
    """Import from the old place: an edited plug-in would make its captions pending."""
    from pipeline.errors import ItemError as OldItemError

    assert OldItemError is ItemError
