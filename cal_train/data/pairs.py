"""An image with its captions: the row of every tower data set, where such rows lie, and the options of reading them.

Rows come from webdataset shards (``.tar``), Parquet, CSV, TSV, JSON and JSONL (`cal_train.data.stream_files`,
`cal_train.data.pair_rows`), are dealt to ranks and workers (`cal_train.data.stream_plan`), and become batches
(`cal_train.data.pair_batches`, `cal_train.data.stream_loader`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cal_train.data.records import resolve_image
from cal_train.types import BadSampleError, Problem

IMAGE_COLUMNS = ("image", "image_path", "filepath", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "title")
"""Column names that are found without being told, in this order. ``filepath`` and ``title`` are open_clip's."""

_SOURCE_KEYS = {"path", "image_root", "weight", "image_column", "caption_column"}


@dataclass(frozen=True)
class Pair:
    """An image that is not decoded yet, and its captions (at least one, none blank).

    ``image`` is a path inside the image root, symbolic links resolved, or the encoded bytes.
    """

    file: str
    row: int
    id: str
    image: Path | bytes
    captions: tuple[str, ...]

    @property
    def image_id(self) -> int:
        """A number in [0, 2**63) that is equal for equal paths, or equal bytes, in every process and every run."""
        identity = self.image if isinstance(self.image, bytes) else str(self.image).encode()
        return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class PairSource:
    """Files of one kind.

    Attributes:
        path: A file, a folder of ``.tar`` or ``.parquet`` files, or several files as ``name-{0000..0099}.tar``.
        image_root: Folder that image paths are relative to and never leave. Default: the folder of the file.
        weight: Share of the rows in an epoch: 0.5 draws half of them anew each epoch, 2 takes every row twice.
        image_column: Name of the column (or the ending of the shard member) with the image. Default: the first of
            `IMAGE_COLUMNS` that is there.
        caption_column: The same for captions, text or a list of texts. Default: the first of `CAPTION_COLUMNS`; in
            shards the ``.txt`` member, else these fields of the ``.json`` member.
    """

    path: str
    image_root: str | None = None
    weight: float = 1.0
    image_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class PairOptions:
    """Which pairs a tower is trained on, and how they become batches."""

    data_path: str | None = field(
        default=None,
        metadata={"help": "Shards as name-{0000..0099}.tar, a folder of shards, or a parquet, csv, tsv or jsonl file."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Image root of csv, tsv, json and jsonl files. Default: the file's folder."}
    )
    data: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Several sources instead of data_path: [{path, image_root, weight, image_column, "
            "caption_column}, ...]. weight 0.5: half of the rows, drawn anew each epoch; 2: every row twice."
        },
    )
    captions_per_image: int = field(
        default=1,
        metadata={"help": "Rows of a batch that show the same image, each with another of its captions drawn."},
    )
    multiple_positives: bool = field(
        default=False, metadata={"help": "Batches carry image_ids: rows of equal ids are positives of each other."}
    )
    min_crop_scale: float = field(
        default=0.9,
        metadata={
            "help": "Smallest area of the random crop relative to the image (open_clip, Llip: 0.9). 1: no augmentation."
        },
    )
    shuffle_pool: int = field(
        default=4096,
        metadata={"help": "Encoded rows that a worker holds and mixes. Shards are read in random order, row by row."},
    )
    max_bad_samples: int = field(
        default=0, metadata={"help": "Bad rows of a rank that are replaced and counted before the run stops."}
    )
    max_image_pixels: int = field(
        default=100_000_000, metadata={"help": "Images with more pixels are refused from their header, undecoded."}
    )
    min_image_side: int = field(default=2, metadata={"help": "Images with a shorter side (pixels) count as broken."})
    batch_timeout_s: float = field(
        default=600, metadata={"help": "Seconds without a batch from the workers after which the run stops."}
    )

    def __post_init__(self):
        if self.captions_per_image < 1:
            raise ValueError(f"captions_per_image is {self.captions_per_image}: give at least 1")
        if self.captions_per_image > 1 and not self.multiple_positives:
            raise ValueError(
                f"captions_per_image {self.captions_per_image} puts an image into a batch several times; without "
                "multiple_positives: true its other captions would be trained as wrong ones"
            )
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"min_crop_scale is {self.min_crop_scale}: an area relative to the image, in (0, 1]")


def pair_sources(options: PairOptions) -> list[PairSource]:
    """Return the sources of a recipe.

    Raises:
        ValueError: If neither or both of ``data_path`` and ``data`` are given, or an entry of ``data`` is malformed.
    """
    if (options.data_path is None) == (options.data is None):
        raise ValueError("give exactly one of data_path and data (a list of {path, image_root, weight})")
    if options.data_path is not None:
        return [PairSource(options.data_path, options.image_folder)]
    if not isinstance(options.data, list) or not options.data:
        raise ValueError("data is a list of sources: [{path: FILES, image_root: DIR, weight: 1.0}, ...]")
    return [_source(i, entry, options.image_folder) for i, entry in enumerate(options.data)]


def _source(i: int, entry: Any, image_folder: str | None) -> PairSource:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"data[{i}] is {entry!r}: write {{path: FILES, image_root: DIR, weight: 1.0}}")
    if unknown := sorted(set(entry) - _SOURCE_KEYS):
        raise ValueError(f"data[{i}] has the unknown keys {unknown}: known are {sorted(_SOURCE_KEYS)}")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise ValueError(f"data[{i}]: weight {weight!r} is not a positive number; leave a source out by removing it")
    return PairSource(**{"image_root": image_folder, **entry, "weight": float(weight)})


def find_columns(present: Sequence[str], source: PairSource, file: str) -> tuple[str, str]:
    """Return the names of the image and the caption column: those asked for, or the first known ones that are present.

    Raises:
        ValueError: If there is none; it lists those that are there.
    """
    image = _find(present, source.image_column, IMAGE_COLUMNS, file, "image")
    return image, _find(present, source.caption_column, CAPTION_COLUMNS, file, "caption")


def _find(present: Sequence[str], asked: str | None, known: tuple[str, ...], file: str, what: str) -> str:
    for name in known if asked is None else (asked,):
        if name in present:
            return name
    looked_for = "any of " + ", ".join(known) if asked is None else repr(asked)
    raise ValueError(
        f"{file} has no {what} column: looked for {looked_for}, found {', '.join(map(str, present)) or 'nothing'}. "
        f"Set {what}_column"
    )


def parse_pair(image: Any, captions: Any, file: str, row: int, image_root: Path, id: str | None = None) -> Pair:
    """Check one row.

    Args:
        image: A path relative to the root, encoded bytes, or the ``{"bytes", "path"}`` of a `datasets` image column.
        captions: Text or a list of texts; blank ones are left out.
        file: Where the row is from, for messages.
        row: Its 0-based number.
        image_root: Folder that paths stay inside.
        id: The row's own name. Default: ``<file stem>-<row>``.

    Raises:
        BadSampleError: With the place, the problem and the cure.
    """
    id = f"{Path(file).stem}-{row}" if id is None else id
    texts = captions if isinstance(captions, list | tuple) else [captions]
    if not all(isinstance(text, str) for text in texts):
        kinds = ", ".join(sorted({type(text).__name__ for text in texts}))
        raise BadSampleError(Problem(file, row, id, f"captions are {kinds}, not text", "Write text, or a list of it"))
    kept = tuple(text.strip() for text in texts if text.strip())
    if not kept:
        raise BadSampleError(
            Problem(file, row, id, "no caption, or only blank ones", "Give a caption, or drop the row")
        )
    if not isinstance(image, bytes):
        image = resolve_image(image, file, row, id, image_root)
    return Pair(file, row, id, image, kept)


def parse_record(record: Any, columns: tuple[str, str], file: str, row: int, image_root: Path) -> Pair | Problem:
    """Check one row given as a mapping; ``columns`` are the names of the image and the caption column."""
    try:
        if not isinstance(record, dict):
            name = f"{Path(file).stem}-{row}"
            return Problem(file, row, name, f"a row is an object, not {type(record).__name__}", "Write {...} per row")
        image_column, caption_column = columns
        id = None if record.get("id") is None else str(record["id"])
        return parse_pair(record.get(image_column), record.get(caption_column), file, row, image_root, id)
    except BadSampleError as error:
        return error.problem
