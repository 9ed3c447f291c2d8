"""The language model's linear layers in 4 or 8 bits (QLoRA), by bitsandbytes; everything else stays as it is.

Left to itself, transformers quantises the vision tower and the projector too, and a skip list of short names
(``vision_tower``) has no effect: names are matched whole, from the beginning. `unquantized_modules` makes the list from
the model's own modules, and `check_quantized` looks at what came out.

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (nf4, double quantisation); Dettmers et al. 2022, LLM.int8(),
arXiv:2208.07339.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from cal_train.folders import from_folder

Quantization = Literal["nf4", "int8"]

_FILE_NAME = "quantization.json"
_LANGUAGE_MODEL = "language_model"


def quantization_settings(
    config: PreTrainedConfig,
    quantization: Quantization,
    compute_dtype: torch.dtype = torch.float32,
    use_double_quant: bool = True,
) -> BitsAndBytesConfig:
    """Return what ``from_pretrained`` takes to quantise the language model of a VLM, and nothing else of it.

    Args:
        config: Of the VLM.
        quantization: ``nf4`` (4 bits, blocks of 64 weights) or ``int8`` (rows of 8 bits).
        compute_dtype: In which products with 4-bit weights are taken. ``int8`` takes its own in float16.
        use_double_quant: The scales of ``nf4`` are quantised too, which saves 0.37 bits per weight.

    Raises:
        ValueError: If bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError(f"quantization={quantization} needs bitsandbytes: pip install 'cal_train[qlora]'")
    # It says the same about float32 inputs once per product, thousands of times in a step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    skipped = unquantized_modules(config)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=use_double_quant,
        llm_int8_skip_modules=skipped,  # the name is historical, it holds for 4 bits as well
    )


def unquantized_modules(config: PreTrainedConfig) -> list[str]:
    """Return the full names of all modules beside the decoder: towers, projector, whatever a family adds, the head."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    body = model.base_model_prefix
    beside = [f"{body}.{name}" for name, _ in model.base_model.named_children() if name != _LANGUAGE_MODEL]
    return beside + [name for name, _ in model.named_children() if name != body]


def check_quantized(model: PreTrainedModel) -> int:
    """Return how many layers are quantised, once it is certain that they are the decoder's linear layers and no others.

    Raises:
        ValueError: If a layer outside the decoder is quantised, or none inside it.
    """
    names = quantized_layers(model)
    inside = f"{model.base_model_prefix}.{_LANGUAGE_MODEL}."
    if strays := [name for name in names if not name.startswith(inside)]:
        raise ValueError(f"{len(strays)} layers outside the language model were quantised, the first is {strays[0]}")
    if not names:
        raise ValueError(f"no layer of {type(model).__name__} was quantised: its language model has no linear layers")
    return len(names)


def keep_layout(model: PreTrainedModel) -> None:
    """Keep 4-bit weights on a CPU as they are in passes without gradients, such as the one without images.

    On CPUs with AVX-512 for bfloat16, bitsandbytes (0.50) takes the first such pass in eval mode for the start of
    inference: it lays the weights out anew, rounds their scales to bfloat16, and from then on multiplies without a
    graph, so that training would go on with no gradient through these layers, and without an error.
    """
    for name in quantized_layers(model):
        layer: Any = model.get_submodule(name)
        layer.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> list[str]:
    """Return the names of the modules that bitsandbytes has replaced."""
    if not is_bitsandbytes_available():
        return []
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]


def write_quantization(model: PreTrainedModel, folder: str | Path) -> None:
    """Note in an adapter's folder how its base model was quantised; nothing happens for a model that is not."""
    settings: Any = getattr(model.config, "quantization_config", None)
    if settings is not None:
        text = json.dumps(settings.to_dict(), indent=2, default=str)
        (Path(folder) / _FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_dequantized(base: Path, adapter: Path) -> PreTrainedModel:
    """Load a base model with the weights that an adapter was trained on: quantised, and turned back.

    Args:
        base: Folder of the base model in full precision.
        adapter: Folder of an adapter of a run with ``quantization``.

    Raises:
        ValueError: If the adapter does not say how its base model was quantised, or bitsandbytes is not installed.
    """
    file = adapter / _FILE_NAME
    if not file.is_file():
        raise ValueError(
            f"{adapter} has no {_FILE_NAME}: it was trained on a base model in full precision, merge it without "
            "--quantized_base"
        )
    if not is_bitsandbytes_available():
        raise ValueError("a quantised base model needs bitsandbytes: pip install 'cal_train[qlora]'")
    settings = BitsAndBytesConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    model = from_folder(AutoModelForImageTextToText, base, dtype="auto", quantization_config=settings)
    return model.dequantize(dtype=model.dtype)
