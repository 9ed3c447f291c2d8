"""Benchmark results of a run's checkpoints over its steps, read from the run folder; any curves, drawn as PNG."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

STATE_NAME = "trainer_state.json"
_COLUMNS = 3

TaskCurves = dict[str, list[tuple[int, float]]]
"""``TASK/METRIC`` -> (step, value), by step."""


def read_task_curves(run: Path) -> dict[str, TaskCurves]:
    """Return the curves of each suite in ``RUN/eval/SUITE/checkpoint-N/results.json`` (``final``: the last step).

    Raises:
        ValueError: If a file of results is not what ``cal-train eval`` writes.
    """
    suites: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(run.glob("eval/*/*/results.json")):
        step = _step_of(run, path.parent.name)
        if step is None:
            continue
        try:
            for task, found in json.loads(path.read_text(encoding="utf-8"))["tasks"].items():
                for metric, value in found["metrics"].items():
                    points = suites.setdefault(path.parents[1].name, {}).setdefault(f"{task}/{metric}", {})
                    points[step] = float(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of cal-train eval ({error!r}): remove its folder") from error
    return {
        suite: {name: sorted(p for p in points.items() if math.isfinite(p[1])) for name, points in curves.items()}
        for suite, curves in suites.items()
    }


def final_step(run: Path) -> int | None:
    """Return the last step of a run that has ended, None of another."""
    state = run / STATE_NAME
    return int(json.loads(state.read_text(encoding="utf-8"))["global_step"]) if state.is_file() else None


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str, output: Path, points: str = "o"
) -> Path:
    """Draw one panel per metric with a line per run over its steps; return the path of the PNG.

    Args:
        curves: Metric -> run -> (step, value).
        title: Stands above all.
        output: PNG to write.
        points: Matplotlib's marker of each point, empty for lines alone.
    """
    num_rows = math.ceil(len(curves) / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.1 * num_rows + 0.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_rows, _COLUMNS, squeeze=False).flat)
    colours = {run: f"C{k}" for k, run in enumerate(dict.fromkeys(run for runs in curves.values() for run in runs))}
    for axes, (name, runs) in zip(panels, curves.items(), strict=False):
        for run, line in runs.items():
            steps, values = zip(*line, strict=True) if line else ((), ())
            axes.plot(steps, values, marker=points, markersize=3, linewidth=1.2, color=colours[run])
        axes.set_title(name.replace("$", r"\$"), fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    if len(colours) > 1:
        handles = [Line2D([], [], color=colour, label=run.replace("$", r"\$")) for run, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title.replace("$", r"\$"), fontsize=9)
    canvas.print_png(str(output))
    return output


def _step_of(run: Path, name: str) -> int | None:
    if name == "final":
        return final_step(run)
    number = name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != name else None
