"""The mixture: data files with image roots and weights, what one pass over their rows tells, and an epoch's draw."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cal_train.conf import DataArguments
from cal_train.data.records import Rows, parse_row, row_id, starts_with_answer
from cal_train.types import IMAGE_MARK, BadSampleError, Problem, Sample

_LARGEST_WEIGHT = 10_000
_SOURCE_KEYS = {"path", "image_root", "weight", "scores"}


@dataclass(frozen=True)
class Source:
    """One data file with its image root (default: the file's folder), its weight in the mixture, and its scores."""

    path: Path
    image_root: Path | None = None
    weight: float = 1.0
    scores: Path | None = None

    @property
    def root(self) -> Path:
        """The folder that image paths are relative to."""
        return self.image_root if self.image_root is not None else self.path.parent


@dataclass
class RowSummary:
    """What one cheap pass over a source's rows tells, images unopened.

    ``num_words`` and ``num_images`` (rows,) int32; ``duplicate_ids`` maps an id to how often it occurs, if more than
    once; ``num_leading_answers`` counts rows whose first turn is the assistant's.
    """

    num_words: np.ndarray
    num_images: np.ndarray
    duplicate_ids: dict[str, int] = field(default_factory=dict)
    num_leading_answers: int = 0


def training_sources(options: DataArguments) -> list[Source]:
    """Return the sources of a recipe.

    Raises:
        ValueError: If neither or both of ``data_path`` and ``data`` are given, or an entry of ``data`` is malformed.
    """
    if (options.data_path is None) == (options.data is None):
        raise ValueError("give exactly one of data_path and data (a list of {path, image_root, weight})")
    if options.data_path is not None:
        return [Source(_local(options.data_path), Path(options.image_folder) if options.image_folder else None)]
    if not isinstance(options.data, list) or not options.data:
        raise ValueError("data is a list of sources: [{path: FILE, image_root: DIR, weight: 1.0}, ...]")
    return [_source(i, entry, options.image_folder) for i, entry in enumerate(options.data)]


def _source(i: int, entry: Any, image_folder: str | None) -> Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - _SOURCE_KEYS:
        raise ValueError(f"data[{i}] is {entry!r}: write {{path: FILE, image_root: DIR, weight: 1.0, scores: FILE}}")
    root, weight, scores = entry.get("image_root") or image_folder, entry.get("weight", 1.0), entry.get("scores")
    if scores is not None and not isinstance(scores, str):
        raise ValueError(f"data[{i}]: scores {scores!r} is not the path of a score file")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"data[{i}]: weight {weight!r} is not a number")
    if not weight <= _LARGEST_WEIGHT:  # catches NaN too
        raise ValueError(f"data[{i}]: weight {weight!r} is not a number up to {_LARGEST_WEIGHT}")
    return Source(_local(entry["path"]), Path(root) if root else None, float(weight), Path(scores) if scores else None)


def _local(path: str) -> Path:
    if "://" in path or path.startswith("pipe:"):  # a `Path` would swallow one of the slashes
        raise ValueError(f"{path} is a URL or a command: download the files and give their path")
    return Path(path)


def parsed_rows(source: Source, rows: Rows) -> Iterator[Sample | Problem]:
    """Yield the rows of a data file in order, checked for form; a bad one is its `Problem`."""
    for row in range(len(rows)):
        try:
            yield parse_row(rows[row], source.path, row, source.root)
        except BadSampleError as error:
            yield error.problem


def draw_rows(num_rows: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """Return ``round(weight * num_rows)`` row numbers (int64): whole rounds, then a draw without replacement."""
    rounds, rest = divmod(round(weight * num_rows), num_rows)
    partial = np.sort(rng.choice(num_rows, rest, replace=False)) if rest else np.empty(0, np.int64)
    return np.concatenate([np.tile(np.arange(num_rows), rounds), partial])


def summarize(rows: Rows) -> RowSummary:
    """Read every row once, without opening images; bad rows count as empty (they are reported where they are used)."""
    num_words, num_images = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    ids: Counter[str] = Counter()
    num_leading_answers = 0
    for i in range(len(rows)):
        try:
            raw = rows[i]
        except BadSampleError:
            continue
        num_words[i], num_images[i] = _words_and_images(raw)
        ids[row_id(raw, rows.path, i)] += 1
        num_leading_answers += starts_with_answer(raw)
    duplicates = {id: count for id, count in ids.items() if count > 1}
    return RowSummary(num_words, num_images, duplicates, num_leading_answers)


def modality_lengths(summary: RowSummary, num_image_tokens: np.ndarray) -> np.ndarray:
    """Return words plus image tokens per row, negative where there is no image (LLaVA's convention); never 0.

    Args:
        summary: Of the source.
        num_image_tokens: Of each row, (rows,) int64.
    """
    lengths = np.maximum(summary.num_words.astype(np.int64) + num_image_tokens, 1)
    return np.where(summary.num_images > 0, lengths, -lengths)


def _words_and_images(raw: Any) -> tuple[int, int]:
    turns = (raw.get("conversations") or raw.get("messages")) if isinstance(raw, dict) else None
    num_words = num_images = 0
    for turn in turns if isinstance(turns, list) else []:
        content = (turn.get("value") or turn.get("content")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                num_words += len(text.split())
                num_images += text.count(IMAGE_MARK)
            elif isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                num_images += 1
    return num_words, num_images
