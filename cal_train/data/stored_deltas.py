"""Deltas that ``cal-train score`` wrote, by row of the data file: training reads them instead of running a second pass.

Nothing of the file is held but where each row's record stands; a record is read when its row is. One that does not fit
the row exactly, token by token, is an error: weights on the wrong tokens would train without any sign of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cal_train.data.records import Rows, row_id
from cal_train.data.score_notes import file_digest, note_path, read_about
from cal_train.types import IGNORE_INDEX, BadSampleError, Problem, Sample, TokenizedExample

# How `score` begins a record; one that begins otherwise is read whole.
_HEAD = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*"), (?:"row": (\d+), )?"input_ids": ')
_AGAIN = "Score the data again with cal-train score, with the recipe's --template and --image_aspect_ratio"


@dataclass(frozen=True)
class Scored:
    """What a run needs scores to be of; each field is a key of ``FILE.about.json`` (``ablation``: of its weighting)."""

    tokenizer_sha256: str
    template_sha256: str
    images_sha256: str
    max_length: int
    image_position: str
    image_token_id: int
    ablation: str


class StoredDeltas:
    """The deltas of one data file.

    Args:
        scores: File of ``cal-train score``.
        rows: The data file.
        needed: What the scores must be of.

    Raises:
        ValueError: If the file is missing or damaged, was made of other data or with other settings, names a row twice,
            or lacks rows that ``score`` did not leave out as bad.
    """

    def __init__(self, scores: str | Path, rows: Rows, needed: Scored):
        self.path = Path(scores)
        if not self.path.is_file():
            raise ValueError(f"score file {scores} does not exist: write it with cal-train score")
        about = read_about(scores)
        check_about(self.path, about, rows.path, needed)
        paths = about.get("paths")
        self.model = paths.get("model", "?") if isinstance(paths, dict) else "a model without a name"
        self._offsets = _index(self.path, rows)
        self._left_out = _left_out(self.path, about, len(rows))
        self.num_left_out = int(self._left_out.sum())
        missing = np.flatnonzero((self._offsets[:, 0] < 0) & ~self._left_out)
        if len(missing):
            first = int(missing[0])
            raise ValueError(
                f"{scores} has no record of {len(missing)} of the {len(rows)} rows of {rows.path}; the first is row "
                f"{first} (id {_id_of(rows, first)!r}). {_AGAIN}"
            )

    def __call__(self, sample: Sample, example: TokenizedExample) -> torch.Tensor:
        """Return the deltas of a row at their label tokens, (S,) float32, 0 elsewhere.

        Raises:
            BadSampleError: If the record is not of this row as it is now.
        """
        start, end = self._offsets[sample.row]
        if start < 0:
            raise _misfit(self.path, sample, "the row was left out as bad when it was scored")
        with self.path.open("rb") as file:  # anew each time: an open file would be shared by forked workers
            file.seek(start)
            line = file.read(end - start)
        positions = (example.labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1
        try:
            record = json.loads(line)
            same_tokens = record["input_ids"] == example.input_ids.tolist()
            same_labels = record["label_positions"] == positions.tolist()
            values = torch.tensor(record["delta"], dtype=torch.float32)
            is_named = record["id"] == sample.id and record.get("row", sample.row) == sample.row
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise _misfit(self.path, sample, f"its record is damaged ({error!r})") from error
        if not is_named:
            raise _misfit(self.path, sample, "the file has changed since the run started")
        if not same_tokens:
            raise _misfit(self.path, sample, "it was scored as other tokens: the template or the image sizes differ")
        if not same_labels or values.shape != positions.shape or not bool(values.isfinite().all()):
            raise _misfit(self.path, sample, "its record has no finite delta for each of its label tokens")
        deltas = torch.zeros(len(example.input_ids))
        deltas[positions] = values
        return deltas


def check_about(scores: Path, about: Mapping[str, Any], data: Path, needed: Scored) -> None:
    """Compare a score file's note with the run.

    Raises:
        ValueError: Naming all that differs, or that there is no note.
    """
    if not about:
        raise ValueError(f"{note_path(scores)} is missing, so that nothing says what {scores} is of. {_AGAIN}")
    weighting = about.get("weighting")
    found = {**about, "ablation": weighting.get("ablation") if isinstance(weighting, dict) else None}
    told = {
        "tokenizer_sha256": "tokenizer",
        "template_sha256": "template",
        "images_sha256": "image processing (image_aspect_ratio)",
        "max_length": "model_max_length",
        "image_position": "image_position",
        "image_token_id": "image_token_id",
        "ablation": "cal_ablation",
    }
    wanted = {name: getattr(needed, name) for name in told} | {"data_sha256": file_digest(data)}
    told["data_sha256"] = f"content of {data}"
    differ = [
        f"{told[name]} (scored: {_short(found.get(name))}, here: {_short(wanted[name])})"
        for name in told
        if found.get(name) != wanted[name]
    ]
    if differ:
        raise ValueError(f"{scores} does not belong to this run; what differs: {', '.join(differ)}. {_AGAIN}")


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _index(path: Path, rows: Rows) -> np.ndarray:
    """Return where the record of each row stands, byte ranges (rows, 2) int64; -1 for a row without one."""
    offsets = np.full((len(rows), 2), -1, np.int64)
    row_of_id: dict[str, int] | None = None
    for number, start, end, id, row in _records(path):
        if row is None:  # written before records named their rows
            row_of_id = _rows_by_id(path, rows) if row_of_id is None else row_of_id
            row = row_of_id.get(id, -1)
        if not 0 <= row < len(rows):
            raise ValueError(f"{path}, line {number}: sample {id!r} is not in {rows.path}. {_AGAIN}")
        if offsets[row, 0] >= 0:
            raise ValueError(f"{path}, line {number}: row {row} (id {id!r}) is there twice. {_AGAIN}")
        offsets[row] = start, end
    return offsets


def _records(path: Path) -> Iterator[tuple[int, int, int, str, int | None]]:
    """Yield line number, byte range, id and row of each record; of most only the beginning is decoded."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end = start + len(line)
            try:
                if head := _HEAD.match(line):
                    id, row = json.loads(head[1]), None if head[2] is None else int(head[2])
                else:
                    record = json.loads(line)
                    id, row = record["id"], record.get("row")
                if not isinstance(id, str) or isinstance(row, bool) or not isinstance(row, int | None):
                    raise TypeError("id is not text, or row no number")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a score record ({error!r}). {_AGAIN}") from error
            yield number, start, end, id, row
            start = end


def _rows_by_id(path: Path, rows: Rows) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in range(len(rows)):
        id = _id_of(rows, row)
        if id in found:
            raise ValueError(
                f"{path} names rows by their ids, but {rows.path} has the id {id!r} twice (rows "
                f"{found[id]} and {row}). {_AGAIN}: it now writes row numbers"
            )
        found[id] = row
    return found


def _id_of(rows: Rows, row: int) -> str:
    try:
        return row_id(rows[row], rows.path, row)
    except BadSampleError as error:
        return error.problem.id


def _left_out(path: Path, about: Mapping[str, Any], num_rows: int) -> np.ndarray:
    """Return which rows ``score`` left out as bad, (rows,) bool."""
    numbers = about.get("left_out", [])
    if not isinstance(numbers, list) or not all(isinstance(n, int) and 0 <= n < num_rows for n in numbers):
        raise ValueError(f"{note_path(path)}: left_out is not a list of row numbers. {_AGAIN}")
    is_left_out = np.zeros(num_rows, bool)
    is_left_out[numbers] = True
    return is_left_out


def _misfit(scores: Path, sample: Sample, problem: str) -> BadSampleError:
    return BadSampleError(Problem(sample.file, sample.row, sample.id, f"{scores}: {problem}", _AGAIN))
