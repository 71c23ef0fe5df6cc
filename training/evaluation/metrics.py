"""Retrieval metrics: text to video and video to text, one rank per query, exact (docs/methods/clip_vip.md section 8).

`text_to_video` pairs texts with videos, not their positions, so evaluation sets may be shuffled or have several
captions per video. Similarities are ranked in blocks of texts, then of videos, so the whole matrix need not exist.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipmill.base.errors import UserError

Ties = Literal["pessimistic", "optimistic", "mean"]
Dsl = Literal["per_direction", "published"]
Metrics = dict[str, float]

DSL_SCALE = 100.0
_CHUNK = 1024  # rows ranked at once, to bound the memory of temporaries
_BLOCK = 2**23  # similarities in a block: 64 MB in float64


class Similarities(Protocol):
    """Similarities [texts, videos] that can be computed in blocks."""

    shape: tuple[int, int]

    def row_blocks(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield all texts in order: a slice of them and their similarities to all videos."""
        ...

    def column_blocks(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield all videos in order: a slice of them and the similarities of all texts to them."""
        ...


class WholeMatrix:
    """Similarities that are in memory; `rows` repeats a row of the matrix for each text that has it."""

    def __init__(self, matrix: NDArray[Any], rows: NDArray[np.int64] | None = None):
        self.matrix, self.rows = matrix, np.arange(len(matrix)) if rows is None else rows
        self.shape = (len(self.rows), matrix.shape[1])

    def row_blocks(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        for part in slices(self.shape[0], self.shape[1]):
            yield part, self.matrix[self.rows[part]]

    def column_blocks(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        for part in slices(self.shape[1], self.shape[0]):
            yield part, self.matrix[:, part][self.rows]


def slices(num_items: int, size: int) -> Iterator[slice]:
    """Cut items with `size` similarities each into blocks."""
    step = max(1, _BLOCK // size)
    return (slice(start, min(start + step, num_items)) for start in range(0, num_items, step))


def retrieval_metrics(
    similarity: Any,
    text_to_video: Any = None,
    *,
    ties: Ties = "pessimistic",
    dsl: Dsl | None = None,
    between_blocks: Callable[[], None] = lambda: None,
) -> dict[str, Metrics]:
    """Compute `{"t2v": …, "v2t": …}`, each with r1, r5, r10 (fractions), medr, meanr (ranks from 1), num_queries.

    similarity     [texts, videos], larger is nearer (cosines, no temperature): an array, a tensor or `Similarities`
    text_to_video  [texts] column of each text's video; None: text i belongs to video i
    ties           order of competitors exactly as near as the right answer: all before it (pessimistic, the default),
                   all after it (optimistic), or half of them before it (mean)
    dsl            also report `t2v_dsl` and `v2t_dsl`, ranks after dual softmax, which uses the whole set of queries.
                   "per_direction" normalises each direction over its own queries; "published" ranks both directions on
                   the matrix normalised over texts, as the reference does
    between_blocks  called before each block, equally often for the same shape; what it raises ends the ranking
    The rank of a video with several texts is that of its group of texts among the groups of all videos; the similarity
    of a group is that of its nearest text. A video without texts is only a competitor, not a query.
    """
    matrix, owner = _checked(similarity, text_to_video, ties, dsl)

    def blocks(axis: int) -> Iterator[tuple[slice, NDArray[Any]]]:
        between_blocks()
        for part, block in matrix.row_blocks() if axis == 0 else matrix.column_blocks():
            yield part, block
            between_blocks()

    metrics = {
        "t2v": _text_to_video(((part, _without_nan(block)) for part, block in blocks(0)), owner, ties),
        "v2t": _video_to_text(blocks(1), owner, ties),
    }
    if dsl is not None:
        largest_N, total_N = _softmax_over_texts(blocks(1), matrix.shape[1])
        over_texts = ((part, _weighted(block, largest_N, total_N)) for part, block in blocks(0))
        metrics["t2v_dsl"] = _text_to_video(over_texts, owner, ties)
        if dsl == "published":
            over_queries = ((part, dual_softmax(block, axis=0)) for part, block in blocks(1))
        else:
            largest_M1, total_M1 = _softmax_over_videos(blocks(0), matrix.shape[0])
            over_queries = ((part, _weighted(block, largest_M1, total_M1)) for part, block in blocks(1))
        metrics["v2t_dsl"] = _video_to_text(over_queries, owner, ties)
    return metrics


def dual_softmax(similarity: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """Compute similarity · softmax(100·similarity) along `axis`, which must be that of the queries, in float64."""
    return _weighted(similarity, *_softmax_parts(similarity, axis))


def _softmax_parts(block: NDArray[Any], axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest value along an axis, and the sum of exponentials above it, both with that axis kept."""
    wide = np.asarray(block, dtype=np.float64)
    largest = wide.max(axis=axis, keepdims=True)
    return largest, np.exp(DSL_SCALE * (wide - largest)).sum(axis=axis, keepdims=True)


def _weighted(block: NDArray[Any], largest: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    wide = np.asarray(block, dtype=np.float64)
    weights = np.exp(DSL_SCALE * (wide - largest))
    weights /= total
    return wide * weights


def _softmax_over_texts(
    columns: Iterator[tuple[slice, NDArray[Any]]], num_videos: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    largest, total = np.empty(num_videos), np.empty(num_videos)
    for part, block in columns:
        largest[part], total[part] = (values[0] for values in _softmax_parts(block, axis=0))
    return largest, total


def _softmax_over_videos(
    rows: Iterator[tuple[slice, NDArray[Any]]], num_texts: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    largest, total = np.empty((num_texts, 1)), np.empty((num_texts, 1))
    for part, block in rows:
        largest[part], total[part] = _softmax_parts(block, axis=1)
    return largest, total


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


def _text_to_video(rows: Iterator[tuple[slice, NDArray[Any]]], owner: NDArray[np.int64], ties: Ties) -> Metrics:
    return summarise(np.concatenate([ranks_of(block, owner[part], ties) for part, block in rows]))


def _video_to_text(columns: Iterator[tuple[slice, NDArray[Any]]], owner: NDArray[np.int64], ties: Ties) -> Metrics:
    videos, group = np.unique(owner, return_inverse=True)
    ranks = []
    for part, block in columns:
        first, last = np.searchsorted(videos, [part.start, part.stop])
        nearest = _nearest_of_group(block[:, videos[first:last] - part.start], group)
        ranks.append(ranks_of(nearest.T, np.arange(first, last), ties))
    return summarise(np.concatenate(ranks))


def _without_nan(block: NDArray[Any]) -> NDArray[Any]:
    if np.isnan(block).any():
        raise UserError("similarity holds NaN, so it cannot be ranked: check the model's features")
    return block


def _nearest_of_group(matrix: NDArray[Any], group: NDArray[np.int64]) -> NDArray[Any]:
    """Take the largest similarity of each group of texts to each video: [groups, videos]."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    return np.maximum.reduceat(matrix[order], starts, axis=0)


def _checked(similarity: Any, text_to_video: Any, ties: str, dsl: str | None) -> tuple[Similarities, NDArray[np.int64]]:
    matrix = similarity if hasattr(similarity, "row_blocks") else _as_array(similarity)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise UserError(f"similarity is {list(matrix.shape)}; allowed: a matrix [texts, videos] with both")
    matrix = WholeMatrix(matrix) if isinstance(matrix, np.ndarray) else matrix
    if ties not in ("pessimistic", "optimistic", "mean"):
        raise UserError(f"ties is {ties!r}; allowed: pessimistic, optimistic, mean")
    if dsl not in (None, "per_direction", "published"):
        raise UserError(f"dsl is {dsl!r}; allowed: per_direction, published, or None")
    if text_to_video is None and matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"similarity is {list(matrix.shape)}, not square: give text_to_video to pair texts with videos")
    num_texts = matrix.shape[0]
    owner = np.arange(num_texts) if text_to_video is None else _as_array(text_to_video)
    if owner.shape != (num_texts,) or owner.dtype.kind not in "iu":
        raise UserError(f"text_to_video is {owner.dtype} {list(owner.shape)}; allowed: {num_texts} integers")
    if owner.min() < 0 or owner.max() >= matrix.shape[1]:
        raise UserError(f"text_to_video names column {owner.max()}; similarity has {matrix.shape[1]} videos")
    return matrix, owner.astype(np.int64)


def _as_array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if str(values.dtype) in ("torch.bfloat16", "torch.float16") else values.numpy()
    return np.asarray(values)
