"""LLaVA-NeXT's grids: which ones there are, in which order, and how many tiles an image takes.

Source: Liu et al. 2024, LLaVA-NeXT. The original code lists grids as (width, height) and, of those that keep most of an
image's resolution and waste least, takes the first. transformers lists them as (height, width); with its default list
it takes another grid than the original wherever two are equally good: for every image smaller than a tile, and for
about one in two hundred of 300 to 800 pixels a side (tests/models/test_anyres.py holds both rules).
"""

import logging
from collections.abc import Sequence

from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

logger = logging.getLogger(__name__)

_ORIGINAL_ORDER = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
_TRANSFORMERS_ORDER = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def original_grid(image_size: int) -> list[list[int]]:
    """Return the five grids as transformers' (height, width) in pixels, in the order that the original code means.

    Args:
        image_size: Side of a tile in pixels.
    """
    return [[rows * image_size, columns * image_size] for rows, columns in _ORIGINAL_ORDER]


def check_grid(pinpoints: Sequence[Sequence[int]], image_size: int) -> list[list[int]]:
    """Return grids as they go into a configuration.

    Raises:
        ValueError: If one is no pair of positive multiples of the tile's side.
    """
    for pinpoint in pinpoints:
        if len(pinpoint) != 2 or any(side <= 0 or side % image_size for side in pinpoint):
            raise ValueError(
                f"grid pinpoint {list(pinpoint)} is not a (height, width) in positive multiples of the tower's "
                f"{image_size} px: give for example {original_grid(image_size)}"
            )
    if not pinpoints:
        raise ValueError(f"the list of grid pinpoints is empty: give for example {original_grid(image_size)}")
    return [list(pinpoint) for pinpoint in pinpoints]


def check_grids(config: PreTrainedConfig, processor: ProcessorMixin, folder: str) -> None:
    """Check that model and image processor choose the same grids; warn, once, where that is not the original choice.

    Nothing happens for a family without grids, and nothing is changed.

    Args:
        config: Of the model.
        processor: Of the same folder.
        folder: For messages.

    Raises:
        ValueError: If the two lists of grids, or their orders, differ.
    """
    if not hasattr(config, "image_grid_pinpoints"):
        return
    side = config.vision_config.image_size
    stored = [list(pinpoint) for pinpoint in config.image_grid_pinpoints]
    read = [list(pinpoint) for pinpoint in getattr(processor.image_processor, "image_grid_pinpoints", None) or []]
    if read != stored:
        raise ValueError(
            f"{folder}: image_grid_pinpoints are {stored} in config.json but {read} in the image processor's "
            "configuration, so that images would get another number of tokens than the model fills: make them equal"
        )
    if stored == [[rows * side, columns * side] for rows, columns in _TRANSFORMERS_ORDER]:
        logger.warning(
            "%s: image_grid_pinpoints stand in transformers' order. Where two grids are equally good the original "
            "LLaVA-NeXT takes the other one (for every image smaller than a tile). For its choice write %s in "
            "config.json and in the image processor's configuration",
            folder,
            original_grid(side),
        )


def num_tiles(image_size_hw: Sequence[int], pinpoints: Sequence[Sequence[int]], tile_size: int) -> int:
    """Return the tiles of an image, the whole image as one of them.

    Args:
        image_size_hw: Height and width in pixels. (0, 0) stands for a blank of one tile, see
            `cal_train.models.llava_next.blank_images`.
        pinpoints: Grids (height, width) in pixels.
        tile_size: Side of a tile in pixels.
    """
    if not any(image_size_hw):
        return 1
    height, width = select_best_resolution(tuple(image_size_hw), list(pinpoints))
    return 1 + (height // tile_size) * (width // tile_size)
