"""The studies' world: clips with the same frames in other orders, noise by levels, models blind to order."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench.studies import load, losses, proxies
from bench.studies.fitting import random_batches, recall, recall_within, similarities, written_texts
from bench.studies.scenes import alike_scenes, frames_of, growing_scenes, single_scenes
from bench.studies.study import Cell, Table
from pipeline.demo.grammar import FILLER, spoken_sentences, still_text
from training.models import registry as models
from training.models.registry import ModelSettings
from training.run.plots import save

SMALL = proxies.STUDY.sizes["small"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> proxies.Clips:
    return proxies.make_clips(8, [0, 9], SMALL, 80, tmp_path_factory.mktemp("cache"))


def test_twins_have_the_same_frames_in_the_other_order(clips: proxies.Clips) -> None:
    assert len(clips.scenes) == len(clips.pixels) == 16
    assert np.array_equal(clips.pixels[::2], clips.pixels[1::2, ::-1])
    texts = [clips.text(row, 0) for row in range(16)]
    assert all(a != b for a, b in zip(texts[::2], texts[1::2], strict=True))
    assert all(text.startswith("now ") for text in texts[:8])
    assert texts[8:] == [t for i in range(4) for t in (f"the {name(clips, i)} grows", f"the {name(clips, i)} shrinks")]


def name(clips: proxies.Clips, pair: int) -> str:
    return clips.scenes[8 + 2 * pair].objects[0].name


def test_mean_pooling_cannot_tell_twins_apart(clips: proxies.Clips) -> None:
    model = models.load(ModelSettings(init="demo", pooling="mean"))
    found = similarities(model, [clips.text(row, 0) for row in range(16)], clips.pixels)
    own, twins = found[np.arange(16), np.arange(16)], found[np.arange(16), np.arange(16) ^ 1]
    assert np.allclose(own, twins, atol=1e-6)


def test_a_growing_object_never_shrinks() -> None:
    from pipeline.demo.render import locate

    for scene in growing_scenes(20, [5], seconds=2.4):
        radii = [locate(scene.objects[0], time_s, 80, 80)[2] for time_s in np.linspace(0, 2.4, 9)]
        assert all(np.diff(radii) > 0)


def test_a_hard_gallery_has_one_background_and_no_text_twice() -> None:
    scenes = alike_scenes(60, [0, 3])
    assert len({scene.background for scene in scenes}) == 1
    assert len({still_text(scene) for scene in scenes}) == 60


def test_frames_are_drawn_once_and_held_out_ones_are_others(tmp_path: Path) -> None:
    scenes, held_out = single_scenes(3, [0, 2]), single_scenes(3, [0, 3])
    assert not set(scenes) & set(held_out)
    pixels = frames_of(scenes, 2, 80, 2.0, tmp_path)
    assert pixels.shape == (3, 2, 3, 80, 80) and pixels.dtype == np.uint8
    (file,) = tmp_path.glob("*.npy")
    written = file.stat().st_mtime_ns
    assert np.array_equal(frames_of(scenes, 2, 80, 2.0, tmp_path), pixels) and file.stat().st_mtime_ns == written


def test_noise_replaces_the_share_it_says_and_grows_by_levels() -> None:
    scenes = single_scenes(200, [0, 2])
    levels = {noise: losses.noisy_subtitles(scenes, noise, seed=0) for noise in (0.0, 0.3, 0.7)}
    rng = np.random.default_rng([0, 11])
    assert levels[0.0] == [" ".join(spoken_sentences(scene, rng, num_words=26)) for scene in scenes]
    wrong = {
        noise: {i for i, (a, b) in enumerate(zip(levels[0.0], said, strict=True)) if a != b}
        for noise, said in levels.items()
    }
    assert len(wrong[0.3]) == pytest.approx(60, abs=2) and len(wrong[0.7]) == pytest.approx(140, abs=2)
    assert wrong[0.3] < wrong[0.7]
    talk = sum(said.startswith(FILLER) for said in levels[0.7])
    assert 40 < talk < 100 and all(levels[0.7][i] == levels[0.3][i] for i in wrong[0.3])


def test_every_clip_comes_once_before_any_comes_again() -> None:
    draw = random_batches([str(i) for i in range(10)], [None] * 10, batch_size=5)
    rng = np.random.default_rng(0)
    batches = [draw(rng) for _ in range(4)]
    for first, second in (batches[:2], batches[2:]):
        assert sorted([*first[0], *second[0]]) == list(range(10))
    assert all(list(texts.subtitles) == [str(row) for row in rows] for rows, texts in batches)
    assert len(random_batches(["a"] * 3, [None] * 3, batch_size=8)(rng)[0]) == 3


def test_recalls_count_ties_half() -> None:
    similarity = np.array([[0.9, 0.9, 0.1, 0.1], [0.5, 0.6, 0.9, 0.1], [0, 0, 0.7, 0.2], [0, 0, 0.3, 0.1]])
    assert recall_within(similarity, 2) == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert recall(similarity, 2) == pytest.approx((1 + 1 + 1 + 1) / 4)


def test_written_texts_tell_looks_and_motion() -> None:
    (scene,) = growing_scenes(1, [1], seconds=2.0)
    assert written_texts([scene])[0].endswith(f"background and the {scene.objects[0].name} grows")


STUDIES = ("proxies", "losses", "corpus-size")


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_is_a_function_of_its_arm_and_seed(name: str, tmp_path: Path) -> None:
    study = load(name)
    arm, small = study.arms[1], study.sizes["small"]
    first = study.run(arm, 0, small, tmp_path)
    assert set(first) == set(study.metrics) and all(0 <= value <= 1 for value in first.values())
    assert study.run(arm, 0, small, tmp_path) == first


@pytest.mark.parametrize("name", STUDIES)
def test_a_plot_has_every_arm(name: str, tmp_path: Path) -> None:
    study = load(name)
    cells = [Cell(arm, seed) for arm in study.arms for seed in range(3)]
    table = Table({cell: dict.fromkeys(study.metrics, 0.1 * cell.seed) for cell in cells})
    drawn = "".join(ElementTree.fromstring(save(study.draw(table), tmp_path / "plot.svg").read_text()).itertext())
    named = {part for arm in study.arms for part in (arm.name, arm.condition)}
    assert study.title in drawn and (name == "corpus-size" or all(part in drawn for part in named))
