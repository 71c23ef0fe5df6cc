"""Retrieval metrics: text to video and video to text, one rank per query, exact (docs/methods/clip_vip.md section 8).

`text_to_video` pairs texts with videos, not their positions, so evaluation sets may be shuffled or have several
captions per video.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import UserError

Ties = Literal["pessimistic", "optimistic", "mean"]
Dsl = Literal["per_direction", "published"]
Metrics = dict[str, float]

DSL_SCALE = 100.0
_CHUNK = 1024  # rows ranked at once, to bound the memory of temporaries


def retrieval_metrics(
    similarity: Any,
    text_to_video: Any = None,
    *,
    ties: Ties = "pessimistic",
    dsl: Dsl | None = None,
) -> dict[str, Metrics]:
    """Compute `{"t2v": …, "v2t": …}`, each with r1, r5, r10 (fractions), medr, meanr (ranks from 1), num_queries.

    similarity     [texts, videos], larger is nearer (cosines, no temperature); an array or a tensor
    text_to_video  [texts] column of each text's video; None: text i belongs to video i
    ties           order of competitors exactly as near as the right answer: all before it (pessimistic, the default),
                   all after it (optimistic), or half of them before it (mean)
    dsl            also report `t2v_dsl` and `v2t_dsl`, ranks after dual softmax, which uses the whole set of queries.
                   "per_direction" normalises each direction over its own queries; "published" ranks both directions on
                   the matrix normalised over texts, as the reference does
    The rank of a video with several texts is that of its group of texts among the groups of all videos; the similarity
    of a group is that of its nearest text. A video without texts is only a competitor, not a query.
    """
    matrix, owner = _checked(similarity, text_to_video, ties, dsl)
    metrics = {"t2v": _text_to_video(matrix, owner, ties), "v2t": _video_to_text(matrix, owner, ties)}
    if dsl is not None:
        over_texts = dual_softmax(matrix, axis=0)
        over_queries = over_texts if dsl == "published" else dual_softmax(matrix, axis=1)
        metrics["t2v_dsl"] = _text_to_video(over_texts, owner, ties)
        metrics["v2t_dsl"] = _video_to_text(over_queries, owner, ties)
    return metrics


def dual_softmax(similarity: NDArray[Any], axis: int, scale: float = DSL_SCALE) -> NDArray[np.float64]:
    """Compute similarity · softmax(scale·similarity) along `axis`, which must be that of the queries, in float64."""
    wide = np.asarray(similarity, dtype=np.float64)
    weights = np.exp(scale * (wide - wide.max(axis=axis, keepdims=True)))
    weights /= weights.sum(axis=axis, keepdims=True)
    return wide * weights


def ranks_of(similarity: NDArray[Any], answers: NDArray[np.int64], ties: Ties = "pessimistic") -> NDArray[np.float64]:
    """Rank each query's one answer (a column) among all columns: [queries], from 1."""
    ranks = [np.zeros(0)]
    for start in range(0, len(similarity), _CHUNK):
        rows, right_answers = similarity[start : start + _CHUNK], answers[start : start + _CHUNK]
        right = rows[np.arange(len(rows)), right_answers][:, None]
        nearer = (rows > right).sum(axis=1)
        as_near = (rows == right).sum(axis=1) - 1
        ranks.append(1.0 + nearer + {"pessimistic": 1.0, "optimistic": 0.0, "mean": 0.5}[ties] * as_near)
    return np.concatenate(ranks)


def summarise(ranks: NDArray[np.float64]) -> Metrics:
    """Compute recall at 1, 5, 10 as fractions, the median (mean of the two middle ranks) and the mean rank."""
    recalls = {f"r{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return recalls | {"medr": float(np.median(ranks)), "meanr": float(ranks.mean()), "num_queries": len(ranks)}


def chance(num_candidates: int) -> Metrics:
    """Compute the expected metrics of guessing among `num_candidates` videos, or groups of texts.

    They are exact for videos and, averaged over all queries, for groups of any sizes.
    """
    recalls = {f"r{k}": min(k / num_candidates, 1.0) for k in (1, 5, 10)}
    return recalls | {"medr": (num_candidates + 1) / 2, "meanr": (num_candidates + 1) / 2}


def _text_to_video(matrix: NDArray[Any], owner: NDArray[np.int64], ties: Ties) -> Metrics:
    return summarise(ranks_of(matrix, owner, ties))


def _video_to_text(matrix: NDArray[Any], owner: NDArray[np.int64], ties: Ties) -> Metrics:
    videos, group = np.unique(owner, return_inverse=True)
    nearest = _nearest_of_group(matrix[:, videos], group)
    return summarise(ranks_of(nearest.T, np.arange(len(videos)), ties))


def _nearest_of_group(matrix: NDArray[Any], group: NDArray[np.int64]) -> NDArray[Any]:
    """Take the largest similarity of each group of texts to each video: [groups, videos]."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return np.maximum.reduceat(matrix[order], starts, axis=0)


def _checked(similarity: Any, text_to_video: Any, ties: str, dsl: str | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    matrix = _as_array(similarity)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"similarity is {list(matrix.shape)}; allowed: a matrix [texts, videos] with both")
    if np.isnan(matrix).any():
        raise UserError("similarity holds NaN, so it cannot be ranked: check the model's features")
    if ties not in ("pessimistic", "optimistic", "mean"):
        raise UserError(f"ties is {ties!r}; allowed: pessimistic, optimistic, mean")
    if dsl not in (None, "per_direction", "published"):
        raise UserError(f"dsl is {dsl!r}; allowed: per_direction, published, or None")
    if text_to_video is None and matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"similarity is {list(matrix.shape)}, not square: give text_to_video to pair texts with videos")
    owner = np.arange(len(matrix)) if text_to_video is None else _as_array(text_to_video)
    if owner.shape != (len(matrix),) or owner.dtype.kind not in "iu":
        raise UserError(f"text_to_video is {owner.dtype} {list(owner.shape)}; allowed: {len(matrix)} integers")
    if owner.min() < 0 or owner.max() >= matrix.shape[1]:
        raise UserError(f"text_to_video names column {owner.max()}; similarity has {matrix.shape[1]} videos")
    return matrix, owner.astype(np.int64)


def _as_array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if str(values.dtype) in ("torch.bfloat16", "torch.float16") else values.numpy()
    return np.asarray(values)
