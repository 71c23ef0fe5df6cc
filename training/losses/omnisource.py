"""Omnisource contrastive losses: videos and frames against subtitles and captions (docs/methods/clip_vip.md section 5).

All functions take unit vectors. With a group, each process scores its own rows against the rows of all processes, and
the result equals that of one process on the whole batch.

Missing rows. A row exists in a source if its mask is true; if `video_mask` is false, the clip could not be read and its
rows in all four sources are absent. A term "query to key" is the mean over the indices where both query and key exist.
The keys of each row are all existing keys, even those whose own query is absent: a video without subtitle has no row in
"video to subtitle", and its absent subtitle is not a negative, but the video is a negative for the other subtitles. A
term without rows is 0. With every row present this is the published loss.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipmill.base.errors import UserError
from training.losses import SOURCES, Loss, LossInputs, LossValue
from training.losses.pair_matching import matching_on_pairs
from training.losses.terms import sum_of_means
from training.parallel.all_gather import gather_counts, gather_rows


class Term(NamedTuple):
    """Mean cross entropy of picking each query's own key among all keys and the others' rows of `other`."""

    query: str
    key: str
    other: str | None = None

    @property
    def name(self) -> str:
        return f"{self.query}_to_{self.key}"


_VS = (Term("video", "subtitle"), Term("subtitle", "video"))
_VC = (Term("video", "caption"), Term("caption", "video"))
_FC = (Term("frame", "caption"), Term("caption", "frame"))
_VSC = (_VS[1], _VC[1], Term("video", "subtitle", other="caption"), Term("video", "caption", other="subtitle"))
TERMS: dict[str, tuple[Term, ...]] = {
    "vs": _VS,
    "vs_fc": _VS + _FC,
    "vs_vc": _VS + _VC,
    "vs_vc_fc": _VS + _VC + _FC,
    "vsc": _VSC,
    "vsc_fc": _VSC + _FC,
    "joint": (Term("visual", "text"), Term("text", "visual")),
}


@dataclass(frozen=True)
class _Source:
    """One kind of feature: the N rows of this process, the K rows of all processes, and the indices [N] into K."""

    local_ND: Tensor
    local_mask_N: Tensor
    all_KD: Tensor
    all_mask_K: Tensor
    index_N: Tensor


def omnisource_loss(
    video: Tensor | None,
    subtitle: Tensor | None,
    frame: Tensor | None,
    caption: Tensor | None,
    log_scale: Tensor,
    variant: str = "vsc_fc",
    *,
    video_mask: Tensor | None = None,
    subtitle_mask: Tensor | None = None,
    frame_mask: Tensor | None = None,
    caption_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    equal_rows: bool = False,
) -> LossValue:
    """Sum the variant's terms, each a mean of cross entropies with logits exp(log_scale)·a·b.

    video … caption   unit vectors [B, D]; None on every process: the source is absent and its terms are dropped. frame
                      and caption may have another number of rows than video and subtitle in the variants that do not
                      compare the two (vs_fc, joint).
    *_mask            bool [B], true where the row exists; see the module's text.
    group             the processes that share the batch; they may differ in their number of rows. `total` and `terms`
                      are those of the whole batch on every process; see `sum_of_means` for the gradient.
    equal_rows        all processes have equally many rows; saves an exchange that waits for the device
    """
    if variant not in TERMS:
        raise UserError(f"loss variant is {variant!r}; allowed: {', '.join(TERMS)}")
    given = {
        "video": _with_mask("video", video, video_mask),
        "subtitle": _with_mask("subtitle", subtitle, subtitle_mask),
        "frame": _with_mask("frame", frame, frame_mask),
        "caption": _with_mask("caption", caption, caption_mask),
    }
    with torch.autocast(log_scale.device.type, enabled=False):
        rows = _aligned(given)
        _check_rows(rows, variant)
        sources = _pack("video", "subtitle", rows, group, equal_rows)
        sources |= _pack("frame", "caption", rows, group, equal_rows)
        absent = {name for name, pair in given.items() if pair is None}
        if variant == "joint":
            sources["visual"] = _stack(sources["video"], sources["frame"])
            sources["text"] = _stack(sources["subtitle"], sources["caption"])
        terms = [term for term in TERMS[variant] if not absent & {term.query, term.key}]
        scale = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp()
        # starts from the scale so that a batch without any row still has a (zero) gradient on every process
        means = {"": scale.sum() * 0} | {term.name: _mean_over_rows(term, sources, scale) for term in terms}
        return sum_of_means(means, group)


def _with_mask(name: str, features: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if features is None:
        return None
    if mask is None:
        mask = torch.ones(len(features), device=features.device)
    if len(features) != len(mask):
        raise UserError(f"{name}: {len(features)} rows of features but a mask of {len(mask)}")
    return features, mask.to(features.device, torch.bool)


def _aligned(given: dict[str, tuple[Tensor, Tensor] | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """Convert all sources to one dtype; replace absent ones by masked rows, as many as their partner has."""
    if given["video"] is None:
        raise UserError("the loss needs video features; only subtitle, frame and caption may be None")
    dtype = torch.float32
    for pair in given.values():
        dtype = dtype if pair is None else torch.promote_types(dtype, pair[0].dtype)
    video_mask = given["video"][1]
    partners = {"subtitle": "video", "frame": "caption", "caption": "frame"}
    rows = {}
    for name, pair in given.items():
        features, mask = pair or map(torch.zeros_like, given[partners[name]] or given["video"])
        if len(mask) == len(video_mask):
            mask = mask & video_mask  # a clip that could not be read has no row in any source
        # a masked row may hold anything, NaN included: zeros keep it out of every value and gradient
        rows[name] = torch.where(mask[:, None], features.to(dtype), 0), mask
    return rows


def _check_rows(rows: dict[str, tuple[Tensor, Tensor]], variant: str) -> None:
    count = {name: len(mask) for name, (_, mask) in rows.items()}
    compares_both = variant not in ("vs", "vs_fc", "joint")
    if count["video"] != count["subtitle"] or count["frame"] != count["caption"]:
        raise UserError(f"paired sources differ in their number of rows: {count}")
    if compares_both and count["video"] != count["caption"]:
        raise UserError(f"variant {variant} compares videos with captions, but their numbers of rows differ: {count}")


def _pack(
    first: str,
    second: str,
    rows: dict[str, tuple[Tensor, Tensor]],
    group: dist.ProcessGroup | None,
    equal_rows: bool,
) -> dict[str, _Source]:
    """Gather two sources of equally many rows in one exchange."""
    local = [rows[first], rows[second]]
    num_rows, dim = local[0][0].shape
    if group is None:
        index = torch.arange(num_rows, device=local[0][0].device)
        return {name: _Source(*pair, *pair, index) for name, pair in zip((first, second), local, strict=True)}
    counts = [num_rows] * dist.get_world_size(group)
    if not equal_rows:
        (counts,) = gather_counts([num_rows], group, local[0][0].device)
    packed = torch.cat([features for features, _ in local] + [mask[:, None] for _, mask in local], dim=1)
    gathered = gather_rows(packed, group, counts)
    index = sum(counts[: dist.get_rank(group)]) + torch.arange(num_rows, device=packed.device)
    features, masks = gathered[:, : 2 * dim].split(dim, dim=1), (gathered[:, 2 * dim :].detach() > 0).unbind(1)
    return {
        name: _Source(*own, *whole, index)
        for name, own, whole in zip((first, second), local, zip(features, masks, strict=True), strict=True)
    }


def _stack(first: _Source, second: _Source) -> _Source:
    """Concatenate the rows of two sources: one view of the variant "joint"."""
    return _Source(
        torch.cat([first.local_ND, second.local_ND]),
        torch.cat([first.local_mask_N, second.local_mask_N]),
        torch.cat([first.all_KD, second.all_KD]),
        torch.cat([first.all_mask_K, second.all_mask_K]),
        torch.cat([first.index_N, len(first.all_KD) + second.index_N]),
    )


def _mean_over_rows(term: Term, sources: dict[str, _Source], scale: Tensor) -> Tensor:
    """Compute this process's part of a term: the sum over its rows, divided by the number of rows of all processes."""
    query, key = sources[term.query], sources[term.key]
    rows = torch.arange(len(query.index_N), device=scale.device)
    logits_NK = scale * (query.local_ND @ key.all_KD.T)
    blocked_NK = (~key.all_mask_K).repeat(len(rows), 1)
    blocked_NK[rows, query.index_N] = False  # keeps the sum finite; rows with an absent key are dropped below
    positive_N = logits_NK[rows, query.index_N]
    if term.other is not None:
        other = sources[term.other]
        blocked_other_NK = (~other.all_mask_K).repeat(len(rows), 1)
        blocked_other_NK[rows, query.index_N] = True  # the clip's other text is neither positive nor negative
        logits_NK = torch.cat([logits_NK, scale * (query.local_ND @ other.all_KD.T)], dim=1)
        blocked_NK = torch.cat([blocked_NK, blocked_other_NK], dim=1)
    losses_N = logits_NK.masked_fill(blocked_NK, -torch.inf).logsumexp(dim=1) - positive_N
    counted_N = query.local_mask_N & key.local_mask_N
    num_rows = (query.all_mask_K & key.all_mask_K).sum().clamp(min=1)
    return torch.where(counted_N, losses_N, 0).sum() / num_rows


def _of_inputs(variant: str, inputs: LossInputs) -> LossValue:
    return omnisource_loss(
        inputs.video,
        inputs.subtitle,
        inputs.frame,
        inputs.caption,
        inputs.log_scale,
        variant,
        video_mask=inputs.video_mask,
        subtitle_mask=inputs.subtitle_mask,
        frame_mask=inputs.video_mask,
        caption_mask=inputs.caption_mask,
        group=inputs.group,
        equal_rows=True,
    )


def _loss_of(variant: str, **more: Any) -> Loss:
    names = {name for term in TERMS[variant] for name in (term.query, term.key, term.other)}
    sources = frozenset(SOURCES) & names or frozenset(SOURCES)  # "joint" compares views of all four
    return Loss(partial(_of_inputs, variant), sources, num_similarities=len(TERMS[variant]), **more)


VS = _loss_of("vs", on_pairs=matching_on_pairs)
VS_FC = _loss_of("vs_fc")
VS_VC = _loss_of("vs_vc")
VS_VC_FC = _loss_of("vs_vc_fc")
VSC = _loss_of("vsc")
VSC_FC = _loss_of("vsc_fc")
JOINT = _loss_of("joint")
