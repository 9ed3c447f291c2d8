"""What a report takes from a folder: its score file, curves of the runs in it, tables of results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cal_train.evals.report.task_curves import STATE_NAME, read_task_curves

SCORES_NAME = "scores.jsonl"
MAX_RUNS = 6
_NOT_CURVES = ("step", "epoch", "total_flos")
_FIRST = ("loss", "eval_loss", "cal/delta_mean", "cal/weight_mean", "cal/share_low", "cal/share_high")

Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Metric -> run -> (step, value)."""


@dataclass(frozen=True)
class ResultTable:
    """A table of results as text; all rows have as many cells as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ReportSource:
    """One thing to report on: a folder, or a score file alone."""

    name: str
    scores: Path | None = None
    curves: Curves = field(default_factory=dict)
    tables: tuple[ResultTable, ...] = ()


def read_source(path: str | Path) -> ReportSource:
    """Return what there is to report: a score file, or a folder with any of scores, trainer states, and results.

    A folder without a trainer state of its own stands for the runs in its direct sub-folders (the first 6 by name).

    Raises:
        ValueError: If the path does not exist, or the folder has nothing to report.
    """
    path = Path(path)
    if path.is_file():
        return ReportSource(path.name if path.stem == "scores" else path.stem, path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a score file or a run folder")
    scores = path / SCORES_NAME if (path / SCORES_NAME).is_file() else None
    states = [path / STATE_NAME] if (path / STATE_NAME).is_file() else sorted(path.glob(f"*/{STATE_NAME}"))[:MAX_RUNS]
    curves = read_curves({state.parent.name: state for state in states})
    curves = with_task_curves(curves, list(dict.fromkeys([*(state.parent for state in states), path])))
    tables = read_tables(path)
    if scores is None and not curves and not tables:
        raise ValueError(
            f"{path} has nothing to report: no {SCORES_NAME}, {STATE_NAME} or results.md/json. Is it a run folder, and "
            "has the run logged anything?"
        )
    return ReportSource(path.resolve().name, scores, curves, tables)


def read_curves(states: Mapping[str, Path]) -> Curves:
    """Return every number that was logged at least twice by one of the runs; losses and CAL's numbers come first.

    Raises:
        ValueError: If a file is not a trainer state.
    """
    curves: Curves = {}
    for run, path in states.items():
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            logs = [dict(entry) for entry in history]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a trainer state ({error!r}): remove it, or choose another folder"
            ) from error
        for entry in logs:
            for metric, value in entry.items():
                if metric not in _NOT_CURVES and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(metric, {}).setdefault(run, []).append((int(entry.get("step", 0)), float(value)))
    kept = {metric: runs for metric, runs in curves.items() if max(map(len, runs.values())) > 1}
    return dict(sorted(kept.items(), key=lambda item: _rank(item[0])))


def with_task_curves(curves: Curves, runs: Sequence[Path]) -> Curves:
    """Return curves with the benchmark results of the runs' checkpoints behind them, as ``SUITE/TASK/METRIC``.

    They take the place of those in the log, which lacks what was evaluated by another process, or after a resume.
    """
    found: Curves = {}
    for run in runs:
        for suite, tasks in read_task_curves(run).items():
            for name, points in tasks.items():
                if len(points) > 1:
                    found.setdefault(f"{suite}/{name}", {})[run.name] = points
    if not found:
        return curves
    return {metric: lines for metric, lines in curves.items() if not metric.startswith("suite/")} | found


def _rank(metric: str) -> tuple[int, str]:
    if metric in _FIRST:
        return _FIRST.index(metric), metric
    return (len(_FIRST) if metric.startswith("cal/") else len(_FIRST) + 1), metric


def merge_curves(sources: Sequence[ReportSource]) -> Curves:
    """Return the curves of all sources together; equal run names get the source's name in front."""
    merged: Curves = {}
    for source in sources:
        for metric, runs in source.curves.items():
            into = merged.setdefault(metric, {})
            for run, points in runs.items():
                into[run if run not in into else f"{source.name}/{run}"] = points
    return merged


def read_tables(folder: Path) -> tuple[ResultTable, ...]:
    """Return the tables of ``results.md``, or else the values of ``results.json`` as one table; none if neither is.

    Raises:
        ValueError: If ``results.json`` is not JSON.
    """
    markdown, values = folder / "results.md", folder / "results.json"
    if markdown.is_file():
        return tuple(parse_markdown(markdown.read_text(encoding="utf-8")))
    if not values.is_file():
        return ()
    try:
        leaves = _leaves(json.loads(values.read_text(encoding="utf-8")), "")
    except ValueError as error:
        raise ValueError(f"{values} is not JSON ({error}): write it again") from error
    return (ResultTable(("result", "value"), tuple(leaves)),) if leaves else ()


def parse_markdown(text: str) -> list[ResultTable]:
    """Return the pipe tables of a Markdown text; a row with more or fewer cells than its header ends the table."""
    tables: list[ResultTable] = []
    block: list[tuple[str, ...]] = []
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("|") and stripped.endswith("|"):
            cells = tuple(cell.strip() for cell in stripped.strip("|").split("|"))
            if not block or len(cells) == len(block[0]):
                block.append(cells)
                continue
        if len(block) > 2 and all(set(cell) <= set("-: ") for cell in block[1]):
            tables.append(ResultTable(block[0], tuple(block[2:])))
        block = []
    return tables


def _leaves(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [leaf for key, child in value.items() for leaf in _leaves(child, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [leaf for i, child in enumerate(value) for leaf in _leaves(child, f"{name}[{i}]")]
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]
