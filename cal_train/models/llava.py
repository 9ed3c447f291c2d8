"""LLaVA-1.5: reach the parts of `LlavaForConditionalGeneration` that a training step needs.

Source: Liu et al. 2023, arXiv:2310.03744; class layout of transformers 5.
"""

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from cal_train.models.tower import blank_pixels, patch_features

VISION_INPUTS = ("pixel_values",)
CACHES_FEATURES = True


def vision_features(model: LlavaForConditionalGeneration, images: Mapping[str, Tensor]) -> Tensor:
    """Return what the projector reads: features of the selected layer of the tower, (I, P, width of the tower).

    Args:
        model: The VLM, unwrapped.
        images: ``pixel_values`` (I, C, H, W).
    """
    return patch_features(model, images["pixel_values"])


def image_embeds(model: LlavaForConditionalGeneration, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings of all image tokens in reading order, (I * P, width of the language model)."""
    return model.model.multi_modal_projector(features).flatten(0, 1)


def language_model(model: LlavaForConditionalGeneration) -> nn.Module:
    """Return the decoder without its head."""
    return model.model.language_model


def blank_images(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Return one black image, for steps without images in which every part must still take part."""
    return {"pixel_values": blank_pixels(model)}


def blank_features(model: LlavaForConditionalGeneration) -> Tensor:
    """Return features of one patch (1, 1, width of the tower), for when only the projector has to take part."""
    weight = model.model.multi_modal_projector.linear_1.weight
    return torch.zeros(1, 1, model.model.multi_modal_projector.linear_1.in_features, device=weight.device).to(
        weight.dtype
    )


def tower_parameters(model: LlavaForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters of the vision tower."""
    return model.model.vision_tower.parameters()


def vision_parameters(model: LlavaForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters that only images reach: tower and projector."""
    return chain(tower_parameters(model), model.model.multi_modal_projector.parameters())
