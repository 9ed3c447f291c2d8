"""Webdataset shards: counting the rows of a tar file from its headers, and reading them.

A row is the members of one name in sequence: ``0001.jpg``, ``0001.txt``, ``0001.json``. Nothing is unpacked to disk.
"""

import gzip
import json
import logging
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from webdataset.tariterators import base_plus_ext, group_by_keys

from cal_train.types import Problem

logger = logging.getLogger(__name__)

Row = TypeVar("Row")

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
"""Endings of the members that are taken as images."""

_META = re.compile(r"__[^/]*__($|/)")  # as in webdataset
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)
_HEADER_ERRORS = (ValueError, OverflowError, IndexError, RecursionError)  # what Python's reader makes of wild headers
_GZIP = b"\x1f\x8b"
_NAME_TYPES = (*(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), *(b"L", b"K"))
_MOST_NAME_BYTES = 16_384  # of a header that holds names; they are searched in quadratic time
_MOST_ROW_BYTES = 2**28
_MOST_GROWTH = 1100  # of deflate; a member that claims more cannot be there
_CUT = "Write the shard again; what is there of it is used"


@dataclass(frozen=True)
class RowCount:
    """The rows of a shard, and what is wrong with it as a whole."""

    rows: int
    problem: Problem | None = None


class _Header(tarfile.TarInfo):
    """A header that is refused where Python's reader would take the end for reached, or all memory for a name."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(f"a header is damaged: {error}") from error
        if header.size < 0 or (header.type in _NAME_TYPES and header.size > _MOST_NAME_BYTES):
            raise tarfile.ReadError(f"the header of {header.name!r} claims {header.size} bytes")
        return header


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
    rows = _sizes(sizes, sizes.stat().st_mtime_ns).get(shard.name)
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(f"{sizes}: {rows!r} is not a number of rows for {shard.name}")
    return RowCount(rows)


@lru_cache(maxsize=64)
def _sizes(file: Path, changed_ns: int) -> dict[str, Any]:
    """Return what a ``sizes.json`` holds; read once, however many shards it lists, unless it was ``changed_ns``."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a mapping from shard names to numbers of rows: {error}") from error
    if not isinstance(listed, dict):
        raise ValueError(f"{file} is not a mapping from shard names to numbers of rows, but a {type(listed).__name__}")
    return listed


def count_rows(shard: Path) -> RowCount:
    """Count the rows of a shard from its headers; a cut-off shard has those up to the cut, and a problem.

    Raises:
        ValueError: If the file is not a tar file.
    """
    rows, key, error = 0, None, None
    try:
        with shard.open("rb") as file, _open(file, "r:") as tar:
            try:
                for member in _headers(tar, _room(shard)):
                    prefix = base_plus_ext(member.name)[0]
                    rows += prefix is not None and prefix != key
                    key = prefix if prefix is not None else key
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


def read_shard(
    shard: Path, num_rows: int, make: Callable[[dict[str, Any], Path, int], Row | Problem], start: int = 0
) -> Iterator[Row | Problem]:
    """Yield rows ``start`` to ``num_rows`` of a shard; rows that are not there are problems, so that the number holds.

    Args:
        shard: The tar file.
        num_rows: How many rows it is known to have.
        make: Given the members of a row, the shard and the row's number, returns the row or what is wrong with it.
        start: Rows in front that are passed over.
    """
    row, errors, oversized = 0, list[Exception](), set[str | None]()
    try:
        with shard.open("rb") as file:
            for members in group_by_keys(_members(file, _room(shard), errors, oversized)):
                if row == num_rows:
                    logger.warning("%s has more than the %d rows that sizes.json lists", shard, num_rows)
                    break
                if row >= start and members["__key__"] in oversized:
                    problem = f"the members of the row are above {_MOST_ROW_BYTES} bytes"
                    yield Problem(
                        str(shard), row, str(members["__key__"]), problem, "Write the shard with smaller images"
                    )
                elif row >= start:
                    yield make(members, shard, row)
                row += 1
    except (OSError, ValueError) as error:  # of opening; and two members of one name in a row
        errors.append(error)
    what = "; ".join(f"{type(error).__name__}: {error}" for error in errors) or "its end was reached"
    for missing in range(max(row, start), num_rows):
        yield Problem(str(shard), missing, f"{shard.stem}-{missing}", f"the shard ends before this row ({what})", _CUT)


def _open(file: BinaryIO, mode: str) -> tarfile.TarFile:
    """Open a tar file, plain or gzip: of other compressions a header alone can claim gigabytes for their tables.

    It is unpacked here, as tarfile's own reader of streams takes quadratic time for what was packed to a thousandth.
    """
    is_gzip = file.read(2) == _GZIP
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file, mode="rb") if is_gzip else file
    try:
        return tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except _HEADER_ERRORS as error:
        raise tarfile.ReadError(f"a header is damaged: {type(error).__name__}: {error}") from error


def _room(shard: Path) -> int:
    """Return how many bytes the members of a shard can have at most."""
    with shard.open("rb") as file:
        return shard.stat().st_size * (_MOST_GROWTH if file.read(2) == _GZIP else 1)


def _headers(tar: tarfile.TarFile, room: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members that belong to rows.

    Raises:
        tarfile.TarError: If a header is damaged, or lies about where the next one is or how much is stored.
    """
    try:
        for member in tar:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] or the headers of the whole shard stay in memory
            if member.size < 0 or member.issparse():  # an extended header may have changed both
                raise tarfile.ReadError(f"{member.name!r} is stored sparse or has a negative size")
            if member.size > room:  # Python's reader would pass over it block by block, whatever is there
                raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, more than the shard can hold")
            if member.isreg() and not _META.match(member.name):
                yield member
    except _HEADER_ERRORS as error:
        raise tarfile.ReadError(f"a header is damaged: {type(error).__name__}: {error}") from error


def _members(
    file: BinaryIO, room: int, errors: list[Exception], oversized: set[str | None]
) -> Iterator[dict[str, Any]]:
    """Yield the members up to the first error, so that the row that is complete before it is not lost.

    The contents of a row that is above `_MOST_ROW_BYTES` are not read, and its key is added to ``oversized``.
    """
    key, num_bytes = None, 0
    try:
        with _open(file, "r|") as tar:
            for member in _headers(tar, room):
                prefix = base_plus_ext(member.name)[0]
                key, num_bytes = prefix, member.size + (num_bytes if prefix == key else 0)
                content = tar.extractfile(member) if num_bytes <= _MOST_ROW_BYTES else None
                if content is None:
                    oversized.add(prefix)
                yield {"fname": member.name, "data": content.read() if content else b"", "__url__": ""}
    except _TAR_ERRORS as error:
        errors.append(error)
