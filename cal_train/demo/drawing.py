"""Pictures of scenes: emoji rendered from SVG with resvg, composed on a grid with PIL."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageOps

from cal_train.demo.concepts import Concept
from cal_train.demo.scenes import COLUMNS, ROWS, Scene

SPRITE_SIZE_PX = 96
"""Emoji are rendered once at this size and scaled down for each picture."""

SCALE_RANGE = (0.8, 1.0)
"""Share of its cell that a drawing fills; with the place inside the cell it is what makes two pictures differ."""


def load_sprites(folder: Path, concepts: Iterable[Concept]) -> dict[str, Image.Image]:
    """Return one RGBA drawing of `SPRITE_SIZE_PX` per concept, keyed by its word.

    Args:
        folder: Drawings of one style, one ``CODEPOINT.svg`` each.
        concepts: What to load.

    Raises:
        ValueError: If a concept has no drawing in this style, naming both.
    """
    sprites = {}
    for concept in concepts:
        path = folder / f"{concept.code_point}.svg"
        if not path.is_file():
            raise ValueError(f"no drawing of {concept.word!r}: {path} is missing; remove {folder} and run again")
        sprites[concept.word] = render(path.read_text(encoding="utf-8"))
    return sprites


def render(svg: str) -> Image.Image:
    """Return an SVG drawing as RGBA, `SPRITE_SIZE_PX` square and without its margins."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=SPRITE_SIZE_PX,
        height=SPRITE_SIZE_PX,
        skip_system_fonts=True,  # half a second each otherwise, and the drawings hold no text
    )
    return _trim(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _trim(drawing: Image.Image) -> Image.Image:
    """Return the drawing cut to its ink and padded back to a square: styles differ in their margins."""
    box = drawing.getchannel("A").getbbox()
    if box is None:
        return drawing
    return ImageOps.pad(drawing.crop(box), (SPRITE_SIZE_PX, SPRITE_SIZE_PX), color=(0, 0, 0, 0))


def draw(scene: Scene, sprites: Mapping[str, Image.Image], image_size: int) -> Image.Image:
    """Return the RGB picture of a scene, ``image_size`` pixels square.

    Size, place within the cell, mirroring and the background's colour vary, all fixed by the scene's own seed.
    """
    rng = np.random.default_rng(scene.seed)
    background = tuple(int(c) for c in rng.integers(200, 256, 3))
    picture = Image.new("RGB", (image_size, image_size), background)
    width, height = image_size // COLUMNS, image_size // ROWS
    for cell, concept in scene.things.items():
        sprite = sprites[concept.word]
        if rng.random() < 0.5:
            sprite = ImageOps.mirror(sprite)
        side = int(min(width, height) * rng.uniform(*SCALE_RANGE))
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        row, column = divmod(cell, COLUMNS)
        left = column * width + int(rng.integers(0, width - side + 1))
        top = row * height + int(rng.integers(0, height - side + 1))
        picture.paste(sprite, (left, top), sprite)
    return picture
