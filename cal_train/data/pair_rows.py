"""Pairs as rows of a stream: what a record of a table or the members of a shard become."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cal_train.data.pairs import CAPTION_COLUMNS, Pair, PairSource, find_columns, parse_pair, parse_record
from cal_train.data.stream_files import Blocks, open_files
from cal_train.data.stream_shards import IMAGE_ENDINGS
from cal_train.data.stream_tables import TABLES
from cal_train.types import BadSampleError, Problem


def open_pairs(source: PairSource) -> Blocks[Pair]:
    """Open the files of a source and count their rows.

    Raises:
        ValueError: As `open_files`.
    """
    return open_files(source.path, source.image_root, PairRows(source))


@dataclass(frozen=True)
class PairRows:
    """The `RowFormat` of pairs; the columns are those of `find_columns`."""

    source: PairSource
    tables: tuple[str, ...] = TABLES

    def columns(self, present: Sequence[str], file: str) -> tuple[str, ...]:
        """Return the image and the caption column."""
        return find_columns(present, self.source, file)

    def of_record(self, record: Any, columns: tuple[str, ...], file: str, row: int, root: Path) -> Pair | Problem:
        """Check a row of a table or a Parquet file."""
        image, caption = columns
        return parse_record(record, (image, caption), file, row, root)

    def of_members(self, members: dict[str, Any], shard: Path, row: int) -> Pair | Problem:
        """Check a row of a shard."""
        key, column = str(members["__key__"]), self.source.image_column
        try:
            image = next((members[name] for name in ((column,) if column else IMAGE_ENDINGS) if name in members), None)
            if image is None:
                raise ValueError("no image member")
            captions = _captions(members, self.source.caption_column)
            return parse_pair(image, captions, str(shard), row, shard.parent, key)
        except BadSampleError as error:
            return error.problem
        except ValueError as error:
            found = ", ".join(name for name in members if not name.startswith("__"))
            return Problem(str(shard), row, key, f"{error} (found {found})", "Set image_column and caption_column")


def _captions(members: dict[str, Any], column: str | None) -> Any:
    if "txt" in members and column in (None, "txt"):
        return members["txt"].decode("utf-8")  # a UnicodeDecodeError is a ValueError
    if "json" not in members:
        raise ValueError("no caption member")
    try:
        record = json.loads(members["json"])
    except RecursionError as error:
        raise ValueError("the json member is nested too deep") from error
    names = CAPTION_COLUMNS if column is None else (column,)
    found = next((name for name in names if isinstance(record, dict) and name in record), None)
    if found is None:
        raise ValueError(f"the json member has none of the fields {', '.join(names)}")
    return record[found]
