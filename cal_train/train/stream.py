"""A stream of batches as the Trainer wants it: a PyTorch loader that can begin in the middle of an epoch."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from cal_train.data.stream_loader import StreamBatch, StreamLoader

STREAM_FILE = "stream.json"
"""Position in the data, beside every checkpoint; the same on all ranks."""

ToInputs = Callable[[StreamBatch], dict[str, Any]]
"""Makes of a batch what a trainer takes."""


class EpochBatches(IterableDataset):
    """The rest of an epoch, from where the loader stands.

    On resume, the Trainer takes the batches that were trained already and drops them. They are handed over as empty
    placeholders, so that it counts right and nothing is read twice.
    """

    def __init__(self, loader: StreamLoader, to_inputs: ToInputs):
        self.loader, self.to_inputs = loader, to_inputs

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        yield from itertools.repeat(None, self.loader.stream.position)
        for batch in self.loader:
            yield self.to_inputs(batch)


def epoch_loader(loader: StreamLoader, to_inputs: ToInputs) -> DataLoader:
    """Return a loader that passes batches on as they are: the stream has its own worker processes."""
    return DataLoader(EpochBatches(loader, to_inputs), batch_size=None, collate_fn=_as_it_is)


def write_position(loader: StreamLoader, folder: str | Path) -> None:
    """Write the position in the data into a checkpoint."""
    (Path(folder) / STREAM_FILE).write_text(json.dumps(loader.state_dict()), encoding="utf-8")


def read_position(loader: StreamLoader, checkpoint: str | Path) -> None:
    """Go to the position of a checkpoint.

    Raises:
        ValueError: If the checkpoint has none, or its data, ranks, batch size or workers are not those of the run.
    """
    file = Path(checkpoint) / STREAM_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no {STREAM_FILE}: it is of a run without streaming; set streaming: false")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        loader.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{file} is not a position in a stream ({error!r}): resume from another checkpoint") from error


def _as_it_is(batch: Any) -> Any:
    return batch
