"""Two results folders against each other: difference, paired interval and exact McNemar test per task and metric."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cal_train.evals.lmms.results import read_results
from cal_train.evals.paired import mcnemar, paired_interval, verdict

_HEADERS = (
    "task", "metric", "n", "first", "second", "second - first", "95 % interval", "only 1st / 2nd", "p", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A metric of a task in both runs.

    ``low`` and ``high`` bound the difference second - first; the three fields of McNemar's test are None where scores
    are not right or wrong.
    """

    task: str
    metric: str
    num_documents: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int | None
    only_second: int | None
    p_value: float | None
    verdict: str


def compare_folders(first: str | Path, second: str | Path, seed: int = 0) -> tuple[list[Line], list[str]]:
    """Return one line per task and metric that both runs scored document by document, and what was left out.

    Raises:
        ValueError: If a folder has no results, the runs share no task, or they answered different documents of one.
    """
    one, one_samples = read_results(first)
    two, two_samples = read_results(second)
    shared = [task for task in one["tasks"] if task in two["tasks"]]
    if not shared:
        raise ValueError(f"{first} and {second} share no task: {', '.join(one['tasks'])} and {', '.join(two['tasks'])}")
    lines, left_out = [], [f"task {task}: only in one of the two" for task in sorted({*one["tasks"]} ^ {*two["tasks"]})]
    left_out += [
        f"{name} was {one['settings'].get(name, 'off')} and {two['settings'].get(name, 'off')}, so the difference is "
        "not the model's alone"
        for name in ("without_image", "vcd_alpha", "vcd_beta")
        if one["settings"].get(name) != two["settings"].get(name)
    ]
    for task in shared:
        left_out += [
            f"task {task}: {part} differs, so the difference is not the model's alone"
            for part in ("prompt", "generation")
            if one["tasks"][task][part] != two["tasks"][task][part]
        ]
        _check_same_documents(task, one_samples[task], two_samples[task])
        is_better = one["tasks"][task]["higher_is_better"]
        found = compare_samples(task, one_samples[task], two_samples[task], is_better, seed)
        lines += found
        for metric in sorted({*one["tasks"][task]["metrics"]} - {line.metric for line in found}):
            left_out.append(f"task {task}: {metric} is a number of the whole set, not of its documents")
    return lines, left_out


def compare_samples(
    task: str,
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    higher_is_better: Mapping[str, bool],
    seed: int = 0,
) -> list[Line]:
    """Return one line per metric; both lists hold the same documents in the same order.

    Raises:
        ValueError: If a metric scores other documents in one run than in the other.
    """
    lines = []
    for metric in dict.fromkeys(name for row in first for name in row["scores"]):
        has = [(metric in a["scores"], metric in b["scores"]) for a, b in zip(first, second, strict=True)]
        if any(a != b for a, b in has):
            raise ValueError(f"task {task}: {metric} scores other documents in the second run")
        chosen = [n for n, (a, _) in enumerate(has) if a]
        a, b = (np.array([rows[n]["scores"][metric] for n in chosen]) for rows in (first, second))
        low, high = paired_interval(a, b, np.arange(len(a)), seed)
        difference = float(b.mean() - a.mean())
        test = mcnemar(a, b) if np.isin([a, b], (0, 1)).all() else None
        words = verdict(difference, low, high, higher_is_better.get(metric, True))
        found = (test.num_only_first, test.num_only_second, test.p_value) if test else (None, None, None)
        means = float(a.mean()), float(b.mean())
        lines.append(Line(task, metric, len(a), *means, difference, low, high, *found, words))
    return lines


def table_of(lines: Sequence[Line]) -> Table:
    """Return the comparison as a table for the terminal."""
    table = Table(*_HEADERS)
    for line in lines:
        table.add_row(*_cells(line))
    return table


def markdown_of(lines: Sequence[Line], left_out: Sequence[str]) -> str:
    """Return the comparison as Markdown."""
    rows = [_HEADERS, ["---"] * len(_HEADERS), *map(_cells, lines)]
    text = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    return text + "".join(f"\n- {note}" for note in left_out) + "\n"


def records_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return the comparison for a JSON file."""
    return [asdict(line) for line in lines]


def _check_same_documents(task: str, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> None:
    if not first or not second:
        raise ValueError(f"task {task}: no samples in one of the folders")
    if len(first) != len(second):
        raise ValueError(f"task {task}: {len(first)} documents against {len(second)}: run both with the same limit")
    for a, b in zip(first, second, strict=True):
        if (a["doc_id"], a["key"]) != (b["doc_id"], b["key"]):
            raise ValueError(f"task {task}: document {a['doc_id']} differs between the runs: their data or prompts do")


def _cells(line: Line) -> list[str]:
    is_right_or_wrong = line.p_value is not None
    return [
        line.task,
        line.metric,
        str(line.num_documents),
        f"{line.first:.4f}",
        f"{line.second:.4f}",
        f"{line.difference:+.4f}",
        f"[{line.low:+.4f}, {line.high:+.4f}]",
        f"{line.only_first} / {line.only_second}" if is_right_or_wrong else "",
        f"{line.p_value:.3g}" if is_right_or_wrong else "",
        line.verdict,
    ]
