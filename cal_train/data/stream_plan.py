"""Which rows each rank and worker reads in an epoch, as a function of numbers alone.

An epoch draws blocks from every source, puts them into random order, and lays the rows of all lanes (a lane is one
worker of one rank) behind each other: lanes share no row and leave out less than one global batch. A lane reads its
rows in windows that it mixes. As nothing depends on what was read, a position in the stream is the number of batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Share:
    """Which part of the stream a process reads: rank of ranks, worker of workers."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of one block of one source."""

    source: int
    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch.

    Attributes:
        block_lengths: Rows of every block of every source.
        weights: Of the sources; source s gives ``round(weight * rows)`` rows per epoch.
        rows_per_batch: Rows (images) that a rank takes in one step.
        window_rows: Rows that a lane mixes; brought to a multiple of ``rows_per_batch``.
        seed, epoch: What the draw depends on.
    """

    block_lengths: Sequence[np.ndarray]
    weights: Sequence[float]
    rows_per_batch: int
    window_rows: int
    seed: int = 0
    epoch: int = 0

    @cached_property
    def source_rows(self) -> np.ndarray:
        """Rows that each source gives in this epoch, (sources,) int64."""
        pairs = zip(self.block_lengths, self.weights, strict=True)
        return np.array([round(weight * int(lengths.sum())) for lengths, weight in pairs], np.int64)

    def num_batches(self, world_size: int) -> int:
        """Return the batches of each rank, equal for all ranks and independent of the workers."""
        return int(self.source_rows.sum()) // (world_size * self.rows_per_batch)

    def left_out(self, world_size: int) -> int:
        """Return the rows at the end of the epoch that do not fill a batch of every rank; other ones each epoch."""
        return int(self.source_rows.sum()) - self.num_batches(world_size) * world_size * self.rows_per_batch

    def lane_batches(self, share: Share) -> int:
        """Return the batches of a lane. Batch k of a rank is made by worker ``k % num_workers``."""
        return -((share.worker - self.num_batches(share.world_size)) // share.num_workers)

    def lane(self, share: Share) -> "Lane":
        """Return the windows of a lane."""
        lanes = [
            Share(rank, share.world_size, worker, share.num_workers)
            for rank in range(share.world_size)
            for worker in range(share.num_workers)
        ]
        # Each lane takes of every source in proportion, drawn without replacement so that the sums come out exactly.
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        first, left = np.zeros_like(self.source_rows), self.source_rows.copy()
        for lane in lanes:
            counts = _draw_counts(left, self.lane_batches(lane) * self.rows_per_batch, rng)
            if lane == share:
                return Lane(self, share, first, counts)
            first, left = first + counts, left - counts
        raise ValueError(f"{share} does not exist")

    def pieces(self, source: int, start: int, stop: int) -> list[Piece]:
        """Return rows ``start`` to ``stop`` of a source in this epoch's order."""
        blocks, ends = self._block_order[source]
        found = []
        i = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            block, first = int(blocks[i]), int(ends[i - 1]) if i else 0
            until = min(stop, int(ends[i]))
            found.append(Piece(source, block, start - first, until - first))
            start, i = until, i + 1
        return found

    @cached_property
    def _block_order(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per source: its blocks in the order of this epoch, and the number of rows up to the end of each."""
        orders = []
        for source, lengths in enumerate(self.block_lengths):
            rng = np.random.default_rng([self.seed, self.epoch, 0, source])
            rounds = -(-int(self.source_rows[source]) // int(lengths.sum()))
            blocks = np.concatenate([rng.permutation(len(lengths)) for _ in range(rounds)] or [np.empty(0, np.int64)])
            orders.append((blocks, np.cumsum(lengths[blocks])))
        return orders


@dataclass(frozen=True)
class Lane:
    """The rows of one worker of one rank: ``counts`` rows of each source, from row ``first`` of its order on."""

    plan: EpochPlan
    share: Share
    first: np.ndarray
    counts: np.ndarray

    @property
    def batches_per_window(self) -> int:
        """Batches that are taken from one window."""
        return max(1, self.plan.window_rows // self.plan.rows_per_batch)

    @property
    def num_batches(self) -> int:
        """Batches of this lane in the epoch."""
        return int(self.counts.sum()) // self.plan.rows_per_batch

    def windows(self, start: int = 0) -> Iterator[tuple[list[Piece], np.ndarray]]:
        """Yield the pieces of each window from number ``start`` on, and the order of its rows, a permutation int64."""
        rng = self._rng(2)
        rows = self.batches_per_window * self.plan.rows_per_batch
        first, left = self.first, self.counts
        for number in range(-(-self.num_batches // self.batches_per_window)):
            counts = _draw_counts(left, min(rows, int(left.sum())), rng)
            if number >= start:
                pieces = [
                    piece
                    for source, count in enumerate(counts.tolist())
                    for piece in self.plan.pieces(source, int(first[source]), int(first[source]) + count)
                ]
                yield pieces, self._rng(3, number).permutation(int(counts.sum()))
            first, left = first + counts, left - counts

    def _rng(self, *purpose: int) -> np.random.Generator:
        share, plan = self.share, self.plan
        return np.random.default_rng([plan.seed, plan.epoch, *purpose, share.rank, share.worker])


def _draw_counts(left: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return how many of ``total`` draws without replacement fall on each source, (sources,) int64."""
    if len(left) == 1:
        return np.array([total], np.int64)
    return rng.multivariate_hypergeometric(left, total, method="marginals")
