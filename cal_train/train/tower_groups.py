"""Optimizer groups of a tower run: decay and learning rate of each part."""

from collections.abc import Collection
from typing import Literal

from torch import nn

Part = Literal["vision", "text", "objective"]


def tower_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    vision_tower_lr: float | None = None,
    text_tower_lr: float | None = None,
    pretrained: Collection[str] = (),
    pretrained_weight_decay: float | None = None,
) -> list[dict]:
    """Return optimizer groups that hold every trained parameter exactly once.

    Nothing with fewer than two dimensions decays: norms, biases, class tokens, logit scale and bias.

    Args:
        model: A `TowerModel`; locked towers are frozen already.
        learning_rate: Of all parts that have none of their own.
        weight_decay: Of weights with two dimensions or more.
        vision_tower_lr: Learning rate of the vision tower, if it has its own.
        text_tower_lr: Learning rate of the text tower, if it has its own.
        pretrained: Those of ``vision`` and ``text`` that did not start from random weights.
        pretrained_weight_decay: Decay of the pretrained towers. Default: ``weight_decay``.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name`` (``vision/decay``), without empty ones.

    Raises:
        ValueError: If an option is given for a part that is not trained, or no tower is pretrained.
    """
    rates: dict[str, float | None] = {"vision": vision_tower_lr, "text": text_tower_lr}
    if pretrained_weight_decay is not None and not pretrained:
        raise ValueError(
            f"pretrained_weight_decay={pretrained_weight_decay} is given, but both towers start from random weights"
        )
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), parameter.ndim >= 2
        own_rate = rates.get(part)
        decay = weight_decay
        if part in pretrained and pretrained_weight_decay is not None:
            decay = pretrained_weight_decay
        group_name = f"{part}/{'decay' if decays else 'no_decay'}"
        group = groups.setdefault(
            group_name,
            {
                "params": [],
                "lr": learning_rate if own_rate is None else own_rate,
                "weight_decay": decay if decays else 0.0,
                "name": group_name,
            },
        )
        group["params"].append(parameter)
    for part, rate in rates.items():
        if rate is not None and not any(name.startswith(part) for name in groups):
            raise ValueError(f"{part}_tower_lr={rate} is given, but the {part} tower is locked: leave one of them out")
    return list(groups.values())


def part_of(name: str) -> Part:
    """Return the part of a `TowerModel` that a parameter belongs to, by its name."""
    if name.startswith("towers.vision."):
        return "vision"
    return "text" if name.startswith("towers.text.") else "objective"
