"""Two runs on the same questions: bootstrap interval of their difference, exact McNemar test, and what both say."""

import math
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
_DRAWS_AT_ONCE = 2**24
"""Counts that are held in memory at a time."""


@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two runs has right, and the two-sided p-value of their split being even."""

    num_only_first: int
    num_only_second: int
    p_value: float


def paired_interval(
    first: np.ndarray,
    second: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """Return the bootstrap interval of mean(second) - mean(first).

    Whole groups are drawn with replacement, since the answers about one picture stand and fall together; both runs are
    read on the same draw, so what makes a picture hard for both cancels.

    Args:
        first: Score per question, (Q,): bool, or numbers.
        second: The same of the other run.
        groups: What each question is about, (Q,).
        seed: Of the draws.
        level: Share of the draws inside the interval.
        num_resamples: Number of draws.
    """
    _, group_Q = np.unique(groups, return_inverse=True)
    size_G = np.bincount(group_Q)
    gain_G = np.bincount(group_Q, weights=second.astype(float) - first.astype(float))
    rng = np.random.default_rng(seed)
    block, means = max(1, _DRAWS_AT_ONCE // len(size_G)), []
    for start in range(0, num_resamples, block):
        num_draws = min(block, num_resamples - start)
        draws_RG = rng.multinomial(len(size_G), np.full(len(size_G), 1 / len(size_G)), num_draws)
        means.append((draws_RG @ gain_G) / (draws_RG @ size_G))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Return the exact McNemar test of two runs on the same questions.

    Under "no difference" each question that only one run has right is a fair coin, so the split of those is binomial.
    Questions count as independent here; where several are about one picture, the interval is the safer of the two.

    Args:
        first: Right or wrong per question, (Q,).
        second: The same of the other run.

    Raises:
        ValueError: If a value is neither 0 nor 1.
    """
    for scores in (first, second):
        if not np.isin(scores, (0, 1)).all():
            raise ValueError("McNemar's test is for right (1) and wrong (0), these scores have values between")
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    num_split = only_first + only_second
    tail = sum(math.comb(num_split, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**num_split))


def verdict(difference: float, low: float, high: float, is_higher_better: bool = True) -> str:
    """Say in words what an interval of second - first shows."""
    if low <= 0 <= high:
        return "no difference is shown (the interval holds 0)"
    return "the second is better" if (difference > 0) == is_higher_better else "the second is worse"
