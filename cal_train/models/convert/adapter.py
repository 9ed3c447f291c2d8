"""LoRA folders of the original repositories: an adapter, and a side file with everything else that was trained."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cal_train.models.convert.reading import inside, read_json, read_tensors

ADAPTER_CONFIG = "adapter_config.json"
SIDE_FILE = "non_lora_trainables.bin"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""Fields of adapter_config.json -> the only value that can be folded here, besides none at all."""


def read_side_file(path: Path) -> dict[str, Tensor]:
    """Return the weights of ``non_lora_trainables.bin`` or ``mm_projector.bin`` under their names in the model.

    peft's wrapper puts ``base_model.model.`` in front of a name.
    """
    tensors = read_tensors(path)
    return {name.removeprefix("base_model.model.") if name.startswith("base_model.") else name: value
            for name, value in tensors.items()}  # fmt: skip


@torch.no_grad()
def fold(folder: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return the weights with the folder's LoRA matrices added, ``W + scale B A``, summed in float32.

    Args:
        folder: An adapter folder.
        state: Weights of the base model, by the names of the original repositories.

    Returns:
        The weights, and how many of them were changed.

    Raises:
        ValueError: If the adapter is of a kind other than plain LoRA, does not fit the base model, or is incomplete.
    """
    config = read_json(inside(folder, ADAPTER_CONFIG))
    scale = _scale(config, folder)
    matrices = _matrices(folder)
    folded = dict(state)
    for target, pair in matrices.items():
        if target not in folded:
            raise ValueError(f"{folder}: the adapter changes {target}, which the base model does not have")
        if pair.keys() != {"lora_A", "lora_B"}:
            raise ValueError(f"{folder}: the adapter holds only {next(iter(pair))} for {target}")
        weight, down, up = folded[target], pair["lora_A"].float(), pair["lora_B"].float()
        if not up.dim() == down.dim() == 2 or up.shape[1] != len(down):
            raise ValueError(
                f"{folder}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} of {target} do not fit"
            )
        if (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"{folder}: the adapter changes {target} by {up.shape[0]} x {down.shape[1]} values, the base model has "
                f"{tuple(weight.shape)}: is it the base model of this adapter?"
            )
        folded[target] = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return folded, len(matrices)


def _scale(config: Mapping[str, Any], folder: Path) -> float:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type {config.get('peft_type')!r} is not LORA")
    for name, only in _UNSUPPORTED.items():
        if config.get(name) not in (only, None):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name} {config[name]!r} cannot be folded: plain LoRA can")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: r {rank!r} and lora_alpha {alpha!r} are not a rank and a scale")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matrices(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the weight that is changed -> its two matrices."""
    file = next((name for name in _ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has {ADAPTER_CONFIG} but no {' or '.join(_ADAPTERS)}")
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(inside(folder, file)).items():
        stem = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
        target, _, which = stem.rpartition(".")
        if which not in ("lora_A", "lora_B"):
            raise ValueError(f"{folder / file}: {name} is not a LoRA matrix")
        matrices.setdefault(f"{target}.weight", {})[which] = tensor
    return matrices
