"""The order of an epoch: shuffled, or grouped by kind and length."""

from collections.abc import Iterator, Sized
from typing import Protocol, cast

import numpy as np
from torch.utils.data import BatchSampler, Sampler


class EpochDataset(Protocol):
    """What the samplers need of a data set: lengths of the epoch that was set last, negative for text-only rows."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the length of each row, (rows,) int."""
        ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch."""
        ...


class ShuffledSampler(Sampler[int]):
    """Every index once per epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, dataset: EpochDataset, seed: int = 0):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset)).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, and the data set's draw for it (accelerate sets only the sampler's)."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)


class RankBatches(Sampler[list[int]]):
    """The batches of one rank: of each round of batches, one for every rank, its own.

    All ranks have equally many. In the last round of an epoch, whose rows may not suffice for all, the first ranks have
    theirs, at most one a part of a batch, and the others an empty list: every row comes up once on all ranks together.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, world_size: int, drop_last: bool = False):
        """Share out the order of ``sampler``, which must be equal on all ranks; ``drop_last`` leaves that round out."""
        self.sampler, self.batch_size, self.rank, self.world_size = sampler, batch_size, rank, world_size
        self.drop_last = drop_last

    def __len__(self) -> int:
        rounds, rest = divmod(len(cast(Sized, self.sampler)), self.batch_size * self.world_size)
        return rounds + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for round_rows in BatchSampler(self.sampler, self.batch_size * self.world_size, self.drop_last):
            yield round_rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


class ModalityLengthSampler(ShuffledSampler):
    """Every index once per epoch, in mega-batches of one kind (with images, or text only), sorted by length inside.

    A mega-batch is what one optimizer step takes over all ranks. The one that is left over from each kind is put last,
    both together, so at most one step mixes kinds.

    Source: LLaVA's ``group_by_modality_length``. Differs: rows inside a mega-batch stay sorted, longest first, where
    LLaVA deals them out so that each rank's share has about the same sum of lengths; neighbours of equal length need
    less padding. The left-over rows are merged only if they are fewer than a mega-batch.
    """

    def __init__(self, dataset: EpochDataset, megabatch_size: int, seed: int = 0):
        """Sample ``dataset``; ``megabatch_size`` is rows per device x gradient accumulation x ranks."""
        super().__init__(dataset, seed)
        self.megabatch_size = megabatch_size

    def __iter__(self) -> Iterator[int]:
        order = modality_grouped_order(
            np.asarray(self.dataset.lengths), self.megabatch_size, np.random.default_rng([self.seed, self.epoch])
        )
        return iter(order.tolist())


def modality_grouped_order(lengths: np.ndarray, megabatch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a permutation of the rows (int64) as `ModalityLengthSampler` describes it.

    Args:
        lengths: Length of each row, negative for text-only rows; (rows,) int.
        megabatch_size: Rows per mega-batch.
        rng: Source of the shuffles.
    """
    full, left_over = [], []
    for rows in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)):
        rows = rng.permutation(rows)
        num_full = len(rows) // megabatch_size * megabatch_size
        full += list(rows[:num_full].reshape(-1, megabatch_size))
        left_over.append(rows[num_full:])
    last = np.concatenate(left_over)
    megabatches = [full[i] for i in rng.permutation(len(full))] + ([last] if len(last) else [])
    ordered = [rows[np.argsort(-np.abs(lengths[rows]), kind="stable")] for rows in megabatches]
    return np.concatenate(ordered) if ordered else np.empty(0, np.int64)
