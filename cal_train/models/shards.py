"""Check which files the weight indices of a model folder name, before any of them is opened."""

import json
from pathlib import Path


def check_shards(folder: str | Path) -> None:
    """Raise if an index of a model folder, or of a folder below it, names anything but regular files beside it.

    Loaders join the names to the folder unchecked: ``../`` or an absolute path reads another file, and a pipe never
    answers (CVE-2026-69112).

    Raises:
        ValueError: If an index is no index, or names a file that is missing, is not regular or lies elsewhere.
    """
    for index in sorted(Path(folder).rglob("*.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a weight index: {error!r}. Copy the folder anew") from None
        for name in names:
            _check_shard(index, name)


def _check_shard(index: Path, name: object) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{index}: shard {name!r} is not the name of a file beside it; do not use this folder")
    shard = index.parent / name
    if not shard.is_file():
        raise ValueError(f"{index}: shard {name!r} is missing or not a regular file. Copy the folder anew")
