"""The stages that need a model, as an actor runs them: from the ledger's items to rows, a batch of frames at a time.

The models stay loaded between pieces of work (`captioning` caches them per process). A model that cannot be loaded
fails its stage's items, not the build: everything else is finished, and the items wait for the model.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from captioning.captioner import Caption, load_captioner
from captioning.scorer import ScoreInput, load_scorer
from clipmill.base.errors import ItemError, UserError
from clipmill.base.settings import Settings
from pipeline.runtime.task import Outcome, Result, Work
from pipeline.runtime.watchdog import time_limit
from shards.packing.tar import read_member
from shards.storage.mirror import files_of


def run_caption(work: Work) -> Result:
    captioner = _load(load_captioner, work.settings, work.fingerprint)
    if isinstance(captioner, ItemError):
        return _all_failed(work, captioner)
    frames = [(item, index, frame) for item in work.items for index, frame in enumerate(item["frames"])]
    images, unreadable = _read_frames(work, [(item["tar"], frame) for item, _, frame in frames])
    readable = [image for image in images if image is not None]
    with _limit(work, "captioning", len(readable)):
        answers = iter(captioner.caption(readable))
    outcomes = {item["item_id"]: Outcome(item["item_id"]) for item in work.items}
    for (item, index, frame), image, problem in zip(frames, images, unreadable, strict=True):
        outcome, answer = outcomes[item["item_id"]], problem if image is None else next(answers)
        if isinstance(answer, ItemError):
            outcome.failure = answer
            continue
        outcome.rows.setdefault("captions", []).append(_caption_row(work, captioner.name, item, index, frame, answer))
    for outcome in outcomes.values():
        if outcome.failure:
            outcome.rows.clear()
    return list(outcomes.values()), []


def _caption_row(work: Work, captioner: str, item: dict, index: int, frame: dict, caption: Caption) -> dict:
    return {
        "clip_id": item["clip_id"],
        "frame_index": index,
        "frame_sha256": frame["sha256"],
        "frame_time_s": frame["time_s"],
        "captioner": captioner,
        "fingerprint": work.fingerprint,
        "text": caption.text,
        "score": caption.score,
        "num_tokens": caption.num_tokens,
    }


def run_score(work: Work) -> Result:
    scorer = _load(load_scorer, work.settings, work.fingerprint)
    if isinstance(scorer, ItemError):
        return _all_failed(work, scorer)
    images, unreadable = _read_frames(work, [(item["tar"], item["frame"]) for item in work.items])
    inputs = [
        ScoreInput(item["clip_id"], image, item["subtitle"], item["caption"], item["duration_s"])
        for item, image in zip(work.items, images, strict=True)
        if image is not None
    ]
    with _limit(work, "scoring", len(inputs)):
        answers, outcomes = iter(scorer.score(inputs)), []
    for item, image, problem in zip(work.items, images, unreadable, strict=True):
        answer = problem if image is None else next(answers)
        if isinstance(answer, ItemError):
            outcomes.append(Outcome(item["item_id"], failure=answer))
            continue
        stamp = {"clip_id": item["clip_id"], "frame_sha256": item["frame_sha256"], "fingerprint": work.fingerprint}
        outcomes.append(Outcome(item["item_id"], rows={"scores": [{**answer, **stamp}]}))
    return outcomes, []


def warm_up(stages: dict[str, tuple[Settings, str]]) -> None:
    """Load the models of stage → (settings, fingerprint) ahead of their work; a failure is told when the work comes."""
    for stage, load in (("caption", load_captioner), ("score", load_scorer)):
        if stage in stages:
            _load(load, *stages[stage])


def _limit(work: Work, what: str, num_images: int) -> AbstractContextManager:
    limit_s = work.settings.timeout_base_s + work.settings.timeout_per_image_s * num_images
    return time_limit(limit_s, f"{what} {num_images:,} images")


_unavailable: dict[str, ItemError] = {}  # stage fingerprint → why its model does not load; not tried again and again


def _load(load: Callable, settings: Settings, fingerprint: str):
    if fingerprint not in _unavailable:
        try:
            return load(settings)
        except (UserError, OSError) as error:
            _unavailable[fingerprint] = ItemError("model-unavailable", str(error), transient=True)
    return _unavailable[fingerprint]


def _all_failed(work: Work, error: ItemError) -> Result:
    return [Outcome(item["item_id"], failure=error) for item in work.items], []


def _read_frames(work: Work, frames: list[tuple[str, dict]]) -> tuple[list[bytes | None], list[ItemError | None]]:
    """The JPEGs of caption frames by byte range; one that is not what its row says is an error, never a picture."""
    images, problems = [], []
    for tar, frame in frames:
        try:
            images.append(_read_frame(files_of(work.root).local(tar), frame))
            problems.append(None)
        except ItemError as error:
            images.append(None)
            problems.append(error)
    return images, problems


def _read_frame(tar: Path, frame: dict) -> bytes:
    data = read_member(tar, frame["offset"], frame["num_bytes"])
    if hashlib.sha256(data).hexdigest() != frame["sha256"]:
        raise ItemError("corrupt-frame", f"{tar.name} at {frame['offset']}: not the frame that was cut")
    return data
