"""Folders that are filled once and appear whole."""

import tempfile
from collections.abc import Callable
from pathlib import Path


def fill_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Fill a folder once. It appears under its name only when it is complete, so a stopped run leaves no half of it."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            make(new)
            new.replace(folder)
    return folder
