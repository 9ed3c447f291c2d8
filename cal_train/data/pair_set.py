"""An evaluation set: all pairs of some sources in file order, one entry per image with all of its captions."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from cal_train.data.images import DEFAULT_LIMITS, ImageLimits, open_image
from cal_train.data.pair_images import EvaluationTransform
from cal_train.data.pair_rows import open_pairs
from cal_train.data.pairs import Pair, PairSource
from cal_train.types import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSet:
    """Images with their captions: ``captions[k]`` belongs to image ``image_of_text[k]`` (texts,) int64."""

    images: tuple[Pair, ...]
    captions: tuple[str, ...]
    image_of_text: torch.Tensor

    @staticmethod
    def of(pairs: Iterable[Pair]) -> "PairSet":
        """Return a set of pairs; those with the same image file (or the same bytes) are one image."""
        merged: dict[int, Pair] = {}
        for pair in pairs:
            known = merged.get(pair.image_id)
            merged[pair.image_id] = replace(known, captions=known.captions + pair.captions) if known else pair
        images = tuple(merged.values())
        owners = [i for i, pair in enumerate(images) for _ in pair.captions]
        return PairSet(images, tuple(text for pair in images for text in pair.captions), torch.tensor(owners))


def read_pair_set(
    sources: Sequence[PairSource], max_bad_samples: int = 0, limits: ImageLimits = DEFAULT_LIMITS
) -> PairSet:
    """Read and check everything: images are decoded once, so that a set that was read can be evaluated.

    Weights of the sources are not used. Encoded images of shards and Parquet files stay in memory.

    Raises:
        ValueError: If a source cannot be read, more rows are bad than allowed, or none is good.
    """
    pairs, num_bad = list[Pair](), 0
    for source in sources:
        for row in _rows(source, limits):
            if isinstance(row, Pair):
                pairs.append(row)
                continue
            num_bad += 1
            if num_bad > max_bad_samples:
                raise ValueError(f"{row}\n{num_bad} bad rows, max_bad_samples is {max_bad_samples}")
            logger.warning("left out: %s", row)
    if not pairs:
        raise ValueError(f"no usable pair in {', '.join(source.path for source in sources) or 'no source'}")
    return PairSet.of(pairs)


def _rows(source: PairSource, limits: ImageLimits) -> Iterator[Pair | Problem]:
    blocks = open_pairs(source)
    yield from blocks.problems
    for block, length in enumerate(blocks.lengths.tolist()):
        for row in blocks.read(block, 0, length):
            yield _decodable(row, limits) if isinstance(row, Pair) else row


def _decodable(pair: Pair, limits: ImageLimits) -> Pair | Problem:
    try:
        open_image(pair.image, limits)
    except ValueError as error:
        return Problem(pair.file, pair.row, pair.id, str(error), "Replace the image, or drop the row")
    return pair


def image_batches(
    images: Sequence[Pair], transform: EvaluationTransform, batch_size: int, limits: ImageLimits = DEFAULT_LIMITS
) -> Iterator[torch.Tensor]:
    """Yield ``pixel_values`` (images of a batch, 3, H, W) in order."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        yield torch.stack([transform(open_image(pair.image, limits)) for pair in batch])
