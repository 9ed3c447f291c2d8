"""The families that can be trained: a module of functions each, by ``model_type`` of the configuration."""

from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cal_train.models import llava, llava_next, mgm_family

FAMILIES: dict[str, ModuleType] = {"llava": llava, "llava_next": llava_next, "mgm": mgm_family}


def family_of(model: PreTrainedModel) -> ModuleType:
    """Return the functions of the model's family.

    Raises:
        ValueError: If the family is not supported, naming those that are.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the VLM itself, from behind a peft wrapper if there is one."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
