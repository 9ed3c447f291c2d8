"""Read checkpoint folders: tensors only, and only from files that lie inside the folder.

Tensors stay mapped to their files: reading a folder takes no memory to speak of until its values are used.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cal_train.folders import read_object

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What the two readers are known to raise on damaged or foreign files.
_READ_ERRORS = (
    *(SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, TypeError, IndexError, KeyError, AttributeError),
)
_NOT_WEIGHTS = (".json", ".jinja", ".model", ".txt")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: If the file is missing or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return read_object(path)


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds the weights of a whole model."""
    return any((folder / name).is_file() for name in (*_WHOLE, *_INDEX))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a model folder, whether in one file or in shards, safetensors before PyTorch's own.

    Raises:
        ValueError: If there are none, a file cannot be read or lies outside the folder, or the index does not fit the
            files.
    """
    for whole, index in zip(_WHOLE, _INDEX, strict=True):
        if (folder / index).is_file():
            return _read_shards(folder, index)
        if (folder / whole).is_file():
            return read_tensors(inside(folder, whole))
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join([*_WHOLE, *_INDEX])}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, safetensors or PyTorch's. Nothing in the file is executed.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except _READ_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of tensors ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, not a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors by name: {name!r} is a {type(value).__name__}")
    return content


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file of the folder.

    Raises:
        ValueError: If the name leads out of the folder (absolute, by ``..`` or by a link), or there is no such file.
    """
    if not isinstance(name, str) or "\0" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} names the file {name!r}, which lies outside the folder: put the files themselves into the folder"
        )
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} does not exist: the checkpoint is incomplete")
    return folder / name


def side_files(folder: Path) -> Iterable[Path]:
    """Yield the files of a model folder that are not weights: configuration, tokenizer, chat template."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _NOT_WEIGHTS and not path.name.endswith(".index.json"):
            yield inside(folder, path.name)


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    weight_map = read_json(inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / index} has no weight_map")
    files = list(dict.fromkeys(inside(folder, name) for name in weight_map.values()))  # all, before any is read
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise ValueError(f"{path}: {name} stands in another shard too")
            tensors[name] = tensor
    if lost := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{folder / index} lists {len(lost)} weights that its files do not hold, first {lost[0]}")
    return tensors
