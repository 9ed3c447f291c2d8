"""The towers of an original checkpoint: their configuration, and their weights where the checkpoint has none.

The original config.json only names its towers. OpenAI's CLIP towers, which nearly all published checkpoints have, are
known here; for others the tower's folder has to be given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.image_utils import PILImageResampling
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cal_train.models.convert.keys import TOWER
from cal_train.models.tower import load_image_processor
from cal_train.towers.loading import folder_config, load_tower

_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": _LARGE | {"image_size": 224},
    "clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
}
"""Last part of a tower's name -> configuration. Source: the configurations that OpenAI published with the weights."""


@dataclass(frozen=True)
class VisionTower:
    """What is known of a vision tower; ``state`` is empty if the checkpoint itself holds the weights."""

    config: PreTrainedConfig
    state: dict[str, Tensor]
    image_processor: LlavaImageProcessorPil
    source: str


@torch.no_grad()
def vision_tower(
    folder: Path | None, name: str, image_aspect_ratio: Literal["square", "pad"], has_state: bool, where: str
) -> VisionTower:
    """Return configuration and image processor of the vision tower, and its weights if the checkpoint has none.

    Args:
        folder: The tower's folder, or None.
        name: ``mm_vision_tower`` of the checkpoint. It is compared with known names and never opened.
        image_aspect_ratio: How images become square.
        has_state: Whether the checkpoint holds the tower's weights, which then count.
        where: The checkpoint, for messages.

    Raises:
        ValueError: If the folder is needed and not given, or is not a usable tower.
    """
    if folder is not None:
        image_processor = load_image_processor(folder, None, image_aspect_ratio)
        if has_state:
            return VisionTower(_tower_config(folder), {}, image_processor, str(where))
        tower = load_tower(folder)
        state = {f"{TOWER}{key}": value for key, value in tower.state_dict().items()}
        return VisionTower(tower.config, state, image_processor, folder.name)
    known = KNOWN_TOWERS.get(name.rstrip("/").rpartition("/")[2])
    if not has_state or known is None:
        lacks = "what kind of tower it has" if has_state else "the weights of its vision tower"
        named = f"config.json names {name!r}, which is not opened" if name else "config.json names none"
        raise ValueError(f"{where} does not hold {lacks} ({named}): name the tower's folder with --vision_tower")
    config = CLIPVisionConfig(**known)
    return VisionTower(config, {}, _clip_image_processor(known["image_size"], image_aspect_ratio), str(where))


def known_name(config: PreTrainedConfig) -> str | None:
    """Return the hub name of the tower that has this configuration, or None."""
    for name, fields in KNOWN_TOWERS.items():
        known = CLIPVisionConfig(**fields)
        if config.model_type == known.model_type and all(
            getattr(config, field) == getattr(known, field)
            for field in (*fields, "hidden_act")
            if field != "projection_dim"
        ):
            return f"openai/{name}"
    return None


def _tower_config(folder: Path) -> PreTrainedConfig:
    config: Any = folder_config(folder, "vision tower")
    return config.vision_config if config.model_type in ("clip", "siglip") else config


def _clip_image_processor(side: int, image_aspect_ratio: Literal["square", "pad"]) -> LlavaImageProcessorPil:
    return LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=image_aspect_ratio == "pad",
        image_mean=list(OPENAI_CLIP_MEAN),
        image_std=list(OPENAI_CLIP_STD),
        resample=PILImageResampling.BICUBIC,
    )
