"""MGM and MGM-HD: what composing and a training step need of `cal_train.models.mgm`.

I images, T tiles of an image, P patches of a tile.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from cal_train.models.mgm.configuration import MGMConfig
from cal_train.models.mgm.image_processing import MGMImageProcessor
from cal_train.models.mgm.modeling import MGMFeatures, MGMForConditionalGeneration
from cal_train.models.mgm.processing import MGMProcessor
from cal_train.towers.loading import has_class_token
from cal_train.types import IMAGE_MARK

VISION_INPUTS = ("pixel_values", "high_res_pixel_values")
CACHES_FEATURES = False

TINY_AUX = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.5}
"""A ConvNeXt for tests, for towers of 2 x 2 patches."""
TINY = {"high_res_size": 64}
TINY_HD = {"high_res_size": 128, "image_grid": 2, "image_global": True}


def vision_features(model: MGMForConditionalGeneration, images: Mapping[str, Tensor]) -> MGMFeatures:
    """Return the features of both towers, without a graph where they are frozen.

    The auxiliary tower drops paths at random in training mode, so both passes of a step must share one call.

    Args:
        model: The VLM, unwrapped.
        images: ``pixel_values`` (I, T, C, h, w) and ``high_res_pixel_values`` (I, C, S, S).
    """
    return model.model.encode_images(images["pixel_values"], images["high_res_pixel_values"])


def image_embeds(
    model: MGMForConditionalGeneration, features: MGMFeatures, images: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return the embeddings of all image tokens in reading order, (I * T * P, width of the language model)."""
    return model.model.embed_images(features).flatten(0, 1)


def language_model(model: MGMForConditionalGeneration) -> nn.Module:
    """Return the decoder without its head."""
    return model.model.language_model


def blank_images(model: MGMForConditionalGeneration) -> dict[str, Tensor]:
    """Return one black image for both towers, for steps without images in which every part must still take part."""
    config = model.config
    vision: Any = config.vision_config
    channels, side, high_res = getattr(vision, "num_channels", 3), vision.image_size, config.high_res_size
    return {
        "pixel_values": torch.zeros(1, config.num_tiles, channels, side, side, device=model.device),
        "high_res_pixel_values": torch.zeros(1, channels, high_res, high_res, device=model.device),
    }


def tower_parameters(model: MGMForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters of both vision towers."""
    return chain(model.model.vision_tower.parameters(), model.model.vision_tower_aux.parameters())


def vision_parameters(model: MGMForConditionalGeneration) -> Iterator[nn.Parameter]:
    """Yield the parameters that only images reach: towers, mining and projector."""
    trained = (model.model.patch_info_mining, model.model.multi_modal_projector)
    return chain(tower_parameters(model), *(module.parameters() for module in trained))


def build_config(
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    image_token_id: int,
    vision_feature_layer: int,
    aux_config: PreTrainedConfig,
    **options: Any,
) -> MGMConfig:
    """Return the configuration of a model made of these parts.

    Args:
        text_config: Of the language model.
        vision_config: Of the first tower.
        image_token_id: Id of the image placeholder.
        vision_feature_layer: Hidden state of the first tower that is read.
        aux_config: Of the ConvNeXt.
        **options: Further fields of `MGMConfig`. ``high_res_size`` is 768 per tile unless it is given.

    Raises:
        ValueError: If the towers do not fit.
    """
    aux_config.dtype = text_config.dtype
    fields: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "aux_config": aux_config,
        "image_token_index": image_token_id,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": "default" if has_class_token(vision_config) else "full",
        "high_res_size": 768 * options.get("image_grid", 1),
        "dtype": text_config.dtype,
    }
    return MGMConfig(**(fields | options))


def build_processor(
    config: MGMConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> MGMProcessor:
    """Return the processor of a model.

    Args:
        config: Of the model.
        image_processor: LLaVA's, whose mean, deviation, resampling and way to make a square are taken over.
        tokenizer: In which the image mark is one special token.
        chat_template: Jinja source.
    """
    vision: Any = config.vision_config
    side = config.high_res_size
    squares = MGMImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=bool(image_processor.do_pad),
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=image_processor.resample,
        image_size=vision.image_size,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )
    return MGMProcessor(
        squares, tokenizer, patch_size=vision.patch_size, image_token=IMAGE_MARK, chat_template=chat_template
    )
