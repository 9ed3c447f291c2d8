"""Rows in the terminal, every supervised token coloured by how much the image raises its logit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib import colormaps
from matplotlib.colors import Normalize, to_hex
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoModelForImageTextToText

from cal_train.cal.strategies import TokenWeighting
from cal_train.data.collate import Collator
from cal_train.data.examples import SampleEncoder
from cal_train.data.preview import Preview, preview_sample
from cal_train.evals.report.page import visible_text
from cal_train.evals.score import score_batches
from cal_train.folders import from_folder
from cal_train.types import BadSampleError, Problem, Sample

SIGNS = {"low": "-", "between": "+", "high": "#"}
"""What stands behind a token where there are no colours: delta against the clamp limits."""

Scores = dict[str, torch.Tensor]


def score_rows(
    model_folder: str | Path, rows: Sequence[Sample | Problem], encoder: SampleEncoder, weighting: TokenWeighting
) -> list[tuple[Preview, Scores | None]]:
    """Return each row as it will be trained, and its scores, each (N,) over its label tokens; None for a bad row.

    Every row is scored by itself, in eval mode and float32.

    Raises:
        ValueError: If the weighting takes no image away.
    """
    if weighting.ablation is None:
        raise ValueError("this cal_strategy takes no image away, so there is nothing to show: use cal or cal_reference")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = from_folder(AutoModelForImageTextToText, model_folder, dtype=torch.float32).eval()
    cast(nn.Module, model).to(device)  # transformers' own `to` is annotated without its arguments
    collate = Collator(cast(Any, encoder.processor).tokenizer.pad_token_id)
    scored = []
    for row in rows:
        try:
            batch = None if isinstance(row, Problem) else collate([encoder.encode(row)])
        except BadSampleError as error:
            batch, row = None, error.problem
        scores = None if batch is None else next(score_batches(model, iter([batch]), weighting))[1]
        scored.append((preview_sample(row, encoder), scores))
    return scored


def to_heat_map(
    rows: Sequence[tuple[Preview, Scores | None]], low: float, high: float, has_colours: bool
) -> RenderableType:
    """Return the rows for the terminal: a legend, then of each row its tokens and the numbers of those with a label.

    Args:
        rows: Of `score_rows`.
        low: Lower clamp limit in logits.
        high: Upper clamp limit.
        has_colours: Colours for deltas; without them a sign in brackets stands behind every token with a label.
    """
    parts: list[RenderableType] = [_legend(low, high, has_colours)]
    for preview, scores in rows:
        parts.append(Text(f"\n{visible_text(preview.title)}", style="bold"))
        if preview.problem is not None or scores is None:
            problem = preview.problem
            parts.append(Text(visible_text(f"{problem.problem}. {problem.cure}") if problem else "", style="red"))
            continue
        parts += [Text(f"! {visible_text(str(suspicion))}", style="bold red") for suspicion in preview.suspicions]
        has_image = any(segment.kind == "image" for segment in preview.segments)
        note = "" if has_image else "; no image: nothing is taken away, all deltas are 0"
        parts.append(Text(preview.counts + note, style="dim"))
        parts += [
            _tokens(preview, scores["delta"].tolist(), low, high, has_colours),
            _numbers(preview, scores, low, high),
        ]
    return Group(*parts)


def _place(delta: float, low: float, high: float) -> str:
    return "low" if delta <= low else "high" if delta >= high else "between"


def _legend(low: float, high: float, has_colours: bool) -> Text:
    legend = Text("delta = logit with the image - without: ")
    meanings = {"low": f"up to {low:g} (low clamp)", "between": "between", "high": f"{high:g} and more (high clamp)"}
    for (place, meaning), delta in zip(meanings.items(), (low, (low + high) / 2, high), strict=True):
        legend.append(f" {meaning} " if has_colours else f"[{SIGNS[place]}] {meaning}", _style(delta, low, high))
        legend.append("  ")
    return legend


def _style(delta: float, low: float, high: float) -> str:
    """Return black or white on the delta's colour, which runs between the limits."""
    colour = colormaps["YlOrRd"](Normalize(min(low, 0.0), high, clip=True)(delta))
    is_dark = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] < 0.5
    return f"{'white' if is_dark else 'black'} on {to_hex(colour)}"


def _tokens(preview: Preview, deltas: Sequence[float], low: float, high: float, has_colours: bool) -> Text:
    text, left = Text(), iter(deltas)
    for segment in preview.segments:
        shown = visible_text(segment.text).replace("\n", "⏎\n")
        if segment.kind != "supervised":
            text.append(shown, style="dim")
            continue
        delta = next(left)
        text.append(shown, style=_style(delta, low, high) if has_colours else "")
        if not has_colours:
            text.append(f"[{SIGNS[_place(delta, low, high)]}]")
    return text


def _numbers(preview: Preview, scores: Scores, low: float, high: float) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    for name in ("with", "without", "delta", "weight"):
        table.add_column(name, justify="right")
    table.add_column("clamp")
    names = ("logit_with", "logit_without", "delta", "weight")
    labelled = [segment.text for segment in preview.segments if segment.kind == "supervised"]
    for token, *values in zip(labelled, *(scores[name].tolist() for name in names), strict=True):
        place = _place(values[2], low, high)
        token_cell = Text(visible_text(token).replace("\n", "⏎"), style=_style(values[2], low, high))
        table.add_row(token_cell, *(f"{value:.2f}" for value in values), "" if place == "between" else place)
    return table
