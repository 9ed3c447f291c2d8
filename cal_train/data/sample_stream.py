"""Samples as rows of a stream: training data that is too large to be held or indexed.

A source is Parquet files with images as bytes, as `datasets` image columns or as paths; JSON or JSONL files; or
webdataset shards. A row of a shard is one ``.json`` member with a row as `cal_train.data.records` knows them, and its
image members, ``KEY.jpg`` or ``KEY.0.jpg``, ``KEY.1.jpg``, and so on.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cal_train.conf import DataArguments
from cal_train.data.collate import Collator
from cal_train.data.examples import SampleEncoder
from cal_train.data.records import parse_row, row_id, starts_with_answer
from cal_train.data.sources import Source, training_sources
from cal_train.data.stream_files import Blocks, open_files
from cal_train.data.stream_loader import RowStream, StreamBatch
from cal_train.data.stream_plan import Share
from cal_train.data.stream_shards import IMAGE_ENDINGS
from cal_train.types import BadSampleError, Problem, Sample

_COLUMNS = ("id", "image", "images", "conversations", "messages")


class SampleRows:
    """The `RowFormat` of samples. ``num_leading_answers`` counts rows whose first turn, the assistant's, is dropped."""

    tables = (".json", ".jsonl")

    def __init__(self, image_root: Path | None):
        self.image_root = image_root
        self.num_leading_answers = 0

    def columns(self, present: Sequence[str], file: str) -> tuple[str, ...]:
        """Return the columns of a row that are there.

        Raises:
            ValueError: If there are neither conversations nor messages.
        """
        if not {"conversations", "messages"} & set(present):
            found = ", ".join(map(str, present)) or "nothing"
            raise ValueError(f"{file} has neither a column 'conversations' nor 'messages', but {found}")
        return tuple(name for name in _COLUMNS if name in present)

    def of_record(self, record: Any, columns: tuple[str, ...], file: str, row: int, root: Path) -> Sample | Problem:
        """Check a row of a table or a Parquet file."""
        self.num_leading_answers += starts_with_answer(record)
        try:
            return parse_row(record, file, row, root)
        except BadSampleError as error:
            return error.problem

    def of_members(self, members: dict[str, Any], shard: Path, row: int) -> Sample | Problem:
        """Check a row of a shard; its images are members of the row, or else files inside the image root."""
        key = str(members["__key__"])
        try:
            record = json.loads(members["json"])
        except KeyError:
            found = ", ".join(name for name in members if not name.startswith("__"))
            return Problem(str(shard), row, key, f"no json member (found {found})", f"Add {key}.json with the row")
        except (ValueError, RecursionError) as error:
            return Problem(str(shard), row, key, f"the json member is not JSON: {error}", "Write the shard again")
        if isinstance(record, dict):
            record = with_member_images({**record, "id": row_id({"id": key} | record, shard, row)}, key, members)
        return self.of_record(record, (), str(shard), row, self.image_root or shard.parent)


def with_member_images(record: dict[str, Any], key: str, members: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the bytes of its image members put in place.

    An image that the row names is the member of that name, with or without the key in front (``0001.0.jpg``,
    ``0.jpg``). If it names as many as there are members, and none by a member's name (the path that an image had before
    it went into the shard), or none at all, the members are taken in order: those without a number first.
    """
    images = {name: data for name, data in members.items() if name.rpartition(".")[2] in IMAGE_ENDINGS}
    in_order = [{"bytes": images[name]} for name in sorted(images, key=_place)]

    def found(value: Any) -> Any:
        name = value.rpartition("/")[2].lower().removeprefix(f"{key.rpartition('/')[2].lower()}.") if _is(value) else ""
        return {"bytes": images[name]} if name in images else value

    def placed(values: list[Any]) -> list[Any]:
        by_name = [found(value) for value in values]
        is_by_path = len(values) == len(in_order) and all(map(_is, by_name))
        return in_order if is_by_path or not values else by_name

    inline: list[Any] = []
    _replace_inline(record.get("messages"), inline.append)
    column = next((name for name in ("image", "images") if record.get(name) is not None), None)
    if inline and column is None:
        new = iter(placed(inline))
        return {**record, "messages": _replace_inline(record["messages"], lambda _: next(new))}
    named = record[column] if column is not None else []
    values = placed(named if isinstance(named, list) else [named])
    return {**record, column or "images": values} if values else record


def _is(value: Any) -> bool:
    return isinstance(value, str)


def _place(name: str) -> tuple[int, str]:
    number = re.match(r"\d{1,9}(?=\.)", name)
    return int(number[0]) if number else -1, name


def _replace_inline(messages: Any, new: Callable[[Any], Any]) -> Any:
    """Return messages with each image that a part names replaced by what ``new`` makes of it."""

    def replaced(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "image_url") or part.get(kind) is None:
            return part
        value = part[kind]
        return {**part, kind: new(value.get("url") if isinstance(value, dict) and "url" in value else value)}

    return [
        {**turn, "content": [replaced(part) for part in turn["content"]]}
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        else turn
        for turn in (messages if isinstance(messages, list) else [])
    ]


@dataclass(frozen=True)
class SampleFiles:
    """The opened files of one streamed source; iterating yields all rows in file order."""

    source: Source
    rows: SampleRows
    blocks: Blocks[Sample]

    def __len__(self) -> int:
        return int(self.blocks.lengths.sum())

    def __iter__(self) -> Iterator[Sample | Problem]:
        for block, length in enumerate(self.blocks.lengths.tolist()):
            yield from self.blocks.read(block, 0, length)


def open_sources(options: DataArguments) -> list[SampleFiles]:
    """Open the sources of a streaming recipe and count their rows.

    Raises:
        ValueError: If the recipe asks for what a stream cannot do, or a source cannot be read or is empty.
    """
    check_streaming(options)
    opened = []
    for source in training_sources(options):
        if source.weight <= 0:
            raise ValueError(f"source {source.path}: weight {source.weight} is not positive; leave the source out")
        rows = SampleRows(source.image_root)
        opened.append(SampleFiles(source, rows, open_files(str(source.path), source.image_root, rows)))
    return opened


def check_streaming(options: DataArguments) -> None:
    """Refuse options that need all rows at once.

    Raises:
        ValueError: With what to use instead.
    """
    if options.group_by_modality_length:
        raise ValueError(
            "group_by_modality_length sorts all rows, which streaming: true does not hold: use packing: true, which "
            "takes the padding out too"
        )
    if options.vision_feature_cache is not None:
        raise ValueError(
            "vision_feature_cache is filled for every image before training, which streaming: true does not do: leave "
            "out one of them"
        )


def spread_over_files(files: Sequence[SampleFiles], num_rows: int) -> Iterator[Sample | Problem]:
    """Yield at most ``num_rows`` rows: the first ones of blocks at equal distances, of each source by its length."""
    total = sum(map(len, files))
    for own in files:
        wanted = max(1, round(num_rows * len(own) / total))
        lengths = own.blocks.lengths
        blocks = np.unique(np.linspace(0, len(lengths) - 1, wanted).round().astype(int)).tolist()
        for block in blocks:
            yield from own.blocks.read(block, 0, min(int(lengths[block]), -(-wanted // len(blocks))))


@dataclass(frozen=True)
class ExampleMaker:
    """Turns rows of a window into a batch: each through the encoder, all through the collator. Bad rows are dropped."""

    encoder: SampleEncoder
    collate: Collator

    def make(
        self, window: Sequence[Sample | Problem], chosen: Sequence[int], spare: Iterable[int], rng: np.random.Generator
    ) -> StreamBatch:
        """Return the batch of the ``chosen`` rows; a bad one leaves it smaller, as with map-style data."""
        batch = self.collate([self._example(window[i]) for i in chosen])
        dropped, num_cut = batch.pop("dropped"), batch.pop("num_truncated")
        return StreamBatch(batch, batch.pop("sample_ids"), dropped, num_cut)

    def _example(self, row: Sample | Problem) -> dict[str, Any] | Problem:
        if isinstance(row, Problem):
            return row
        try:
            return self.encoder.encode(row)
        except BadSampleError as error:
            return error.problem


def sample_stream(
    files: Sequence[SampleFiles],
    maker: ExampleMaker,
    batch_size: int,
    share: Share = Share(),  # noqa: B008 (frozen)
    shuffle_pool: int = 1024,
    seed: int = 0,
) -> RowStream[Sample]:
    """Return this rank's batches.

    Args:
        files: The mixture.
        maker: Makes the batches.
        batch_size: Rows of a micro-batch on one rank.
        share: Rank and number of ranks.
        shuffle_pool: Rows that a worker holds and mixes.
        seed: Of the order; equal on all ranks.

    Raises:
        ValueError: If there are fewer rows than one batch per rank.
    """
    blocks, weights = [own.blocks for own in files], [own.source.weight for own in files]
    return RowStream(blocks, weights, maker.make, batch_size, share, shuffle_pool, seed)
