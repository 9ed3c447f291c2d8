"""What maps are made of, as plain arrays: the page and the pictures need no model to read them."""

from dataclasses import dataclass

import numpy as np

NO_TOKEN = -1


@dataclass(frozen=True)
class View:
    """One picture with a grid of image tokens over it.

    ``picture`` (height, width, 3) uint8 RGB; ``tokens`` (rows, columns) int64, an index into the sample's image tokens,
    or ``NO_TOKEN``. ``image`` is the index of the sample's image; ``name`` is ``whole`` or ``tiles``.
    """

    image: int
    name: str
    picture: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class SampleSight:
    """The maps of one sample with N label tokens and M image tokens, by one model.

    ``attention`` (N, M) float32 are shares of all attention, see `cal_train.evals.sight.attention`; ``words`` (M,) are
    the nearest of the vocabulary, ``cosines`` (M,) float32 how near.
    """

    views: list[View]
    attention: np.ndarray
    words: tuple[str, ...]
    cosines: np.ndarray

    @property
    def share_readable(self) -> float:
        """Share of image tokens whose nearest word can be read."""
        return sum(map(is_readable, self.words)) / len(self.words)


def is_readable(text: str) -> bool:
    """Return whether a token can be read as a word or part of one: two letters or more, and nothing else."""
    letters = text.strip()
    return len(letters) > 1 and letters.isalpha()
