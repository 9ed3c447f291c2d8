"""Pretrained encoders from folders: whole, from safetensors, without foreign code; and at another image size."""

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from cal_train.folders import from_folder

TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
}
"""Vision classes by ``model_type`` of the folder's configuration."""

_VISION_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Dual encoders, of which the vision half is taken."""

_POSITIONS = {
    "clip_vision_model": "embeddings.position_embedding.weight",
    "siglip_vision_model": "embeddings.position_embedding.weight",
    "dinov2": "embeddings.position_embeddings",
}


def untrained_config(source: Mapping[str, Any], what: str) -> PreTrainedConfig:
    """Return the configuration of a Hugging Face class from its fields.

    Args:
        source: ``model_type`` and fields; what is not given has the class's default.
        what: The model's part in the run, for messages.

    Raises:
        ValueError: If the model type is unknown, or has no such field (Hugging Face's classes take any name).
    """
    fields = dict(source)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{what}: model_type {model_type!r} is not one that transformers knows")
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for name in sorted(fields.keys() - known):
        nearest = difflib.get_close_matches(name, known, n=1)
        cure = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{what}: {model_type} has no field {name!r}{cure}")
    return config_class(**fields)


def folder_config(folder: Path, what: str) -> PreTrainedConfig:
    """Return the configuration of a model folder.

    Args:
        folder: A folder in Hugging Face layout.
        what: The folder's part in the run, for messages.

    Raises:
        ValueError: If it is no model folder, is quantised, or has a model type that transformers does not know.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what} {folder} is not a model folder: config.json is missing")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise ValueError(f"{what} {folder} is quantised: use the folder with its original weights")
    try:
        return from_folder(AutoConfig, folder)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error


def load_strict(
    model_class: Any, folder: Path, what: str, may_lack: Collection[str] = (), **options: object
) -> PreTrainedModel:
    """Load a model in float32, in eval mode, and refuse a file that does not hold all of its weights.

    Args:
        model_class: A transformers class, or auto class, with ``from_pretrained``.
        folder: The model's folder, with safetensors or PyTorch's ``.bin`` files.
        what: The folder's part in the run, for messages.
        may_lack: First components of the names of weights that are not used and may be missing.
        options: For ``from_pretrained``.

    Raises:
        ValueError: If weights cannot be read, are missing or of another shape, or a file holds more than tensors.
    """
    try:
        loaded = from_folder(
            model_class,
            folder,
            dtype=torch.float32,
            weights_only=True,  # of a .bin file tensors are read and nothing is executed
            output_loading_info=True,
            **options,
        )
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    missing = [key for key in info["missing_keys"] if key.split(".")[0] not in may_lack]
    if lost := sorted([*missing, *(str(key) for key in info["mismatched_keys"])]):
        raise ValueError(f"{what} {folder} lacks {len(lost)} weights, the first is {lost[0]}: the file is wrong")
    return model.eval()


def load_tower(folder: Path) -> PreTrainedModel:
    """Load a vision tower in float32, in eval mode; of a dual encoder only the vision half.

    Raises:
        ValueError: If the folder is not a supported tower, is quantised, or lacks weights.
    """
    model_type = _require_tower_type(folder, folder_config(folder, "vision tower"))
    return load_strict(TOWERS[model_type], folder, "vision tower")


def _require_tower_type(folder: Path, config: PreTrainedConfig) -> str:
    """Return the key of the tower's class in `TOWERS`."""
    model_type = _VISION_HALF.get(config.model_type, config.model_type)
    if model_type not in TOWERS:
        raise ValueError(
            f"vision tower {folder} has model_type {config.model_type!r}, which is not supported: "
            f"use one of {', '.join([*TOWERS, *_VISION_HALF])}"
        )
    return model_type


def stored_image_processor(folder: Path) -> Any:
    """Return the image processor in a tower's folder.

    Raises:
        ValueError: If there is none, or no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"vision tower {folder} is not a folder: check the path")
    if (folder / "vision").is_dir() and (folder / "tower.json").is_file():
        raise ValueError(
            f"vision tower {folder} is the folder of a tower run: take its tower out first, cal-train export_tower "
            f"--checkpoint {folder} --output {folder}-vision"
        )
    if (folder / "config.json").is_file():
        _require_tower_type(folder, folder_config(folder, "vision tower"))
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"vision tower {folder} has no preprocessor_config.json, which says how its images were normalised: "
            "copy it from where the tower came from"
        )
    return from_folder(AutoImageProcessor, folder, backend="pil")


def has_class_token(config: PreTrainedConfig) -> bool:
    """Return whether the tower's hidden states begin with a class token, which LLaVA drops."""
    return config.model_type != "siglip_vision_model"


def at_image_size(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Return the tower with position embeddings for ``image_size`` pixels, interpolated as the tower itself does it.

    Interpolating once and storing the result, instead of at every step, lets every tower run at any size that its
    patches divide, and keeps ``config.image_size`` true.

    Args:
        tower: A tower of `load_tower`.
        image_size: Side of the square images, in pixels.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    patch_size = tower.config.patch_size
    if image_size < patch_size or image_size % patch_size:
        lower = max(image_size // patch_size, 1) * patch_size
        raise ValueError(
            f"image_size {image_size} is not a multiple of the tower's patch size {patch_size}: "
            f"use {lower} or {lower + patch_size}"
        )
    if image_size == tower.config.image_size:
        return tower
    config = deepcopy(tower.config)
    config.image_size = image_size
    num_tokens = (image_size // patch_size) ** 2 + int(has_class_token(config))
    resized = type(tower)(config).eval()
    key = _POSITIONS[config.model_type]
    embeddings: Any = tower.embeddings
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(
            torch.zeros(1, num_tokens, config.hidden_size), image_size, image_size
        )
    state = tower.state_dict()
    resized.load_state_dict({**state, key: positions.reshape_as(resized.state_dict()[key])})
    return resized
