"""What a score file says as a whole: distribution of delta, shares at the clamp limits, which samples surprise."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cal_train.evals.report.scores import ScoredRow
from cal_train.evals.report.words import CLASSES, classes_of

NUM_BINS = 60
_MIN_OCCURRENCES = 3  # below, a token has no usual delta of its own, and its word class's stands in


@dataclass(frozen=True)
class Histogram:
    """Counts of label tokens by delta: ``edges`` (bins + 1,) in logits, ``counts`` (word classes, bins).

    The outermost bins also hold what lies beyond; the edges cover the clamp limits and all but 0.5 % on either side.
    """

    edges: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Summary:
    """Counts and shares over all label tokens; ``effective_tokens`` is (sum w)^2 / sum w^2 over the file."""

    num_samples: int
    num_labels: int
    share_low: float
    share_high: float
    delta_mean: float
    delta_median: float
    weight_mean: float
    effective_tokens: float
    class_medians: tuple[tuple[str, int, float], ...]
    histogram: Histogram


def summarize(rows: Sequence[ScoredRow], low: float, high: float, edges: np.ndarray | None = None) -> Summary:
    """Return the summary of a score file; limits and edges of the histogram (by default `bin_edges`) are in logits.

    Raises:
        ValueError: If no sample has a label token.
    """
    delta, weight = (np.concatenate([getattr(row, name) for row in rows]) for name in ("delta", "weight"))
    if not len(delta):
        raise ValueError("the score file has no label tokens: was it made of rows without answers?")
    classes = np.concatenate([np.array(classes_of(row.tokens), np.int64) for row in rows])
    squares = float(np.square(weight, dtype=np.float64).sum())
    return Summary(
        num_samples=len(rows),
        num_labels=len(delta),
        share_low=float((delta <= low).mean()),
        share_high=float((delta >= high).mean()),
        delta_mean=float(delta.mean(dtype=np.float64)),
        delta_median=float(np.median(delta)),
        weight_mean=float(weight.mean(dtype=np.float64)),
        effective_tokens=float(weight.sum(dtype=np.float64)) ** 2 / squares if squares else 0.0,
        class_medians=tuple(
            (name, int((classes == k).sum()), float(np.median(delta[classes == k])))
            for k, name in enumerate(CLASSES)
            if (classes == k).any()
        ),
        histogram=_histogram(delta, classes, bin_edges([rows], low, high) if edges is None else edges),
    )


def bin_edges(files: Sequence[Sequence[ScoredRow]], low: float, high: float) -> np.ndarray:
    """Return edges (bins + 1,) that suit the deltas of several score files together."""
    deltas = [row.delta for rows in files for row in rows if len(row.delta)]
    first, last = np.quantile(np.concatenate(deltas), [0.005, 0.995]) if deltas else (low, high)
    return np.linspace(min(first, low - 1), max(last, high + 1), NUM_BINS + 1)


def _histogram(delta: np.ndarray, classes: np.ndarray, edges: np.ndarray) -> Histogram:
    inside = np.clip(delta, edges[0], edges[-1])
    counts = np.stack([np.histogram(inside[classes == k], edges)[0] for k in range(len(CLASSES))])
    return Histogram(edges, counts)


def surprises(rows: Sequence[ScoredRow]) -> np.ndarray:
    """Return each sample's surprise in logits (samples,): how far its most unusual token is from that token's usual.

    A token's usual delta is the median over the file of the same token, or of its word class where the token occurs
    fewer than 3 times. A name that the image does not support, or an article that suddenly needs the image, stand out.
    """
    by_token: dict[str, list[float]] = defaultdict(list)
    by_class: dict[int, list[float]] = defaultdict(list)
    classes = [classes_of(row.tokens) for row in rows]
    for row, kinds in zip(rows, classes, strict=True):
        for token, kind, delta in zip(row.tokens, kinds, row.delta.tolist(), strict=True):
            by_token[token].append(delta)
            by_class[kind].append(delta)
    usual = {token: float(np.median(values)) for token, values in by_token.items() if len(values) >= _MIN_OCCURRENCES}
    usual_of_class = {kind: float(np.median(values)) for kind, values in by_class.items()}
    result = np.zeros(len(rows))
    for i, (row, kinds) in enumerate(zip(rows, classes, strict=True)):
        expected = [usual.get(token, usual_of_class[kind]) for token, kind in zip(row.tokens, kinds, strict=True)]
        result[i] = np.abs(row.delta - np.array(expected)).max() if expected else 0.0
    return result
