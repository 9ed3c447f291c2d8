"""Maps as PNG, for papers: attention of a few words (the paper's figure 5), nearest words (figure 6)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cal_train.evals.report.page import PageContent, visible_text
from cal_train.evals.report.scores import ScoredRow, words_of
from cal_train.evals.sight.values import NO_TOKEN, SampleSight, View, is_readable

NUM_WORDS = 4


def write_map_pictures(content: PageContent, folder: Path) -> list[Path]:
    """Write ``attention_*.png`` and ``nearest_words_*.png``, one of each per sample with maps; return the paths.

    The number in the name is the sample's line in the score file, from 1.
    """
    written = []
    for i, sights in content.maps.items():
        names = [visible_text(model.name).replace("$", r"\$") for model in content.models]
        row = content.models[-1].rows[i]
        written.append(draw_attention(sights, names, row, folder / f"attention_{i + 1}.png"))
        written.append(draw_nearest_words(sights, names, folder / f"nearest_words_{i + 1}.png"))
    return written


def strongest_words(row: ScoredRow) -> list[tuple[int, int]]:
    """Return the (start, end) label tokens of the 4 words with the largest delta, in reading order.

    A word is what has a letter; its delta is its largest token's.
    """
    words = [
        (start, end)
        for start, end in words_of(row.tokens)
        if any(character.isalpha() for character in "".join(row.tokens[start:end])) and row.tokens[start][:1] != "<"
    ]
    best = sorted(words, key=lambda word: -float(row.delta[word[0] : word[1]].max()))[:NUM_WORDS]
    return sorted(best) or [(0, 1)]


def word_map(sight: SampleSight, view: View, word: tuple[int, int]) -> np.ndarray:
    """Return the attention of a word over a view, (rows, columns): the mean over its tokens, NaN where no token is."""
    mean_M = sight.attention[word[0] : word[1]].mean(0)
    return np.where(view.tokens >= 0, mean_M[view.tokens], np.nan)


def draw_attention(sights: list[SampleSight], names: list[str], row: ScoredRow, output: Path) -> Path:
    """Draw one row of pictures per model and view, one column per word; each word is scaled by its strongest patch."""
    words = strongest_words(row)
    lines = [(name, sight, view) for name, sight in zip(names, sights, strict=True) for view in sight.views]
    figure, all_axes = _axes(len(lines), 1 + len(words), 2.1)
    for axes, (name, sight, view) in zip(all_axes, lines, strict=True):
        axes[0].imshow(view.picture)
        axes[0].set_title(_title(name, sight, view), fontsize=8, loc="left")
        for axis, word in zip(axes[1:], words, strict=True):
            attention_M = sight.attention[word[0] : word[1]].mean(0)
            height, width = view.picture.shape[:2]
            axis.imshow(view.picture.mean(2), cmap="gray", vmin=0, vmax=255)
            axis.imshow(
                word_map(sight, view, word), cmap="inferno", vmin=0, vmax=attention_M.max() or 1, alpha=0.6,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest",
            )  # fmt: skip
            text = visible_text("".join(row.tokens[word[0] : word[1]]).strip()).replace("$", r"\$")
            axis.set_title(f"{text}  {attention_M.sum():.1%}", fontsize=8)
    return _save(figure, output)


def draw_nearest_words(sights: list[SampleSight], names: list[str], output: Path) -> Path:
    """Draw the nearest word over each patch, models side by side; those that can be read are darker."""
    most = max(len(sight.views) for sight in sights)
    widest = max(view.tokens.shape[1] for sight in sights for view in sight.views)
    figure, all_axes = _axes(most, len(sights), max(3.2, 0.42 * widest))
    for k, (name, sight) in enumerate(zip(names, sights, strict=True)):
        for axis, view in zip(all_axes[:, k], sight.views, strict=False):
            axis.imshow(view.picture, alpha=0.35)
            axis.set_title(f"{_title(name, sight, view)}, {sight.share_readable:.0%} readable", fontsize=8, loc="left")
            for x, y, token in _cells(view):
                word = sight.words[token]
                text = visible_text(word.strip() or repr(word))[:8].replace("$", r"\$")
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=6, color="black" if is_readable(word) else "0.45"
                )
    return _save(figure, output)


def _cells(view: View) -> Iterator[tuple[float, float, int]]:
    """Yield the centre (x, y) in pixels and the token of each patch that is one."""
    height, width = (side / count for side, count in zip(view.picture.shape[:2], view.tokens.shape, strict=True))
    for (row, column), token in np.ndenumerate(view.tokens):
        if token != NO_TOKEN:
            yield (column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5, int(token)


def _title(name: str, sight: SampleSight, view: View) -> str:
    several = len({other.image for other in sight.views}) > 1
    return f"{name}{f', image {view.image + 1}' if several else ''}{f', {view.name}' if len(sight.views) > 1 else ''}"


def _axes(rows: int, columns: int, inches: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(inches * columns, (inches + 0.25) * rows), layout="constrained", dpi=150)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for axis in all_axes.ravel():
        axis.axis("off")
    return figure, all_axes


def _save(figure: Figure, output: Path) -> Path:
    FigureCanvasAgg(figure).print_png(output)
    return output
