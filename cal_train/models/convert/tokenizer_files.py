"""A tokenizer's files without the tokens that a conversion had added."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cal_train.models.convert.reading import read_json


def write_tokenizer_files(files: Iterable[Path], folder: Path, num_rows: int, pad_token: str | None) -> None:
    """Copy files into a folder; from a tokenizer's, tokens with an id of ``num_rows`` or above are taken away.

    Args:
        files: Of a folder of `PreTrainedTokenizerBase.save_pretrained`, and others, which are copied as they are.
        folder: Where they go.
        num_rows: Rows of the model's vocabulary.
        pad_token: What takes the place of a padding token that is taken away.
    """
    paths = {path.name: path for path in files}
    removed = _tokens_beyond(paths, num_rows)
    for name, path in paths.items():
        if name == "tokenizer.json" and removed:
            content = read_json(path)
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_rows]
            _write(folder / name, content)
        elif name == "tokenizer_config.json":
            content = read_json(path)
            content.pop("processor_class", None)
            has_pad = _is_one(content.get("pad_token"), removed)
            content = _without(content, removed)
            _write(folder / name, content | ({"pad_token": pad_token} if has_pad and pad_token else {}))
        elif name in ("special_tokens_map.json", "added_tokens.json") and removed:
            _write(folder / name, _without(read_json(path), removed))
        else:
            shutil.copyfile(path, folder / name)


def _tokens_beyond(paths: dict[str, Path], num_rows: int) -> set[str]:
    if "tokenizer.json" not in paths:
        return set()
    added = read_json(paths["tokenizer.json"]).get("added_tokens", [])
    return {token["content"] for token in added if token["id"] >= num_rows}


def _without(content: Any, removed: set[str]) -> Any:
    """Return a JSON value without the tokens, wherever they stand: as values, in lists, or as keys."""
    if isinstance(content, dict):
        return {
            key: _without(value, removed)
            for key, value in content.items()
            if key not in removed and not _is_one(value, removed)
        }
    if isinstance(content, list):
        return [_without(value, removed) for value in content if not _is_one(value, removed)]
    return content


def _is_one(value: Any, removed: set[str]) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in removed


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
