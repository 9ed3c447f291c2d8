"""Tables whose images are files of their own. CSV, TSV and JSON are held in memory, of JSONL where each row stands."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as arrow_csv

from cal_train.data.records import Rows
from cal_train.types import BadSampleError, Problem

TABLES = (".csv", ".tsv", ".json", ".jsonl")


class CsvRows:
    """The rows of a CSV or TSV file with a header line; every value is text. Rows of a wrong width are problems."""

    def __init__(self, file: Path):
        """Read the file.

        Raises:
            ValueError: If it has no header, no rows, or is not text in UTF-8.
        """
        self.file, self.problems = file, list[Problem]()
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=self._note)
        read = arrow_csv.ReadOptions(use_threads=False)  # in one thread rows have numbers
        try:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                self.column_names = next(csv.reader(lines, delimiter=delimiter), [])
            text = dict.fromkeys(self.column_names, pa.string())
            convert = arrow_csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            self._table = arrow_csv.read_csv(file, read_options=read, parse_options=parse, convert_options=convert)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a readable table with a header line: {error}") from error
        if not len(self):
            raise ValueError(f"{file} has no rows: remove it from the source, or write it again")

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, str]:
        return self._table.slice(row, 1).to_pylist()[0]

    def _note(self, row: arrow_csv.InvalidRow) -> str:
        name = f"{self.file.stem}-line-{row.number}"
        problem = f"line {row.number} has {row.actual_columns} columns instead of {row.expected_columns}"
        cure = "Quote texts that contain the delimiter or a line break"
        self.problems.append(Problem(str(self.file), -(row.number or 0), name, problem, cure))
        return "skip"


def open_table(file: Path) -> tuple[Rows | CsvRows, list[str]]:
    """Return the rows of a table and the names of its columns (of JSON: of the first row that is an object).

    Raises:
        ValueError: If the file cannot be read, or has no row to take the names from.
    """
    if file.suffix.lower() in (".csv", ".tsv"):
        table = CsvRows(file)
        return table, table.column_names
    rows = Rows(file, in_memory=False)
    for i in range(len(rows)):
        first = _object(rows, i)
        if first is not None:
            return rows, list(first)
    raise ValueError(f"{file} has no row that is a JSON object")


def _object(rows: Rows, i: int) -> dict[str, Any] | None:
    try:
        row = rows[i]
    except BadSampleError:
        return None
    return row if isinstance(row, dict) else None
