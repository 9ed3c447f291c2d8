"""The files of a source as blocks of known length, and reading a range of rows of one block.

A block is what is read in sequence: a tar shard, a row group of a Parquet file, or a few rows of a table whose images
are files of their own. Lengths are known before the first row is read, so that ranks get equal shares and a position in
the stream is a number.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand
from pyarrow import parquet

from cal_train.data.pair_shards import count_rows, listed_rows, read_shard
from cal_train.data.pair_tables import TABLES, CsvRows, open_table
from cal_train.data.pairs import Pair, PairSource, find_columns, parse_record
from cal_train.types import BadSampleError, Problem

_MOST_TABLE_BLOCKS = 65_536  # a table is shuffled row by row up to here, above it by a few rows at a time


class Blocks(Protocol):
    """The files of one source."""

    lengths: np.ndarray
    """Rows of each block, (blocks,) int64, all positive."""

    problems: list[Problem]
    """What opening has found."""

    def read(self, block: int, start: int, stop: int) -> Iterator[Pair | Problem]:
        """Yield exactly ``stop - start`` rows of a block; a bad row is its `Problem`."""
        ...


def open_source(source: PairSource) -> Blocks:
    """Open the files of a source and count their rows.

    Raises:
        ValueError: If a file is missing, empty, or of another format, or the files of a source differ in format.
    """
    files = source_files(source.path)
    suffixes = {_suffix(file) for file in files}
    if suffixes == {".tar"}:
        return TarBlocks(files, source)
    if suffixes == {".parquet"}:
        return ParquetBlocks(files, source)
    if len(files) == 1 and suffixes <= set(TABLES):
        return TableBlocks(files[0], source)
    raise ValueError(
        f"{source.path} holds {', '.join(sorted(suffixes))} files: a source is .tar files, .parquet files, or one of "
        f"{', '.join(TABLES)}"
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
        files = sorted(file for file in files[0].iterdir() if _suffix(file) in (".tar", ".parquet"))
        if not files:
            raise ValueError(f"folder {path} holds neither .tar nor .parquet files")
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


class TarBlocks:
    """Webdataset shards: one block per shard. A shard that is read on stays open, so that no row is read twice."""

    def __init__(self, files: list[Path], source: PairSource):
        self.files, self.source = files, source
        with ThreadPoolExecutor(max_workers=8) as pool:
            counts = list(pool.map(lambda file: listed_rows(file) or count_rows(file), files))
        self.lengths = _not_empty([count.rows for count in counts], files)
        self.problems = [count.problem for count in counts if count.problem is not None]
        self._open: tuple[int, int, Iterator[Pair | Problem]] | None = None  # block, next row, rows

    def read(self, block: int, start: int, stop: int) -> Iterator[Pair | Problem]:
        """Yield rows ``start`` to ``stop`` of a shard."""
        if self._open is not None and self._open[:2] == (block, start):
            rows = self._open[2]
        else:
            shard = read_shard(self.files[block], int(self.lengths[block]), self.source)
            rows = islice(shard, start, None)
        self._open = None
        yield from islice(rows, stop - start)
        if stop < self.lengths[block]:
            self._open = (block, stop, rows)
        else:
            next(rows, None)  # closes the file, and notices rows that were not counted

    def __getstate__(self) -> dict[str, Any]:  # an open shard stays with its process
        return {**self.__dict__, "_open": None}


class ParquetBlocks:
    """Parquet files with images as bytes or as paths: one block per row group; the last one that was read is kept."""

    def __init__(self, files: list[Path], source: PairSource):
        self.source, self.problems = source, list[Problem]()
        groups: list[tuple[Path, int, int]] = []  # file, row group, number of its first row
        lengths: list[int] = []
        for file in files:
            counts = _row_groups(file)
            _not_empty([sum(counts)], [file])
            firsts = np.cumsum([0, *counts]).tolist()
            groups += [(file, group, firsts[group]) for group, count in enumerate(counts) if count]
            lengths += [count for count in counts if count]
        self.groups, self.lengths = groups, np.array(lengths, np.int64)
        self.columns = find_columns(parquet.read_schema(files[0]).names, source, str(files[0]))
        self._kept: tuple[int, pa.Table] | None = None

    def read(self, block: int, start: int, stop: int) -> Iterator[Pair | Problem]:
        """Yield rows ``start`` to ``stop`` of a row group."""
        file, group, first = self.groups[block]
        if self._kept is None or self._kept[0] != block:
            with parquet.ParquetFile(file) as opened:
                wanted = [*self.columns, *(["id"] if "id" in opened.schema_arrow.names else [])]
                self._kept = (block, opened.read_row_group(group, columns=wanted))
        root = Path(self.source.image_root or file.parent)
        for i in range(start, stop):
            record = self._kept[1].slice(i, 1).to_pylist()[0]
            yield parse_record(record, self.columns, str(file), first + i, root)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _row_groups(file: Path) -> list[int]:
    try:
        metadata = parquet.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file, or is cut off: {error}") from error
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


class TableBlocks:
    """A table whose images are files of their own."""

    def __init__(self, file: Path, source: PairSource):
        self.file, self.root = file, Path(source.image_root or file.parent)
        self.rows, columns = open_table(file)
        self.problems = self.rows.problems if isinstance(self.rows, CsvRows) else []
        self.columns = find_columns(columns, source, str(file))
        self.block_rows = -(-len(self.rows) // _MOST_TABLE_BLOCKS)
        full, rest = divmod(len(self.rows), self.block_rows)
        self.lengths = np.array([self.block_rows] * full + ([rest] if rest else []), np.int64)

    def read(self, block: int, start: int, stop: int) -> Iterator[Pair | Problem]:
        """Yield rows ``start`` to ``stop`` of a block."""
        for row in range(block * self.block_rows + start, block * self.block_rows + stop):
            try:
                record = self.rows[row]
            except BadSampleError as error:
                yield error.problem
            else:
                yield parse_record(record, self.columns, str(self.file), row, self.root)
