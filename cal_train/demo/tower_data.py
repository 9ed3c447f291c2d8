"""Pictures with captions for the towers' demo: one drawing, or two side by side, on a plain ground.

| file | drawings | concepts |
|---|---|---|
| ``train.jsonl`` | OpenMoji | of training |
| ``new_concepts.jsonl`` | OpenMoji | held out |
| ``new_style.jsonl`` | Noto | of training, as many as are held out |
| ``new_both.jsonl`` | Noto | held out |
| ``shown.jsonl`` | OpenMoji, two in a picture | held out; for the pictures of maps and masks |
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cal_train.demo.assets import fill_once
from cal_train.demo.drawing import SCALE_RANGE, render
from cal_train.demo.tower_assets import TowerAssets
from cal_train.demo.tower_concepts import PictureConcept

SHOWN_FILE = "shown.jsonl"
NUM_SHOWN = 4
TEST_SPLITS = ("new_concepts", "new_style", "new_both")
VIEWS_PER_CONCEPT = 2
PAIRS_PER_CONCEPT = 1
"""Pictures of a training concept alone, and beside another one. Placed, sized, coloured and mirrored by chance."""

Draw = Callable[[PictureConcept], Image.Image]


def write_tower_data(folder: Path, assets: TowerAssets, image_size: int, seed: int = 0) -> Path:
    """Write all pictures and the files above into a folder, unless it is there; return it.

    Args:
        folder: Is made.
        assets: Drawings and their names.
        image_size: Side of the pictures in pixels.
        seed: Of everything that is drawn by chance.
    """

    def write(new: Path) -> None:
        (new / "images").mkdir()
        rng = np.random.default_rng(seed)
        seen = [concept for concept in assets.concepts if not concept.held_out]
        unseen = [concept for concept in assets.concepts if concept.held_out]
        some_seen = [seen[i] for i in sorted(rng.permutation(len(seen))[: len(unseen)])]
        train, test = _sprites(assets.train_style), _sprites(assets.held_out_style)
        _write_rows(new, "train", [*_alone(seen, rng), *_pairs(seen, rng)], train, image_size, rng)
        for split, concepts, draw in zip(TEST_SPLITS, (unseen, some_seen, unseen), (train, test, test), strict=True):
            _write_rows(new, split, [(concept,) for concept in concepts], draw, image_size, rng)

        pairs = [(unseen[i], unseen[j]) for i, j in rng.permutation(len(unseen))[: 2 * NUM_SHOWN].reshape(-1, 2)]
        _write_rows(new, Path(SHOWN_FILE).stem, pairs, train, image_size, rng)

    return fill_once(folder, write)


def captions_of(shown: Sequence[PictureConcept]) -> list[str]:
    """Return the captions of a picture; the first is what it shows and nothing else."""
    if len(shown) == 1:
        return list(shown[0].captions)
    left, right = (concept.name for concept in shown)
    return [f"{left} and {right}", f"a picture of {left} and {right}", f"{left} on the left, {right} on the right"]


def draw_picture(sprites: Sequence[Image.Image], image_size: int, rng: np.random.Generator) -> Image.Image:
    """Return one drawing, or several side by side, as an RGB picture of ``image_size`` pixels square."""
    picture = Image.new("RGB", (image_size, image_size), tuple(int(c) for c in rng.integers(200, 256, 3)))
    width = image_size // len(sprites)
    for column, sprite in enumerate(sprites):
        if rng.random() < 0.5:
            sprite = ImageOps.mirror(sprite)
        side = int(width * rng.uniform(*SCALE_RANGE))
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        left, top = rng.integers(0, [width - side + 1, image_size - side + 1]).tolist()
        picture.paste(sprite, (column * width + left, top), sprite)
    return picture


def _alone(concepts: Sequence[PictureConcept], rng: np.random.Generator) -> Iterator[tuple[PictureConcept, ...]]:
    for _ in range(VIEWS_PER_CONCEPT):
        yield from ((concepts[i],) for i in rng.permutation(len(concepts)))


def _pairs(concepts: Sequence[PictureConcept], rng: np.random.Generator) -> Iterator[tuple[PictureConcept, ...]]:
    for _ in range(PAIRS_PER_CONCEPT):
        order = rng.permutation(len(concepts))
        yield from ((concepts[i], concepts[j]) for i, j in zip(order, np.roll(order, 1), strict=True))


def _sprites(style: Path) -> Draw:
    """Return a function that renders a drawing of a style, each once."""
    rendered: dict[str, Image.Image] = {}

    def draw(concept: PictureConcept) -> Image.Image:
        if concept.code_point not in rendered:
            svg = (style / f"{concept.code_point}.svg").read_text(encoding="utf-8")
            rendered[concept.code_point] = render(svg)
        return rendered[concept.code_point]

    return draw


def _write_rows(
    folder: Path,
    name: str,
    shown: Sequence[tuple[PictureConcept, ...]],
    draw: Draw,
    image_size: int,
    rng: np.random.Generator,
) -> None:
    rows: list[dict[str, Any]] = []
    for i, concepts in enumerate(shown):
        image = f"images/{name}-{i:05}.png"
        draw_picture([draw(concept) for concept in concepts], image_size, rng).save(folder / image)
        rows.append({"image": image, "captions": captions_of(concepts)})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
