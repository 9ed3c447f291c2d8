"""The result of the towers' demo: one row per method, a row for guessing, as a table, Markdown and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from cal_train.data.pair_set import PairSet

CHANCE = "guessing"
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "new_concepts": (
        ("new concepts", "I>T R@1", "image_to_text_1"),
        ("new concepts", "I>T R@5", "image_to_text_5"),
        ("new concepts", "T>I R@1", "text_to_image_1"),
        ("new concepts", "T>I R@5", "text_to_image_5"),
        ("new concepts", "zero-shot", "zero_shot"),
    ),
    "new_style": (("new style", "T>I R@5", "text_to_image_5"), ("new style", "zero-shot", "zero_shot")),
    "new_both": (("both new", "T>I R@5", "text_to_image_5"), ("both new", "zero-shot", "zero_shot")),
}
"""What the table shows of each split; ``results.json`` has all of it."""


@dataclass(frozen=True)
class SplitResult:
    """Shares in [0, 1]: recall at 1 and 5 of captions for an image, of images for a caption, zero-shot accuracy."""

    image_to_text_1: float
    image_to_text_5: float
    text_to_image_1: float
    text_to_image_5: float
    zero_shot: float


@dataclass(frozen=True)
class MethodResult:
    """A row: scores by split, seconds of a training step (data aside), peak memory and seconds of the whole command."""

    method: str
    splits: Mapping[str, SplitResult]
    step_seconds: float
    peak_memory_gib: float
    seconds: float


def chance_row(splits: Mapping[str, PairSet]) -> MethodResult:
    """Return what guessing would score: every order of the candidates equally likely."""
    rows = {}
    for split, pairs in splits.items():
        num_images, num_texts = len(pairs.images), len(pairs.captions)
        own = [len(pair.captions) for pair in pairs.images]
        found = {k: sum(_hit(num_texts, n, k) for n in own) / num_images for k in (1, 5)}
        rows[split] = SplitResult(found[1], found[5], 1 / num_images, min(5 / num_images, 1), 1 / num_images)
    return MethodResult(CHANCE, rows, math.nan, math.nan, math.nan)


def _hit(num_candidates: int, num_right: int, k: int) -> float:
    """Return the probability that one of the right candidates is among k drawn ones."""
    return 1 - math.comb(num_candidates - num_right, k) / math.comb(num_candidates, k)


def table_of(results: Sequence[MethodResult], chance: MethodResult) -> Table:
    """Return the table for the terminal."""
    table = Table(
        title="Held-out retrieval (I>T, T>I) and zero-shot classification in percent; cost against the first row"
    )
    for header in _headers(results):
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in (*results, chance):
        table.add_row(*_cells(row, results[0]))
    return table


def markdown_of(results: Sequence[MethodResult], chance: MethodResult) -> str:
    """Return the table as Markdown."""
    headers = _headers(results)
    rows = [headers, ["---"] * len(headers), *(_cells(row, results[0]) for row in (*results, chance))]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def write_tower_results(folder: Path, results: Sequence[MethodResult], chance: MethodResult) -> None:
    """Write ``results.json`` and ``results.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in results] + [{"method": CHANCE, "splits": asdict(chance)["splits"]}]
    (folder / "results.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (folder / "results.md").write_text(markdown_of(results, chance), encoding="utf-8")


def _headers(results: Sequence[MethodResult]) -> list[str]:
    scores = [f"{title}: {measure}" for split in results[0].splits for title, measure, _ in COLUMNS[split]]
    return ["method", *scores, "step s", "x", "peak GiB", "x"]


def _cells(row: MethodResult, first: MethodResult) -> list[str]:
    shares = [getattr(found, name) for split, found in row.splits.items() for _, _, name in COLUMNS[split]]
    scores = [f"{100 * share:.1f}" for share in shares]
    if row.method == CHANCE:
        return [row.method, *scores, "", "", "", ""]
    costs = [(row.step_seconds, first.step_seconds), (row.peak_memory_gib, first.peak_memory_gib)]
    return [row.method, *scores, *(cell for own, its in costs for cell in (f"{own:.2f}", f"{own / its:.2f}"))]
