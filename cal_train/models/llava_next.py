"""LLaVA-NeXT: tiles of an image, its unpadded map with a newline after each row, and the whole image before it.

The packing is transformers' own (``pack_image_features``). T tiles of all images, P patches of a tile.

Source: Liu et al. 2024, LLaVA-NeXT; class layout of transformers 5.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from cal_train.models.anyres import num_tiles
from cal_train.models.tower import blank_pixels, patch_features

VISION_INPUTS = ("pixel_values", "image_sizes")
CACHES_FEATURES = False


def vision_features(model: LlavaNextForConditionalGeneration, images: Mapping[str, Tensor]) -> Tensor:
    """Return features of the selected layer of the tower, (T, P, width of the tower).

    Args:
        model: The VLM, unwrapped.
        images: ``pixel_values`` (T, C, H, W), the tiles of all images in order, without padding tiles.
    """
    return patch_features(model, images["pixel_values"])


def image_embeds(model: LlavaNextForConditionalGeneration, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings of all image tokens in reading order, (tokens, width of the language model).

    Args:
        model: The VLM, unwrapped.
        features: From `vision_features`.
        images: ``image_sizes`` (I, 2), height and width of each image in pixels.

    Raises:
        ValueError: If the sizes ask for more or fewer tiles than there are.
    """
    config: Any = model.config
    sizes = images["image_sizes"].tolist()
    counts = [num_tiles(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes]
    if sum(counts) != len(features):
        raise ValueError(
            f"{len(sizes)} images make {len(features)} tiles, but the model expects {sum(counts)} for their sizes: the "
            "image_grid_pinpoints of the image processor and of config.json differ, make them equal"
        )
    projected = model.model.multi_modal_projector(features).split(counts)
    # A bare parameter is read outside its module's forward; within the root's forward DeepSpeed and FSDP2 gather it.
    newline = model.model.image_newline
    packed, _ = model.model.pack_image_features(projected, sizes, config.vision_feature_select_strategy, newline)
    return torch.cat(packed)


def language_model(model: LlavaNextForConditionalGeneration) -> nn.Module:
    """Return the decoder without its head."""
    return model.model.language_model


def blank_images(model: LlavaNextForConditionalGeneration) -> dict[str, Tensor]:
    """Return one black tile, for steps without images in which every part must still take part.

    Its size is (0, 0), which no image has: it stands for an image of a single tile.
    """
    return {
        "pixel_values": blank_pixels(model),
        "image_sizes": torch.zeros(1, 2, dtype=torch.long, device=model.device),
    }


def tower_parameters(model: LlavaNextForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters of the vision tower."""
    return model.model.vision_tower.parameters()


def vision_parameters(model: LlavaNextForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters that only images reach: tower, projector and newline."""
    body = model.model
    return chain(tower_parameters(model), body.multi_modal_projector.parameters(), [body.image_newline])
