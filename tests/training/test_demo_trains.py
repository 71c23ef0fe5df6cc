"""The demo evaluates, trains and evaluates again on a small corpus, and reports too few clips."""

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from clipmill.cli import demo_training as demo
from clipmill.cli.demo import _last_screen
from pipeline.engine.build import BuildReport
from pipeline.stages.pack import PackReport
from tests.helpers.shards import make_corpus, pack

SVG_TEXT = "{http://www.w3.org/2000/svg}text"
RECIPE = """
model: {init: demo}
data: {num_frames: 2, max_text_tokens: 16, loader_processes: 0}
train: {batch_size: 4, max_steps: 3, precision: fp32, log_every: 1, tensorboard: false}
eval: {where: video_id = (SELECT max(video_id) FROM clips), overlap: exclude}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    monkeypatch.setattr(demo, "RECIPE", str(path))
    return path


def run_demo(corpus: Path, run: Path) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    return demo.run_training_demo(console, corpus, run), console.file.getvalue()


@pytest.mark.slow
def test_the_demo_searches_trains_searches_again_and_draws_it(tmp_path: Path, recipe: Path) -> None:
    pack(make_corpus(tmp_path / "corpus", 36))  # of two videos
    code, shown = run_demo(tmp_path / "corpus", tmp_path / "run")
    assert code == 0
    for text in ("image model, zero-shot", "after post-pretraining", "chance", "clipmill train", "retrieval.svg"):
        assert text in shown
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    labels = {element.text for element in ET.parse(tmp_path / "run" / "retrieval.svg").iter(SVG_TEXT)}
    assert {"image model, zero-shot", "after post-pretraining", "chance", "text→video R@1"} <= labels
    assert (tmp_path / "run" / "loss.svg").exists()

    code, again = run_demo(tmp_path / "corpus", tmp_path / "run")
    assert code == 0 and again.partition("Result:")[2] == shown.partition("Result:")[2]


def test_a_world_that_is_too_small_is_built_but_not_trained_on(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("batch_size: 4", "batch_size: 19"))
    pack(make_corpus(tmp_path / "corpus", 36))
    code, shown = run_demo(tmp_path / "corpus", tmp_path / "run")
    assert code == 0 and "36 samples" in shown and "at least 38" in shown and not (tmp_path / "run").exists()


def test_what_to_type_next_names_a_run_only_where_there_is_one(tmp_path: Path) -> None:
    report = BuildReport(pack=PackReport())
    assert "clipmill eval" not in _last_screen(tmp_path, tmp_path / "corpus", report, 1.0).renderable
    (tmp_path / "run").mkdir()
    assert "clipmill eval" in _last_screen(tmp_path, tmp_path / "corpus", report, 1.0).renderable
