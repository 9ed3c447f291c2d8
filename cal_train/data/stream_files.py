"""The files of a source as blocks of known length, and reading a range of rows of one block.

A block is what is read in sequence: a tar shard, a row group of a Parquet file, or a few rows of a table whose images
are files of their own. Lengths are known before the first row is read, so that ranks get equal shares and a position in
the stream is a number. What a row becomes is said by its `RowFormat`: a pair (`cal_train.data.pair_rows`) or a sample
(`cal_train.data.sample_stream`).

Parquet is read through pyarrow, one row group at a time: an iterable data set of ``datasets`` loses what stands in its
shuffle buffer when it resumes, so that a resumed run would not be the same run.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand
from pyarrow import parquet

from cal_train.data.stream_shards import count_rows, listed_rows, read_shard
from cal_train.data.stream_tables import CsvRows, open_table
from cal_train.types import BadSampleError, Problem

Row = TypeVar("Row")
Row_co = TypeVar("Row_co", covariant=True)

_MOST_TABLE_BLOCKS = 65_536  # a source is shuffled row by row up to here, above it by a few rows at a time


class RowFormat(Protocol[Row_co]):
    """What the raw rows of a source become."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Endings of the tables that may hold such rows."""
        ...

    def columns(self, present: Sequence[str], file: str) -> tuple[str, ...]:
        """Return which columns are read; a ``ValueError`` names the file if those that are there cannot do."""
        ...

    def of_record(self, record: Any, columns: tuple[str, ...], file: str, row: int, root: Path) -> Row_co | Problem:
        """Return a row of a table or a Parquet file; ``root`` is the folder that image paths stay inside."""
        ...

    def of_members(self, members: dict[str, Any], shard: Path, row: int) -> Row_co | Problem:
        """Return a row of a shard, given as its key under ``__key__`` and the bytes of each member by its ending."""
        ...


class Blocks(Protocol[Row_co]):
    """The files of one source."""

    lengths: np.ndarray
    """Rows of each block, (blocks,) int64, all positive."""

    problems: list[Problem]
    """What opening has found."""

    def read(self, block: int, start: int, stop: int) -> Iterator[Row_co | Problem]:
        """Yield exactly ``stop - start`` rows of a block; a bad row is its `Problem`."""
        ...


def open_files(path: str, image_root: str | Path | None, rows: RowFormat[Row]) -> Blocks[Row]:
    """Open the files of a source and count their rows.

    Args:
        path: As `source_files` takes it.
        image_root: Folder that image paths are relative to. Default: the folder of the file.
        rows: What a row becomes.

    Raises:
        ValueError: If a file is missing, empty, or of another format, or the files of a source differ in format.
    """
    files = source_files(path)
    suffixes = {_suffix(file) for file in files}
    root = Path(image_root) if image_root is not None else None
    if suffixes == {".tar"}:
        return TarBlocks(files, rows)
    if suffixes == {".parquet"}:
        return ParquetBlocks(files, root, rows)
    if len(suffixes) == 1 and suffixes <= set(rows.tables):
        return TableBlocks(files, root, rows)
    raise ValueError(
        f"{path} holds {', '.join(sorted(suffixes))} files: a source is files of one kind, .tar, .parquet, "
        f"{', '.join(rows.tables)}"
    )


def source_files(path: str) -> list[Path]:
    """Return the files that a path stands for, in order: braces are expanded, of a folder its shards are taken.

    Raises:
        ValueError: If there are none, or one of them does not exist.
    """
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"{path} is a URL or a command: download the files and give their path")
    files = [Path(name) for name in (braceexpand(path) if "{" in path else [path])]
    if len(files) == 1 and files[0].is_dir():
        there = sorted(files[0].iterdir())
        files = [file for file in there if _suffix(file) in (".tar", ".parquet")]
        files = files or [file for file in there if _suffix(file) == ".jsonl"]
        if not files:
            raise ValueError(f"folder {path} holds no .tar, .parquet or .jsonl files")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{len(missing)} of {len(files)} files of {path} do not exist, first {missing[0]}")
    return files


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return ".tar" if name.endswith((".tar", ".tar.gz", ".tgz")) else file.suffix.lower()


def _not_empty(lengths: list[int], files: list[Path]) -> np.ndarray:
    for file, length in zip(files, lengths, strict=True):
        if length == 0:
            raise ValueError(f"{file} has no rows: remove it from the source, or write it again")
    return np.array(lengths, np.int64)


class TarBlocks(Generic[Row]):
    """Webdataset shards: one block per shard. A shard that is read on stays open, so that no row is read twice."""

    def __init__(self, files: list[Path], rows: RowFormat[Row]):
        self.files, self.rows = files, rows
        with ThreadPoolExecutor(max_workers=8) as pool:
            counts = list(pool.map(lambda file: listed_rows(file) or count_rows(file), files))
        self.lengths = _not_empty([count.rows for count in counts], files)
        self.problems = [count.problem for count in counts if count.problem is not None]
        self._open: tuple[int, int, Iterator[Row | Problem]] | None = None  # block, next row, rows

    def read(self, block: int, start: int, stop: int) -> Iterator[Row | Problem]:
        """Yield rows ``start`` to ``stop`` of a shard."""
        if self._open is not None and self._open[:2] == (block, start):
            rows = self._open[2]
        else:
            # rows in front are passed over as members, not made into anything
            rows = read_shard(self.files[block], int(self.lengths[block]), self.rows.of_members, start)
        self._open = None
        yield from islice(rows, stop - start)
        if stop < self.lengths[block]:
            self._open = (block, stop, rows)
        else:
            next(rows, None)  # closes the file, and notices rows that were not counted

    def __getstate__(self) -> dict[str, Any]:  # an open shard stays with its process
        return {**self.__dict__, "_open": None}


class ParquetBlocks(Generic[Row]):
    """Parquet files with images as bytes or as paths: one block per row group; the last one that was read is kept."""

    def __init__(self, files: list[Path], root: Path | None, rows: RowFormat[Row]):
        self.root, self.rows, self.problems = root, rows, list[Problem]()
        self.columns: dict[Path, tuple[str, ...]] = {}  # a file of text-only rows may lack the images' column
        groups: list[tuple[Path, int, int]] = []  # file, row group, number of its first row
        lengths: list[int] = []
        for file in files:
            counts, names = _row_groups(file)
            _not_empty([sum(counts)], [file])
            self.columns[file] = rows.columns(names, str(file))
            firsts = np.cumsum([0, *counts]).tolist()
            groups += [(file, group, firsts[group]) for group, count in enumerate(counts) if count]
            lengths += [count for count in counts if count]
        self.groups, self.lengths = groups, np.array(lengths, np.int64)
        self._kept: tuple[int, pa.Table | str] | None = None

    def read(self, block: int, start: int, stop: int) -> Iterator[Row | Problem]:
        """Yield rows ``start`` to ``stop`` of a row group; all of a group that cannot be decoded are problems."""
        file, _, first = self.groups[block]
        if self._kept is None or self._kept[0] != block:
            self._kept = None  # frees the last one before the next one is there
            self._kept = (block, self._read_group(block))
        table = self._kept[1]
        for i in range(start, stop):
            if isinstance(table, str):
                name = f"{file.stem}-{first + i}"
                yield Problem(str(file), first + i, name, table, "Write the file again, or remove it from the source")
            else:
                record = table.slice(i, 1).to_pylist()[0]
                yield self.rows.of_record(record, self.columns[file], str(file), first + i, self.root or file.parent)

    def _read_group(self, block: int) -> pa.Table | str:
        """Return a row group, or why it cannot be read."""
        file, group, _ = self.groups[block]
        try:
            with parquet.ParquetFile(file) as opened:
                wanted = [*self.columns[file], *(["id"] if "id" in opened.schema_arrow.names else [])]
                return opened.read_row_group(group, columns=list(dict.fromkeys(wanted)))
        except (pa.ArrowException, OSError) as error:
            return f"row group {group} cannot be read: {error}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _row_groups(file: Path) -> tuple[list[int], list[str]]:
    """Return the rows of each row group, and the names of the columns."""
    try:
        metadata = parquet.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file, or is cut off: {error}") from error
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return counts, metadata.schema.to_arrow_schema().names


class TableBlocks(Generic[Row]):
    """Tables whose images are files of their own: one block per few rows."""

    def __init__(self, files: list[Path], root: Path | None, rows: RowFormat[Row]):
        self.files, self.root, self.rows = files, root, rows
        opened = [open_table(file) for file in files]
        self.tables = [table for table, _ in opened]
        self.problems = [problem for table in self.tables if isinstance(table, CsvRows) for problem in table.problems]
        self.columns = [rows.columns(names, str(file)) for file, (_, names) in zip(files, opened, strict=True)]
        block_rows = -(-sum(map(len, self.tables)) // _MOST_TABLE_BLOCKS)
        starts = [(k, first) for k, table in enumerate(self.tables) for first in range(0, len(table), block_rows)]
        self.starts = np.array(starts, np.int64)  # (blocks, 2): table, its first row
        self.lengths = np.array([min(block_rows, len(self.tables[k]) - first) for k, first in starts], np.int64)

    def read(self, block: int, start: int, stop: int) -> Iterator[Row | Problem]:
        """Yield rows ``start`` to ``stop`` of a block."""
        k, first = self.starts[block].tolist()
        file = self.files[k]
        for row in range(first + start, first + stop):
            try:
                record = self.tables[k][row]
            except BadSampleError as error:
                yield error.problem
            else:
                yield self.rows.of_record(record, self.columns[k], str(file), row, self.root or file.parent)
