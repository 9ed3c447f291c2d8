"""Open folders in Hugging Face layout, whoever made them: looked over before a library reads any of their files.

Libraries follow links, join names of an index to the folder unchecked, build as many layers as a configuration claims,
and load another model where a folder says so. What they raise on damaged files is of no common kind, so that it becomes
a ``ValueError`` that names the folder.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_READ_BY_NAME = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".gguf", ".pt", ".pth", ".yaml")
_COUNTS = re.compile(r"(num|n)_.*layers?|.*_layers|depths?|n_layer|image_size|max_position_embeddings|num_.*heads")
_LARGEST_COUNT = {"image_size": 16_384, "max_position_embeddings": 2**24}
_MOST_LAYERS = 4096  # and heads


def from_folder(loader: Any, folder: str | Path, **options: Any) -> Any:
    """Return ``loader.from_pretrained(folder, **options)``, after `check_folder` and without foreign code.

    Args:
        loader: A class, or auto class, of a model, configuration, tokenizer or processor.
        folder: A folder in Hugging Face layout; nothing is looked up on the hub.
        options: For ``from_pretrained``.

    Raises:
        ValueError: As `check_folder`, or if the library cannot load the folder; names folder and reason.
    """
    check_folder(folder)
    try:
        return loader.from_pretrained(folder, trust_remote_code=False, **options)
    except (ImportError, NotImplementedError):  # a package that is not installed, an engine that cannot do it
        raise
    except Exception as error:  # tokenizers raises plain Exception, each other library errors of its own
        what = getattr(loader, "__name__", type(loader).__name__)
        raise ValueError(f"{folder} cannot be loaded by {what} ({type(error).__name__}): {error}") from error


def check_folder(folder: str | Path) -> None:
    """Raise unless the files of a folder are its own, and a library loads what they say and nothing else.

    Raises:
        ValueError: If an index names other files (`check_shards`), a model comes with an adapter, or as `check_files`.
    """
    folder = Path(folder)
    check_files(folder)
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds adapter_config.json beside a model: the adapter's base model would be loaded instead. "
            "Move the adapter's files into a folder of their own"
        )
    check_shards(folder)


def check_files(folder: Path) -> None:
    """Raise unless the files of a folder are its own, and its configuration is of a size that a model can have.

    Raises:
        ValueError: If a file is a pipe or device, a link leads out of the folder (but into the blobs of a hub cache),
            or as `check_config`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: check the path")
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_BY_NAME:
            _check_file(folder, path)
    if (folder / "config.json").is_file():
        check_config(folder / "config.json")


def check_config(file: Path) -> None:
    """Raise if a config.json is no JSON object, or claims counts from which a library would build for hours.

    Raises:
        ValueError: Naming the file and the field.
    """
    for name, value in _named_numbers(read_object(file)):
        most = _LARGEST_COUNT.get(name, _MOST_LAYERS)
        if _COUNTS.fullmatch(name) and value > most:
            raise ValueError(f"{file}: {name} is {value}, above {most}: no model is like that")


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, not a {type(content).__name__}")
    return content


def check_shards(folder: str | Path) -> None:
    """Raise if an index of a model folder, or of a folder below it, names anything but regular files beside it.

    Loaders join the names to the folder unchecked: ``../`` or an absolute path reads another file, and a pipe never
    answers (CVE-2026-69112).

    Raises:
        ValueError: If an index is no index, or names a file that is missing, is not regular or lies elsewhere.
    """
    for index in sorted(Path(folder).rglob("*.index.json")):
        if not index.is_file():
            raise ValueError(f"{index} is not a regular file. Copy the folder anew")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not a weight index: {error!r}. Copy the folder anew") from None
        for name in names:
            _check_shard(index, name)


def _check_shard(index: Path, name: object) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or set("\\\0") & set(name):
        raise ValueError(f"{index}: shard {name!r} is not the name of a file beside it; do not use this folder")
    shard = index.parent / name
    if not shard.is_file():
        raise ValueError(f"{index}: shard {name!r} is missing or not a regular file. Copy the folder anew")


def _check_file(folder: Path, path: Path) -> None:
    try:
        target = path.resolve()
        is_file = target.is_file()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{path} cannot be looked up ({error})") from None
    own = folder.resolve()
    if not is_file:
        raise ValueError(f"{path} is not a regular file. Copy the folder anew")
    if not (target.is_relative_to(own) or target.is_relative_to(own.parent.parent / "blobs")):
        raise ValueError(f"{path} is a link out of the folder: put the file itself there")


def _named_numbers(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every whole number in nested objects with the nearest name above it."""
    pending: list[tuple[str, Any]] = list(content.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, entry) for entry in value]
        elif isinstance(value, int):
            yield name, value
