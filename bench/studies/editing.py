"""Study e: does a teacher that edits the boundaries of its training clips help the student, and find the truth?

The model is minimal: a linear map for frames and one for texts, from the features of the demo's image model into one
space, trained from scratch on few clips; a clip is the mean of its frames, as in CLIP4Clip's meanP.
Shape letters: N clips, F frames of all videos together, C the image model's embed_dim, D of the common space.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from bench.studies.study import Arm, Claim, Study, Table
from training.run.plots import bars

if TYPE_CHECKING:
    from torch import Tensor

    from bench.studies.untrimmed import Untrimmed
    from training.editing.boundaries import Edited, Floats, Spans, VideoClips
    from training.editing.rounds import State
    from training.editing.settings import EditSettings

EMBED_DIM = 64
LOG_SCALE = float(np.log(20))

# By arm: first boundaries, and whether the teacher edits them
ARMS = {
    "true": ("true", False),
    "midpoint, edited": ("midpoint", True),
    "midpoint": ("midpoint", False),
    "fixed, edited": ("fixed", True),
    "fixed": ("fixed", False),
    "random": ("random", False),
}


@dataclass(frozen=True)
class Size:
    """The amount of work."""

    num_videos: int = 40
    num_validation: int = 100  # videos with the same weak boundaries, which decide on promoting the teacher
    num_test: int = 100  # videos with true boundaries
    warmup_rounds: int = 4
    rounds: int = 8
    # Over the clips per round: an epoch in docs/methods/video_editing.md covers a corpus, these are 200 clips.
    passes: int = 10
    batch_size: int = 64
    lr: float = 3e-3
    step_ratio: float = 0.2
    rings: int = 2
    length_weight: float = 0.005
    min_gain: float = 0.002


def run(arm: Arm, seed: int, size: Size, cache: Path) -> Mapping[str, float]:
    """Train an arm and score it. All arms train equally long and keep the weights of the round that validated best."""
    from bench.studies.untrimmed import untrimmed_videos
    from training.editing.rounds import edit_here, rounds, warm_up

    kind, is_edited = ARMS[arm.name]
    settings = settings_of(size, kind)
    videos = untrimmed_videos(size.num_videos + size.num_validation + size.num_test, seed, cache)
    train, rest = videos[: size.num_videos], videos[size.num_videos :]
    validation, test = rest[: size.num_validation], rest[size.num_validation :]
    clips, held_out = (clips_of(some, kind, settings, seed) for some in (train, validation))
    host = Host([*train, *validation, *test], clips, held_out, settings, size, seed)
    state = warm_up(clips, host, settings).state
    edit = edit_here if is_edited else edit_nothing
    for played in rounds(clips, host, settings, state, [video.video_id for video in held_out], edit):
        state = played.state
    host.restore()
    ranks = host.ranks(clips_of(test, "true", settings, seed))
    return {"r1": float((ranks <= 1).mean()), "r5": float((ranks <= 5).mean()), "iou": mean_iou(train, state.spans)}


def edit_nothing(videos: "Sequence[VideoClips]", host: "Host", settings: "EditSettings", state: "State") -> "Edited":
    """Return the spans unchanged."""
    from training.editing.boundaries import EDITS, Edited

    return Edited(EDITS.empty_table(), state.spans)


def settings_of(size: Size, kind: str) -> "EditSettings":
    """Return settings in which no rule ends the rounds early, so that all arms train equally long."""
    from training.editing.settings import EditSettings

    return EditSettings(
        initial="fixed" if kind == "fixed" else "midpoint",
        half_length_s=10.0,
        min_length_s=2.0,
        max_length_s=60.0,
        max_overlap=0.5,
        step_ratio=size.step_ratio,
        step_s=0.5,
        smallest_step_s=1e-6,
        rings=size.rings,
        length_weight=size.length_weight,
        min_gain=size.min_gain,
        lowest_share=1.0,
        bank_size=512,
        same_caption=0.95,
        warmup_patience=size.warmup_rounds,
        max_warmup_epochs=size.warmup_rounds,
        max_rounds=size.rounds,
        patience=size.rounds,
        max_median_change=None,
        max_share_at_limit=None,
    )


def clips_of(videos: "Sequence[Untrimmed]", kind: str, settings: "EditSettings", seed: int) -> "list[VideoClips]":
    """Make the clips of videos with first boundaries of a kind."""
    from training.editing.boundaries import video_clips

    clips = []
    for video in videos:
        truth = video.spans_N2 if kind == "true" else None
        made = video_clips(video.video_id, video.duration_s, video.clip_ids, video.timestamps_N, settings, truth)
        clips.append(replace(made, base_N2=anywhere(video, seed)) if kind == "random" else made)
    return clips


def anywhere(video: "Untrimmed", seed: int) -> "Floats":
    """Return spans as long as the true ones at random places of the video."""
    lengths_N = video.spans_N2[:, 1] - video.spans_N2[:, 0]
    starts_N = np.random.default_rng([seed, int(video.video_id[1:]), 5]).uniform(0, video.duration_s - lengths_N)
    return np.stack([starts_N, starts_N + lengths_N], axis=1)


def mean_iou(videos: "Sequence[Untrimmed]", spans: "Spans") -> float:
    """Return the mean IoU of all clips with the truth."""
    from training.editing.boundaries import iou

    return float(np.concatenate([iou(spans[video.video_id], video.spans_N2) for video in videos]).mean())


class Host:
    """A `training.editing.rounds.Host`: the student trains, and the teacher is the student at its best so far."""

    def __init__(
        self,
        videos: "Sequence[Untrimmed]",
        train: "Sequence[VideoClips]",
        validation: "Sequence[VideoClips]",
        settings: "EditSettings",
        size: Size,
        seed: int,
    ):
        import torch

        self.clips, self.validation, self.settings, self.size = train, validation, settings, size
        self.videos = {video.video_id: video for video in videos}
        self.generator = torch.Generator().manual_seed(seed)
        width = videos[0].frames_FC.shape[1]
        self.student = torch.nn.ModuleDict({name: torch.nn.Linear(width, EMBED_DIM) for name in ("frame", "text")})
        self.best = self._copy()
        self.optimiser = torch.optim.AdamW(self.student.parameters(), lr=size.lr, weight_decay=0.01)
        self._scorer: Callable[..., Any] | None = None

    def teacher(self) -> str:
        """Return a hash of the teacher's weights."""
        from hashlib import sha256

        return sha256(b"".join(tensor.numpy().tobytes() for tensor in self.best.values())).hexdigest()[:16]

    def promote(self) -> None:
        """Make the student the teacher."""
        self.best, self._scorer = self._copy(), None

    def restore(self) -> None:
        """Give the student the teacher's weights."""
        self.student.load_state_dict(self.best)

    def train(self, spans: "Mapping[str, Floats]") -> float:
        """Train for a round; return R@1 on the validation clips."""
        import torch

        from training.losses.omnisource import omnisource_loss

        frames_FC, shares_NF, texts_NC = self._inputs(self.clips, spans)
        scale, size = torch.tensor(LOG_SCALE), self.size.batch_size
        for _ in range(self.size.passes):
            order_N = torch.randperm(len(texts_NC), generator=self.generator)
            for rows in order_N.split(size)[: max(1, len(order_N) // size)]:
                video, text = self._video(frames_FC, shares_NF[rows]), self._unit("text", texts_NC[rows])
                self.optimiser.zero_grad()
                omnisource_loss(video, text, None, None, scale, "vs").total.backward()
                self.optimiser.step()
        return float((self.ranks(self.validation) <= 1).mean())

    def score(self, video: "VideoClips", offered: "Sequence[Floats]") -> "Sequence[Floats]":
        """Score offered spans by the teacher."""
        if self._scorer is None:
            self._scorer = self._make_scorer()
        return self._scorer(video, offered)

    def ranks(self, clips: "Sequence[VideoClips]") -> "Floats":
        """Return the rank [N] of each text's own clip among all clips, which have their first boundaries."""
        import torch

        from training.evaluation.metrics import ranks_of

        with torch.no_grad():
            frames_FC, shares_NF, texts_NC = self._inputs(clips, {clip.video_id: clip.base_N2 for clip in clips})
            similarity_NN = self._unit("text", texts_NC) @ self._video(frames_FC, shares_NF).T
        return ranks_of(similarity_NN.numpy(), np.arange(len(similarity_NN)), ties="mean")

    def _copy(self) -> "dict[str, Tensor]":
        return {name: tensor.clone() for name, tensor in self.student.state_dict().items()}

    def _unit(self, side: str, features: "Tensor") -> "Tensor":
        from torch.nn.functional import normalize

        return normalize(self.student[side](features), dim=-1)

    def _video(self, frames_FC: "Tensor", shares_NF: "Tensor") -> "Tensor":
        from torch.nn.functional import normalize

        return normalize(shares_NF @ self._unit("frame", frames_FC), dim=-1)

    def _inputs(self, clips: "Sequence[VideoClips]", spans: "Mapping[str, Floats]") -> "tuple[Tensor, Tensor, Tensor]":
        """Return all frames [F, C], the share of each frame in each clip [N, F], and each clip's text [N, C]."""
        import torch

        videos = [self.videos[clip.video_id] for clip in clips]
        shares = [shares_of(video.times_F, spans[video.video_id]) for video in videos]
        frames, texts = (
            np.concatenate([getattr(video, name) for video in videos]) for name in ("frames_FC", "texts_NC")
        )
        shares_NF = torch.block_diag(*(torch.from_numpy(share).float() for share in shares))
        return torch.from_numpy(frames), shares_NF, torch.from_numpy(texts)

    def _make_scorer(self) -> Callable[..., Any]:
        """Make the teacher's scorer, mapping frames and texts once."""
        import torch

        from training.editing.scores import FrameFeatures, FrameScorer, draw_bank

        student = self._copy()
        self.restore()
        frames, texts = {}, {}
        with torch.no_grad():
            for clip in self.clips:
                video = self.videos[clip.video_id]
                mapped_FD = self._unit("frame", torch.from_numpy(video.frames_FC)).numpy()
                frames[clip.video_id] = FrameFeatures(video.times_F, mapped_FD)
                mapped_ND = self._unit("text", torch.from_numpy(video.texts_NC)).numpy()
                texts |= zip(video.clip_ids, mapped_ND, strict=True)
        self.student.load_state_dict(student)
        owners = [clip_id.split(".")[0] for clip_id in texts]
        bank = draw_bank(owners, np.stack(list(texts.values())), self.settings.bank_size)
        return FrameScorer(frames, texts, bank, LOG_SCALE, self.settings.same_caption)


def shares_of(times_F: "Floats", spans_N2: "Floats") -> "Floats":
    """Return [N, F] whose rows sum to 1, with equal shares for the frames of a span, or the nearest frame alone."""
    inside_NF = (times_F >= spans_N2[:, :1]) & (times_F < spans_N2[:, 1:])
    nearest_N = np.abs(times_F - spans_N2.mean(axis=1, keepdims=True)).argmin(axis=1)
    empty_N = ~inside_NF.any(axis=1)
    inside_NF[empty_N, nearest_N[empty_N]] = True
    return inside_NF / inside_NF.sum(axis=1, keepdims=True)


def draw(table: Table) -> Figure:
    """Plot scores and IoU by arm."""
    groups = {
        heading: {arm.name: tuple(100 * v for v in table.mean(arm, metric)) for arm in STUDY.arms}
        for metric, heading in (("r1", "R@1 of the model trained on them"), ("iou", "overlap with the truth (IoU)"))
    }
    return bars(STUDY.title, groups, y_label="percent", label="{:.0f}".format)


STUDY = Study(
    name="editing",
    title="Clip boundaries edited by a teacher",
    question="Each training text has one timestamp in an untrimmed video. Does editing the clips' boundaries find the "
    "true ones, and does a model trained on edited clips retrieve better?",
    claimed="true ≥ edited > midpoint > fixed length > random (Video Editing for Video Retrieval, arXiv 2402.02335).",
    setting="Videos of 6 to 10 scenes; two thirds of the scenes have a text (what is said about them) and a timestamp "
    "at which it is true. The host is two linear maps from features of the demo's image model, trained from "
    "scratch; a clip is the mean of its frames. All arms train equally long, in rounds, and keep the weights "
    "of the round that was best on validation videos with boundaries of the same kind. In edited arms a round "
    "is one of teacher and student (`training.editing.rounds`). Texts of unseen videos are the queries, clips "
    "with true boundaries the gallery.",
    arms=tuple(Arm(name) for name in ARMS),
    metrics={"r1": "R@1", "r5": "R@5", "iou": "IoU with the truth"},
    claims=(
        Claim("true > edited", "r1", "true", "midpoint, edited"),
        Claim("edited > midpoint", "r1", "midpoint, edited", "midpoint"),
        Claim("fixed, edited > fixed", "r1", "fixed, edited", "fixed"),
        Claim("midpoint > fixed", "r1", "midpoint", "fixed"),
        Claim("fixed > random", "r1", "fixed", "random"),
        Claim("edited nearer the truth than midpoint", "iou", "midpoint, edited", "midpoint"),
        Claim("fixed, edited nearer the truth than fixed", "iou", "fixed, edited", "fixed"),
    ),
    sizes={
        "default": Size(),
        "small": Size(num_videos=6, num_validation=3, num_test=3, warmup_rounds=1, rounds=2, passes=1, batch_size=8),
    },
    run=run,
    draw=draw,
    notes="A round is kept where the student does better on the weakly labelled validation clips than before. Without "
    "such a round an edited arm equals the arm it began with, which explains most of the spread of its IoU. Tried on "
    "other videos before: steps of a tenth of the clip in one ring and one pass a round, the proposal of "
    "docs/methods/video_editing.md, where rounds are hardly ever kept; no penalty for length and no minimal "
    "gain, where boundaries get worse (IoU 0.61 to 0.55 after six rounds that were all kept); no comparison with"
    " captions of other videos, about as good as with it. If every round were kept, IoU would rise from 0.61 to "
    "about 0.72 and, from fixed clips, from 0.44 to about 0.66. With 200 training videos instead of 40, or with "
    "maps that begin as the image model's own space, boundaries hardly matter: even clips of fixed length train "
    "as good a model as true ones, because the text is all that the clips of a text have in common.",
    num_seeds=10,
)
