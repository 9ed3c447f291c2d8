"""The reading suite: words and numbers drawn at set-up, as tables that lmms-eval's tasks read, and how answers score.

| task | picture | asked |
|---|---|---|
| ``word`` | one common word | what it says |
| ``number`` | one number of three to five digits | what it says |
| ``among`` | three words under each other, each in a colour of its own | the word of a colour, or of a place |

Sizes and conditions alternate from document to document, so that the first few hundred documents of a task (``limit``)
hold as many of each. Each word is the answer equally often, so an answer that ignores the picture is right in one case
of 48, and one that ignores the question in one of three of the ``among`` documents that ask for a place.
"""

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

READING_TABLES = Path(".cache/reading")
"""Where the task files look for the tables, from the root of the repository."""

IMAGE_SIZE_PX = 336
FONT_SIZES_PX = (12, 18, 28, 44)
NUM_DOCUMENTS = 192
"""Of each task: a multiple of the number of words and of every combination of size, condition and place."""

WORDS = (
    "apple", "bread", "bridge", "candle", "chair", "circle", "cloud", "dance", "desert", "engine", "family", "field",
    "finger", "flower", "forest", "garden", "ghost", "hotel", "island", "jacket", "kitchen", "lemon", "letter",
    "market", "mirror", "morning", "needle", "ocean", "orange", "paper", "pencil", "planet", "pocket", "queen",
    "river", "school", "shadow", "silver", "smoke", "spring", "stone", "summer", "ticket", "travel", "valley",
    "window", "winter", "yellow",
)  # fmt: skip
CONTRASTS = {"dark": (25, 235), "light": (235, 25), "faint": (170, 215)}
"""Grey of the text and of what is behind it."""
COLOURS = {"red": (205, 20, 20), "green": (0, 130, 40), "blue": (25, 45, 215)}
PLACES = {"at the top": 0, "in the middle": 1, "at the bottom": 2}
_MARGIN_PX = 8


def write_reading_tables(folder: Path, seed: int = 0) -> None:
    """Draw the suite and write ``word.parquet``, ``number.parquet`` and ``among.parquet``.

    Equal seeds give equal tables with equal versions of Pillow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stream, (task, documents) in enumerate({"word": _words, "number": _numbers, "among": _among}.items()):
        rows = documents(np.random.default_rng([seed, stream]))
        rows = [{"id": f"{task}-{n:03d}", **row, "image": _png(row["image"])} for n, row in enumerate(rows)]
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{task}.parquet")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer is the text asked for, over all, for its size and condition, and whether it holds it.

    Case and punctuation do not count. ``has_answer`` allows a sentence around the text, but no other text of the
    picture in it.
    """
    said = _plain(results[0])
    is_right = float(said == doc["answer"])
    has_answer = doc["answer"] in said.split() and not set(doc["others"]) & set(said.split())
    by_group = {f"exact_match_{group}": is_right for group in (f"{doc['size']}px", doc["condition"])}
    return {"exact_match": is_right, "has_answer": float(has_answer), **by_group}


def _plain(answer: str) -> str:
    return " ".join(re.sub(r"[^0-9a-z\s]", "", answer.lower()).split())


def _words(rng: np.random.Generator) -> list[dict[str, Any]]:
    return _alone("What word is written in the picture?", _answers(rng), rng)


def _numbers(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return documents with different numbers, as many of three, four and five digits."""
    numbers = [
        str(number)
        for digits in (3, 4, 5)
        for number in rng.choice(np.arange(10 ** (digits - 1), 10**digits), NUM_DOCUMENTS // 3, replace=False)
    ]
    return _alone("What number is written in the picture?", [str(text) for text in rng.permutation(numbers)], rng)


def _alone(question: str, texts: Sequence[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for n, text in enumerate(texts):
        size, condition = _cycle(n, FONT_SIZES_PX, tuple(CONTRASTS))
        ink, paper = CONTRASTS[condition]
        picture = _paper(paper)
        _write(picture, text, size, (ink, ink, ink), (0, IMAGE_SIZE_PX), rng)
        rows.append(_document(picture, question, text, [], size, condition))
    return rows


def _among(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows, band = [], IMAGE_SIZE_PX // len(PLACES)
    for n, answer in enumerate(_answers(rng)):
        size, condition, place = _cycle(n, FONT_SIZES_PX, ("colour", "place"), tuple(PLACES))
        others = [str(word) for word in rng.choice([w for w in WORDS if w != answer], len(PLACES) - 1, replace=False)]
        texts = list(others)
        texts.insert(PLACES[place], answer)
        colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
        picture = _paper(CONTRASTS["dark"][1])
        for row, (text, colour) in enumerate(zip(texts, colours, strict=True)):
            _write(picture, text, size, COLOURS[colour], (row * band, (row + 1) * band), rng)
        asked = f"is written in {colours[PLACES[place]]}" if condition == "colour" else f"is {place}"
        rows.append(_document(picture, f"Which word {asked}?", answer, others, size, condition))
    return rows


def _answers(rng: np.random.Generator) -> list[str]:
    """Return `NUM_DOCUMENTS` words in random order, each equally often."""
    return [str(word) for word in rng.permutation(WORDS * (NUM_DOCUMENTS // len(WORDS)))]


def _cycle(n: int, *choices: Sequence[Any]) -> list[Any]:
    """Return the n-th combination of the choices, the first of them changing fastest."""
    chosen = []
    for values in choices:
        n, index = divmod(n, len(values))
        chosen.append(values[index])
    return chosen


def _document(
    picture: Image.Image, question: str, answer: str, others: list[str], size: int, condition: str
) -> dict[str, Any]:
    return {
        "image": picture, "question": question, "answer": answer, "others": others, "size": size,
        "condition": condition,
    }  # fmt: skip


def _paper(grey: int) -> Image.Image:
    return Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), (grey, grey, grey))


def _write(
    picture: Image.Image,
    text: str,
    size: int,
    colour: tuple[int, int, int],
    rows: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    """Write a text at a random place within the rows (first, behind last) of a picture."""
    font = _font(size)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = (round(edge) for edge in pen.textbbox((0, 0), text, font=font))
    x = rng.integers(_MARGIN_PX, picture.width - _MARGIN_PX - (right - left), endpoint=True)
    y = rng.integers(rows[0] + _MARGIN_PX, rows[1] - _MARGIN_PX - (bottom - top), endpoint=True)
    pen.text((int(x) - left, int(y) - top), text, fill=colour, font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("this Pillow is built without FreeType, which draws the texts: install one from its wheels")
    # the basic layout, since the other is only there where libraqm is
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _png(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}
