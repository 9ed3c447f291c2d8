"""Numbers to the geometry of the page's charts: points and ticks in SVG user units, no markup."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cal_train.evals.report.summary import Histogram
from cal_train.evals.report.words import CLASSES

CURVE_WIDTH, CURVE_HEIGHT = 300, 110
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 720, 200
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """A polyline: ``points`` as SVG wants them, and its last value."""

    name: str
    points: str
    last: str


@dataclass(frozen=True)
class CurveChart:
    """One metric over steps; labels of the axes' ends."""

    metric: str
    lines: tuple[Line, ...]
    bottom: str
    top: str
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Bar:
    """One class's part of one bin of a stacked histogram."""

    x: float
    y: float
    width: float
    height: float
    class_index: int
    title: str


@dataclass(frozen=True)
class HistogramChart:
    """A stacked histogram: bars, (x, label) of the ticks, x of the clamp limits, the count that fills the height."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    low_x: float
    high_x: float
    tallest: int


def curve_chart(metric: str, runs: Mapping[str, Sequence[tuple[int, float]]]) -> CurveChart:
    """Return the chart of one metric; long curves are thinned to 600 points, evenly, with both ends."""
    thinned = {run: _thin(points) for run, points in runs.items()}
    steps = [step for points in thinned.values() for step, _ in points]
    values = [value for points in thinned.values() for _, value in points]
    first, last, bottom, top = min(steps), max(steps), min(values), max(values)

    def place(step: int, value: float) -> str:
        x = CURVE_WIDTH * (step - first) / ((last - first) or 1)
        y = CURVE_HEIGHT * (1 - (value - bottom) / (top - bottom)) if top > bottom else CURVE_HEIGHT / 2
        return f"{x:.1f},{y:.1f}"

    lines = tuple(
        Line(run, " ".join(place(*point) for point in points), short(points[-1][1])) for run, points in thinned.items()
    )
    return CurveChart(metric, lines, short(bottom), short(top), first, last)


def histogram_chart(histogram: Histogram, low: float, high: float, tallest: int | None = None) -> HistogramChart:
    """Return the stacked bars of a histogram; ``tallest`` is the count that fills the height (default: its own)."""
    edges, counts = histogram.edges, histogram.counts
    span = edges[-1] - edges[0]
    tallest = max(tallest or int(counts.sum(0).max()), 1)

    def x_of(delta: float) -> float:
        return round(HISTOGRAM_WIDTH * (delta - edges[0]) / span, 2)

    bars = []
    for k, (left, right) in enumerate(itertools.pairwise(edges)):
        y = float(HISTOGRAM_HEIGHT)
        for class_index, count in enumerate(counts[:, k].tolist()):
            height = HISTOGRAM_HEIGHT * count / tallest
            y -= height
            if count:
                title = f"{CLASSES[class_index]}: {count} tokens, delta {left:.2f} to {right:.2f}"
                width = max(x_of(right) - x_of(left) - 1, 0.5)
                bars.append(Bar(x_of(left), round(y, 2), round(width, 2), round(height, 2), class_index, title))
    step = max(1, math.ceil(span / 14))
    ticks = [tick for tick in range(math.ceil(edges[0]), math.floor(edges[-1]) + 1) if tick % step == 0]
    return HistogramChart(tuple(bars), tuple((x_of(tick), f"{tick}") for tick in ticks), x_of(low), x_of(high), tallest)


def short(value: float) -> str:
    """Return a number in at most four significant digits."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)]
