"""Summarise a round of editing: columns of `edit_rounds`, and lines of text for the user."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.editing.boundaries import Floats, Spans, VideoClips, overlapping

OVERLAP = 0.5  # share of the shorter of two clips above which they are reported
LENGTH_EDGES = (-0.7, -0.4, -0.2, -0.1, -0.01, 0.01, 0.1, 0.2, 0.4, 0.7)  # e-folds: a tenth is about 10 %
SHIFT_EDGES = (-4.0, -2.0, -1.0, -0.5, -0.01, 0.01, 0.5, 1.0, 2.0, 4.0)  # seconds


def measures(edits: pa.Table, videos: Sequence[VideoClips], spans: Spans) -> dict[str, Any]:
    """Summarise one round's rows and the boundaries after it.

    Counts reasons, clips by change from their first boundaries, and overlapping pairs of a video.
    """
    reasons = Counter(edits["reason"].to_pylist())
    start, end, first, last = (edits[name].to_numpy() for name in ("start_s", "end_s", "base_start_s", "base_end_s"))
    return {
        "reasons": [{"reason": reason, "num_clips": count} for reason, count in reasons.most_common()],
        "length_changes": histogram(np.log((end - start) / (last - first)), LENGTH_EDGES),
        "shifts": histogram((start + end - first - last) / 2, SHIFT_EDGES),
        "num_overlapping": len(overlapping(videos, spans, OVERLAP)),
    }


def histogram(values: Floats | NDArray[Any], edges: Sequence[float]) -> list[dict[str, Any]]:
    """Count values from each edge to the next; the first bin holds values below all edges."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    return [
        {"from": low, "num_clips": int(count)} for low, count in zip([-np.inf, *edges], counts.tolist(), strict=True)
    ]


def report_lines(row: Mapping[str, Any]) -> list[str]:
    """Describe a row of `edit_rounds` in lines of text."""
    if row["outcome"] == "warm-up":
        return [f"teacher {row['teacher']}: {_recall(row['validation'])}; {row['num_clips']:,} clips to edit"]
    head = f"round {row['round']}, {row['outcome']}: {row['num_accepted']:,} of {row['num_clips']:,} clips edited"
    head += f", {row['num_failed']:,} videos failed" * bool(row["num_failed"])
    if row["validation"] is not None:
        head += f"; student {_recall(row['validation'])}, to exceed {100 * row['best_before']:.1f} %"
    reasons = ", ".join(f"{reason['reason']} {reason['num_clips']:,}" for reason in row["reasons"])
    lines = [head, f"  by reason: {reasons}"] if reasons else [head]
    if row["threshold"] is not None:
        lines.append(f"  only clips that scored at most {row['threshold']:.4f}")
    lines.append(f"  length, e-folds: {_bars(row['length_changes'])} (median length {row['median_change']:+.1%})")
    lines.append(f"  shift, seconds:  {_bars(row['shifts'])}")
    lines.append(
        f"  {row['share_at_limit']:.1%} of clips newly at a limit; {row['num_overlapping']:,} pairs of a video overlap "
        f"by more than {OVERLAP:.0%}"
    )
    return lines


def _recall(validation: float | None) -> str:
    return "not validated" if validation is None else f"validation R@1 {100 * validation:.1f} %"


def _bars(bins: Sequence[Mapping[str, Any]]) -> str:
    """Format the bins that are not empty, by their lower edge."""
    edges = [bin_["from"] for bin_ in bins[1:]]
    names = [f"<{edges[0]:g}", *(f"{edge:g}…" for edge in edges)]
    return " ".join(
        f"{name} {bin_['num_clips']:,}" for name, bin_ in zip(names, bins, strict=True) if bin_["num_clips"]
    )
