"""Where the rows of a JSON or JSONL file stand, found without decoding more than one row at a time.

Both readers return ``(source, edges)``: row i is ``source[edges[i] : edges[i + 1]]``; edges are (rows + 1,) int64.
"""

import io
import json
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

_BOM = b"\xef\xbb\xbf"
_SHOW_AFTER_S = 5  # a file that is read faster needs no progress bar


class FileBytes:
    """The bytes of a file, read when they are asked for: ``FileBytes(path)[start:stop]``.

    The file is opened anew each time: an open one would be shared by forked workers, and there may be thousands.
    """

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, wanted: slice) -> bytes:
        with self.path.open("rb") as file:
            file.seek(wanted.start)
            return file.read(wanted.stop - wanted.start)


def find_lines(path: Path, in_memory: bool) -> tuple[bytes | FileBytes, np.ndarray]:
    """Find the lines of a JSONL file that are not blank; those that are belong to the row before them.

    Args:
        path: The file.
        in_memory: Whether it is held. Otherwise only the edges are, and a row is read from the file when it is needed.
    """
    if in_memory:
        buffer = path.read_bytes()
        return buffer, _line_edges(io.BytesIO(buffer), path, len(buffer))
    with path.open("rb") as file:
        return FileBytes(path), _line_edges(file, path, path.stat().st_size)


def _line_edges(file: BinaryIO, path: Path, size: int) -> np.ndarray:
    edges, position = array("q"), 0
    show = {"desc": f"rows of {path.name}", "unit": "B", "unit_scale": True, "disable": None, "delay": _SHOW_AFTER_S}
    with tqdm(total=size, **show) as progress:
        for text in file:
            for line in text.splitlines(keepends=True):  # a lone carriage return ends a line too
                mark = len(_BOM) if position == 0 and line.startswith(_BOM) else 0
                if line[mark:].strip():
                    edges.append(position + mark)
                position += len(line)
            progress.update(len(text))
    edges.append(position)
    return np.array(edges, np.int64)


def find_objects(path: Path) -> tuple[bytes, np.ndarray]:
    """Find the rows of a JSON list, which is held as a whole.

    Raises:
        ValueError: If the file is not text in UTF-8, or not a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8: {error}") from error
    decoder, chunks, sizes = json.JSONDecoder(), [], []
    try:
        position = _skip(text, 0, "[")
        while text[position : position + 1] != "]":
            if sizes:
                position = _skip(text, position, ",")
            end = decoder.raw_decode(text, position)[1]
            chunk = text[position:end].encode()
            chunks.append(chunk)
            sizes.append(len(chunk))
            position = _skip(text, end, "")
    except (ValueError, RecursionError) as error:  # nested without end, or a number of thousands of digits
        raise ValueError(f"data file {path} is not a JSON list of rows: {error}") from error
    return b"".join(chunks), np.cumsum([0, *sizes], dtype=np.int64)


def _skip(text: str, position: int, sign: str) -> int:
    """Return the position behind white space, ``sign`` and white space."""
    position = _first_not_space(text, position)
    if not text.startswith(sign, position):
        raise json.JSONDecodeError(f"expected {sign!r}", text, position)
    return _first_not_space(text, position + len(sign))


def _first_not_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position
