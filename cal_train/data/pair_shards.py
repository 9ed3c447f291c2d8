"""Webdataset shards: counting the rows of a tar file from its headers, and reading them.

A row is the members of one name in sequence: ``0001.jpg``, ``0001.txt``, ``0001.json``. Nothing is unpacked to disk.
"""

import json
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from cal_train.data.pairs import CAPTION_COLUMNS, Pair, PairSource, parse_pair
from cal_train.types import BadSampleError, Problem

logger = logging.getLogger(__name__)

_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_META = re.compile(r"__[^/]*__($|/)")  # as in webdataset
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)
_CUT = "Write the shard again; what is there of it is used"


@dataclass(frozen=True)
class RowCount:
    """The rows of a shard, and what is wrong with it as a whole."""

    rows: int
    problem: Problem | None = None


def listed_rows(shard: Path) -> RowCount | None:
    """Return the count that a ``sizes.json`` beside the shard gives for its name, None without one.

    Such a file, ``{"00000.tar": 1000, ...}``, saves reading the headers of every shard at each start. A count that is
    too high shows as bad rows, one that is too low as a warning.

    Raises:
        ValueError: If the file is there but malformed.
    """
    sizes = shard.with_name("sizes.json")
    if not sizes.is_file():
        return None
    try:
        rows = json.loads(sizes.read_text(encoding="utf-8")).get(shard.name)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{sizes} is not a mapping from shard names to numbers of rows: {error}") from error
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(f"{sizes}: {rows!r} is not a number of rows for {shard.name}")
    return RowCount(rows)


def count_rows(shard: Path) -> RowCount:
    """Count the rows of a shard from its headers; a cut-off shard has those up to the cut, and a problem.

    Raises:
        ValueError: If the file is not a tar file.
    """
    rows, key, error = 0, None, None
    try:
        with tarfile.open(shard) as tar:
            try:
                for member in tar:
                    prefix = base_plus_ext(member.name)[0] if member.isreg() and not _META.match(member.name) else None
                    rows += prefix is not None and prefix != key
                    key = prefix if prefix is not None else key
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] or the headers of the whole shard stay in memory
            except _TAR_ERRORS as caught:
                error = str(caught)
    except _TAR_ERRORS as caught:
        raise ValueError(f"{shard} is not a readable tar file: {caught}") from caught
    if error is None and shard.suffix == ".tar" and not _has_end_mark(shard):
        error = "it has no end mark"
    if error is None:
        return RowCount(rows)
    return RowCount(rows, Problem(str(shard), rows, shard.stem, f"the shard is cut off ({error})", _CUT))


def _has_end_mark(shard: Path) -> bool:
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        return file.read() == bytes(1024)


def read_shard(shard: Path, num_rows: int, source: PairSource) -> Iterator[Pair | Problem]:
    """Yield ``num_rows`` rows of a shard; rows that are not there are problems, so that the number holds."""
    row, errors = 0, list[Exception]()
    try:
        with shard.open("rb") as file:
            for members in group_by_keys(_members(file, errors)):
                if row == num_rows:
                    logger.warning("%s has more than the %d rows that sizes.json lists", shard, num_rows)
                    break
                yield _pair(members, shard, row, source)
                row += 1
    except (OSError, ValueError) as error:  # of opening; and two members of one name in a row
        errors.append(error)
    what = "; ".join(f"{type(error).__name__}: {error}" for error in errors) or "its end was reached"
    for missing in range(row, num_rows):
        yield Problem(str(shard), missing, f"{shard.stem}-{missing}", f"the shard ends before this row ({what})", _CUT)


def _members(file: BinaryIO, errors: list[Exception]) -> Iterator[dict[str, Any]]:
    """Yield the members up to the first error, so that the row that is complete before it is not lost."""
    try:
        for member in tar_file_iterator(cast(Any, file)):
            yield {**member, "__url__": ""}
    except _TAR_ERRORS as error:
        errors.append(error)


def _pair(members: dict[str, Any], shard: Path, row: int, source: PairSource) -> Pair | Problem:
    key = str(members["__key__"])
    try:
        image = _member(members, (source.image_column,) if source.image_column else _IMAGE_ENDINGS)
        if image is None:
            raise ValueError("no image member")
        return parse_pair(image, _captions(members, source.caption_column), str(shard), row, shard.parent, key)
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
    record = json.loads(members["json"])
    names = CAPTION_COLUMNS if column is None else (column,)
    found = next((name for name in names if isinstance(record, dict) and name in record), None)
    if found is None:
        raise ValueError(f"the json member has none of the fields {', '.join(names)}")
    return record[found]


def _member(members: dict[str, Any], endings: tuple[str, ...]) -> bytes | None:
    return next((members[ending] for ending in endings if ending in members), None)
