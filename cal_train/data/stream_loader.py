"""The endless supply of batches: workers that follow the plan, a position that is a number, and the bookkeeping.

It serves pairs (`cal_train.data.pair_batches`) and samples (`cal_train.data.sample_stream`) alike: what a row is, and
how rows become a batch, is said by the blocks and by the `MakeBatch` that a stream is given.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cal_train.data.stream_files import Blocks
from cal_train.data.stream_plan import EpochPlan, Share
from cal_train.data.workers import loader_context
from cal_train.types import DropCount, Problem

logger = logging.getLogger(__name__)

Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


@dataclass(frozen=True)
class StreamBatch:
    """A batch and what it cost.

    Attributes:
        inputs: What the model is given.
        sample_ids: Names of the rows.
        dropped: Bad rows that were to be in this batch, or to stand in for one.
        num_cut: Texts that lost tokens to the length limit.
        num_repeated: Rows that stand in for bad ones and so occur a second time in the epoch.
    """

    inputs: dict[str, Any]
    sample_ids: list[str]
    dropped: list[Problem] = field(default_factory=list)
    num_cut: int = 0
    num_repeated: int = 0

    def pin_memory(self) -> "StreamBatch":
        """Return the batch with its tensors in page-locked memory; PyTorch calls this."""
        pinned = {name: value.pin_memory() for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        return replace(self, inputs=self.inputs | pinned)


class MakeBatch(Protocol[Row_contra]):
    """Turns rows of a window into a batch."""

    def __call__(
        self,
        window: Sequence[Row_contra | Problem],
        chosen: Sequence[int],
        spare: Iterable[int],
        rng: np.random.Generator,
    ) -> StreamBatch:
        """Return the batch of the ``chosen`` rows of a window; those of ``spare`` may stand in for bad ones."""
        ...


class RowStream(IterableDataset, Generic[Row]):
    """The batches of one rank, from a position on; every worker makes those whose number is its own modulo workers."""

    def __init__(
        self,
        blocks: Sequence[Blocks[Row]],
        weights: Sequence[float],
        make_batch: MakeBatch[Row],
        rows_per_batch: int,
        share: Share = Share(),  # noqa: B008 (frozen)
        shuffle_pool: int = 4096,
        seed: int = 0,
        layout: Mapping[str, Any] | None = None,
    ):
        """Plan the first epoch.

        Args:
            blocks: The files of each source.
            weights: Of the sources.
            make_batch: Makes the batches.
            rows_per_batch: Rows of a batch on one rank.
            share: Rank and number of ranks.
            shuffle_pool: Encoded rows that a worker holds and mixes.
            seed: Of the order and of all that is drawn per batch; equal on all ranks.
            layout: What else a position depends on, and has to be equal where a run goes on.

        Raises:
            ValueError: If there is no source, or fewer rows than one batch per rank.
        """
        if not blocks:
            raise ValueError("no data: give data_path, or a list of sources under data")
        if min(rows_per_batch, shuffle_pool) < 1:
            raise ValueError(f"{rows_per_batch} rows per batch, shuffle_pool {shuffle_pool}: both are at least 1")
        self.blocks = list(blocks)
        self.plan = EpochPlan([own.lengths for own in blocks], weights, rows_per_batch, shuffle_pool, seed)
        self.make_batch, self.share = make_batch, share
        self.layout = dict(layout or {"batch_size": rows_per_batch})
        self.position = 0
        if not len(self):
            raise ValueError(
                f"{int(self.plan.source_rows.sum())} rows do not fill a batch of {rows_per_batch} on each of "
                f"{share.world_size} ranks: lower the batch size, or add data"
            )

    def __len__(self) -> int:
        return self.plan.num_batches(self.share.world_size)

    def __iter__(self) -> Iterator[StreamBatch]:
        # DataLoader asks its worker 0 first, whatever the position is.
        info = get_worker_info()
        turn, num_workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.position + turn
        share = replace(self.share, worker=first % num_workers, num_workers=num_workers)
        return self._lane(share, first // num_workers)

    def _lane(self, share: Share, start: int) -> Iterator[StreamBatch]:
        """Yield the batches of a lane from its batch ``start`` on."""
        lane, plan = self.plan.lane(share), self.plan
        begun = start // lane.batches_per_window
        for number, (pieces, order) in enumerate(lane.windows(begun), begun):
            rows: list[Row | Problem] = []
            for piece in pieces:
                rows.extend(self.blocks[piece.source].read(piece.block, piece.start, piece.stop))
            first = number * lane.batches_per_window
            for batch in range(max(start, first), first + len(order) // plan.rows_per_batch):
                order_from_here = np.roll(order, -(batch - first) * plan.rows_per_batch).tolist()
                chosen, spare = order_from_here[: plan.rows_per_batch], order_from_here[plan.rows_per_batch :]
                rng = np.random.default_rng([plan.seed, plan.epoch, 4, share.rank, share.worker, batch])
                yield self.make_batch(rows, chosen, spare, rng)


@dataclass
class StreamReport:
    """What has happened since the start of this process, on this rank.

    ``bad`` counts each bad row once, however often it came up, and what opening the files has found.
    """

    batches: int = 0
    bad: DropCount = field(default_factory=DropCount)
    num_cut: int = 0
    num_repeated: int = 0

    def add(self, batch: StreamBatch) -> None:
        """Count a batch."""
        self.batches += 1
        self.num_cut += batch.num_cut
        self.num_repeated += batch.num_repeated
        self.add_problems(batch.dropped)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        """Count and name problems whose row is new."""
        for problem in problems:
            if self.bad.add(problem):
                logger.warning("left out: %s", problem)


class StreamLoader:
    """Batches of one rank, epoch after epoch; goes on exactly where a saved state stood.

    Iterating runs to the end of the current epoch; the next iteration is the next epoch. All ranks have equally many
    batches in an epoch. Every rank's state is the same, so one saved state serves all.
    """

    def __init__(
        self,
        stream: RowStream[Any],
        num_workers: int = 0,
        max_bad_samples: int | None = 0,
        batch_timeout_s: float = 600,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ):
        """Prepare the workers.

        Args:
            stream: The batches.
            num_workers: Processes that read and decode; 0 works in this process. The order of rows depends on it.
            max_bad_samples: Bad rows of this rank before an error; None leaves the counting to who takes the batches.
            batch_timeout_s: Seconds that workers may take for a batch.
            pin_memory: Whether batches are put into page-locked memory.
            prefetch_factor: Batches that a worker has ready. Default: 2.

        Raises:
            ValueError: If opening the sources has found more problems than allowed.
        """
        self.stream, self.num_workers, self.max_bad_samples = stream, num_workers, max_bad_samples
        self.batch_timeout_s, self.pin_memory, self.prefetch_factor = batch_timeout_s, pin_memory, prefetch_factor
        self.report = StreamReport()
        self._wait_s = 0.0
        if max_bad_samples is not None:
            self.report.add_problems([problem for blocks in stream.blocks for problem in blocks.problems])
            self._check_bad(max_bad_samples)

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return len(self.stream)

    def __iter__(self) -> Iterator[StreamBatch]:
        batches = iter(
            DataLoader(
                self.stream,
                batch_size=None,
                num_workers=self.num_workers,
                multiprocessing_context=loader_context(self.num_workers),
                timeout=self.batch_timeout_s if self.num_workers else 0,
                pin_memory=self.pin_memory,
                prefetch_factor=self.prefetch_factor if self.num_workers else None,
                # Or DataLoader draws from the global generator, and a resumed run has another one.
                generator=torch.Generator().manual_seed(self.stream.plan.seed),
            )
        )
        while self.stream.position < len(self):
            start = time.perf_counter()
            batch: StreamBatch = next(batches)
            self._wait_s += time.perf_counter() - start
            if self.max_bad_samples is not None:
                self.report.add(batch)
                self._check_bad(self.max_bad_samples)
            self.stream.position += 1
            yield batch
        self.set_epoch(self.stream.plan.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the current one."""
        if epoch != self.stream.plan.epoch:
            self.stream.plan = replace(self.stream.plan, epoch=epoch)
            self.stream.position = 0

    def read_and_reset_wait_s(self) -> float:
        """Return the seconds spent waiting for batches since the last call."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and all that its meaning depends on; plain numbers."""
        return {"epoch": self.stream.plan.epoch, "position": self.stream.position, **self._layout()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: If data, seed, batch size, ranks or workers are not those of the saved run.
        """
        for name, value in self._layout().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved stream position is for {name} {state.get(name)}, this run has {value}: set it back to "
                    "go on exactly"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or position < 0:
            raise ValueError(f"the saved stream position, {position} of epoch {epoch}, is none")
        self.set_epoch(epoch)
        self.stream.position = position
        if self.stream.position >= len(self):
            self.set_epoch(self.stream.plan.epoch + 1)

    def _layout(self) -> dict[str, Any]:
        plan = self.stream.plan
        return {
            "seed": plan.seed,
            **self.stream.layout,
            "world_size": self.stream.share.world_size,
            "num_workers": self.num_workers,
            "shuffle_pool": plan.window_rows,
            "rows": [len(lengths) for lengths in plan.block_lengths] + plan.source_rows.tolist(),
        }

    def _check_bad(self, allowed: int) -> None:
        bad = self.report.bad
        if bad.count > allowed:
            raise ValueError(
                f"{bad.count} bad rows, max_bad_samples is {allowed}; the last of them: {bad.problems[-1]}"
            )
