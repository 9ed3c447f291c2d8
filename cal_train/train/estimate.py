"""What a recipe needs: parameters, memory of a device by part, tokens and operations of a step.

No weight is loaded: shapes come from ``config.json``, what autograd keeps is asked of PyTorch on tensors without data
(`cal_train.models.activations`), the rest are the formulas below. On top of what is listed a device holds its driver's
context, communication buffers and the allocator's gaps, which are not estimated.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from cal_train.cal.loss import CHUNK_ELEMENTS
from cal_train.conf import ModelArguments
from cal_train.models.activations import saved_by_decoder
from cal_train.models.families import base_model
from cal_train.models.flops import Work, count_vision_flops, meta_model, model_flops
from cal_train.models.parts import PartCount, count_parameters, freeze
from cal_train.train.run import part_overrides, wrap_lora

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")

_STATE_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "sgd": 0, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
"""Optimizer state in bytes per trained weight; other optimizers count as AdamW."""
_GATHERED_WEIGHTS = 1e9
"""Weights that ZeRO-3 holds whole at a time, at most (``stage3_max_live_parameters`` of zero_configs/zero3.json)."""


@dataclass(frozen=True)
class Setting:
    """What decides about memory besides the model.

    ``dtype`` is that of the weights; ``work`` that of a micro-batch of ``num_rows`` rows padded to ``length`` tokens.
    """

    engine: Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    num_devices: int
    dtype: torch.dtype
    autocast: bool
    checkpointing: bool
    optimizer: str
    num_rows: int
    length: int
    work: Work
    ablation: Literal["remove", "mask"] | None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part; ``other_checkpointing`` is the activations' row with that switched round."""

    parts: dict[str, float]
    other_checkpointing: float
    stock_head: float

    @property
    def total(self) -> float:
        """Return the sum of the parts, without temporary results: a real peak lies above it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """All that is printed."""

    counts: list[PartCount]
    memory: Memory
    flops: dict[str, float]
    quantized_weights: int

    @property
    def cal_overhead(self) -> float:
        """Return the operations of a step with CAL over those without."""
        total = sum(self.flops.values())
        return total / (total - self.flops["cal"])


def estimate(config: PreTrainedConfig, options: ModelArguments, setting: Setting) -> Estimate:
    """Return the estimate of a recipe's model in a setting.

    Args:
        config: Of the VLM.
        options: What is trained, LoRA and quantization.
        setting: Engine, precision and batch.
    """

    def adapt(model: Any) -> nn.Module:
        wrapped = wrap_lora(model, options)
        freeze(wrapped, options.stage, part_overrides(options))
        return wrapped

    model = adapt(meta_model(config))
    counts = count_parameters(model)
    quantized = _decoder_linear_weights(model) if options.quantization else 0
    saved = saved_by_decoder(config, adapt, setting.num_rows, setting.length, setting.dtype, setting.autocast)
    num_layers = config.get_text_config().num_hidden_layers
    # one layer at a time is run again, and its gradients are about as large as what it keeps
    plain = num_layers * saved.per_layer + saved.around
    thrifty = num_layers * saved.layer_input + saved.per_layer + saved.around
    activations, other = (thrifty, plain) if setting.checkpointing else (plain, thrifty)
    parts = _static_bytes(model, counts, quantized, options, setting)
    parts["activations of the language model"] = activations
    parts["tower and images"] = _vision_bytes(config, model, setting)
    parts["head and loss"], stock = _head_bytes(config, model, setting)
    flops = model_flops(model, setting.work, count_vision_flops(config), setting.ablation)
    return Estimate(counts, Memory(parts, other, stock), flops, quantized)


def _static_bytes(
    model: nn.Module, counts: list[PartCount], quantized: int, options: ModelArguments, setting: Setting
) -> dict[str, float]:
    """Return weights, gradients and optimizer state."""
    num_devices, size = setting.num_devices, setting.dtype.itemsize
    total = sum(count.num_parameters for count in counts)
    copies = sum(p.numel() for name, p in model.named_parameters() if ".original_module." in name)
    trained = sum(count.num_trainable for count in counts)
    stage = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}[setting.engine]
    offloads = setting.engine == "zero3_offload"
    weights = (total + copies - quantized) * size + quantized * _quantized_bytes(options)
    gradients, state = trained * size, trained * _STATE_BYTES.get(setting.optimizer, 8)
    if stage and size < 4:
        state += 4 * trained  # DeepSpeed's float32 copy of the weights
    if stage == 0 and num_devices > 1:
        gradients *= 2  # DDP's buckets
    shares = {1: state / num_devices, 2: state / num_devices, 3: state / num_devices}
    parts = {
        "weights": 0.0 if offloads else weights / num_devices if stage == 3 else weights,
        "gradients": 0.0 if offloads else gradients / num_devices if stage >= 2 else gradients,
        "optimizer": 0.0 if offloads else shares.get(stage, state),
    }
    if stage == 3:
        parts["weights gathered at a time"] = min(total, _GATHERED_WEIGHTS) * size
    return parts


def _quantized_bytes(options: ModelArguments) -> float:
    """Return bytes per weight with its scales: blocks of 64 in nf4, rows (taken as 4096 long) in int8."""
    if options.quantization == "int8":
        return 1 + 4 / 4096
    return 0.5 + (1 / 64 + 4 / (64 * 256) if options.bnb_4bit_use_double_quant else 4 / 64)


def _vision_bytes(config: PreTrainedConfig, model: nn.Module, setting: Setting) -> float:
    """Return pixels, the hidden states that the tower hands out, and what a trained tower and the projector keep."""
    vision: Any = base_model(model).config.vision_config
    size = 2 if setting.autocast else setting.dtype.itemsize
    channels = getattr(vision, "num_channels", 3)
    pixels = setting.work.num_images * channels * vision.image_size**2 * 4
    width = getattr(vision, "hidden_size", 0)
    tokens = setting.work.num_images * ((vision.image_size // vision.patch_size) ** 2 + 1)
    is_trained = any(p.requires_grad for name, p in model.named_parameters() if "vision_tower" in name)
    states = (vision.num_hidden_layers + 1) * width * setting.dtype.itemsize
    kept = vision.num_hidden_layers * (8 * width + 3 * vision.intermediate_size) * size if is_trained else 0
    projected = 3 * config.get_text_config().hidden_size * size
    return pixels + tokens * (states + kept + projected)


def _head_bytes(config: PreTrainedConfig, model: nn.Module, setting: Setting) -> tuple[float, float]:
    """Return the bytes of our head, which makes logits of label rows in chunks, and of the usual one.

    Ours: a chunk of logits twice, and the head's gradient in float32 if it is trained. The usual one: logits of every
    position, their float32 copy, log-probabilities and gradient.
    """
    text: Any = config.get_text_config()
    is_trained = any(p.requires_grad for name, p in model.named_parameters() if name.endswith("lm_head.weight"))
    rows = min(setting.work.num_labels, max(CHUNK_ELEMENTS // text.vocab_size, 1))
    ours = rows * text.vocab_size * 4 * 2 + is_trained * text.vocab_size * text.hidden_size * 4
    product = 2 if setting.autocast else setting.dtype.itemsize
    positions = setting.num_rows * setting.length
    return float(ours), float(positions * text.vocab_size * ((product if product < 4 else 0) + 12))


def _decoder_linear_weights(model: nn.Module) -> int:
    return sum(
        module.in_features * module.out_features
        for name, module in base_model(model).named_modules()
        if isinstance(module, nn.Linear) and ".language_model." in f".{name}." and ".lora_" not in name
    )
