"""Images for both towers of MGM: one square at high resolution, and smaller ones interpolated from it.

Source: Li et al. 2024, arXiv:2403.18814; released code dvlab-research/MGM at 769820c.
"""

from typing import Any, ClassVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TensorType

from cal_train.models.mgm.configuration import MGMConfig

MOST_ELONGATED = 200
"""Largest ratio of the sides of an image that is cropped: enlarging its short side enlarges the long one too."""


class MGMImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings besides those of LLaVA's image processor.

    ``image_size``: side in pixels of what the first tower sees. ``image_grid``: tiles along a side. ``image_global``:
    whether the whole image follows its tiles.
    """

    image_size: int
    image_grid: int
    image_global: bool


class MGMImageProcessor(LlavaImageProcessorPil):
    """Make ``high_res_pixel_values`` as LLaVA makes its images, and ``pixel_values`` from them.

    ``crop_size`` is the side of the high-resolution image; ``do_pad`` pads to a square with the mean colour instead of
    cropping. The tiles are the *normalised* high-resolution image, interpolated bilinearly without antialiasing to
    ``image_grid * image_size`` and cut row by row; the global image is interpolated from that once more and comes last.
    """

    valid_kwargs = MGMImageProcessorKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values", "high_res_pixel_values"]
    size: ClassVar[dict[str, int]] = {"shortest_edge": 768}
    crop_size: ClassVar[dict[str, int]] = {"height": 768, "width": 768}
    image_size = 336
    image_grid = 1
    image_global = False

    def __init__(self, **kwargs: Unpack[MGMImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: list[np.ndarray],
        image_size: int,
        image_grid: int,
        image_global: bool,
        do_pad: bool | None = False,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        for height, width in (image.shape[-2:] for image in images):
            if not do_pad and max(height, width) > MOST_ELONGATED * min(height, width):
                raise ValueError(
                    f"image of {width} x {height} pixels: one side is more than {MOST_ELONGATED} times the other, "
                    "which is too much to crop a square from; crop it yourself, or set do_pad"
                )
        squares = super()._preprocess(images, do_pad=do_pad, return_tensors=None, **kwargs)["pixel_values"]
        high_res = [torch.from_numpy(np.ascontiguousarray(square, dtype=np.float32)) for square in squares]
        tiles = [tiles_of(image, image_size, image_grid, image_global) for image in high_res]
        return BatchFeature({"pixel_values": tiles, "high_res_pixel_values": high_res}, tensor_type=return_tensors)


def tiles_of(image: Tensor, size: int, grid: int, has_global: bool) -> Tensor:
    """Return the tiles of a normalised image (C, S, S) row by row, then the whole if asked: (T, C, size, size)."""
    large = _interpolate(image, grid * size)
    tiles = large.unflatten(2, (grid, size)).unflatten(1, (grid, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([tiles, _interpolate(large, size)[None]]) if has_global else tiles.contiguous()


def _interpolate(image: Tensor, size: int) -> Tensor:
    return F.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)[0]


# one implementation, with PIL, whichever backend is asked for
_CLASSES: dict[str, type] = {"pil": MGMImageProcessor, "torchvision": MGMImageProcessor}
AutoImageProcessor.register(MGMConfig, image_processor_classes=_CLASSES, exist_ok=True)
