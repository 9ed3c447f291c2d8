"""The parts of a VLM by parameter name: which are trained, and at which learning rate.

Names are read, never module attributes, so that everything here works alike for a bare model and behind the wrapper of
peft, which puts ``base_model.model.`` in front, adds ``lora_`` matrices and keeps copies of modules.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Part = Literal["vision_tower", "projector", "image_newline", "language_model"]
PARTS: tuple[Part, ...] = ("vision_tower", "projector", "image_newline", "language_model")

STAGES: dict[str, tuple[Part, ...]] = {
    "pretrain": ("projector",),
    "finetune": ("projector", "image_newline", "language_model"),
}
"""Parts that each stage trains, as far as a family has them. Source: Liu et al. 2023, arXiv:2310.03744, section 3; the
original LLaVA-NeXT freezes its newline in stage 1."""

_PART_OF_MODULE: dict[str, Part] = {
    "vision_tower": "vision_tower",
    "vision_tower_aux": "vision_tower",
    "multi_modal_projector": "projector",
    "patch_info_mining": "projector",
    "image_newline": "image_newline",
    "language_model": "language_model",
    "lm_head": "language_model",
}
_MODULE = re.compile(r"(?:^|\.)(" + "|".join(_PART_OF_MODULE) + r")(?:\.|$)")
_TOWER = re.compile(r"(?:^|\.)vision_tower\.")
_TOWER_LAYER = re.compile(r"\.layers?\.(\d+)\.")
_TOWER_INPUT = re.compile(r"\.(embeddings\.(?!mask_token)|pre_layrnorm\.)")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part, and how many of them are trained."""

    part: Part
    num_parameters: int
    num_trainable: int

    def __str__(self) -> str:
        return f"{self.part}: {self.num_trainable:,} of {self.num_parameters:,} parameters trained"


def part_of(name: str) -> Part:
    """Return the part that a parameter belongs to, by its name.

    Raises:
        ValueError: If the name lies in none of the known modules.
    """
    found = _MODULE.search(name)
    if found is None:
        raise ValueError(f"parameter {name!r} belongs to no known part: expected one of {', '.join(_PART_OF_MODULE)}")
    return _PART_OF_MODULE[found.group(1)]


def freeze(model: nn.Module, stage: str, overrides: Mapping[Part, bool | None] | None = None) -> list[PartCount]:
    """Set which parameters are trained, and return the counts per part.

    The vision tower is trained only when asked, and then only up to the selected hidden state: what lies behind it
    gets no gradient, which DDP reports as an error. Behind peft the language model is trained through its LoRA
    matrices, and the projector through the copy that the adapter saves.

    Args:
        model: The VLM, or its peft wrapper (`cal_train.models.lora.add_lora` goes first).
        stage: ``pretrain`` trains the projector, ``finetune`` the projector, the newline and the language model.
        overrides: Per part, whether it is trained; ``None`` or absent follows the stage.

    Raises:
        ValueError: If the stage or a part is unknown, a part is asked for that the model lacks, nothing is left to
            train, or a vision tower is to be trained beside LoRA, whose adapter would not save it.
    """
    overrides = overrides or {}
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: use one of {', '.join(STAGES)}")
    if unknown := set(overrides) - set(PARTS):
        raise ValueError(f"part {sorted(unknown)[0]!r} is unknown: use one of {', '.join(PARTS)}")
    wishes = {part: overrides.get(part) for part in PARTS}
    trained = {part for part, wish in wishes.items() if (part in STAGES[stage] if wish is None else wish)}
    has_lora = any(_is_lora(name) for name, _ in model.named_parameters())
    if has_lora and "vision_tower" in trained:
        raise ValueError(
            "the vision tower cannot be trained together with LoRA: the adapter folder would not hold it. "
            "Leave out tune_vision_tower or lora_enable"
        )
    num_layers = num_tower_layers_used(model) if "vision_tower" in trained else 0
    for name, parameter in model.named_parameters():
        part = part_of(name)
        wanted = part in trained and ".original_module." not in name
        if part == "language_model" and has_lora:
            wanted = wanted and _is_lora(name)
        elif part == "vision_tower":
            wanted = wanted and _reaches_selected_layer(name, num_layers)
        parameter.requires_grad_(wanted)
    counts = count_parameters(model)
    if lacking := {part for part, wish in wishes.items() if wish} - {count.part for count in counts}:
        part = sorted(lacking)[0]
        raise ValueError(f"tune_{part} is set, but this model has no {part}: leave it out")
    if not any(count.num_trainable for count in counts):
        raise ValueError(f"stage {stage!r} with overrides {dict(overrides)} leaves nothing to train: train some part")
    return counts


def count_parameters(model: nn.Module) -> list[PartCount]:
    """Return the parameters of every part that the model has.

    The untouched originals of modules that peft has copied are not counted.
    """
    totals, trainable = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        totals[part_of(name)] += _numel(parameter)
        trainable[part_of(name)] += _numel(parameter) if parameter.requires_grad else 0
    return [PartCount(part, totals[part], trainable[part]) for part in PARTS if totals[part]]


def num_tower_layers_used(model: nn.Module) -> int:
    """Return how many layers of the vision tower run before the (last) selected hidden state is made."""
    config: Any = model.config
    layers = config.vision_feature_layer
    num_layers = config.vision_config.num_hidden_layers
    return max(
        layer if layer >= 0 else num_layers + 1 + layer for layer in ([layers] if isinstance(layers, int) else layers)
    )


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    mm_projector_lr: float | None,
    vision_tower_lr: float | None,
    decay_names: Collection[str],
) -> list[dict]:
    """Return optimizer groups, {decay, no decay} per part, that hold every trained parameter exactly once.

    Args:
        model: The VLM or its peft wrapper, frozen by `freeze`.
        learning_rate: Of the language model, and of the other parts unless they have their own.
        weight_decay: Of the parameters in ``decay_names``; 0 for all others.
        mm_projector_lr: Learning rate of the projector, if it has its own.
        vision_tower_lr: Learning rate of the vision tower, if it has its own.
        decay_names: Names of the parameters with weight decay (``Trainer.get_decay_parameter_names``).

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name`` (``projector/decay``), without empty ones.

    Raises:
        ValueError: If a learning rate is given for a part that is not trained.
    """
    rates: dict[Part, float | None] = {"projector": mm_projector_lr, "vision_tower": vision_tower_lr}
    names = decay_names if isinstance(decay_names, set | frozenset) else set(decay_names)
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), name in names
        own_rate = rates.get(part)
        group_name = f"{part}/{'decay' if decays else 'no_decay'}"
        group = groups.setdefault(
            group_name,
            {
                "params": [],
                "lr": learning_rate if own_rate is None else own_rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": group_name,
            },
        )
        group["params"].append(parameter)
    for part, rate in rates.items():
        if rate is not None and not any(name.startswith(part) for name in groups):
            option = "mm_projector_lr" if part == "projector" else "vision_tower_lr"
            raise ValueError(f"{option}={rate} is given, but the {part} is frozen: train it or leave it out")
    return list(groups.values())


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _numel(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a partitioned parameter is empty here and says its true size in ds_numel. In 4 bits two weights share
    # a byte; the shape that they had is kept beside them.
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def _reaches_selected_layer(name: str, num_layers: int) -> bool:
    if not _TOWER.search(name):
        return True  # an auxiliary tower is read to its end
    layer = _TOWER_LAYER.search(name)
    return int(layer.group(1)) < num_layers if layer else _TOWER_INPUT.search(name) is not None
