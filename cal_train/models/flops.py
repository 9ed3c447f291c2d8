"""Floating-point operations of a training step, vision tower included, counted from a model without weights.

A multiply and an add are two operations. Linear layers and attention are counted, everything element-wise is left out;
causal attention counts the pairs at or below the diagonal. The tower is counted by PyTorch's own counter.

B rows, S tokens of a row, N label tokens, V vocabulary, D width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from cal_train.models.families import base_model, family_of
from cal_train.models.parts import part_of


@dataclass(frozen=True)
class Work:
    """What one device does in one micro-batch or step.

    ``lengths`` are the rows' tokens, images included, of the rows with an image first; ``text_lengths`` are of these
    rows alone, images left out; ``num_images`` is how often the vision tower runs (tiles, where a family has them).
    """

    lengths: Sequence[int]
    text_lengths: Sequence[int]
    num_images: int
    num_labels: int


PEAK_FLOPS = {
    r"A100": 312e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H[12]00": 989e12,
    r"L40S": 362e12,
    r"RTX 4090$": 165e12,
    r"V100-PCIE": 112e12,
    r"V100": 125e12,
}
"""Dense bfloat16 operations per second (float16 of the V100, which has no bfloat16) by a pattern of the device's name;
the first that fits. Source: data sheets of NVIDIA, with float32 sums."""


def peak_flops(device_name: str) -> float | None:
    """Return the 16-bit peak of a GPU by its name, or None if it is not known here: nothing is guessed."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class FlopRates:
    """Operations of forward and backward by part: per image, token, pair of attending tokens, or label.

    The decoder's first number is per token, its second per pair; ``ablated`` is one forward of the decoder.
    """

    vision_tower: float
    projector: float
    decoder: tuple[float, float]
    head: float
    ablated: tuple[float, float]
    ablation: Literal["remove", "mask"] | None

    def count(self, work: Work) -> dict[str, float]:
        """Return the operations of some work: keys as of `model_flops`."""
        patches = sum(work.lengths[: len(work.text_lengths)]) - sum(work.text_lengths)
        with_image = work.lengths[: len(work.text_lengths)]
        ablated = {None: (), "remove": work.text_lengths, "mask": with_image}[self.ablation]
        return {
            "vision_tower": work.num_images * self.vision_tower,
            "projector": patches * self.projector,
            "language_model": _decode(self.decoder, work.lengths),
            "head": work.num_labels * self.head,
            "cal": _decode(self.ablated, ablated),
        }


def _decode(rates: tuple[float, float], lengths: Sequence[int]) -> float:
    return rates[0] * sum(lengths) + rates[1] * sum(length * (length + 1) / 2 for length in lengths)


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
    return flop_rates(model, vision_flops, ablation).count(work)


def flop_rates(model: nn.Module, vision_flops: float, ablation: Literal["remove", "mask"] | None = None) -> FlopRates:
    """Return what `model_flops` multiplies the work with; arguments as there."""
    vlm = base_model(model)
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    text: Any = vlm.config.get_text_config()
    linear, adapters, projector = _linear_weights(model)
    learns_all = "language_model" in trained and not adapters
    reaches = bool(trained)  # gradients flow through the decoder to whatever is trained before it
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 4.0 * text.num_attention_heads * head_dim * text.num_hidden_layers
    return FlopRates(
        vision_tower=vision_flops * (3 if "vision_tower" in trained else 1),
        projector=2.0 * projector * (3 if "projector" in trained else 1),
        decoder=(2.0 * linear * (1 + reaches + learns_all) + 6.0 * adapters, attention * (1 + 2 * reaches)),
        head=2.0 * text.vocab_size * text.hidden_size * (1 + reaches + learns_all),
        ablated=(2.0 * (linear + adapters), attention),
        ablation=ablation,
    )


def count_vision_flops(config: PreTrainedConfig) -> float:
    """Return the operations of one image (or tile) through the vision tower, by PyTorch's counter on shapes alone."""
    # no_init_weights: truncated normals (DINOv2) are drawn until they fit, which needs values
    with torch.device("meta"), torch.no_grad(), no_init_weights():
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


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model that has shapes and no weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
