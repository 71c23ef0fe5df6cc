"""The log of a run: content of its lines, a continuous curve after a resume, non-finite losses, TensorBoard."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from clipmill.base.errors import UserError
from training.run import log as run_log
from training.run.log import RunLog, cut_after
from training.run.throughput import Throughput

TOTAL = 20


def open_log(root: Path, start_step: int = 0, **options: Any) -> RunLog:
    options = {"total_steps": TOTAL, "every": 5, "tensorboard": False, "console": Console(file=io.StringIO())} | options
    root.mkdir(exist_ok=True)
    return RunLog(root, Throughput(torch.device("cpu"), peak_flops=1e12), start_step=start_step, **options)


def values(step: int) -> dict[str, Any]:
    return {
        "epoch": step // 8,
        "loss": torch.tensor(1 / step),
        "video_to_subtitle": torch.tensor([0.25], dtype=torch.float64),
        "lr": 1e-4 / step,
        "logit_scale": torch.tensor(2.0),
        "grad_norm": None,
        "num_failures": 3,
    }


def take_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(step, values(step), num_samples=4, flops=8e6)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = ("samples_per_s", "data_wait", "mfu", "eta_s", "wall_s")


def curve(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in lines(path)]


def test_the_first_the_last_and_every_nth_step_have_a_line(tmp_path: Path) -> None:
    with open_log(tmp_path, total_steps=12) as log:
        take_steps(log, 1, 12)
    assert [row["step"] for row in lines(tmp_path / "log.jsonl")] == [1, 5, 10, 12]


def test_a_line_says_the_step_its_losses_and_how_fast_it_went(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        take_steps(log, 1, 5)
    row = lines(tmp_path / "log.jsonl")[-1]
    assert (row["step"], row["epoch"], row["num_failures"], row["grad_norm"]) == (5, 0, 3, None)
    assert row["loss"] == torch.tensor(1 / 5).item() and row["video_to_subtitle"] == 0.25
    assert row["samples_per_s"] > 0 and 0 <= row["data_wait"] <= 1
    assert row["mfu"] == pytest.approx(row["samples_per_s"] / 4 * 8e6 / 1e12)
    assert row["eta_s"] > 0 and row["wall_s"] > 0


def test_nothing_is_read_from_the_device_between_lines(tmp_path: Path) -> None:
    """A later change of the tensor shows in the log, so it was not read at its step."""
    loss = torch.tensor(1.0)
    with open_log(tmp_path) as log:
        log.step(1, values(1), num_samples=4)
        log.step(2, values(2) | {"loss": loss}, num_samples=4)
        loss.fill_(math.nan)
        take_steps(log, 3, 4)
        with pytest.raises(UserError, match="step 2: loss is nan"):
            log.step(5, values(5), num_samples=4)


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at, saved_at", [(13, 10), (13, 13), (15, 7), (3, 0), (20, 20)])
def test_the_curve_of_a_resumed_run_is_that_of_one_that_never_stopped(
    killed_at: int, saved_at: int, tmp_path: Path
) -> None:
    with open_log(tmp_path / "whole") as log:
        take_steps(log, 1, TOTAL)
    with open_log(tmp_path / "resumed") as log:
        take_steps(log, 1, killed_at)
    with open_log(tmp_path / "resumed", start_step=saved_at) as log:
        take_steps(log, saved_at + 1, TOTAL)
    assert curve(tmp_path / "resumed" / "log.jsonl") == curve(tmp_path / "whole" / "log.jsonl")


def test_wall_time_continues_from_the_kept_lines(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 5, "wall_s": 1000.0}\n{"step": 10, "wall_s": 2000.0}\n')
    with open_log(tmp_path, start_step=7) as log:
        take_steps(log, 8, 10)
    assert 1000 < lines(tmp_path / "log.jsonl")[-1]["wall_s"] < 2000


@pytest.mark.parametrize("torn", ['{"step": 15, "lo', "\0\0\0", '{"step": 15, "loss": 1.0}'])
def test_a_torn_last_line_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n' + torn)
    assert [row["step"] for row in cut_after(path, 20)] == [5, 10]
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'


def test_a_broken_line_in_the_middle_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5}\nhello\n{"step": 10}\n')
    with pytest.raises(UserError, match="line 2"):
        open_log(tmp_path, start_step=5)
    assert "hello" in path.read_text()


def test_evaluations_of_later_steps_are_taken_again_and_earlier_ones_are_not(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (0, 10, 20):
            log.evaluation(step, {"text_to_video": {"R@1": step}, "num_clips": 7})
    with open_log(tmp_path, start_step=10) as log:
        assert log.has_evaluation(0) and log.has_evaluation(10) and not log.has_evaluation(20)
        log.evaluation(20, {"text_to_video": {"R@1": 1}})
    rows = lines(tmp_path / "eval.jsonl")
    assert [(row["step"], row["text_to_video"]["R@1"]) for row in rows] == [(0, 0), (10, 10), (20, 1)]


def test_a_run_that_starts_over_keeps_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.evaluation(0, {"t2v_r1": 0.5})
        take_steps(log, 1, 3)
    with open_log(tmp_path) as log:
        assert not log.has_evaluation(0)
    assert (tmp_path / "eval.jsonl").read_text() == (tmp_path / "log.jsonl").read_text() == ""


# -- losses that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "grad_norm", "video_to_subtitle"])
@pytest.mark.parametrize("writes", [True, False])
def test_a_loss_that_is_not_finite_stops_every_process_at_the_next_line(
    writes: bool, name: str, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    with open_log(tmp_path, writes=writes) as log:
        take_steps(log, 1, 6)
        log.step(7, values(7) | {name: torch.tensor(math.nan)}, num_samples=4)
        log.step(8, values(8) | {name: torch.tensor(math.inf)}, num_samples=4)
        with pytest.raises(UserError, match=rf"step 7: {name} is nan.*step-00000006.*train\.lr"):
            take_steps(log, 9, 10)
    if writes:
        assert [row["step"] for row in lines(tmp_path / "log.jsonl")] == [1, 5]
    assert (tmp_path / "log.jsonl").exists() == writes


def test_a_checkpoint_asks_first_whether_all_is_well(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        take_steps(log, 1, 6)
        log.check()
        log.step(7, values(7) | {"loss": torch.tensor(math.inf)}, num_samples=4)
        with pytest.raises(UserError, match="step 7: loss is inf"):
            log.check()


def test_looking_early_does_not_change_the_next_line(tmp_path: Path) -> None:
    for root, checks in ((tmp_path / "a", False), (tmp_path / "b", True)):
        with open_log(root) as log:
            take_steps(log, 1, 3)
            if checks:
                log.check()
            take_steps(log, 4, 5)
            if checks:
                log.check()
            take_steps(log, 6, 10)
    assert curve(tmp_path / "a" / "log.jsonl") == curve(tmp_path / "b" / "log.jsonl")


# -- output ------------------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: 1000.0))  # no time passes
    with open_log(tmp_path, console=Console(file=out, width=200)) as log:
        take_steps(log, 1, TOTAL)
        log.say("something happened")
    said = out.getvalue().splitlines()
    assert said[0].startswith("step 1/20 · loss 1.0000 · ") and "data wait" in said[0] and "MFU" in said[0]
    assert said[-2].startswith("step 20/20") and "0:00:00 left" in said[-2]
    assert said[-1] == "something happened" and len(said) == 3, "lines that follow within seconds are not logged"


def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    with open_log(tmp_path, console=Console(file=out, width=160, force_terminal=True)) as log:
        take_steps(log, 1, TOTAL)
        log.say("something happened")
    assert "20/20" in out.getvalue() and "loss 0.0500" in out.getvalue() and "something happened" in out.getvalue()


@pytest.mark.slow
def test_tensorboard_shows_one_curve_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, tensorboard=True) as log:
        take_steps(log, 1, 15)
        log.evaluation(15, {"t2v_r1": 0.5, "nested": {"R@1": 0.25}})
    with open_log(tmp_path, start_step=7, tensorboard=True) as log:
        take_steps(log, 8, TOTAL)
        log.evaluation(15, {"t2v_r1": 0.75, "nested": {"R@1": 0.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 5, 10, 15, 20]
    assert [(event.step, event.value) for event in events.Scalars("eval/t2v_r1")] == [(15, 0.75)]
    assert [event.value for event in events.Scalars("eval/nested/R@1")] == [0.5]
