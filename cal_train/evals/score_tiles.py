"""Scores of images and texts, computed tile by tile: the one thing that every tower evaluation is built on.

Scores, not dot products of two vectors, so that objectives that look at tokens (FILIP) or mix the image anew for every
text (Llip) are evaluated by the same code as CLIP. I images, T texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Features = Mapping[str, Tensor]
"""Named tensors whose first dimension is the image or the text."""

Score = Callable[[Features, Features], Tensor]
"""(image features, text features) -> how well each image fits each text, (I, T); larger is better.
``objective.score`` is one."""


@dataclass(frozen=True)
class Tile:
    """``scores`` (rows, columns) of the images from ``first_image`` on and the texts from ``first_text`` on."""

    first_image: int
    first_text: int
    scores: Tensor


def num_rows(features: Features) -> int:
    """Return how many images or texts the features describe.

    Raises:
        ValueError: If the tensors disagree, or there is none.
    """
    counts = {len(feature) for feature in features.values()}
    if len(counts) != 1:
        raise ValueError(f"features of unequal length: { {name: len(f) for name, f in features.items()} }")
    return counts.pop()


def take(features: Features, start: int, stop: int) -> dict[str, Tensor]:
    """Return rows ``start`` to ``stop`` of every tensor."""
    return {name: feature[start:stop] for name, feature in features.items()}


def join(parts: Sequence[Features]) -> dict[str, Tensor]:
    """Return the rows of all parts behind each other.

    Raises:
        ValueError: If there is no part.
    """
    if not parts:
        raise ValueError("no features to join: the evaluation set is empty")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def score_tiles(
    images: Features,
    texts: Features,
    score: Score,
    tile_size: tuple[int, int] = (256, 1024),
    wanted: Callable[[int, int, int, int], bool] | None = None,
) -> Iterator[Tile]:
    """Yield the score matrix in tiles, row by row.

    Args:
        images: Features of I images.
        texts: Features of T texts.
        score: The scores of a tile.
        tile_size: Images and texts of a tile.
        wanted: Called with (first image, end, first text, end); a tile for which it is false is not computed.

    Raises:
        ValueError: If a score is not a number, naming the pair, or a tile has the wrong shape.
    """
    num_images, num_texts = num_rows(images), num_rows(texts)
    for i in range(0, num_images, tile_size[0]):
        i_end = min(i + tile_size[0], num_images)
        for t in range(0, num_texts, tile_size[1]):
            t_end = min(t + tile_size[1], num_texts)
            if wanted is not None and not wanted(i, i_end, t, t_end):
                continue
            scores = score(take(images, i, i_end), take(texts, t, t_end))
            if scores.shape != (i_end - i, t_end - t):
                raise ValueError(f"scores of shape {tuple(scores.shape)} for {i_end - i} images and {t_end - t} texts")
            if scores.isnan().any():
                row, column = scores.isnan().nonzero()[0].tolist()
                raise ValueError(f"the score of image {i + row} and text {t + column} is not a number")
            yield Tile(i, t, scores)
