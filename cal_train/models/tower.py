"""Vision towers that a VLM can be composed with: CLIP, SigLIP (1, and 2 at fixed size) and DINOv2."""

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
}
"""Classes by ``model_type`` of the folder's configuration."""

_VISION_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Dual encoders, of which the vision half is taken."""

_POSITIONS = {
    "clip_vision_model": "embeddings.position_embedding.weight",
    "siglip_vision_model": "embeddings.position_embedding.weight",
    "dinov2": "embeddings.position_embeddings",
}


def load_tower(folder: Path) -> PreTrainedModel:
    """Load a vision tower in float32, in eval mode; of a dual encoder only the vision half.

    Raises:
        ValueError: If the folder is not a supported tower, is quantised, holds no safetensors, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"vision tower {folder} is not a model folder: config.json is missing")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model_type = _VISION_HALF.get(config.model_type, config.model_type)
    if model_type not in TOWERS:
        raise ValueError(
            f"vision tower {folder} has model_type {config.model_type!r}, which is not supported: "
            f"use one of {', '.join([*TOWERS, *_VISION_HALF])}"
        )
    if hasattr(config, "quantization_config"):
        raise ValueError(f"vision tower {folder} is quantised: use the folder with its original weights")
    try:
        loaded = TOWERS[model_type].from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"vision tower {folder} cannot be loaded: {error}") from error
    tower, info = cast(tuple[PreTrainedModel, dict], loaded)
    if lost := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise ValueError(f"vision tower {folder} lacks {len(lost)} weights, the first is {lost[0]}: the file is wrong")
    return tower.eval()


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


@torch.no_grad()
def selected_features(tower: PreTrainedModel, pixel_values: Tensor, layer: int) -> Tensor:
    """Return the hidden state of ``layer`` at the size of the images, as the tower itself computes it.

    Args:
        tower: A tower, whose positions are interpolated where the images are of another size than its own.
        pixel_values: Images (I, 3, H, W).
        layer: Index into the hidden states; 0 is the embeddings, -1 the last layer.

    Returns:
        Features (I, tokens, width), class token included.

    Raises:
        ValueError: If the tower has no such layer.
    """
    num_states = tower.config.num_hidden_layers + 1
    if not -num_states <= layer < num_states:
        raise ValueError(f"vision_feature_layer {layer} does not exist: the tower has {num_states} hidden states")
    options = {} if tower.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return tower(pixel_values, output_hidden_states=True, **options).hidden_states[layer]


def load_image_processor(
    folder: Path, image_size: int | None, image_aspect_ratio: Literal["square", "pad"]
) -> LlavaImageProcessorPil:
    """Return LLaVA's image processor with the tower's own mean, standard deviation, resampling and size.

    The short side is resized to the image size itself: a larger resize with a crop, as some towers use, would cut the
    borders of images that were padded to a square.

    Args:
        folder: The tower's folder.
        image_size: Side in pixels. Default: what the tower's own processor makes.
        image_aspect_ratio: ``pad`` pads to a square with the mean colour, ``square`` crops the centre.

    Raises:
        ValueError: If the folder has no preprocessor configuration.
    """
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"vision tower {folder} has no preprocessor_config.json, which says how its images were normalised: "
            "copy it from where the tower came from"
        )
    own = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    own_size = own.crop_size if own.do_center_crop else own.size
    side = image_size or own_size["height"] or own_size["shortest_edge"]
    return LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=image_aspect_ratio == "pad",
        image_mean=list(own.image_mean),
        image_std=list(own.image_std),
        rescale_factor=own.rescale_factor,
        resample=own.resample,
    )
