"""The best checkpoint by validation is kept, named and used by other commands; a test split never selects it."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from clipmill.base.errors import UserError
from clipmill.cli.evaluate import run_eval
from tests.helpers.shards import change_manifest
from tests.helpers.training import SMALL, lines, small_corpus
from training import trainer
from training.data.selection import freeze_run
from training.launch import initial_weights as init_of
from training.run.best_checkpoint import best_of, chosen_checkpoint, read_best
from training.run.folder import RunFolder
from training.run.log import RunLog
from training.run.setup import Request
from training.settings import DataSettings, EvalSettings
from training.trainer import train

HELD_OUT = "clip_id IN (SELECT clip_id FROM clips ORDER BY clip_id LIMIT 4)"
RECALLS = {0: 0.9, 2: 0.3, 4: 0.5, 6: 0.5, 8: 0.1}  # by step: the untrained model's is the highest, 4 and 6 are equal


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def train_here(corpus: Path, run: Path, *settings: str) -> None:
    chosen = (*SMALL, f"eval.where={HELD_OUT}", "eval.overlap=allow", "data.loader_processes=0", "train.max_steps=8")
    train(Request(str(run), str(corpus), "demo", (*chosen, "train.keep_checkpoints=1", *settings)))


def script(monkeypatch, recalls: dict[int, float], at_step: list[int]) -> None:
    """Replace evaluations by values from a table of steps, and record them."""
    real_step = trainer.Trainer._evaluate_if_due

    def noting(self) -> bool:
        at_step.append(self.step)
        return real_step(self)

    def scripted(*_, **__) -> dict:
        way = {"r1": recalls[at_step[-1]], "r10": 1.0, "medr": 2.0}
        return {"t2v": way, "v2t": way, "num_videos": 4}

    monkeypatch.setattr(trainer.Trainer, "_evaluate_if_due", noting)
    monkeypatch.setattr(trainer, "evaluate", scripted)


@pytest.fixture(scope="module")
def validated(corpus: Path, tmp_path_factory) -> RunFolder:
    """Make a run whose best step is 4 and whose last is 8."""
    run = tmp_path_factory.mktemp("validated") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        script(monkeypatch, RECALLS, [])
        train_here(corpus, run, "eval.every=2")
    return RunFolder(run)


def test_the_earlier_of_equals_is_the_best_and_the_untrained_model_never_is() -> None:
    def row(step: int, r1: float, r5: float) -> dict:
        return {"step": step, "t2v": {"r1": r1}, "v2t": {"r5": r5}}

    rows = [row(0, 0.9, 0.9), row(30, 0.5, 0.1), row(20, 0.5, 0.2), row(40, 0.4, 0.3)]
    assert (best_of(rows, "t2v_r1").step, best_of(rows, "v2t_r5").step) == (20, 40)
    assert best_of(rows[:1], "t2v_r1") is None


def test_the_best_checkpoint_is_never_rotated_away_and_is_named(validated: RunFolder) -> None:
    assert validated.checkpoints.steps() == [4, 8]
    best = json.loads((validated.root / "checkpoints" / "best.json").read_text())
    assert best == {"step": 4, "metric": "t2v_r1", "value": 0.5, "num_evaluations": 4}


@pytest.mark.parametrize("at", ["before the line", "before the name"])
def test_a_run_that_dies_between_evaluation_and_record_ends_alike(at, corpus, validated, tmp_path, monkeypatch) -> None:
    run, steps = tmp_path / "run", []
    script(monkeypatch, RECALLS, steps)
    owner, name = (RunLog, "evaluation") if at == "before the line" else (trainer, "write_best")
    real = getattr(owner, name)

    def dies_at_4(*arguments) -> None:
        if steps[-1:] == [4]:
            raise InterruptedError
        real(*arguments)

    with monkeypatch.context() as deadly:
        deadly.setattr(owner, name, dies_at_4)
        with pytest.raises(InterruptedError):
            train_here(corpus, run, "eval.every=2")
    train(Request(str(run)))
    assert lines(run, "eval.jsonl") == lines(validated.root, "eval.jsonl")
    assert read_best(RunFolder(run).checkpoints) == read_best(validated.checkpoints)
    assert RunFolder(run).checkpoints.steps() == [4, 8]


def test_the_same_command_takes_the_best_the_last_or_any_step(corpus: Path, validated: RunFolder) -> None:
    def name(checkpoint: str | None) -> str:
        console = Console(file=io.StringIO(), width=300)
        return run_eval(run=validated.root, checkpoint=checkpoint, where="n = 0", console=console)["model"]

    assert name(None).endswith("at step 4 (t2v_r1 0.500, the best of 4)")
    assert name("last").endswith("at step 8") and name("4").endswith("at step 4")
    assert init_of(str(validated.root)).endswith("step-00000004"), "a run that begins from it"
    for wrong in ("6", "first"):
        with pytest.raises(UserError, match=rf"--checkpoint {wrong}.*best, last, 4, 8"):
            chosen_checkpoint(validated, wrong)
    with pytest.raises(UserError, match="--checkpoint goes with --run"):
        run_eval(model="demo", corpus=corpus, checkpoint="best")


def test_a_damaged_best_checkpoint_is_reported_and_not_replaced(validated: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(shutil.copytree(validated.root, tmp_path / "run"))
    (copy.checkpoints.path(4) / "training.pt").write_text("torn")
    with pytest.raises(UserError, match="training.pt"):
        chosen_checkpoint(copy)
    assert chosen_checkpoint(copy, "last").step == 8


def test_without_validation_the_last_is_taken(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    script(monkeypatch, RECALLS, [])
    train_here(corpus, tmp_path / "run", "eval.every=2", "eval.select=null")
    run = RunFolder(tmp_path / "run")
    assert read_best(run.checkpoints) is None and chosen_checkpoint(run).step == 8
    with pytest.raises(UserError, match="not validated"):
        chosen_checkpoint(run, "best")


@pytest.mark.slow
def test_what_is_on_record_is_what_the_best_checkpoint_gives(corpus: Path, tmp_path: Path) -> None:
    """The run is really evaluated, after every second epoch of five steps."""
    train_here(corpus, tmp_path / "run", "train.batch_size=24", "eval.every=2 epochs", "train.max_steps=12")
    run = RunFolder(tmp_path / "run")
    assert [row["step"] for row in lines(run.root, "eval.jsonl")] == [0, 10, 12]
    best = read_best(run.checkpoints)
    console = Console(file=io.StringIO(), width=200)
    metrics = run_eval(run=run.root, console=console)
    assert (
        metrics["num_chosen_on"] == 4 and "4 clips were also used to choose the checkpoint" in console.file.getvalue()
    )
    assert metrics["t2v"]["r1"] == best.value and best.num_evaluations == 2


@pytest.mark.parametrize("where, refused", [("split = 'test'", 60), ("", 60), ("split = 'val'", 0)])
def test_clips_of_a_test_split_select_nothing(where: str, refused: int, corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    change_manifest(copy, "UPDATE videos SET split = if(ordinal < 2, 'test', 'val')")

    def freeze(**changes) -> None:
        freeze_run(tmp_path, copy, DataSettings(), EvalSettings(where=where or "true", overlap="allow", **changes))

    freeze(every=None)
    freeze(every=5, select=None)
    if refused:
        with pytest.raises(UserError, match=rf"eval.where: {refused} of its .*'test'.*eval.select = null"):
            freeze(every="epoch")
    else:
        freeze(every="epoch")


def test_evaluations_are_counted_in_steps_or_epochs() -> None:
    assert [EvalSettings(every=every).every_epochs for every in (3, "epoch", "12 epochs", None)] == [None, 1, 12, None]
    for wrong in (0, "epochs", "0 epochs"):
        with pytest.raises(ValueError, match="every"):
            EvalSettings(every=wrong)
