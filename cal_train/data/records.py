"""Data files to `Sample`: reading rows, and checking the form of one row.

Two layouts are understood, in JSON, JSONL and Parquet:

- LLaVA: ``{"id", "image": path or list (absent: text only), "conversations": [{"from": "human", "value": ...}, ...]}``
- messages: ``{"id", "images": [...], "messages": [{"role": "user", "content": text or parts}, ...]}``

Paths are relative to the image root of the source and never leave it. URLs are refused, never fetched.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import datasets
from datasets.exceptions import DatasetGenerationError

from cal_train.data.json_rows import find_lines, find_objects
from cal_train.types import IMAGE_MARK, BadSampleError, Message, Problem, Role, Sample

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


class Rows:
    """Random access to the rows of one data file, as plain dicts.

    JSON and JSONL rows are kept as one buffer of bytes and decoded on access: Python objects would be copied page by
    page into every forked worker as their reference counts change. A JSONL file may also stay on disk
    (``in_memory=False``), with the places of its rows held. Parquet is memory-mapped by ``datasets``.
    """

    def __init__(self, path: str | Path, in_memory: bool = True):
        """Open the file.

        Raises:
            ValueError: If it is missing, empty, of another format, or not what its name says.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data file {path} does not exist: check data_path")
        suffix = self.path.suffix.lower()
        if suffix not in (".json", ".jsonl", ".parquet"):
            raise ValueError(f"data file {path} is not .json, .jsonl or .parquet")
        self._table: datasets.Dataset | None = None
        if suffix == ".parquet":
            # Arrow format: images stay the encoded bytes or the path that they are in the file.
            try:
                self._table = datasets.Dataset.from_parquet(str(self.path)).with_format("arrow")
            except (ValueError, OSError, DatasetGenerationError) as error:
                raise ValueError(f"data file {path} is not a Parquet file: {error}") from error
        else:
            found = find_objects(self.path) if suffix == ".json" else find_lines(self.path, in_memory)
            self._source, self._edges = found
        if not len(self):
            raise ValueError(f"data file {path} has no rows")

    def __len__(self) -> int:
        return len(self._table) if self._table is not None else len(self._edges) - 1

    def __getitem__(self, row: int) -> Any:
        """Return the decoded row; a dict if the file is right, whatever was found otherwise.

        Raises:
            BadSampleError: If a line of a JSONL file is not JSON, or a value of a Parquet file cannot be read.
        """
        if self._table is not None:
            try:
                return self._table[row].to_pylist()[0]  # pyright: ignore[reportAttributeAccessIssue] (an Arrow table)
            except (ValueError, ArithmeticError, LookupError) as error:  # text that is not UTF-8, the year 300000
                self._fail(row, f"a value cannot be read: {error}", "Correct the row, or leave out the column", error)
        start, end = self._edges[row], self._edges[row + 1]
        try:
            return json.loads(self._source[start:end].rstrip())  # blank lines behind a row are part of it
        except (ValueError, RecursionError) as error:
            self._fail(row, f"not JSON: {error}", "Correct the line", error)
        except OSError as error:
            self._fail(row, f"the file cannot be read: {error}", "Check that the file is still there", error)

    def _fail(self, row: int, problem: str, cure: str, error: Exception) -> NoReturn:
        raise BadSampleError(Problem(str(self.path), row, row_id(None, self.path, row), problem, cure)) from error

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))


def row_id(raw: Any, file: str | Path, row: int) -> str:
    """Return the row's own id as a string, or ``<file stem>-<row>`` if it has none.

    Half of a surrogate pair, which no file or terminal takes, is written as its escape.
    """
    own = raw.get("id") if isinstance(raw, dict) else None
    return f"{Path(file).stem}-{row}" if own is None else str(own).encode(errors="backslashreplace").decode()


def starts_with_answer(raw: Any) -> bool:
    """Return whether the first turn is the assistant's; `parse_row` drops such a turn, as LLaVA does."""
    turns = (raw.get("conversations") or raw.get("messages")) if isinstance(raw, dict) else None
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and (first.get("from") == "gpt" or first.get("role") == "assistant")


def parse_row(raw: Any, file: str | Path, row: int, image_root: Path) -> Sample:
    """Check one row and bring it into the common form.

    Args:
        raw: The decoded row.
        file: Its data file, for messages.
        row: Its 0-based number, blank lines of JSONL not counted.
        image_root: Folder that every image path must stay inside, symbolic links resolved.

    Returns:
        The sample. A leading assistant turn is dropped (ShareGPT rows cut out of longer conversations have one; count
        them with `starts_with_answer`).

    Raises:
        BadSampleError: With the place, the problem and the cure.
    """
    return _RowParser(file, row, row_id(raw, file, row), image_root).parse(raw)


def resolve_image(value: Any, file: str | Path, row: int, id: str, image_root: Path) -> Path | bytes:
    """Return the resolved path of an image inside ``image_root``, or its bytes where the value carries them.

    Raises:
        BadSampleError: If it is a URL, leaves the root (symbolic links resolved), or is not there.
    """
    return _RowParser(file, row, id, image_root).image(value)


class _RowParser:
    """The place of one row, so that each check can name it."""

    def __init__(self, file: str | Path, row: int, id: str, image_root: Path):
        self.file, self.row, self.id = str(file), row, id
        self.image_root = image_root.resolve()

    def fail(self, problem: str, cure: str) -> NoReturn:
        raise BadSampleError(Problem(self.file, self.row, self.id, problem, cure))

    def parse(self, raw: Any) -> Sample:
        if not isinstance(raw, dict):
            self.fail(f"a row is an object, not {type(raw).__name__}", "Write one {...} per row")
        inline: list[Any] = []
        messages = self.drop_leading_answer(self.messages(raw, inline))
        self.check_turns(messages)
        column = self.image_column(raw)
        if inline and column:
            self.fail("images both inside the messages and in a column of the row", "Keep one of the two")
        images = tuple(self.image(value) for value in inline or column)
        num_marks = sum(message.content.count(IMAGE_MARK) for message in messages)
        if num_marks != len(images):
            self.fail(
                f"{num_marks} image marks but {len(images)} images",
                f"Write {IMAGE_MARK} once per image, and an image for each mark",
            )
        return Sample(self.id, self.file, self.row, messages, images)

    def messages(self, raw: dict, inline: list[Any]) -> tuple[Message, ...]:
        """Read either layout; image paths found inside contents are appended to ``inline``."""
        keys = [key for key in ("conversations", "messages") if raw.get(key) is not None]
        if len(keys) != 1:
            found = "both 'conversations' and 'messages'" if keys else "neither 'conversations' nor 'messages'"
            self.fail(f"the row has {found}", "Give exactly one of them")
        turns = raw[keys[0]]
        if not isinstance(turns, list) or not turns:
            self.fail(
                f"{keys[0]!r} is {'empty' if turns == [] else 'not a list'}", "Give at least one question and answer"
            )
        role_key, text_key, roles = (
            ("from", "value", _LLAVA_ROLES) if keys == ["conversations"] else ("role", "content", _MESSAGE_ROLES)
        )
        return tuple(self.message(i, turn, role_key, text_key, roles, inline) for i, turn in enumerate(turns))

    def message(
        self, i: int, turn: Any, role_key: str, text_key: str, roles: dict[str, Role], inline: list[Any]
    ) -> Message:
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            self.fail(f"turn {i} lacks {role_key!r} or {text_key!r}", f"Write {{{role_key!r}: ..., {text_key!r}: ...}}")
        role, content = turn[role_key], turn[text_key]
        if not isinstance(role, str) or role not in roles:
            self.fail(f"turn {i} has the unknown role {role!r}", f"Use one of {', '.join(roles)}")
        if isinstance(content, list) and text_key == "content":
            content = self.join_parts(i, content, inline)
        if not isinstance(content, str):
            self.fail(f"{text_key!r} of turn {i} is {type(content).__name__}, not text", "Write it as a string")
        if not _is_unicode(content):
            self.fail(f"turn {i} contains half of a surrogate pair", "Write the whole character")
        if IMAGE_MARK in content and role not in ("human", "user"):
            self.fail(
                f"turn {i} ({role}) contains {IMAGE_MARK}", "Images belong to the user's turns: move or remove the mark"
            )
        return Message(roles[role], content)

    def join_parts(self, i: int, parts: list[Any], inline: list[Any]) -> str:
        """Write a list of parts as text with image marks, by the rule of `cal_train.data.conversation`."""
        text, has_text = "", False
        for k, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text, has_text = text + part["text"], True
            elif kind in ("image", "image_url"):
                value = part.get(kind)
                if isinstance(value, dict) and "url" in value:
                    value = value["url"]
                if value is not None:
                    inline.append(value)
                elif kind == "image_url":
                    self.fail(f"part {k} of turn {i} has no image_url", "Give a path relative to the image root")
                text += IMAGE_MARK + ("" if has_text or k == len(parts) - 1 else "\n")
            else:
                self.fail(
                    f"part {k} of turn {i} is neither text nor an image", 'Use {"type": "text"} or {"type": "image"}'
                )
        return text

    def drop_leading_answer(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return messages[1:] if messages and messages[0].role == "assistant" else messages

    def check_turns(self, messages: tuple[Message, ...]) -> None:
        turns = messages[1:] if messages and messages[0].role == "system" else messages
        for i, message in enumerate(turns):
            expected = "assistant" if i % 2 else "user"
            if message.role != expected:
                self.fail(
                    f"turns do not alternate: {message.role!r} where {expected!r} should be",
                    "A system turn may come first; then user and assistant take turns",
                )
        if len(turns) < 2:
            self.fail("the conversation has no assistant turn behind a user turn", "Add the answer, or remove the row")

    def image_column(self, raw: dict) -> list[Any]:
        found = [key for key in ("image", "images") if raw.get(key) is not None]
        if len(found) > 1:
            self.fail("the row has both 'image' and 'images'", "Give one of them")
        value = raw[found[0]] if found else []
        return value if isinstance(value, list) else [value]

    def image(self, value: Any) -> Path | bytes:
        """Return the resolved path of an image, or its bytes where the row carries them."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, dict):  # the storage of a `datasets` image column
            if isinstance(value.get("bytes"), bytes):
                return value["bytes"]
            value = value.get("path")
        if not isinstance(value, str) or not value or "\0" in value:
            self.fail(f"{value!r} is not an image path", "Give a path relative to the image root")
        if "://" in value or value.startswith("data:"):
            self.fail(f"image {value[:80]!r} is a URL", "Download it, and give a path relative to the image root")
        try:
            path = (self.image_root / value).resolve()
            is_inside = path.is_relative_to(self.image_root)
            is_file = is_inside and path.is_file()
        except (OSError, RuntimeError, UnicodeEncodeError) as error:  # name too long, loop of links, half a character
            self.fail(f"image {value[:80]!r} cannot be looked up ({error})", "Correct the path")
        if not is_inside:
            self.fail(
                f"image {value!r} leaves the image root {self.image_root}", "Put the file inside, or set image_root"
            )
        if not is_file:
            self.fail(f"image {value!r} does not exist in {self.image_root}", "Add the file, or correct the path")
        return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
