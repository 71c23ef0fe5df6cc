"""Similarity scores of clips, from a tiny CLIP with random weights, equal cosines computed directly."""

import io
import json
from unittest import mock

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from captioning.scorer import ScoreInput, fingerprint_of, load_scorer, speech_columns
from captioning.settings import ScoreSettings
from clipmill.base.errors import ItemError, UserError
from shards.corpus.schema import TABLES
from tests.helpers.pictures import random_jpeg

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


TEXTS = ["a dog on the grass", "now we fry the onions", "thank you", "word " * 60, "the the the dog"]
ROWS = [
    ScoreInput(f"v.{n}", random_jpeg(n % 4), TEXTS[n % 5], TEXTS[(n * 2 + 1) % 5] if n % 3 else None, duration_s=4.0)
    for n in range(9)
]


def settings_for(folder: str, **chosen) -> ScoreSettings:
    return ScoreSettings(model=folder, device="cpu", **chosen)


def test_similarities_are_the_cosines_of_the_model(folder):
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    answers = load_scorer(settings_for(folder)).score(ROWS)
    with torch.no_grad():
        for row, answer in zip(ROWS, answers, strict=True):
            picture = preprocess(Image.open(io.BytesIO(row.jpeg)).convert("RGB"))[None]
            image = model.eval().encode_image(picture, normalize=True)[0]
            subtitle = model.encode_text(tokenizer([row.subtitle]), normalize=True)[0]
            assert answer["subtitle_similarity"] == pytest.approx(float(image @ subtitle), abs=2e-5)
            if row.caption is None:
                assert answer["caption_similarity"] is None and answer["text_similarity"] is None
                continue
            caption = model.encode_text(tokenizer([row.caption]), normalize=True)[0]
            assert answer["caption_similarity"] == pytest.approx(float(image @ caption), abs=2e-5)
            assert answer["text_similarity"] == pytest.approx(float(subtitle @ caption), abs=2e-5)
    assert len({answer["subtitle_similarity"] for answer in answers}) > 5


def test_rows_have_the_columns_of_the_table(folder):
    scorer = load_scorer(settings_for(folder))
    answer = scorer.score(ROWS[:1])[0]
    assert list(answer) == TABLES["scores"].names
    assert answer["fingerprint"] == scorer.fingerprint == fingerprint_of(settings_for(folder))
    assert answer["clip_id"] == "v.0" and folder.removeprefix("local-dir:") not in answer["model"]


def test_scores_do_not_depend_on_the_batch(folder):
    together = load_scorer(settings_for(folder)).score(ROWS)
    for other in (
        load_scorer(settings_for(folder, batch_size=2)).score(ROWS),
        [load_scorer(settings_for(folder)).score([row])[0] for row in ROWS],
    ):
        for one, two in zip(together, other, strict=True):
            assert {k: v for k, v in one.items() if "similarity" not in k} == {
                k: v for k, v in two.items() if "similarity" not in k
            }
            for key in ("subtitle_similarity", "caption_similarity", "text_similarity"):
                assert one[key] == (None if two[key] is None else pytest.approx(two[key], abs=2e-5))


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_missing_text_gives_null_and_no_number(folder, nothing):
    rows = [
        ScoreInput("v.0", random_jpeg(0), nothing, "a dog", 3.0),
        ScoreInput("v.1", random_jpeg(0), "a dog", nothing, None),
        ScoreInput("v.2", None, "a dog", "a cat", 3.0),
    ]
    first, second, third = load_scorer(settings_for(folder)).score(rows)
    similar = ("subtitle_similarity", "caption_similarity", "text_similarity")
    assert [first[key] is None for key in (*similar, "words_per_s", "repeated_word_ratio")] == [1, 0, 1, 1, 1]
    assert [second[key] is None for key in (*similar, "words_per_s", "repeated_word_ratio")] == [0, 1, 1, 1, 0]
    assert [third[key] is None for key in (*similar, "frame_sha256")] == [1, 1, 0, 1]


def test_a_bad_frame_fails_alone_and_in_its_place(folder):
    scorer = load_scorer(settings_for(folder))
    rows = [ROWS[0], ScoreInput("v.x", b"<html>", "a dog", "a dog", 3.0), ROWS[1]]
    answers = scorer.score(rows)
    assert isinstance(answers[1], ItemError) and answers[1].error_class == "undecodable-frame"
    assert [answers[0], answers[2]] == scorer.score(ROWS[:2])
    assert scorer.score([]) == []


def test_every_frame_and_text_is_encoded_once(folder):
    scorer = load_scorer(settings_for(folder, batch_size=3))
    with mock.patch.object(scorer, "_encode", wraps=scorer._encode) as encode:
        scorer.score(ROWS)
    rows = sum(len(call.args[1]) for call in encode.call_args_list)
    assert rows == len({row.jpeg for row in ROWS}) + len(TEXTS)
    assert max(len(call.args[1]) for call in encode.call_args_list) == 3


def test_a_model_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="score.model = local-dir"):
        load_scorer(ScoreSettings(model=f"local-dir:{tmp_path}", device="cpu"))
    with pytest.raises(UserError, match="score.pretrained = gone.pt"):
        fingerprint_of(ScoreSettings(pretrained="gone.pt"))


@given(st.lists(st.sampled_from(["dog", "cat", "don't", "naïve", "4k"]), min_size=1), st.floats(0.1, 1000))
def test_word_columns_count_words_not_marks(words, duration_s):
    text = " – ".join(word.upper() if i % 2 else f"{word}," for i, word in enumerate(words))
    columns = speech_columns(text, duration_s)
    assert columns["words_per_s"] == pytest.approx(len(words) / duration_s)
    assert columns["repeated_word_ratio"] == pytest.approx(1 - len(set(words)) / len(words))
