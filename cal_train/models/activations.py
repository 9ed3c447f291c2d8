"""What a forward pass leaves for the backward pass, found by running it on tensors without data.

PyTorch is asked what it saves, so that LoRA, its dropout, autocast, grouped attention and frozen parts are accounted
for as they are, not by a formula for one architecture. Two and one decoder layers are run; the difference is a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from cal_train.models.families import base_model, family_of
from cal_train.models.flops import meta_model

Adapt = Callable[[Any], nn.Module]
"""Puts adapters on a model and freezes its parts, as for training."""


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward of the decoder keeps: per layer, for what is around the layers, and a layer's input."""

    per_layer: int
    around: int
    layer_input: int


def saved_by_decoder(
    config: PreTrainedConfig, adapt: Adapt, num_rows: int, length: int, dtype: torch.dtype, autocast: bool
) -> Saved:
    """Return what the decoder saves for one micro-batch.

    Args:
        config: Of the VLM.
        adapt: See `Adapt`.
        num_rows: Of the micro-batch.
        length: Tokens of its longest row.
        dtype: Of the weights.
        autocast: Whether products are taken in bfloat16.
    """
    one, two = (_saved(_with_layers(config, n), adapt, num_rows, length, dtype, autocast) for n in (1, 2))
    width = config.get_text_config().hidden_size
    return Saved(two - one, max(2 * one - two, 0), num_rows * length * width * dtype.itemsize)


def _saved(
    config: PreTrainedConfig, adapt: Adapt, num_rows: int, length: int, dtype: torch.dtype, autocast: bool
) -> int:
    model = adapt(meta_model(config)).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_fake_weights(model)
        decoder = family_of(base_model(model)).language_model(base_model(model)).train()
        embeds = torch.zeros(num_rows, length, config.get_text_config().hidden_size, dtype=dtype, requires_grad=True)
        kept = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
        saved: dict[int, Any] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in kept:
                saved[storage._cdata] = storage  # held, so that its number is not given to another one
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                mask = torch.ones(num_rows, length, dtype=torch.long)
                output = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        del output
    return sum(storage.nbytes() for storage in saved.values())


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    copy = type(config).from_dict(config.to_dict())
    text = copy.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return copy


def _give_fake_weights(model: nn.Module) -> None:
    """Replace parameters and buffers of the meta device by fake ones of the CPU, whose kernels are then asked."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
