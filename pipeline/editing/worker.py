"""Edit one unit of videos in one round: encode frames, score candidates, cut the clips that moved, commit.

`Editor` is the part of one process, this one or a Ray actor. Its commits are functions of the job: on a CPU it computes
on one thread, because sums in fp32 depend on the number of threads; units are spread over processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.base.errors import ItemError
from clipmill.base.settings import digest
from pipeline.editing.clips import Video
from pipeline.editing.frames import cut_again, read_frames
from pipeline.editing.settings import EditRunSettings
from pipeline.runtime.task import Outcome, Stopwatch, Task, commit
from pipeline.stages.cut.settings import CutSettings, SpanRequest
from shards.corpus.fragments import Commit, temporary_folder
from shards.packing.tar import write_clips
from training.data.clip_frames import Picture, Pixels
from training.data.frame_sampling import eval_indices
from training.editing.boundaries import Floats, Scorer, VideoClips, edit_video, scores_of
from training.editing.scores import Bank, FrameFeatures, FrameScorer, VideoScorer, draw_bank
from training.models import registry as models
from training.models.encode import normalise, text_encoder
from training.parallel.distributed import join

CODE_VERSION = 1  # raised when the same job gives different rows
_FRAMES_AT_ONCE, _VIDEOS_AT_ONCE = 64, 8

Texts = list[tuple[str, str]]  # (video_id, text)


@dataclass(frozen=True)
class Plan:
    """Values that all jobs of an editing share."""

    root: str
    editing: str
    settings: EditRunSettings
    cut: CutSettings
    run_id: str
    lock_owner: str

    def key(self, video_id: str, round_number: int) -> str:
        return digest([CODE_VERSION, self.editing, round_number, video_id])


@dataclass(frozen=True)
class Job:
    """The videos of one unit in one round. `spans` are their current boundaries."""

    unit: str
    round_number: int
    teachers: tuple[str, ...]  # weights files
    hashes: tuple[str, ...]
    banks: tuple[Bank | None, ...]
    videos: tuple[Video, ...]
    spans: tuple[Floats, ...]
    clips_without_text: tuple[str, ...]  # reported as failures, in the first round only
    step_scale: float
    threshold: float

    def teacher_of(self, video: Video) -> int:
        """Choose the teacher that was not trained on the video's fold."""
        return (video.items[0]["fold"] + 1) % len(self.teachers)


def work_of(plan: Plan, job: Job) -> Task:
    """Describe the commit of a job."""
    ids = [video.video_id for video in job.videos] + list(job.clips_without_text)
    items = [{"item_id": name, "key": plan.key(name, job.round_number), "attempts": 0, "cost": 1.0} for name in ids]
    return Task(
        "edit", job.unit, items, plan.settings, plan.editing, plan.root, plan.run_id, lock_owner=plan.lock_owner
    )


class Editor:
    """Encodes, scores, cuts and commits. Keeps the most recently used teachers in memory."""

    def __init__(self, plan: Plan):
        self.plan, self.settings = plan, plan.settings
        self.teachers: dict[str, Teacher] = {}

    def banks(self, weights: Sequence[str], texts: Texts) -> list[Bank | None]:
        """Draw each teacher's bank of captions, as a function of the seed, the texts and their order."""
        edit = self.settings.edit
        if not edit.bank_size:
            return [None for _ in weights]
        rows = np.sort(np.random.default_rng(self.settings.data.seed).permutation(len(texts))[: edit.bank_size])
        drawn = [texts[row] for row in rows]
        video_ids = [video_id for video_id, _ in drawn]
        with self._computing():
            features = [self._teacher(path).text_features([text for _, text in drawn]) for path in weights]
        return [draw_bank(video_ids, feature, len(drawn)) for feature in features]

    def present_scores(self, job: Job) -> list[float]:
        """Score the current boundaries of all clips. Videos that fail are left out; `edit` reports them."""
        scores: list[float] = []
        with self._computing():
            for number, video in enumerate(job.videos):
                try:
                    clips = video.clips(self.settings.edit)
                    offered = list(job.spans[number][:, None])
                    kept = scores_of(clips, offered, self._scorer(job, video, clips), self.settings.edit)
                except ItemError:
                    continue
                scores += [float(of_clip[0]) for of_clip in kept]
        return scores

    def edit(self, job: Job) -> Commit:
        """Edit the unit; commit its rows of `clip_edits` and `edited_clips`, and the tar of the edited clips."""
        work = work_of(self.plan, job)
        name = f"clips/{work.name}.tar"
        with temporary_folder(Path(self.plan.root) / "clips" / work.name) as folder:
            with self._computing():
                outcomes = [self._edit_video(job, number, folder) for number in range(len(job.videos))]
            no_text = ItemError("no-text", "the clip has no text to score its boundaries by")
            outcomes += [Outcome(clip_id, failure=no_text) for clip_id in job.clips_without_text]
            rows = [row for outcome in outcomes for row in outcome.rows.get("edited_clips", [])]
            if rows:
                write_clips(Path(self.plan.root) / name, rows, lambda row: folder / row["video_id"])
            for row in rows:
                row["tar"] = name
            return commit(work, outcomes, [name] if rows else [])

    def _edit_video(self, job: Job, number: int, folder: Path) -> Outcome:
        video = job.videos[number]
        edit = self.settings.edit
        with Stopwatch(video.video_id) as outcome:
            clips = video.clips(edit)
            scorer = self._scorer(job, video, clips)
            rows = edit_video(clips, job.spans[number], scorer, edit, job.step_scale, job.threshold)
            cut, outcome.parts = self._cut(video, rows, clips, job.spans[number], folder)
            outcome.rows = {
                "clip_edits": [self._named(job, video, row) for row in rows],
                "edited_clips": [row | {"editing": self.plan.editing, "round": job.round_number} for row in cut],
            }
        return outcome

    def _cut(
        self, video: Video, rows: list[dict[str, Any]], clips: VideoClips, present_N2: Floats, folder: Path
    ) -> tuple[list[dict[str, Any]], list[tuple[str, ItemError]]]:
        """Cut the accepted edits; revert the row of an edit that cannot be cut."""
        numbers = {item["clip_id"]: item["n"] for item in video.items}
        wanted = [
            SpanRequest(row["clip_id"], numbers[row["clip_id"]], row["start_s"], row["end_s"])
            for row in rows
            if row["accepted"] and (row["start_s"], row["end_s"]) != (row["base_start_s"], row["base_end_s"])
        ]
        cut, failures = cut_again(Path(self.plan.root), video, wanted, self.plan.cut, folder)
        failed = {clip_id for clip_id, _ in failures}
        for row, (start_s, end_s) in zip(rows, present_N2.tolist(), strict=True):
            if row["clip_id"] in failed:
                row |= {"start_s": start_s, "end_s": end_s, "score_after": row["score_before"], "accepted": False}
                row["reason"] = row["reason"].replace("better", "not-cut", 1)
        return cut, failures

    def _named(self, job: Job, video: Video, row: dict[str, Any]) -> dict[str, Any]:
        text = next(item["text"] for item in video.items if item["clip_id"] == row["clip_id"])
        return row | {
            "editing": self.plan.editing,
            "round": job.round_number,
            "teacher": job.hashes[job.teacher_of(video)],
            "text_md5": md5(text.encode()).hexdigest(),
        }

    def _scorer(self, job: Job, video: Video, clips: VideoClips) -> Scorer:
        """Build the scorer of a video. Raises ItemError if it cannot be read."""
        number = job.teacher_of(video)
        teacher = self._teacher(job.teachers[number])
        times_F, pixels = read_frames(
            Path(self.plan.root), video, clips, self.settings.edit, self.plan.cut, teacher.picture
        )
        frames = {video.video_id: FrameFeatures(times_F, teacher.frame_features(pixels))}
        features = teacher.text_features([item["text"] for item in video.items])
        texts = {item["clip_id"]: feature for item, feature in zip(video.items, features, strict=True)}
        scorer = FrameScorer(frames, texts, job.banks[number], teacher.log_scale, self.settings.edit.same_caption)
        if not (teacher.model.mixes_frames and self.settings.edit.reencode):
            return scorer
        return VideoScorer(scorer, partial(teacher.video_features, times_F, pixels), self.settings.edit.reencode)

    def _teacher(self, weights: str) -> "Teacher":
        if weights not in self.teachers:
            self.teachers = {weights: Teacher(weights, self.settings)} | (
                self.teachers if len(self.teachers) < self.settings.edit.folds else {}
            )
        return self.teachers[weights]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute on one thread; restore the number of threads, because this process may also train."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_num_threads(before)


class Teacher:
    """A model that encodes pictures and texts for scoring."""

    def __init__(self, weights: str, settings: EditRunSettings):
        self.settings = settings
        with join(settings.train.device) as process:
            self.device = process.device
        self.model = models.read(Path(weights), settings.model, settings.data.seed).to(self.device).eval()
        self.log_scale = float(self.model.logit_scale)

    @property
    def picture(self) -> Picture:
        data = self.settings.data
        return Picture(self.model.config.image_size, data.fit, data.antialias)

    def frame_features(self, pixels_FSS3: Pixels) -> NDArray[np.float32]:
        """Encode each frame as a video of one frame: [F, C]."""

        def encode(some_FSS3: Tensor) -> Tensor:
            return self.model.encode_frames(self._normalised(some_FSS3))

        return self._in_pieces(encode, torch.from_numpy(pixels_FSS3), _FRAMES_AT_ONCE)

    def video_features(self, times_F: Floats, pixels_FSS3: Pixels, spans_K2: Floats) -> NDArray[np.float32]:
        """Encode pieces of a video from its known frames: [K, C]."""
        rows_KT = torch.from_numpy(np.stack([self._frames_of(times_F, span) for span in spans_K2]))
        pixels = torch.from_numpy(pixels_FSS3)

        def encode(some_KT: Tensor) -> Tensor:
            return self.model.encode_video(self._normalised(pixels[some_KT.cpu()].to(self.device)))

        return self._in_pieces(encode, rows_KT, _VIDEOS_AT_ONCE)

    def _frames_of(self, times_F: Floats, span: Floats) -> NDArray[np.int64]:
        """Choose frames of [start, end) as evaluation does, or the nearest one if there is none: [T]."""
        first, last = np.searchsorted(times_F, span).tolist()
        if first == last:
            first = int(np.abs(times_F - span.mean()).argmin())
        return first + eval_indices(max(last - first, 1), self.settings.data.num_frames)

    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts: [N, C]."""
        ids_NL = self._tokens(list(texts))
        return self._in_pieces(self.model.encode_text, ids_NL, self.settings.eval.batch_size)

    @cached_property
    def _tokens(self) -> Any:
        return text_encoder(self.model.config, self.settings.data.max_text_tokens)

    def _normalised(self, pixels: Tensor) -> Tensor:
        config = self.model.config
        return normalise(pixels.movedim(-1, -3), config.image_mean, config.image_std)

    def _in_pieces(self, encode: Any, inputs: Tensor, size: int) -> NDArray[np.float32]:
        enabled = self.settings.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            parts = [encode(part.to(self.device)).float().cpu() for part in inputs.split(size)]
        return torch.cat(parts).numpy()
