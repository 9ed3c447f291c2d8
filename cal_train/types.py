"""The values that travel between the stages, in the order in which they are made.

``Sample`` -> ``TokenizedExample`` -> batch (a plain ``dict``, see `cal_train.data.collate`) -> model.

Shape letters used across the package: B rows of a batch, S sequence after image expansion, N supervised (label)
tokens of a batch, V vocabulary, D width, P patches of one image, I images of a batch.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

IGNORE_INDEX = -100
"""Label of a token that is not supervised; Hugging Face's and PyTorch's convention. Labels are never pre-shifted."""

IMAGE_MARK = "<image>"
"""How a data file marks the place of an image inside a text."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn. ``content`` is text with one ``IMAGE_MARK`` per image, in place."""

    role: Role
    content: str


@dataclass(frozen=True)
class Sample:
    """One row of a data file, checked for form but with its images not yet opened.

    ``images`` are resolved paths inside the image root of the row's source (or encoded bytes, for Parquet rows that
    carry them), in the order of their marks.
    """

    id: str
    file: str
    row: int
    messages: tuple[Message, ...]
    images: tuple[Path | bytes, ...] = ()


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one sample with image placeholders already expanded.

    ``input_ids`` and ``labels`` are int64 of shape (S,); labels are unshifted, ``IGNORE_INDEX`` where not supervised.
    ``image_spans`` holds one half-open (start, end) range per image. ``num_cut`` counts text tokens lost to truncation.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_spans: tuple[tuple[int, int], ...] = ()
    num_cut: int = 0


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row, where, and what to do about it."""

    file: str
    row: int
    id: str
    problem: str
    cure: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (id {self.id!r}): {self.problem}. {self.cure}"


class BadSampleError(ValueError):
    """Raised for a row that cannot be trained on; carries the `Problem`."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem

    def __reduce__(self):  # crosses the DataLoader's process border with its problem intact
        return (type(self), (self.problem,))


@dataclass
class DropCount:
    """Rows dropped so far, and the first few by name, so that nothing is lost without a trace."""

    count: int = 0
    problems: list[Problem] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set, repr=False)

    def add(self, problem: Problem) -> bool:
        """Count a problem whose row is new, keep it if it is among the first hundred, and return whether it was new."""
        place = (problem.file, problem.row)
        if place in self._seen:
            return False
        self._seen.add(place)
        self.count += 1
        if len(self.problems) < 100:
            self.problems.append(problem)
        return True
