"""Where the parts of each family go: configuration, processor, and prefixes in the state dict.

Shared by `cal_train.models.compose`, which builds from parts, and by the conversion of published checkpoints.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from cal_train.models import mgm_family
from cal_train.models.anyres import check_grid, original_grid
from cal_train.models.tower import require_hidden_state
from cal_train.towers.loading import has_class_token
from cal_train.types import IMAGE_MARK

_SHARED_PARTS = {
    "language_model": "model.language_model",
    "lm_head": "lm_head",
    "vision_tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
}
PARTS_OF: dict[str, dict[str, str]] = {
    "llava": _SHARED_PARTS,
    "llava_next": _SHARED_PARTS | {"image_newline": "model.image_newline"},
    "mgm": _SHARED_PARTS | {"aux_tower": "model.vision_tower_aux", "mining": "model.patch_info_mining"},
}
"""Per family, the parts of the model in memory and the prefix of their weights; a bare parameter's prefix is its name.
"""

PRETRAINED_PARTS = ("language_model", "lm_head", "vision_tower", "aux_tower")
"""Parts that a new model takes from somewhere; the others start untrained."""


def build_config(
    family: str,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    image_token_id: int,
    vision_feature_layer: int,
    aux_config: PreTrainedConfig | None = None,
    **family_options: Any,
) -> PreTrainedConfig:
    """Return the configuration of a model of the family; the configurations of the parts are copied.

    Args:
        family: ``llava``, ``llava_next`` or ``mgm``.
        text_config: Of the language model, with the vocabulary that the model will have.
        vision_config: Of the vision tower.
        image_token_id: Id of ``<image>``.
        vision_feature_layer: Hidden state of the tower that the projector reads.
        aux_config: Of the tower for high-resolution images (``mgm`` only).
        **family_options: Further fields of the family's configuration, for example ``image_grid_pinpoints``.

    Raises:
        ValueError: If the family is unknown, an auxiliary tower is given to a family that has none, or lacking, the
            tower has no such hidden state, or grids of tiles do not fit it.
    """
    if family not in PARTS_OF:
        raise ValueError(f"family {family!r} is unknown: use one of {', '.join(PARTS_OF)}")
    if (aux_config is not None) != ("aux_tower" in PARTS_OF[family]):
        cure = "leave out the auxiliary tower" if aux_config is not None else "name one with --aux_tower"
        raise ValueError(f"family {family!r} has {'no' if aux_config is not None else 'an'} auxiliary tower: {cure}")
    require_hidden_state(vision_config, vision_feature_layer)
    return _CONFIGS[family](
        deepcopy(text_config),
        deepcopy(vision_config),
        image_token_id,
        vision_feature_layer,
        deepcopy(aux_config),
        **family_options,
    )


def build_processor(
    family: str,
    config: PreTrainedConfig,
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
) -> ProcessorMixin:
    """Return the processor of a model of the family.

    Args:
        family: ``llava``, ``llava_next`` or ``mgm``.
        config: Of the model, from `build_config`.
        image_processor: One that makes square images for the tower: size, mean, standard deviation and resampling are
            taken from it where the family has an image processor of its own.
        tokenizer: In which ``<image>`` is one special token.
        chat_template: Jinja source.
    """
    return _PROCESSORS[family](config, image_processor, tokenizer, chat_template)


def _shared_fields(
    text_config: PreTrainedConfig, vision_config: Any, image_token_id: int, vision_feature_layer: int
) -> dict[str, Any]:
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": image_token_id,
        "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": "default" if has_class_token(vision_config) else "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text_config.tie_word_embeddings,
        "dtype": text_config.dtype,
    }


def _llava_config(
    text: PreTrainedConfig, vision: PreTrainedConfig, image_token_id: int, layer: int, _: None, **options: Any
) -> LlavaConfig:
    return LlavaConfig(**{**_shared_fields(text, vision, image_token_id, layer), **options})


def _llava_next_config(
    text: PreTrainedConfig, vision: Any, image_token_id: int, layer: int, _: None, **options: Any
) -> LlavaNextConfig:
    grids = options.pop("image_grid_pinpoints", None) or original_grid(vision.image_size)
    grid = {"image_grid_pinpoints": check_grid(grids, vision.image_size)}
    return LlavaNextConfig(**{**_shared_fields(text, vision, image_token_id, layer), **grid, **options})


def _token_fields(config: Any) -> dict[str, Any]:
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(has_class_token(config.vision_config)),
        "image_token": IMAGE_MARK,
    }


def _llava_processor(config: Any, image_processor: Any, tokenizer: Any, chat_template: str | None) -> ProcessorMixin:
    fields = _token_fields(config)
    return LlavaProcessor(image_processor, tokenizer, chat_template=chat_template, **fields)


def _llava_next_processor(
    config: Any, image_processor: Any, tokenizer: Any, chat_template: str | None
) -> ProcessorMixin:
    side = config.vision_config.image_size
    tiling = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(size) for size in config.image_grid_pinpoints],
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
        rescale_factor=image_processor.rescale_factor,
        resample=image_processor.resample,
    )
    return LlavaNextProcessor(tiling, tokenizer, chat_template=chat_template, **_token_fields(config))


_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llava": _llava_config,
    "llava_next": _llava_next_config,
    "mgm": mgm_family.build_config,
}
_PROCESSORS: dict[str, Callable[..., ProcessorMixin]] = {
    "llava": _llava_processor,
    "llava_next": _llava_next_processor,
    "mgm": mgm_family.build_processor,
}
