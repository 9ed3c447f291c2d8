"""Baseline against CAL: accuracy per question type with a paired interval, blind accuracy, and delta as a detector."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from cal_train.demo.scenes import QUESTION_TYPES
from cal_train.evals.paired import paired_interval

ALL = "all"


@dataclass(frozen=True)
class Answers:
    """What a model made of a split of Q questions.

    ``is_right`` and ``is_right_blind`` (Q,) bool: the answer is the reference sentence, with the picture and without;
    ``types`` and ``scenes`` (Q,) str.
    """

    types: np.ndarray
    scenes: np.ndarray
    is_right: np.ndarray
    is_right_blind: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """One line of the result: a question type of a split. Accuracies and differences are shares, not percent."""

    split: str
    type: str
    num_questions: int
    baseline: float
    cal: float
    difference: float
    low: float
    high: float
    baseline_blind: float
    cal_blind: float


def compare(split: str, baseline: Answers, cal: Answers, seed: int = 0) -> list[Comparison]:
    """Return the comparison per question type and over all of them.

    Raises:
        ValueError: If the two runs did not answer the same questions in the same order.
    """
    if not (np.array_equal(baseline.types, cal.types) and np.array_equal(baseline.scenes, cal.scenes)):
        raise ValueError(f"the runs answered different questions of {split}: evaluate both on the same files")
    lines = []
    for type_ in (*(t for t in QUESTION_TYPES if t in baseline.types), ALL):
        chosen = np.ones(len(baseline.types), bool) if type_ == ALL else baseline.types == type_
        a, b = baseline.is_right[chosen], cal.is_right[chosen]
        low, high = paired_interval(a, b, baseline.scenes[chosen], seed)
        blind = float(baseline.is_right_blind[chosen].mean()), float(cal.is_right_blind[chosen].mean())
        difference = float(b.mean() - a.mean())
        lines.append(Comparison(split, type_, len(a), float(a.mean()), float(b.mean()), difference, low, high, *blind))
    return lines


def area_under_curve(score: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the probability that a positive scores higher than a negative, ties counting half (ROC AUC).

    Raises:
        ValueError: If positives or negatives are missing.
    """
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not num_positive or not num_negative:
        raise ValueError(f"a detector needs both kinds: {num_positive} positives, {num_negative} negatives")
    _, index, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_rank[index][is_positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def table_of(lines: list[Comparison]) -> Table:
    """Return the comparison as a table for the terminal."""
    table = Table(title="Exact-match accuracy in percent (blind: the picture's tokens deleted)")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header in ("split", "question") else "right")
    for line in lines:
        table.add_row(*_cells(line), end_section=line.type == ALL)
    return table


def detector_table(detectors: Mapping[str, float]) -> Table:
    """Return delta's AUC as a detector of the words that only the image tells."""
    table = Table("split, model and question", "AUC", title="delta as a detector of visual tokens (0.5 = chance)")
    for name, value in detectors.items():
        table.add_row(name, f"{value:.3f}")
    return table


def markdown_of(lines: list[Comparison], detectors: Mapping[str, float]) -> str:
    """Return comparison and AUC values as Markdown."""
    rows = [list(_HEADERS), ["---"] * len(_HEADERS), *(_cells(line) for line in lines)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    aucs = "\n".join(f"| {name} | {value:.3f} |" for name, value in detectors.items())
    return f"{text}\n\n| delta as a detector of visual tokens | AUC |\n| --- | --- |\n{aucs}\n"


def write_results(folder: Path, lines: list[Comparison], detectors: Mapping[str, float]) -> None:
    """Write ``results.json`` and ``results.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"accuracy": [asdict(line) for line in lines], "auc_of_delta": dict(detectors)}
    (folder / "results.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    (folder / "results.md").write_text(markdown_of(lines, detectors), encoding="utf-8")


_HEADERS = ("split", "question", "n", "baseline", "CAL", "CAL - baseline", "95 % interval", "blind b.", "blind CAL")


def _cells(line: Comparison) -> list[str]:
    percent = [f"{100 * share:.1f}" for share in (line.baseline, line.cal)]
    difference = f"{100 * line.difference:+.1f}"
    interval = f"[{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
    blind = [f"{100 * share:.1f}" for share in (line.baseline_blind, line.cal_blind)]
    return [line.split, line.type, str(line.num_questions), *percent, difference, interval, *blind]
