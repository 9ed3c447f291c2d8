"""Prompts and thumbnails of scored samples, taken from the data file that was scored."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from cal_train.data.images import open_image
from cal_train.data.records import Rows, parse_row, row_id
from cal_train.evals.report.scores import ScoredRow
from cal_train.types import BadSampleError, Sample

THUMBNAIL_PX = 224


def find_samples(rows: Sequence[ScoredRow], data: Path, image_root: Path | None) -> list[Sample | None]:
    """Return the data row of each scored sample.

    Both files are in the same order, and the score file lacks the rows that were dropped; so equal ids are told apart
    by their order. A row that cannot be parsed any more (its image is gone) counts as not at hand.

    Raises:
        ValueError: If the data file has no such sample: it is not the one that was scored.
    """
    file, position = Rows(data), 0
    root = image_root or data.parent
    found: list[Sample | None] = []
    for row in rows:
        while position < len(file):
            raw, position = _raw(file, position), position + 1
            if row_id(raw, data, position - 1) == row.id:
                break
        else:
            raise ValueError(
                f"{data} has no sample {row.id!r} where the score file has one: give the data file that was scored"
            )
        found.append(_parsed(raw, data, position - 1, root))
    return found


def _raw(file: Rows, position: int):
    try:
        return file[position]
    except BadSampleError:
        return None


def _parsed(raw, data: Path, position: int, root: Path) -> Sample | None:
    try:
        return parse_row(raw, data, position, root)
    except BadSampleError:
        return None


def prompt_of(sample: Sample | None) -> str:
    """Return the user's turns as text, without image marks; empty if the sample is not at hand."""
    turns = [message.content for message in sample.messages if message.role == "user"] if sample else []
    return "\n".join(turn.replace("<image>", "").strip() for turn in turns)


def thumbnails(samples: Iterable[Sample | None], limit: int) -> tuple[dict[Path | bytes, str], int]:
    """Return small JPEGs as data URIs by image, for the first image of each sample, and how many could not be read.

    Args:
        samples: In the order of importance.
        limit: Distinct images that are made; the rest is left out.
    """
    made: dict[Path | bytes, str] = {}
    unreadable: set[Path | bytes] = set()
    for sample in samples:
        if len(made) >= limit:
            break
        if sample is None or not sample.images or sample.images[0] in made or sample.images[0] in unreadable:
            continue
        try:
            made[sample.images[0]] = _data_uri(open_image(sample.images[0]))
        except ValueError:
            unreadable.add(sample.images[0])
    return made, len(unreadable)


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
