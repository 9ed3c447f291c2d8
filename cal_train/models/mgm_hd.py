"""MGM-HD from a stage 1 of MGM: the same weights, told to look at tiles of a larger image.

Source: Li et al. 2024, arXiv:2403.18814: the HD models have no stage 1 of their own.
"""

from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from cal_train.models.mgm.configuration import MGMConfig
from cal_train.models.mgm_family import build_processor


def with_grid(config: PreTrainedConfig, image_grid: int, folder: str) -> MGMConfig:
    """Return the configuration of the same model with another grid of tiles, at the same resolution of a tile.

    Args:
        config: Of an MGM model.
        image_grid: Tiles along a side; with more than one, the whole image is added as one more tile.
        folder: The model's, for messages.

    Raises:
        ValueError: If the model is not an MGM.
    """
    if not isinstance(config, MGMConfig):
        raise ValueError(f"image_grid is an option of MGM, and {folder} is a {config.model_type!r} model: leave it out")
    side = config.high_res_size // config.image_grid
    tiles = {"image_grid": image_grid, "image_global": image_grid > 1, "high_res_size": image_grid * side}
    return MGMConfig.from_dict(config.to_dict() | tiles)


def for_grid(config: Any, processor: Any) -> ProcessorMixin:
    """Return the processor that makes the images which the configuration asks for, otherwise like the given one."""
    return build_processor(config, processor.image_processor, processor.tokenizer, processor.chat_template)
