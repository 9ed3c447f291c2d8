"""How long the rows of a data set are in tokens, measured on some of them without decoding an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cal_train.data.dataset import VlmDataset
from cal_train.data.images import count_image_tokens, read_size
from cal_train.types import BadSampleError


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


def sample_lengths(dataset: VlmDataset, num_rows: int) -> RowLengths:
    """Return the lengths of rows at equal distances over the data set.

    Args:
        dataset: Whose epoch is looked at.
        num_rows: How many rows, at most.

    Raises:
        ValueError: If none of them can be used.
    """
    rows: list[tuple[int, int, int, int]] = []
    num_bad = 0
    chosen = np.unique(np.linspace(0, len(dataset) - 1, num_rows).round().astype(int))
    for i in chosen.tolist():
        try:
            sample = dataset.load_sample(i)
            sizes = [read_size(image, dataset.limits) for image in sample.images]
            usable = [size for size in sizes if size is not None]
            per_image = count_image_tokens(dataset.processor, usable)
            if len(usable) < len(sizes):
                num_bad += 1
                continue
            example = dataset.tokenize(sample, per_image)
        except BadSampleError:
            num_bad += 1
            continue
        num_labels = int((example.labels[1:] >= 0).sum())
        rows.append((sum(per_image), len(example.input_ids) - sum(per_image), num_labels, len(sizes)))
    if not rows:
        raise ValueError(f"none of the {len(chosen)} rows that were looked at can be used: run `cal-train check_data`")
    image, text, labels, images = (list(values) for values in zip(*rows, strict=True))
    return RowLengths(image, text, labels, images, num_bad)
