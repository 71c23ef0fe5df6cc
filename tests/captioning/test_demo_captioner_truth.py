"""The shipped demo models caption and score unseen frames correctly."""

from pathlib import Path

import numpy as np
import pytest

from bench.demo_models.evaluate import GREEDY, caption_accuracy, matching_accuracy, unseen_frames
from bench.demo_models.frames import correct, said
from captioning.captioner import load_captioner
from captioning.scorer import ScoreInput, load_scorer
from captioning.settings import CaptionSettings, ScoreSettings
from pipeline.demo.grammar import STILL_TEMPLATES, VOCABULARY, still_text

WEIGHTS = Path(__file__).resolve().parents[2] / "captioning" / "weights"


@pytest.fixture(scope="module")
def single_frames():
    return unseen_frames(100, pair_fraction=0.0)


@pytest.mark.parametrize("name", ["demo_captioner"])
def test_shipped_weights_are_small(name):
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 5_000_000


def test_captions_are_true_on_unseen_frames(single_frames):
    accuracy = caption_accuracy(single_frames)
    for name in ("colour", "shape", "background colour", "background texture"):
        assert accuracy[name] >= 0.93, accuracy


def test_the_default_decoding_is_as_true_as_the_greedy_one(single_frames):
    frames = single_frames[:20]
    beams, greedy = caption_accuracy(frames, CaptionSettings(captioner="demo", device="cpu")), caption_accuracy(frames)
    assert beams["everything"] >= greedy["everything"] - 0.1


def test_captions_say_how_sure_they_are(single_frames):
    captions = load_captioner(GREEDY).caption([frame.jpeg for frame in single_frames])
    truths = [correct(c.text, f.scene)["everything"] for c, f in zip(captions, single_frames, strict=True)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    from PIL import Image

    unsure = load_captioner(GREEDY).caption([Image.fromarray(noise)])[0]
    assert np.mean([c.score for c, true in zip(captions, truths, strict=True) if true]) > unsure.score
    assert all(c.num_tokens == len(c.text.split()) for c in captions)


@pytest.mark.parametrize("name", ["demo_captioner"])
def test_frames_find_their_texts_among_a_hundred(name):
    accuracy = matching_accuracy(name, unseen_frames(100, pair_fraction=0.3, seed=1002))
    assert min(accuracy.values()) >= 0.6, accuracy


def test_a_true_text_scores_above_a_false_one(single_frames):
    scorer = load_scorer(ScoreSettings(model="demo", device="cpu"))
    frames = single_frames[:50]
    rows = [
        ScoreInput(str(i), frame.jpeg, still_text(frame.scene), still_text(frames[i - 1].scene))
        for i, frame in enumerate(frames)
    ]
    answers = scorer.score(rows)
    right = sum(a["subtitle_similarity"] > a["caption_similarity"] for a in answers)
    assert right >= 0.95 * len(frames)


def test_every_still_caption_is_understood_word_for_word(single_frames):
    for frame in single_frames:
        for index in range(len(STILL_TEMPLATES)):
            assert all(correct(still_text(frame.scene, index), frame.scene).values())


def test_a_false_or_empty_caption_counts_as_false(single_frames):
    scene = single_frames[0].scene
    assert not any(correct("", scene).values())
    wrong = still_text(scene).replace(scene.objects[0].shape, "banana")
    assert not correct(wrong, scene)["shape"] and correct(wrong, scene)["background colour"]
    assert said("nothing of the kind")["objects"] == []


def test_the_words_of_the_models_are_the_words_of_the_world():
    tokenizer = load_captioner(GREEDY).loaded.tokenizer
    assert set(VOCABULARY) <= set(tokenizer.words)
