"""`clipmill eval`: its choice of model, clips and settings; its table and its JSON agree."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from clipmill.base.errors import UserError
from clipmill.cli.app import app
from clipmill.cli.evaluate import run_eval
from tests.helpers.clip_vip import save
from tests.helpers.evaluations import ALONE, packed_corpus, selected, small_model, small_settings
from training.data.selection import freeze
from training.evaluation.retrieval import evaluate
from training.models.registry import writer
from training.run.folder import RunFolder, RunRecord

SETTINGS = ["data.num_frames=4", "data.loader_processes=0", "eval.batch_size=5"]
CAPTIONED = "SELECT clip_id FROM captions WHERE current"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return packed_corpus(tmp_path_factory.mktemp("eval") / "corpus", 12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(small_model(), folder)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory) -> RunFolder:
    """Make a run trained on clips .0 to .3 with .6 on held out; step 3 is model 1, step 7 model 2, its EMA model 3."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    settings = small_settings("eval.where=n >= 6", "eval.text=caption", "data.where=n < 4", "eval.overlap=allow")
    folder.create()
    choice = freeze(folder.selection_path, corpus, "n < 4")
    assert choice.num_clips == 4
    folder.save(RunRecord(str(corpus), "clipmill train", "hash", settings.model_dump(mode="json")))
    for step, seed in ((3, 1), (7, 2)):
        model, averaged = small_model(seed), small_model(seed + 1)
        folder.checkpoints.save(
            step, writer(model), model.state_dict(), state={}, optimiser={}, random={}, ema=averaged.state_dict()
        )
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def expected(corpus: Path, seed: int, where: str, *assignments: str) -> dict:
    return evaluate(small_model(seed), selected(corpus, where), small_settings(*assignments), ALONE)


def test_a_run_is_its_latest_checkpoint_on_what_it_holds_out(corpus: Path, run: RunFolder) -> None:
    metrics = run_eval(run=run.root, console=quiet())
    same = expected(corpus, 2, "n >= 6", "eval.text=caption")
    assert {key: metrics[key] for key in same} == same
    assert metrics["text"] == "caption" and metrics["num_videos"] == 6
    assert metrics["model"].endswith("at step 7") and metrics["where"] == "n >= 6"


def test_averaged_weights_are_evaluated_when_asked_for(corpus: Path, run: RunFolder, weights: Path) -> None:
    metrics = run_eval(run=run.root, ema=True, console=quiet())
    assert metrics["t2v"] == expected(corpus, 3, "n >= 6", "eval.text=caption")["t2v"]
    with pytest.raises(UserError, match="--ema goes with --run"):
        run_eval(model=str(weights), corpus=corpus, ema=True, console=quiet())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus: Path, run: RunFolder, capsys) -> None:
    state = run.checkpoints.path(7) / "state.json"
    text = state.read_text()
    try:
        state.write_text("{")
        assert run_eval(run=run.root, console=quiet())["model"].endswith("at step 3")
        assert "step-00000007" in capsys.readouterr().err
    finally:
        state.write_text(text)


def test_options_come_before_what_the_run_was_made_with(corpus: Path, run: RunFolder) -> None:
    metrics = run_eval(run=run.root, corpus=corpus, where="n < 3", text="subtitle", console=quiet())
    assert metrics["t2v"] == expected(corpus, 2, "n < 3")["t2v"] and metrics["num_videos"] == 3
    metrics = run_eval(run=run.root, select=CAPTIONED, assignments=["data.num_frames=2"], console=quiet())
    assert metrics["t2v"] == expected(corpus, 2, CAPTIONED, "eval.text=caption", "data.num_frames=2")["t2v"]


def test_clips_of_videos_that_were_trained_on_are_counted(run: RunFolder) -> None:
    """All clips of the corpus belong to one video."""
    console = quiet()
    assert run_eval(run=run.root, console=console)["num_seen"] == 6
    assert "6 clips come from videos of the training selection" in console.file.getvalue()


def test_a_model_is_evaluated_on_every_sample_in_float32(corpus: Path, weights: Path) -> None:
    """Texts are cut at the model's context length, which is below the setting's 70 tokens."""
    metrics = run_eval(model=str(weights), corpus=corpus, assignments=SETTINGS, console=quiet())
    same = expected(corpus, 0, "")
    assert {key: metrics[key] for key in same} == same and metrics["num_videos"] == 12
    with pytest.raises(UserError, match="data.max_text_tokens = 60.*at most 24"):
        run_eval(model=str(weights), corpus=corpus, assignments=[*SETTINGS, "data.max_text_tokens=60"], console=quiet())


def test_a_recipe_gives_a_model_its_settings_and_its_clips(corpus: Path, weights: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {num_frames: 3, max_text_tokens: 24}\neval: {where: n > 4, text: caption}")
    metrics = run_eval(
        model=str(weights),
        corpus=corpus,
        recipe=str(recipe),
        assignments=["data.loader_processes=0", "eval.batch_size=5", "train.precision=fp32"],
        console=quiet(),
    )
    same = expected(corpus, 0, "n > 4", "eval.text=caption", "data.num_frames=3")
    assert {key: metrics[key] for key in same} == same


def test_the_table_shows_the_numbers_and_what_they_are_over(tmp_path: Path, weights: Path) -> None:
    sql = "UPDATE clips SET text = 'red' WHERE n < 2; UPDATE clips SET text = '' WHERE n = 3"
    corpus, console = packed_corpus(tmp_path / "corpus", 5, sql), quiet()
    metrics = run_eval(model=str(weights), corpus=corpus, dsl=True, assignments=SETTINGS, console=console)
    shown = console.file.getvalue()
    for text in ("text → video", "video → text, DSL", "chance, text → video", "R@10", "20.0 %"):
        assert text in shown
    assert f"{100 * metrics['t2v']['r1']:.1f} %" in shown and f"{metrics['v2t_dsl']['meanr']:,.1f}" in shown
    assert "5 clips searched with 4 subtitles; 1 clips have no text" in shown
    assert "2 of the subtitles belong to more than one clip" in shown


def test_json_is_the_metrics_and_nothing_else(corpus: Path, weights: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "sim.npz"
    options = [option for setting in SETTINGS for option in ("--set", setting)]
    command = ["eval", "--model", str(weights), "--corpus", str(corpus), "--where", "n > 2", "--text", "caption"]
    result = CliRunner().invoke(
        app, [*command, "--dsl", "--save-similarity", str(matrix), "--format", "json", *options]
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics["t2v"] == expected(corpus, 0, "n > 2", "eval.text=caption")["t2v"]
    assert {"t2v_dsl", "v2t_dsl", "chance"} < set(metrics) and matrix.exists()


def test_mistakes_are_named_before_anything_is_computed(
    corpus: Path, weights: Path, run: RunFolder, tmp_path: Path
) -> None:
    model = str(weights)
    for arguments, words in (
        ({}, "--run DIR or --model"),
        ({"run": run.root, "model": model}, "--run DIR or --model"),
        ({"model": model}, "--corpus is missing"),
        ({"model": model, "corpus": corpus, "select": "FROM clips", "where": "true"}, "--select or --where"),
        ({"model": model, "corpus": corpus, "where": "colour = 'red'"}, "(?s)--where.*colour"),
        ({"model": model, "corpus": corpus, "where": "n > 99"}, "--where = 'n > 99'"),
        ({"model": model, "corpus": corpus, "text": "title"}, "eval.text"),
        ({"model": model, "corpus": corpus, "save_similarity": "sim.csv"}, "npz"),
        ({"model": model, "corpus": tmp_path}, "manifest"),
        ({"model": "nosuch", "corpus": corpus}, "nosuch"),
        ({"run": tmp_path}, "no run"),
        ({"run": run.root, "recipe": "demo"}, "--recipe goes with --model"),
    ):
        with pytest.raises(UserError, match=words):
            run_eval(**arguments, console=quiet())
    empty = RunFolder(tmp_path / "empty")
    empty.create()
    empty.save(RunRecord(str(corpus), "clipmill train", "hash", small_settings().model_dump(mode="json")))
    with pytest.raises(UserError, match="no checkpoint yet"):
        run_eval(run=empty.root, console=quiet())
