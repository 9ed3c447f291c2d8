"""How long the rows of a data set are in tokens, measured on some of them without decoding an image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cal_train.data.dataset import VlmDataset
from cal_train.data.examples import SampleEncoder
from cal_train.data.images import count_image_tokens, read_size
from cal_train.types import BadSampleError, Problem, Sample


@dataclass(frozen=True)
class RowLengths:
    """Image tokens, text tokens, label tokens and images of each row, and how many rows could not be used."""

    image: Sequence[int]
    text: Sequence[int]
    labels: Sequence[int]
    images: Sequence[int]
    num_bad: int

    def total(self, row: int) -> int:
        """Return the tokens of a row."""
        return self.image[row] + self.text[row]


def spread_rows(dataset: VlmDataset, num_rows: int) -> Iterator[Sample | Problem]:
    """Yield at most ``num_rows`` rows, at equal distances over the epoch that is set."""
    for i in np.unique(np.linspace(0, len(dataset) - 1, num_rows).round().astype(int)).tolist():
        try:
            yield dataset.load_sample(i)
        except BadSampleError as error:
            yield error.problem


def sample_lengths(samples: Iterable[Sample | Problem], encoder: SampleEncoder) -> RowLengths:
    """Return the lengths of rows.

    Args:
        samples: From `spread_rows`, or of a stream.
        encoder: Of the recipe.

    Raises:
        ValueError: If none of them can be used.
    """
    rows: list[tuple[int, int, int, int]] = []
    num_bad = 0
    for sample in samples:
        if isinstance(sample, Problem):
            num_bad += 1
            continue
        try:
            sizes = [read_size(image, encoder.limits) for image in sample.images]
            usable = [size for size in sizes if size is not None]
            per_image = count_image_tokens(encoder.processor, usable)
            if len(usable) < len(sizes):
                num_bad += 1
                continue
            example = encoder.tokenize(sample, per_image)
        except BadSampleError:
            num_bad += 1
            continue
        num_labels = int((example.labels[1:] >= 0).sum())
        rows.append((sum(per_image), len(example.input_ids) - sum(per_image), num_labels, len(sizes)))
    if not rows:
        raise ValueError(f"none of the {num_bad} rows that were looked at can be used: run `cal-train check_data`")
    image, text, labels, images = (list(values) for values in zip(*rows, strict=True))
    return RowLengths(image, text, labels, images, num_bad)
