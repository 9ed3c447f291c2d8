"""Which rows this rank takes, for training and for the evaluation loss: each row once on all ranks together.

Accelerate would repeat rows where they do not suffice for all ranks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from cal_train.data.sampling import RankBatches
from cal_train.data.workers import loader_context

Collate = Callable[[list[Any]], dict[str, Any]]


def check_same_rows(num_rows: int, data_files: Mapping[str, int]) -> None:
    """Refuse a run whose ranks have found different data; all ranks call this.

    On copies that differ from node to node, rows would be trained twice or never, and ranks with fewer of them would
    leave the others waiting.

    Args:
        num_rows: Of an epoch.
        data_files: Size in bytes of each file.

    Raises:
        ValueError: On all ranks, if one differs from the first.
    """
    own = hashlib.sha256(json.dumps([num_rows, sorted(data_files.items())]).encode()).hexdigest()
    found = gather_object([(own, num_rows)])
    if differing := [rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]]:
        rank = differing[0]
        raise ValueError(
            f"{len(differing)} ranks have found other data files than rank 0, which has {found[0][1]} rows, first rank "
            f"{rank} with {found[rank][1]}: give all nodes the same files, names and sizes"
        )


def train_batches(dataset: Dataset, sampler: Sampler[int], collate: Collate, args: TrainingArguments) -> DataLoader:
    """Return the batches of this rank, equally many on all: a rank that has no rows left gets empty ones.

    Args:
        dataset: Map-style.
        sampler: Order of the rows of all ranks, equal on all.
        collate: Makes a batch, also of no rows.
        args: Batch size, ranks and workers.

    Raises:
        ValueError: If Accelerate is asked to split batches or to send them round, which is done by rank here.
    """
    config = cast(Any, args.accelerator_config)
    if config.split_batches or config.dispatch_batches:
        raise ValueError("accelerator_config: leave out split_batches and dispatch_batches, each rank reads its rows")
    batches = RankBatches(
        sampler, args.train_batch_size, args.process_index, args.world_size, args.dataloader_drop_last
    )
    loader = DataLoader(
        dataset,
        batch_sampler=cast(Any, batches),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=loader_context(args.dataloader_num_workers),
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
    )
    # one process: the rows are dealt out already
    return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)


def eval_batches(dataset: Dataset, collate: Collate, args: TrainingArguments) -> DataLoader:
    """Return the batches of this rank for the evaluation loss, equally many on all."""
    size, world, rank = args.eval_batch_size, args.world_size, args.process_index
    num_rows = len(cast(Sized, dataset))
    num_batches = -(-num_rows // (size * world))
    mine = list(range(rank, num_rows, world))
    batches = [mine[i * size : (i + 1) * size] for i in range(num_batches)]
    return DataLoader(
        dataset,
        batch_sampler=cast(Any, batches),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=loader_context(args.dataloader_num_workers),
    )
