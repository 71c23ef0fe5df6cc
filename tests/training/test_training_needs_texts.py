"""A selection without any text that the loss compares is an error before training, not a run with loss 0."""

import json
import re

import pytest

from clipmill.base.errors import UserError
from tests.helpers.tars import write_members
from training.run.folder import RunFolder
from training.run.setup import Request, prepare

SETTINGS = ("train.batch_size=2",)


def prepared(tmp_path, members: dict[str, bytes], *settings: str) -> list[str]:
    write_members(tmp_path / "x.tar", members)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    request = Request(str(folder.root), str(tmp_path / "x.tar"), assignments=(*SETTINGS, *settings))
    return prepare(request, folder)


def clips(**texts: bytes) -> dict[str, bytes]:
    """Return four clips, each with these members beside its video."""
    named = {f"{n}.{name}": content for n in range(4) for name, content in texts.items()}
    return {f"{n}.mp4": bytes([n]) * 9 for n in range(4)} | named


CAPTION = json.dumps({"caption": "seen"}).encode()
TEXTS = json.dumps({"texts": [" ", "written"]}).encode()
BLANK = json.dumps({"caption": " ", "texts": ["", "\t"]}).encode()


@pytest.mark.parametrize(
    "members, settings, compared",
    [
        (clips(), (), "subtitle and caption"),
        (clips(txt=b""), (), "subtitle and caption"),
        (clips(txt=b" \n\t"), (), "subtitle and caption"),
        (clips(json=BLANK), (), "subtitle and caption"),
        (clips(json=CAPTION), ("train.loss=vs",), "subtitle"),
        (clips(txt=b"said"), ("train.loss=vs", "data.subtitle=caption"), "caption"),
        (clips(json=BLANK), ("train.loss=vs", "data.subtitle=texts"), "texts"),
        (clips(json=CAPTION), ("train.loss=mil_nce", "data.neighbours=1"), "subtitle and neighbours"),
    ],
)
def test_no_text_is_an_error_that_names_the_loss_and_its_texts(tmp_path, members, settings, compared):
    with pytest.raises(UserError, match=f"train.loss = .* with {re.escape(compared)}, and none of the 4"):
        prepared(tmp_path, members, *settings)
    assert not RunFolder(tmp_path / "run").exists


@pytest.mark.parametrize(
    "members, settings",
    [
        (clips(txt=b"said"), ()),
        (clips(json=CAPTION), ()),
        (clips(json=TEXTS), ("data.subtitle=texts", "train.loss=vs")),
    ],
)
def test_one_kind_of_text_is_enough(tmp_path, members, settings):
    assert not any("have no text" in note for note in prepared(tmp_path, members, *settings))


def test_clips_without_a_text_are_counted(tmp_path):
    notes = prepared(tmp_path, {**clips(), "2.txt": b"said", "1.txt": b" "}, "train.loss=vs")
    assert any(note.startswith("3 of 4 clips have no text") for note in notes)


def test_an_evaluation_without_queries_is_an_error_before_training(tmp_path):
    with pytest.raises(UserError, match="eval.text = caption: none of the 1 clips"):
        prepared(tmp_path, clips(txt=b"said"), "eval.where=clip_id = '3'", "eval.text=caption", "eval.overlap=exclude")
