"""Floating-point operations of a training step, vision tower included, counted from a model without weights.

A multiply and an add are two operations. Linear layers and attention are counted, everything element-wise is left out;
causal attention counts the pairs at or below the diagonal. The tower is counted by PyTorch's own counter.

B rows, S tokens of a row, N label tokens, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from cal_train.models.families import base_model, family_of
from cal_train.models.parts import part_of


@dataclass(frozen=True)
class Work:
    """What one device does in one micro-batch or step.

    ``lengths`` are the rows' tokens, images included; ``text_lengths`` those of the rows with an image, images left
    out; ``num_images`` is how often the vision tower runs (tiles, where a family has them).
    """

    lengths: Sequence[int]
    text_lengths: Sequence[int]
    num_images: int
    num_labels: int


PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second by a word of the device's name; the first that fits. Source: data sheets of
NVIDIA."""


def peak_flops(device_name: str) -> float | None:
    """Return the bfloat16 peak of a GPU by its name, or None if it is not known here: nothing is guessed."""
    return next((peak for word, peak in PEAK_FLOPS.items() if word in device_name), None)


def model_flops(
    model: nn.Module, work: Work, vision_flops: float, ablation: Literal["remove", "mask"] | None = None
) -> dict[str, float]:
    """Return the operations of forward and backward by part; recomputation under checkpointing is not among them.

    Args:
        model: The VLM or its peft wrapper, frozen as for training; its weights are not read.
        work: Lengths and counts.
        vision_flops: Of one image's forward through the tower, from `count_vision_flops`.
        ablation: How CAL takes the image away; None without CAL.

    Returns:
        ``vision_tower``, ``projector``, ``language_model``, ``head``, and ``cal`` (0 without CAL).
    """
    vlm = base_model(model)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    text: Any = vlm.config.get_text_config()
    linear, adapters, projector = _linear_weights(model)
    learns_all = "language_model" in trained and not adapters
    reaches = bool(trained)  # gradients flow through the decoder to whatever is trained before it
    backward = reaches + learns_all

    def decoder(lengths: Sequence[int], passes: float, attention_passes: float) -> float:
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attention = 4 * text.num_attention_heads * head_dim * pairs * text.num_hidden_layers
        return 2 * linear * sum(lengths) * passes + attention * attention_passes

    adapter = 2 * adapters * sum(work.lengths)
    head = 2 * text.vocab_size * text.hidden_size * work.num_labels
    patches = sum(work.lengths) - _text_tokens(work)
    ablated = {None: (), "remove": work.text_lengths, "mask": work.lengths}[ablation]
    return {
        "vision_tower": work.num_images * vision_flops * (3 if "vision_tower" in trained else 1),
        "projector": 2 * projector * patches * (3 if "projector" in trained else 1),
        "language_model": decoder(work.lengths, 1 + backward, 1 + 2 * reaches) + 3 * adapter,
        "head": head * (1 + reaches + learns_all),
        "cal": (decoder(ablated, 1, 1) + 2 * adapters * sum(ablated)) if ablated else 0.0,
    }


def count_vision_flops(config: PreTrainedConfig) -> float:
    """Return the operations of one image (or tile) through the vision tower, by PyTorch's counter on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # the counter does not see the CPU's fused attention
        model = AutoModelForImageTextToText.from_config(_shallow(config), attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter:
            family_of(model).vision_features(model, family_of(model).blank_images(model))
    return float(counter.get_total_flops())


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with one decoder layer: only the tower is looked at."""
    copy = type(config).from_dict(config.to_dict())
    copy.get_text_config().num_hidden_layers = 1
    if getattr(copy.get_text_config(), "layer_types", None):
        copy.get_text_config().layer_types = copy.get_text_config().layer_types[:1]
    return copy


def _linear_weights(model: nn.Module) -> tuple[int, int, int]:
    """Return the linear weights of decoder, adapters and projector."""
    counts = [0, 0, 0]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("lm_head") or ".original_module" in name:
            continue
        part, size = part_of(f"{name}."), module.in_features * module.out_features
        if ".lora_" in name:
            counts[1] += size
        elif part == "language_model":
            counts[0] += size
        elif part == "projector":
            counts[2] += size
    return counts[0], counts[1], counts[2]


def _text_tokens(work: Work) -> int:
    num_text_only = len(work.lengths) - len(work.text_lengths)
    text_only = sorted(work.lengths)[:num_text_only]  # rows without an image are the short ones
    return sum(work.text_lengths) + sum(text_only)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model that has shapes and no weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
