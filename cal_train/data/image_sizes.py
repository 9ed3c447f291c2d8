"""Sizes of images from their headers, kept in a small file: what an image's tokens depend on when it is cut into tiles.

The file holds one entry per image: a hash of its path, size and modification time (or of its bytes), and its height and
width, both 0 for an image that cannot be used.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cal_train.data.images import ImageLimits, read_size

_IMAGES_PER_ROUND = 4096

Sizes = dict[int, tuple[int, int]]
"""(height, width) in pixels by `size_key`; (0, 0) for an image that cannot be used."""


def size_key(image: Path | bytes, limits: ImageLimits) -> int:
    """Return a 64-bit hash that tells an image from others, from its own former states and under other limits."""
    if isinstance(image, bytes):
        identity = image
    else:
        stat = image.stat()
        identity = f"{image}:{stat.st_size}:{stat.st_mtime_ns}".encode()
    return int.from_bytes(hashlib.sha256(identity + repr(limits).encode()).digest()[:8], "little")


def read_sizes(file: Path) -> Sizes:
    """Return what `write_sizes` wrote, nothing if there is no file.

    Raises:
        ValueError: If the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            return dict(zip(stored["keys"].tolist(), map(tuple, stored["sizes"].tolist()), strict=True))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, it will be made again") from error


def write_sizes(file: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Write sizes so that a run that is killed leaves the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("wb") as stream:
        keys = np.fromiter(sizes.keys(), np.uint64, len(sizes))
        np.savez(stream, keys=keys, sizes=np.array(list(sizes.values()), np.int32).reshape(-1, 2))
    unfinished.replace(file)


def add_sizes(
    known: Sizes, images: Iterable[tuple[int, Path | bytes]], limits: ImageLimits, show_progress: bool
) -> int:
    """Read the headers of images whose size is not known yet, several at a time; return how many were read.

    Args:
        known: Is added to.
        images: Every image behind its `size_key`; repeats are read once.
        limits: Which images cannot be used.
        show_progress: Draw a bar.
    """
    num_read = 0
    pending: dict[int, Path | bytes] = {}
    with (
        ThreadPoolExecutor(max_workers=4 * (os.cpu_count() or 1)) as executor,  # waiting for a disk, mostly
        tqdm(desc="image sizes", unit="image", disable=not show_progress) as progress,
    ):

        def read_pending() -> None:
            sizes = executor.map(lambda image: read_size(image, limits), pending.values())
            known.update({key: size or (0, 0) for key, size in zip(pending, sizes, strict=True)})
            progress.update(len(pending))
            pending.clear()

        for key, image in images:
            if key not in known and key not in pending:
                pending[key] = image
                num_read += 1
            if len(pending) == _IMAGES_PER_ROUND:
                read_pending()
        read_pending()
    return num_read
