"""Score files to samples, checked line by line: a report may be made of a file that somebody else wrote."""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_LISTS = ("label_positions", "tokens", "logit_with", "logit_without", "delta", "weight")


@dataclass(frozen=True)
class ScoredRow:
    """One sample of a score file with N label tokens.

    ``positions`` (N,) int64 are indices into the sample's ``num_tokens`` tokens; ``logit_with``, ``logit_without``,
    ``delta`` (logits) and ``weight`` are (N,) float32. ``num_image_tokens`` is None where the image token is unknown.
    """

    id: str
    tokens: tuple[str, ...]
    positions: np.ndarray
    logit_with: np.ndarray
    logit_without: np.ndarray
    delta: np.ndarray
    weight: np.ndarray
    num_tokens: int
    num_image_tokens: int | None = None
    begins_twice: bool = False
    """The first two tokens are the same one, and no image token."""


def read_scores(path: str | Path, image_token_id: int | None = None) -> list[ScoredRow]:
    """Return the samples of a score file in order.

    Raises:
        ValueError: If the file is missing or empty, or a line is not a record of ``cal-train score``; names the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"score file {path} does not exist: write it with cal-train score")
    texts: dict[str, str] = {}  # equal tokens share one string: a large file repeats few of them
    rows = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(_row(json.loads(line), image_token_id, texts))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"{path}, line {number}: not a score record ({reason}). Write the file with cal-train score"
                ) from error
    if not rows:
        raise ValueError(f"score file {path} has no samples: nothing was scored")
    return rows


def read_input_ids(path: str | Path, wanted: Container[int]) -> dict[int, np.ndarray]:
    """Return the token ids (S,) int64 of some samples of a score file that `read_scores` has read, by line from 0."""
    with Path(path).open("rb") as file:
        return {i: np.asarray(json.loads(line)["input_ids"], np.int64) for i, line in enumerate(file) if i in wanted}


def _row(record: Any, image_token_id: int | None, texts: dict[str, str]) -> ScoredRow:
    if not isinstance(record, Mapping):
        raise ValueError("the line is not an object")
    lengths = {name: len(record[name]) for name in _LISTS}
    if len(set(lengths.values())) != 1:
        raise ValueError("its lists differ in length: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    if not all(isinstance(token, str) for token in record["tokens"]):
        raise ValueError("tokens are not all text")
    numbers = {name: np.asarray(record[name], np.float32) for name in _LISTS[2:]}
    for name, values in numbers.items():
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"{name} is not a list of finite numbers")
    ids = np.asarray(record["input_ids"], np.int64)
    positions = np.asarray(record["label_positions"], np.int64)
    if len(positions) and not (0 <= positions.min() and positions.max() < len(ids)):
        raise ValueError("label_positions reach outside input_ids")
    tokens = tuple(texts.setdefault(token, token) for token in record["tokens"])
    num_image_tokens = None if image_token_id is None else int((ids == image_token_id).sum())
    begins_twice = len(ids) > 1 and ids[0] == ids[1] and image_token_id is not None and ids[0] != image_token_id
    return ScoredRow(
        str(record["id"]),
        tokens,
        positions,
        **numbers,
        num_tokens=len(ids),
        num_image_tokens=num_image_tokens,
        begins_twice=bool(begins_twice),
    )


def words_of(tokens: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Yield half-open (start, end) ranges of tokens that spell one word: up to the next token that begins with a space.

    Letters and digits join; punctuation and marks such as ``<|im_end|>`` stand alone.
    """
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or not (_joins(tokens[i]) and _joins(tokens[i - 1], ends=True)):
            yield start, i
            start = i


def _joins(token: str, ends: bool = False) -> bool:
    """Return whether a token begins (or ends) inside a word."""
    edge = token[-1:] if ends else token[:1]
    return edge.isalnum() or edge in ("'", "’")  # noqa: RUF001


def pair_up(first: list[ScoredRow], second: list[ScoredRow], paths: tuple[str, str]) -> None:
    """Check that two score files are of the same samples with the same labels, in the same order.

    Raises:
        ValueError: With the first difference.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{paths[0]} has {len(first)} samples and {paths[1]} {len(second)}: score the same data with both models"
        )
    for number, (one, other) in enumerate(zip(first, second, strict=True), 1):
        if one.id != other.id or one.tokens != other.tokens:
            raise ValueError(
                f"line {number}: sample {one.id!r} of {paths[0]} and {other.id!r} of {paths[1]} differ in id or label "
                "tokens. A pair needs the same data file, tokenizer and template"
            )
