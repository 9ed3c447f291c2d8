"""Image files to RGB, safely; the aspect-ratio choice; images to what the model reads of them, and their tokens."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

# Raster formats only: PIL hands EPS files to an external interpreter. JPEG includes multi-picture files.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
# What PIL's decoders are known to raise on damaged input.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


_MAX_ASPECT = 200


@dataclass(frozen=True)
class ImageLimits:
    """Which images are refused: above ``max_pixels``, or with a shorter side below ``min_side`` (pixels).

    A long thin image becomes a huge one when it is padded to a square or its short side is enlarged, so the longer side
    must also be at most ``2 * sqrt(max_pixels)`` and at most 200 times the shorter. PIL refuses 179 million pixels on
    its own account.
    """

    max_pixels: int = 100_000_000
    min_side: int = 2


DEFAULT_LIMITS = ImageLimits()


def size_problem(width: int, height: int, limits: ImageLimits) -> str | None:
    """Return why an image of this size (pixels) is refused, or None."""
    short, long = min(width, height), max(width, height)
    if width * height > limits.max_pixels:
        return f"it is above max_image_pixels ({limits.max_pixels})"
    if short < limits.min_side:
        return f"a side is below min_image_side ({limits.min_side})"
    if long * long > 4 * limits.max_pixels:
        return f"its long side would make too large a square for max_image_pixels ({limits.max_pixels})"
    if long > _MAX_ASPECT * short:
        return f"one side is more than {_MAX_ASPECT} times the other"
    return None


def open_image(source: Path | bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Size limits are checked on the header, before any pixel is decoded. EXIF orientation is ignored and transparency is
    dropped, as in the original LLaVA; of an animation the first frame is taken; 16-bit grey values keep their upper
    8 bits.

    Args:
        source: A path, or the encoded file's bytes.
        limits: Which sizes are refused.

    Raises:
        ValueError: If the image is missing, damaged, not one of the known formats, too large or too small.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            problem = size_problem(width, height, limits)
            if problem is None:
                return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image is too large: {error}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"image cannot be read ({type(error).__name__}: {error})") from error
    raise ValueError(f"image of {width} x {height} pixels: {problem}")


def read_size(source: Path | bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int] | None:
    """Return (height, width) in pixels from an image's header; None for an image that `open_image` would refuse."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, *_DECODE_ERRORS):
        return None
    return (height, width) if size_problem(width, height, limits) is None else None


def apply_aspect_ratio(processor: ProcessorMixin, mode: Literal["pad", "square", "anyres"] | None) -> None:
    """Set how the processor makes images square, so that what is saved with it is what was trained.

    ``pad`` pads to a square with the mean colour, ``int(255 * mean)``, before resizing; ``square`` resizes the short
    side and crops the centre; ``None`` leaves the processor as it is. ``anyres`` is what LLaVA-NeXT's processor does,
    which cuts an image into tiles and can do nothing else.

    Raises:
        ValueError: If ``pad`` is asked of an image processor that cannot pad to a square, or if ``anyres`` and a
            processor that tiles images do not come together.
    """
    if mode is None:
        return
    image_processor = processor.image_processor
    if (mode == "anyres") != is_anyres(processor):
        does = "tiles images" if is_anyres(processor) else "does not tile images"
        raise ValueError(
            f"image_aspect_ratio {mode!r}: {type(image_processor).__name__} {does}. Leave the option out, or use a "
            "model of another family"
        )
    if mode == "anyres":
        return
    if mode == "pad" and not hasattr(image_processor, "pad_to_square"):
        raise ValueError(
            f"image_aspect_ratio 'pad': {type(image_processor).__name__} cannot pad to a square. Use LLaVA's image "
            "processor (`cal-train compose` writes it), or image_aspect_ratio: square"
        )
    image_processor.do_pad = mode == "pad"


def is_anyres(processor: ProcessorMixin) -> bool:
    """Return whether images are cut into tiles, so that their number of tokens depends on their size."""
    return getattr(processor.image_processor, "image_grid_pinpoints", None) is not None


def image_inputs(processor: ProcessorMixin, images: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return what the model reads of the images, and the placeholders that each takes.

    Args:
        processor: Of the model.
        images: PIL RGB images; at least one.

    Returns:
        Tensors that are batched by concatenation: ``pixel_values`` (I, C, H, W), and whatever else the family's image
        processor makes. Of anyres processors ``pixel_values`` (T, C, H, W), the tiles of all images, and
        ``image_sizes`` (I, 2): height and width.
    """
    counts = count_image_tokens(processor, [(image.height, image.width) for image in images])
    image_processor: Any = processor.image_processor
    if not is_anyres(processor):
        made = image_processor(images=list(images), return_tensors="pt")
        return {name: made[name] for name in image_processor.model_input_names}, counts
    each = [image_processor(images=[image], return_tensors="pt") for image in images]  # one by one: no padding tiles
    tiles = torch.cat([made["pixel_values"][0] for made in each])
    return {"pixel_values": tiles, "image_sizes": torch.cat([made["image_sizes"] for made in each])}, counts


def count_image_tokens(processor: ProcessorMixin, image_sizes_hw: Sequence[tuple[int, int]]) -> list[int]:
    """Return the placeholders of each image, given its (height, width) in pixels, as the model will fill them."""
    if not image_sizes_hw:
        return []
    sizes = [list(size) for size in image_sizes_hw]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)  # pyright: ignore[reportAttributeAccessIssue]
    return [int(count) for count in counted.num_image_tokens]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit, in one of PIL's several modes; convert("RGB") would clip, not scale
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    return image.convert("RGB")
