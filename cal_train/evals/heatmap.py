"""A picture of what CAL sees: images beside their answers, every token coloured by its delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

CHARS_PER_LINE = 64
ROW_INCHES = 1.5


@dataclass(frozen=True)
class ScoredSample:
    """An image, the prompt (not coloured), and the label tokens with one delta (logits) each."""

    image: Image.Image
    prompt: str
    tokens: Sequence[str]
    deltas: Sequence[float]


def draw_heat_map(samples: Sequence[ScoredSample], output: str | Path, low: float = 1.0, high: float = 5.0) -> Path:
    """Write a PNG with one row per sample; colours run from the lower to the upper clamp limit (logits).

    Raises:
        ValueError: If there are no samples, or a sample's tokens and deltas differ in number.
    """
    if not samples:
        raise ValueError("no samples to draw: the score file is empty")
    figure = Figure(figsize=(10, ROW_INCHES * len(samples) + 0.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    norm = Normalize(min(low, 0.0), high)
    colours = ScalarMappable(norm, "YlOrRd")
    axes = figure.subplots(len(samples), 2, width_ratios=[1, 5], squeeze=False)
    for (image_axis, text_axis), sample in zip(axes, samples, strict=True):
        image_axis.imshow(sample.image)
        image_axis.axis("off")
        _draw_tokens(text_axis, sample, colours)
    figure.colorbar(colours, ax=axes, shrink=0.6, label="delta: logit with image - without", pad=0.01)
    canvas.print_png(output)
    return Path(output)


def _draw_tokens(axis, sample: ScoredSample, colours: ScalarMappable) -> None:
    """Write the prompt, then the tokens, in a fixed-width grid of characters."""
    axis.set_xlim(0, CHARS_PER_LINE)
    axis.set_ylim(8, 0)
    axis.axis("off")
    axis.text(0, 0.5, sample.prompt[: CHARS_PER_LINE - 1], family="monospace", fontsize=9, color="0.45", va="center")
    column, line = 0, 2
    for token, delta in zip(sample.tokens, sample.deltas, strict=True):
        text = token.replace("\n", "\\n")
        if column + len(text) > CHARS_PER_LINE:
            column, line = 0, line + 1.3
        red, green, blue, _ = colours.to_rgba(np.asarray(delta))
        is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axis.text(
            column, line, text.replace("$", r"\$"), family="monospace", fontsize=9, va="center",
            color="white" if is_dark else "black",
            bbox={"facecolor": (red, green, blue), "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        column += len(text) + 0.15
