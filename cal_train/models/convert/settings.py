"""What an original checkpoint's config.json says, and writing such a file.

The original repositories keep one flat file: the language model's configuration with ``mm_...`` fields beside it.
LLaVA-NeXT's grids stand there as (width, height), in transformers as (height, width); swapping each pair and keeping
their order keeps the choice among grids that are equally good.
"""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from cal_train.models.convert.keys import PROJECTORS

LANGUAGE_MODELS = {
    "llava": ("llama", "llava"),
    "llava_llama": ("llama", "llava"),
    "llava_mistral": ("mistral", "llava"),
    "llava_mixtral": ("mixtral", "llava"),
    "llava_qwen": ("qwen2", "llava"),
    "llava_gemma": ("gemma", "llava"),
    "mgm": ("llama", "mgm"),
    "mgm_gemma": ("gemma", "mgm"),
    "mgm_mistral": ("mistral", "mgm"),
    "mgm_mixtral": ("mixtral", "mgm"),
    "mini_gemini": ("llama", "mgm"),
    "mini_gemini_gemma": ("gemma", "mgm"),
    "mini_gemini_mixtral": ("mixtral", "mgm"),
}
"""Original ``model_type`` -> (``model_type`` of the language model, repository). MGM was Mini-Gemini at first."""

_ARCHITECTURES = {"llava": "Llava{}ForCausalLM", "mgm": "MGM{}ForCausalLM"}
_CAMEL = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen", "gemma": "Gemma"}
_TEXT_EXTRAS = {"rope_theta", "rope_scaling", "torch_dtype", "dtype", "bos_token_id", "eos_token_id"}
_NEVER_TEXT = {"architectures", "model_type", "transformers_version", "_name_or_path"}
_SELECT = {"patch": "default", "cls_patch": "full"}


@dataclass(frozen=True)
class Settings:
    """What an original config.json says.

    Attributes:
        family: ``llava``, ``llava_next`` or ``mgm``.
        text_config: Of the language model.
        tower_name: ``mm_vision_tower``: a hub name, or a path on someone else's machine.
        aux_tower_name: ``mm_vision_tower_aux`` (MGM).
        projector_type: A key of `cal_train.models.convert.keys.PROJECTORS`.
        layer: Hidden state of the tower that the projector reads.
        select_strategy: ``default`` without, ``full`` with the class token.
        image_aspect_ratio: ``square`` or ``pad``.
        family_options: For `cal_train.models.layout.build_config`.
        unused: Names of fields that say nothing about the converted model.
    """

    family: str
    text_config: PreTrainedConfig
    tower_name: str
    aux_tower_name: str | None
    projector_type: str
    layer: int
    select_strategy: str
    image_aspect_ratio: str
    family_options: dict[str, Any]
    unused: tuple[str, ...]


def is_original(raw: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in the flat form of the original repositories."""
    return "mm_vision_tower" in raw and "text_config" not in raw


def read_settings(raw: Mapping[str, Any], where: str) -> Settings:
    """Return what an original config.json says.

    Raises:
        ValueError: If it describes something that the Hugging Face classes cannot hold, naming field and value.
    """
    model_type, projector_type = raw.get("model_type"), raw.get("mm_projector_type", "linear")
    if not isinstance(model_type, str) or model_type not in LANGUAGE_MODELS:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not one that can be converted: {', '.join(LANGUAGE_MODELS)}"
        )
    if "quantization_config" in raw:
        raise ValueError(f"{where}: the weights are quantised: use the folder with the original ones")
    if not isinstance(projector_type, str) or projector_type not in PROJECTORS:
        raise ValueError(
            f"{where}: mm_projector_type {projector_type!r} does not fit the Hugging Face classes, whose projector is "
            f"two linear layers: only {', '.join(PROJECTORS)} can be converted"
        )
    text_type, repository = LANGUAGE_MODELS[model_type]
    family = "mgm" if repository == "mgm" else _llava_family(raw, where)
    select = raw.get("mm_vision_select_feature", "patch")
    if not isinstance(select, str) or select not in _SELECT:
        raise ValueError(f"{where}: mm_vision_select_feature {select!r} is neither patch nor cls_patch")
    text_config, unused = _text_config(raw, text_type, where)
    aspect = raw.get("image_aspect_ratio") or "square"
    return Settings(
        family=family,
        text_config=text_config,
        tower_name=str(raw["mm_vision_tower"] or ""),
        aux_tower_name=raw.get("mm_vision_tower_aux"),
        projector_type=projector_type,
        layer=_whole(raw, "mm_vision_select_layer", -2, where),
        select_strategy=_SELECT[select],
        image_aspect_ratio="pad" if aspect == "pad" else "square",
        family_options=_family_options(raw, family, where),
        unused=unused,
    )


def original_config(
    config: PreTrainedConfig, tower_name: str, aux_tower_name: str | None, image_aspect_ratio: str
) -> dict[str, Any]:
    """Return the flat config.json that the original repositories read, for a model of ours.

    Args:
        config: Of the model.
        tower_name: What becomes ``mm_vision_tower``.
        aux_tower_name: What becomes ``mm_vision_tower_aux`` (MGM).
        image_aspect_ratio: ``square`` or ``pad``; LLaVA-NeXT's becomes ``anyres``.

    Raises:
        ValueError: If the original repository has no class for the language model.
    """
    ours: Any = config
    repository = "mgm" if config.model_type == "mgm" else "llava"
    text_type = ours.text_config.model_type
    flat = ours.text_config.to_dict()
    rope = flat.pop("rope_parameters", None) or {}
    if text_type not in _CAMEL or (repository, text_type) == ("mgm", "qwen2"):
        raise ValueError(f"{repository}'s original code has no class for a language model of type {text_type!r}")
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {field.name for field in dataclasses.fields(type(ours.text_config))} - shared
    flat = {name: value for name, value in flat.items() if name in known}
    flat |= {"torch_dtype": str(config.dtype).removeprefix("torch."), "rope_theta": rope.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
        flat["rope_scaling"]["type"] = rope["rope_type"]
    is_next = config.model_type == "llava_next"
    flat |= {
        "model_type": _original_type(repository, text_type),
        "architectures": [_ARCHITECTURES[repository].format(_CAMEL[text_type])],
        "use_mm_proj": True,
        "mm_vision_tower": tower_name,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": ours.vision_config.hidden_size,
        "mm_vision_select_layer": ours.vision_feature_layer,
        "mm_vision_select_feature": "patch" if ours.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if is_next else image_aspect_ratio,
        "tokenizer_padding_side": "right",
        # without it the original code takes the tower from its own folder and ignores this checkpoint's
        "unfreeze_mm_vision_tower": True,
    }
    if is_next:
        flat["image_grid_pinpoints"] = swapped(ours.image_grid_pinpoints)
    if repository == "mgm":
        flat |= _mgm_fields(ours, aux_tower_name)
    return flat


def swapped(pairs: list[Any]) -> list[list[int]]:
    """Return (width, height) as (height, width) and the other way round, in the same order."""
    return [[int(b), int(a)] for a, b in pairs]


def _llava_family(raw: Mapping[str, Any], where: str) -> str:
    merge, aspect = raw.get("mm_patch_merge_type", "flat"), raw.get("image_aspect_ratio") or "square"
    if merge == "spatial_unpad" and aspect == "anyres":
        return "llava_next"
    if merge == "flat" and aspect in ("square", "pad"):
        return "llava"
    raise ValueError(
        f"{where}: mm_patch_merge_type {merge!r} with image_aspect_ratio {aspect!r} has no Hugging Face class: flat "
        "with square or pad (LLaVA-1.5), and spatial_unpad with anyres (LLaVA-NeXT), can be converted"
    )


def _family_options(raw: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
    if family == "llava_next":
        return {"image_grid_pinpoints": swapped(_pinpoints(raw.get("image_grid_pinpoints"), where))}
    if family == "mgm":
        return {
            "image_grid": _whole(raw, "image_grid", 1, where),
            "image_global": bool(raw.get("image_global", False)),
            "high_res_size": _whole(raw, "image_size_aux", 320, where),
            **({} if raw.get("drop_path", True) else {"aux_drop_path": 0.0}),
        }
    return {}


def _mgm_fields(config: Any, aux_tower_name: str | None) -> dict[str, Any]:
    return {
        "mm_vision_tower_aux": aux_tower_name,
        "mm_hidden_size_aux": sum(config.aux_config.hidden_sizes),
        "image_size_aux": config.high_res_size,
        "image_grid": config.image_grid,
        "image_global": config.image_global,
        "optimize_vision_tower": False,
        # without it the original code takes the stages from the tower's own folder
        "optimize_vision_tower_aux": True,
    }


def _pinpoints(value: Any, where: str) -> list[Any]:
    try:
        pairs = ast.literal_eval(value) if isinstance(value, str) else value
        if pairs and all(len(pair) == 2 and all(isinstance(side, int) for side in pair) for pair in pairs):
            return list(pairs)
    except (ValueError, SyntaxError, TypeError):
        pass  # answered below, with the value
    raise ValueError(f"{where}: image_grid_pinpoints {value!r} is not a list of pairs of pixels")


def _whole(raw: Mapping[str, Any], name: str, default: int, where: str) -> int:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int):
        raise ValueError(f"{where}: {name} {value!r} is not a whole number")
    return value


def _text_config(raw: Mapping[str, Any], text_type: str, where: str) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    config_class: Any = CONFIG_MAPPING[text_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map) | _TEXT_EXTRAS
    fields = {name: value for name, value in raw.items() if name in known - _NEVER_TEXT}
    try:
        config = config_class(**fields)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError) as error:  # of values that do not fit
        raise ValueError(f"{where} does not describe a language model: {error}") from error
    return config, tuple(sorted(raw.keys() - fields.keys() - _NEVER_TEXT))


def _original_type(repository: str, text_type: str) -> str:
    """Return the name that the original repository gives a model today: LLaVA's old ``llava`` is ``llava_llama``."""
    names = {text: name for name, (text, where) in reversed(LANGUAGE_MODELS.items()) if where == repository}
    return "llava_llama" if (repository, text_type) == ("llava", "llama") else names[text_type]
