"""LLaVA-1.5: reach the parts of `LlavaForConditionalGeneration` that a training step needs.

Source: Liu et al. 2023, arXiv:2310.03744; class layout of transformers 5.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


def vision_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Return what the projector reads: features of the selected layer of the tower, (I, P, width of the tower).

    Args:
        model: The VLM, unwrapped.
        pixel_values: Images (I, C, H, W).
    """
    layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    # Activation checkpointing makes even a frozen tower's input require gradients: it must not record a graph.
    is_trained = any(parameter.requires_grad for parameter in tower_parameters(model))
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
        hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    start = 1 if strategy == "default" else 0  # "default" drops the class token
    return torch.cat([hidden_states[index][:, start:] for index in layers], dim=-1)


def image_embeds(model: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """Return the embeddings of all image tokens in reading order, (I * P, width of the language model)."""
    return model.model.multi_modal_projector(features).flatten(0, 1)


def language_model(model: LlavaForConditionalGeneration) -> nn.Module:
    """Return the decoder without its head."""
    return model.model.language_model


def blank_pixels(model: LlavaForConditionalGeneration) -> Tensor:
    """Return one black image (1, C, H, W), for steps without images in which every part must still take part."""
    config: Any = model.config.vision_config
    return torch.zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size, device=model.device)


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
