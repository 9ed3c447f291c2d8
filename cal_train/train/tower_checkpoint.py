"""The folder of a tower run: towers in Hugging Face layout, the objective's weights, and what they were built with.

``vision/`` (with the image processor), ``text/`` (with the tokenizer), ``tower.json``, ``objective.safetensors`` and
``objective.json`` (its name and options).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cal_train.objectives.families import build_objective
from cal_train.towers.two_tower import TwoTower, load_two_tower
from cal_train.train.tower_model import TowerModel

WEIGHTS_FILE = "objective.safetensors"
SETTINGS_FILE = "objective.json"


def save_tower_model(
    model: TowerModel,
    name: str,
    options: Mapping[str, Any],
    folder: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write towers and objective into a folder.

    Args:
        model: The bare model.
        name: Of the objective.
        options: That the objective was built with.
        folder: Is made if it does not exist.
        weights: The model's state dict, where an engine has collected it from all ranks. Default: the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if weights is None else weights
    cast(TwoTower, model.towers).save_pretrained(folder, _under("towers.", weights))
    own = {key: value.detach().cpu().contiguous() for key, value in _under("objective.", weights).items()}
    save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = {"objective": name, "objective_options": dict(options)}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tower_model(folder: str | Path) -> TowerModel:
    """Return the model of a run folder or of one of its checkpoints, in float32 and evaluation mode.

    Raises:
        ValueError: If the folder is not one of a tower run, or a weight is missing or left over.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} is not a folder of a tower run: {SETTINGS_FILE} is missing")
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    towers = load_two_tower(folder)
    objective = build_objective(settings["objective"], towers.shape, settings["objective_options"])
    model = TowerModel(towers, cast(nn.Module, objective))
    _load_objective(model.objective, folder)
    return model.eval()


def objective_heads(folder: str | Path) -> str:
    """Return the objective of a checkpoint and its heads, for a reader: ``coca (captioner, clip, ...)``."""
    folder = Path(folder)
    name = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["objective"]
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
        heads = sorted({key.partition(".")[0] for key in weights.keys()})
    return f"{name} ({', '.join(heads)})"


@torch.no_grad()
def load_tower_weights(model: TowerModel, name: str, folder: str | Path) -> None:
    """Copy all weights of a checkpoint into a model, every one of them.

    Raises:
        ValueError: If the checkpoint is of another objective, or a weight is missing, left over or of another shape.
    """
    folder = Path(folder)
    check_objective(folder, name)
    _load_strictly(model.towers, load_two_tower(folder).state_dict(), folder)
    _load_objective(model.objective, folder)


def check_objective(folder: Path, name: str) -> None:
    """Refuse a checkpoint of another objective.

    Raises:
        ValueError: If it is of another one, or no checkpoint of a tower run.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} is not a checkpoint of a tower run: {SETTINGS_FILE} is missing")
    stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["objective"]
    if stored != name:
        raise ValueError(f"{folder} was trained with the objective {stored!r}, the recipe says {name!r}")


def _load_objective(objective: nn.Module, folder: Path) -> None:
    _load_strictly(objective, load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _load_strictly(module: nn.Module, weights: dict[str, Any], origin: Path) -> None:
    own = module.state_dict()
    for key in own.keys() & weights.keys():
        if own[key].shape == (1,) and weights[key].ndim == 0:  # scale and bias of runs before they had a dimension
            weights[key] = weights[key].reshape(1)
    unlike = {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape}
    if problems := sorted((own.keys() ^ weights.keys()) | unlike):
        first = ", ".join(problems[:5])
        raise ValueError(f"{origin} does not fit: {len(problems)} weights missing, left over or misshapen: {first}")
    module.load_state_dict({key: _split_like(own[key], value) for key, value in weights.items()})


def _split_like(own: Tensor, value: Tensor) -> Tensor:
    """Return this rank's share of a value where FSDP2 has split the parameter that it is for."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
