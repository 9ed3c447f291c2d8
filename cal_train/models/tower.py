"""What a VLM takes from a vision tower: the hidden state of a layer, and the image processor."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from cal_train.towers.loading import stored_image_processor


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
    require_hidden_state(tower.config, layer)
    options = {} if tower.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    return tower(pixel_values, output_hidden_states=True, **options).hidden_states[layer]


def require_hidden_state(config: Any, layer: int) -> None:
    """Check that a tower of this configuration has the hidden state ``layer``.

    Raises:
        ValueError: If it has not.
    """
    num_states = config.num_hidden_layers + 1
    if not -num_states <= layer < num_states:
        raise ValueError(f"vision_feature_layer {layer} does not exist: the tower has {num_states} hidden states")


def patch_features(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Return what the projector of a VLM reads, (I, P, width of the tower), without a graph if the tower is frozen.

    Args:
        model: A VLM with a ``vision_tower``, unwrapped.
        pixel_values: Images or tiles (I, C, H, W).
    """
    config: Any = model.config
    tower: Any = model.base_model.vision_tower
    # Activation checkpointing makes even a frozen tower's input require gradients: it must not record a graph.
    is_trained = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
        hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states
    selected = config.vision_feature_layer
    layers = [selected] if isinstance(selected, int) else selected
    start = 1 if config.vision_feature_select_strategy == "default" else 0  # "default" drops the class token
    return torch.cat([hidden_states[index][:, start:] for index in layers], dim=-1)


def blank_pixels(model: PreTrainedModel) -> Tensor:
    """Return one black image (1, C, H, W) at the size of the model's vision tower."""
    config: Any = model.config.vision_config
    return torch.zeros(1, getattr(config, "num_channels", 3), config.image_size, config.image_size, device=model.device)


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
    own = stored_image_processor(folder)
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
