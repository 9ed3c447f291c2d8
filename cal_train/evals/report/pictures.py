"""The page's pictures as PNG, for papers."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cal_train.data.images import open_image
from cal_train.evals.heatmap import ScoredSample, draw_heat_map
from cal_train.evals.report.map_pictures import write_map_pictures
from cal_train.evals.report.page import PageContent, visible_text
from cal_train.evals.report.samples import prompt_of
from cal_train.evals.report.summary import Summary, bin_edges, summarize
from cal_train.evals.report.task_curves import draw_curves
from cal_train.evals.report.words import CLASSES

NUM_HEAT_MAPS = 8
_COLOURS = ("#c2410c", "#b88a00", "#4b7a8c", "#b9b3a5")


def write_pictures(content: PageContent, folder: str | Path) -> list[Path]:
    """Write what the page draws: ``curves.png``, ``histogram.png``, heat maps of each model's first samples, all maps.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: If there are neither curves nor scores to draw.
    """
    if not (content.models or content.curves):
        raise ValueError("--png draws curves and scores, and there are none: give a run folder or a score file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if content.curves:
        curves = {
            visible_text(metric): {visible_text(run): points for run, points in runs.items()}
            for metric, runs in content.curves.items()
        }
        written.append(draw_curves(curves, visible_text(content.title), folder / "curves.png", points=""))
    return written + _write_scores(content, folder) if content.models else written


def _write_scores(content: PageContent, folder: Path) -> list[Path]:
    edges = bin_edges([model.rows for model in content.models], content.low, content.high)
    summaries = {model.name: summarize(model.rows, content.low, content.high, edges) for model in content.models}
    written = [draw_histogram(summaries, content.low, content.high, folder / "histogram.png")]
    for k, model in enumerate(content.models):
        name = "heat_map.png" if len(content.models) == 1 else f"heat_map_{k + 1}.png"
        samples = [
            ScoredSample(
                _image(content, i), visible_text(prompt_of(_sample(content, i))), row.tokens, row.delta.tolist()
            )
            for i, row in enumerate(model.rows[:NUM_HEAT_MAPS])
        ]
        written.append(draw_heat_map(samples, folder / name, content.low, content.high))
    return written + write_map_pictures(content, folder)


def draw_histogram(summaries: dict[str, Summary], low: float, high: float, output: Path) -> Path:
    """Draw one stacked histogram of delta per model, by word class, with the clamp limits (the paper's figure 4)."""
    figure = Figure(figsize=(7, 2.6 * len(summaries)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(summaries), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (name, summary) in zip(all_axes, summaries.items(), strict=True):
        edges, counts = summary.histogram.edges, summary.histogram.counts
        bottom = np.zeros(counts.shape[1])
        for label, colour, heights in zip(CLASSES, _COLOURS, counts, strict=True):
            axes.bar(edges[:-1], heights, np.diff(edges), bottom, align="edge", color=colour, label=label)
            bottom += heights
        for limit in (low, high):
            axes.axvline(limit, color="0.2", linewidth=0.8, linestyle="--")
        axes.set_title(visible_text(name).replace("$", r"\$"), fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("label tokens")
    all_axes[-1].set_xlabel("delta: logit with image - without")
    all_axes[0].legend(frameon=False, fontsize=8)
    canvas.print_png(output)
    return output


def _sample(content: PageContent, i: int):
    return content.samples[i] if content.samples else None


def _image(content: PageContent, i: int) -> Image.Image:
    """Return the sample's image, or white where it is not at hand."""
    sample = _sample(content, i)
    try:
        return open_image(sample.images[0]) if sample and sample.images else Image.new("RGB", (32, 32), "white")
    except ValueError:
        return Image.new("RGB", (32, 32), "white")
