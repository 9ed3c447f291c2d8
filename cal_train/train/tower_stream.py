"""The pair loader as the Trainer wants it: a PyTorch loader that can begin in the middle of an epoch."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from cal_train.data.pair_loader import PairLoader


class EpochBatches(IterableDataset):
    """The rest of an epoch, from where the loader stands.

    On resume, the Trainer takes the batches that were trained already and drops them. They are handed over as empty
    placeholders, so that it counts right and nothing is read twice.
    """

    def __init__(self, loader: PairLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        yield from itertools.repeat(None, self.loader.stream.position)
        for inputs in self.loader:
            yield {**inputs, "sample_ids": self.loader.last_sample_ids}


def epoch_loader(loader: PairLoader) -> DataLoader:
    """Return a loader that passes batches on as they are: the pair loader has its own worker processes."""
    return DataLoader(EpochBatches(loader), batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
