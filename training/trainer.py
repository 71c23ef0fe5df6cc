"""Train a run from its current step to its end, on one process or many.

`train` prepares the run on its first process. `Trainer.fit` then feeds batches to the learner, which makes the updates
(`training.learner`), and after each step logs, evaluates, saves or stops if due.

The position of a run is one number, `step`, the updates done; the rest follows from it and the plan.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.clip_feedback import Feedback
from training.data.batch import Batch
from training.data.epoch_files import Epochs, plan_spec, total_steps
from training.data.epoch_plan import PlanSpec, locate, num_steps_done, rank_slots, state_dict
from training.data.loader import Loader, default_processes
from training.data.sample_reader import Failure, SampleReader
from training.data.stateless_random import mix
from training.evaluation.retrieval import EvaluationStopped, evaluate
from training.learner import Learner, Values
from training.losses import load_loss
from training.models import registry as models
from training.models.clip_vip.model import sample_flops
from training.models.encode import text_encoder
from training.parallel.distributed import Process, join
from training.parallel.state_dict import (
    OptimiserState,
    State,
    full_state,
    random_state,
    restore_optimiser,
    set_random_state,
)
from training.run.best_checkpoint import Best, best_of, write_best
from training.run.checkpoints import Checkpoint
from training.run.folder import RunFolder
from training.run.hardware_peaks import peak_flops
from training.run.log import RunLog, cut_after
from training.run.setup import Prepared, Request, prepare, requested_settings
from training.run.throughput import Throughput

FEEDBACK_FILE = "feedback.npz"  # in a checkpoint: the clips' feedback up to its step


@dataclass(frozen=True)
class Report:
    """The end of a training. `reason` is "done", or the name of the signal that stopped it."""

    run: Path
    step: int
    total_steps: int
    reason: str


def train(request: Request) -> Report:
    """Run this process's part of a training, from the run's current step to its end. Raises UserError.

    Under torchrun or Ray Train every process calls this with the same request; without them one process does all.
    """
    folder = RunFolder(request.run)
    device = requested_settings(request, folder).train.device
    with join(device) as process, ExitStack() as stack:
        process.first(lambda: stack.enter_context(folder.writer()) and None)
        notes = process.first(lambda: prepare(request, folder))
        return Trainer(Prepared.open(folder), process, notes).fit()


class Trainer:
    """One process's part of a prepared run."""

    def __init__(self, prepared: Prepared, process: Process, notes: list[str]):
        self.prepared, self.settings, self.folder = prepared, prepared.settings, prepared.folder
        self.process, self.notes = process, notes
        model, data, train = self.settings.model, self.settings.data, self.settings.train
        if process.device.type == "cpu":  # the processes of a host share its cores
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(train.threads or max(1, cores // process.local_world_size))
        torch.manual_seed(data.seed)
        step = process.first(self.folder.checkpoints.find_latest)
        checkpoint = None if step is None else self.folder.checkpoints.load(step)
        if checkpoint is None:
            self.spec = process.first(lambda: plan_spec(prepared.selection, data, train.batch_size))
        else:  # saves seconds of hashing the groups of 100 million clips, because the selection is the same
            self.spec = PlanSpec(**checkpoint.state["plan"]["spec"])
        self.epochs = Epochs(self.folder.plan_path, self.spec, prepared.selection.path, data.apart)
        self.slots = rank_slots(self.spec, process.rank, process.world_size)
        self.total_steps = total_steps(self.spec, train)
        feedback = Feedback(prepared.selection.num_clips, process.group, process.control) if train.feedback else None
        weights = None if checkpoint is None else checkpoint.weights
        built = models.load(model, data.seed) if weights is None else models.read(weights, model, data.seed)
        self.learner = Learner(built, train, self.total_steps, process, feedback, data.seed)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.start_step = self.learner.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore all but the weights from a checkpoint. Raises UserError if its plan has another version."""
        learner = self.learner
        restore_optimiser(learner.model, learner.optimiser, checkpoint.optimiser)
        learner.step = num_steps_done(self.spec, checkpoint.state["plan"])
        if learner.ema and checkpoint.averaged:
            averaged = models.read(checkpoint.averaged, self.settings.model, self.settings.data.seed)
            learner.ema.restore(averaged.state_dict())
        if learner.feedback and learner.feedback.is_first and (checkpoint.path / FEEDBACK_FILE).exists():
            learner.feedback.load(checkpoint.path / FEEDBACK_FILE)
        set_random_state(checkpoint.random)

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> Report:
        """Train to the end or until a stop signal; save in either case."""
        train, process = self.settings.train, self.process
        peak = train.peak_tflops * 1e12 if train.peak_tflops else peak_flops(process.device, train.precision)
        throughput = Throughput(process.device, None if peak is None else peak * process.world_size)
        with ExitStack() as stack:
            self.stop = stop = stack.enter_context(stop_on_signals())
            self.log = stack.enter_context(
                RunLog(
                    self.folder.root,
                    throughput,
                    total_steps=self.total_steps,
                    start_step=self.start_step,
                    every=train.log_every,
                    tensorboard=train.tensorboard,
                    writes=process.is_first,
                )
            )
            if process.is_first:
                cut_after(self.folder.failures_path, self.step)  # failures of steps that are repeated
            self.loader = stack.enter_context(self._open_loader())
            self._announce()
            self._write_best()
            is_stopped = not self._evaluate_if_due()
            last_step = self.step if is_stopped else self.total_steps
            batches = self.loader.batches(self.epochs, self.slots, self.start_step, last_step)
            for batch in throughput.waiting(batches):
                values = self.learner.train_step(batch.to(process.device))
                slots = np.arange(self.slots.start, self.slots.stop, dtype=np.uint64) << np.uint64(32)
                hashes = mix(slots + batch.rows_B.numpy().astype(np.uint32), key=0)
                # the sum of all processes' row hashes identifies the batch
                num_stops, digest = process.sum(int(stop.name is not None), int(hashes.sum().astype(np.int64)))
                self._log_step(values, batch, digest)
                if is_stopped := num_stops > 0 and self.step < self.total_steps:
                    break
                if self.step % train.checkpoint_every == 0:
                    self._save()
                if is_stopped := not self._evaluate_if_due():
                    break
            if self.step:  # a run stopped before its first step has nothing to save, and may still change settings
                self._save()
        stopped_by = (stop.name or "a signal to another process") if is_stopped else None
        return Report(self.folder.root, self.step, self.total_steps, stopped_by or "done")

    def _is_stopped(self) -> bool:
        """Return whether any process got a stop signal; all processes call this together."""
        return self.process.sum(int(self.stop.name is not None))[0] > 0

    def _log_step(self, values: Values, batch: Batch, digest: int) -> None:
        epoch = locate(self.spec, self.step - 1)[0]
        self.log.step(
            self.step,
            {"epoch": epoch, **values},
            num_samples=self.spec.batch_size,
            flops=self._step_flops(batch),
            labels={"batch": f"{digest % 2**64:016x}"},
        )

    @property
    def step(self) -> int:
        return self.learner.step

    def _save(self) -> None:
        """Gather the state of all processes and write a checkpoint of this step on the first one."""
        learner = self.learner
        with self.log.paused():
            self.log.check()
            tensors, optimiser = full_state(learner.model, learner.optimiser)
            averaged = tensors | learner.ema.full_state() if learner.ema else None
            if learner.feedback:
                learner.feedback.collect()
            self.process.first(lambda: self._write(tensors, optimiser, averaged))

    def _write(self, tensors: State, optimiser: OptimiserState, averaged: State | None) -> None:
        feedback = self.learner.feedback
        self.folder.checkpoints.save(
            self.step,
            models.writer(self.learner.model),
            tensors,
            state={"plan": state_dict(self.spec, self.step), "settings": self.settings.model_dump(mode="json")},
            optimiser=optimiser,
            random=random_state(),
            ema=averaged,
            attach={FEEDBACK_FILE: feedback.save} if feedback else {},
            keep=self.settings.train.keep_checkpoints,
            also_keep={best.step} if (best := self._best()) else (),
        )
        if feedback:
            feedback.write(self.folder.feedback_path, self.prepared.selection)
        self.epochs.tidy(locate(self.spec, self.step)[0])

    def _evaluate_if_due(self) -> bool:
        """Evaluate before the first step, after the last, and every `eval.every` in between, once per step.

        Return False if a stop signal ended the evaluation, which is then made when the run resumes. A new best
        checkpoint is saved before its line is written, so that the best step in eval.jsonl always has a checkpoint.
        """
        if self.prepared.held_out is None or not self._evaluation_is_due():
            return True
        if self.process.first(lambda: self.log.has_evaluation(self.step)):
            return True
        try:
            with self.log.paused():
                model = self.learner.whole_model()
                held_out = self.prepared.held_out
                metrics = evaluate(model, held_out, self.settings, self.process, should_stop=self._is_stopped)
        except EvaluationStopped:
            self.log.say(f"The evaluation at step {self.step:,} was stopped; it is made when the run resumes.")
            return False
        if self.settings.eval.selects and self.step > 0:
            if self.process.first(lambda: self._best({"step": self.step, **metrics}).step == self.step):
                self._save()
        self.log.evaluation(self.step, metrics)
        self.log.say(_evaluation_line(self.step, metrics))
        self._write_best()
        return True

    def _evaluation_is_due(self) -> bool:
        settings = self.settings.eval
        if settings.every is None or self.step in (0, self.total_steps):
            return self.step in (0, self.total_steps)
        if settings.every_epochs is None:
            return self.step % settings.every == 0
        epoch, step = locate(self.spec, self.step)
        return step == 0 and epoch % settings.every_epochs == 0

    def _best(self, *more: Mapping[str, Any]) -> Best | None:
        """Return the best evaluation so far, on the first process; None if evaluations select nothing."""
        settings = self.settings.eval
        return best_of([*self.log.evaluations, *more], settings.select) if settings.selects else None

    def _write_best(self) -> None:
        self.process.first(lambda: write_best(self.folder.checkpoints, self._best()))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _open_loader(self) -> Loader:
        data, config = self.settings.data, self.learner.model.config
        texts = text_encoder(config, data.max_text_tokens)
        num_processes = data.loader_processes
        return Loader(
            SampleReader(self.prepared.selection, data, texts, config.image_size),
            num_processes=default_processes(self.process.local_world_size) if num_processes is None else num_processes,
            prefetch_samples=data.prefetch_samples,
            max_failures=data.max_failures,
            on_failures=self._record_failures,
            pin_memory=self.process.device.type == "cuda",
        )

    def _record_failures(self, failures: list[Failure]) -> None:
        """Append lines to failures.jsonl, in one write because every process appends to it."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [
            {"step": self.step + 1, "stage": "train", "item_id": clip_id, "error_class": error.error_class}
            | {"message": error.message, "at": at}
            for clip_id, _, error in failures
        ]
        with open(self.folder.failures_path, "ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def _announce(self) -> None:
        for note in self.notes:
            self.log.say(note)
        if not self.process.is_first:
            return
        if self.step >= self.total_steps:
            self.log.say(f"Nothing to do: {self.step:,} steps are done, and the run has {self.total_steps:,}.")
            return
        epoch, step = locate(self.spec, self.step)
        facts = self.epochs.describe(epoch)
        left = f", {facts['num_left']:,} left out" if facts["num_left"] else ""
        shared = f", {facts['num_conflicts']:,} in a batch with a clip of their group" if facts["num_conflicts"] else ""
        start = f"resuming after step {self.step:,}" if self.step else "from the start"
        self.log.say(
            f"{self.spec.num_clips:,} clips in batches of {self.spec.batch_size:,}: {facts['num_steps']:,} steps an "
            f"epoch{left}{shared}; {self.total_steps:,} steps in all, {start} (epoch {epoch}, step {step})."
        )

    def _step_flops(self, batch: Batch) -> float:
        """Count the FLOPs of the global batch by the published arithmetic, with this process's text lengths."""
        sources = load_loss(self.settings.train.loss).sources
        lengths = [batch.subtitle_BL.shape[1]] * ("subtitle" in sources)
        lengths += [batch.caption_BL.shape[1]] * ("caption" in sources)
        lengths += [batch.neighbour_BNL.shape[2]] * batch.neighbour_BNL.shape[1]
        config, num_frames = self.learner.model.config, batch.video_BT3SS.shape[1]
        flops = self.spec.batch_size * sample_flops(config, num_frames, int("frame" in sources), tuple(lengths))
        return flops + self.spec.batch_size**2 * self.learner.model.pair_flops(num_frames)


def _evaluation_line(step: int, metrics: dict[str, Any]) -> str:
    directions = (
        f"{name} R@1 {100 * metrics[key]['r1']:.1f} %, R@10 {100 * metrics[key]['r10']:.1f} %, median rank "
        f"{metrics[key]['medr']:,.1f}"
        for key, name in (("t2v", "text → video"), ("v2t", "video → text"))
    )
    return f"evaluation at step {step:,}, {metrics['num_videos']:,} clips: {'; '.join(directions)}"


@dataclass
class Stop:
    name: str | None = None  # of the signal; None: no stop


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Record SIGTERM, SIGUSR1, SIGUSR2 or the first Ctrl-C as a stop; a second Ctrl-C raises.

    It is obeyed after the current step, or after the current batch or block of an evaluation.

    Does nothing in a thread other than the main one (Ray Train's workers), where signals cannot be caught.
    """
    stop = Stop()

    def record(number: int, frame: Any) -> None:
        if number == signal.SIGINT and stop.name is not None:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.signal(number, record) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
