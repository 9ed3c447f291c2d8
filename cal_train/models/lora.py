"""LoRA on the language model, with the projector inside the adapter, and merging an adapter into a plain checkpoint.

The original LLaVA keeps a LoRA run's projector in a side file that is written only at the very end. Here the projector
is one of peft's ``modules_to_save``: every saved adapter is complete and can be resumed, merged and moved on its own.
LLaVA-NeXT's newline is a parameter without a module, which peft does not save: `save_newline` adds it to the adapter's
file under its name in the wrapped model, where peft's own loading finds it.

An adapter of a quantised base model (`cal_train.models.quantize`) is merged into the base model in full precision
unless asked otherwise: the merged weights then carry no rounding, but the logits are not quite those of the training,
which went through the rounded weights. ``quantized_base`` gives exactly those.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel

from cal_train.conf import LORA_TARGETS
from cal_train.folders import check_files, from_folder, read_object
from cal_train.models.parts import part_of
from cal_train.models.quantize import load_dequantized

_WEIGHTS_NAME = "adapter_model.safetensors"
_LARGEST_RANK = 16_384


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: str = LORA_TARGETS,
    use_dora: bool = False,
) -> PeftModel:
    """Return the model behind peft, with LoRA on linear layers of the language model and a projector of its own.

    Args:
        model: The VLM; a quantised language model is fine. Its ``name_or_path`` is remembered for `merge`.
        r: Rank.
        alpha: Scale; the update is multiplied by ``alpha / r``.
        dropout: Dropout in front of the LoRA matrices.
        target_modules: Regular expression that a module's full name must match.
        use_dora: Also learn the norm of each row of the adapted matrices (DoRA, arXiv:2402.09353).

    Raises:
        ValueError: If the expression matches nothing, or anything outside the language model.
    """
    _check_targets(model, target_modules)
    body = model.base_model
    projectors = [name for name, _ in body.named_children() if part_of(f"{name}.") == "projector"]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=projectors,
        use_dora=use_dora,
    )
    return get_peft_model(model, config)


def save_newline(model: PeftModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Add the newline to an adapter that peft has just saved; nothing happens for a model without one.

    Args:
        model: The wrapped VLM.
        folder: Of the adapter.
        state_dict: The wrapped model's weights, gathered from all ranks. Default: the model's own.
    """
    newlines = {
        name: parameter if state_dict is None else state_dict[name]
        for name, parameter in model.named_parameters()
        if part_of(name) == "image_newline"
    }
    if not newlines:
        return
    file = Path(folder) / _WEIGHTS_NAME
    with safe_open(file, framework="pt") as weights:
        metadata = weights.metadata()
    complete = load_file(file) | {name: tensor.detach().cpu().contiguous() for name, tensor in newlines.items()}
    save_file(complete, file, metadata=metadata)


def load_adapter_strictly(model: PeftModel, folder: str | Path) -> None:
    """Copy the weights of an adapter folder into the wrapped model, every one of them.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape.
    """
    _check_keys(model, Path(folder))
    try:
        set_peft_model_state_dict(model, _stored(Path(folder) / _WEIGHTS_NAME))
    except RuntimeError as error:  # a shape that does not fit
        raise ValueError(f"{folder} does not fit the adapter of this run: {error}") from error


def merge(adapter: Path, output: Path, base: Path | None = None, quantized_base: bool = False) -> Path:
    """Fold an adapter into its base model and save a plain checkpoint folder with processor and chat template.

    Args:
        adapter: Folder of the adapter. A processor or generation configuration in it wins over the base model's.
        output: Folder to write; it must not exist or be empty.
        base: Folder of the base model. Default: the one that the adapter names.
        quantized_base: Merge into the weights that a run with ``quantization`` saw, quantised and turned back.

    Returns:
        The output folder.

    Raises:
        ValueError: If a folder is not what it should be, the adapter lacks a weight or has one too many, the output
            folder is not empty, or ``quantized_base`` is asked for after a run without quantization.
    """
    adapter, output = Path(adapter), Path(output)
    check_files(adapter)
    base = _base_of(adapter) if base is None else Path(base)
    if not (base / "config.json").is_file():
        raise ValueError(f"base model {base} of adapter {adapter} is not a model folder: name it with --base")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")
    if quantized_base:
        model = load_dequantized(base, adapter)
    else:
        model = from_folder(AutoModelForImageTextToText, base, dtype="auto")
    _check_newline(model, adapter)
    wrapped = _wrap(model, adapter, base)
    load_adapter_strictly(wrapped, adapter)  # peft's own loading tolerates what is missing
    merged = wrapped.merge_and_unload(safe_merge=True)
    for source in (adapter, base):
        if (source / "generation_config.json").is_file():
            read_object(source / "generation_config.json")
            merged.generation_config = GenerationConfig.from_pretrained(source)
            break
    processor = from_folder(
        AutoProcessor, adapter if (adapter / "processor_config.json").is_file() else base, backend="pil"
    )
    try:
        merged.save_pretrained(output)
        processor.save_pretrained(output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a checkpoint must not look like one
        raise
    return output


def _wrap(model: PreTrainedModel, adapter: Path, base: Path) -> PeftModel:
    """Return the model behind peft as adapter_config.json says; peft's errors on wild values become one that names it.

    Raises:
        ValueError: If it is not an adapter as `add_lora` makes them.
    """
    file = adapter / "adapter_config.json"
    raw = read_object(file)
    for name in ("layer_replication", "megatron_config"):  # more layers, imports of any module
        if raw.get(name):
            raise ValueError(f"{file}: {name} {raw[name]!r} is not of an adapter that can be merged here")
    rank = raw.get("r")
    if raw.get("peft_type") != "LORA" or not isinstance(rank, int) or not 1 <= rank <= _LARGEST_RANK:
        kind = raw.get("peft_type")
        raise ValueError(f"{file}: peft_type {kind!r} with r {rank!r} is not LORA with a rank up to {_LARGEST_RANK}")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = str(base)
        return cast(PeftModel, get_peft_model(model, config))
    except (TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise ValueError(f"{file} is not the configuration of an adapter of {base} ({error!r})") from error


def _stored(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}): copy the adapter anew") from error


def _check_newline(model: PreTrainedModel, adapter: Path) -> None:
    """Refuse an adapter without the model's newline: it was trained, and the base model's is another one."""
    if not any(part_of(name) == "image_newline" for name, _ in model.named_parameters()):
        return
    file = adapter / _WEIGHTS_NAME
    keys = list(_stored(file)) if file.is_file() else []
    if not any(key.endswith(".image_newline") for key in keys):
        raise ValueError(
            f"{file} holds no image_newline, which {type(model).__name__} is trained with: merged, the model would be "
            "another one than was trained. Take the adapter folder as the run saved it"
        )


def _check_keys(model: PeftModel, folder: Path) -> None:
    """Compare the names in an adapter's file with what the wrapped model needs: peft itself tolerates gaps."""
    file = folder / _WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} is not an adapter folder: {_WEIGHTS_NAME} is missing")
    found = set(_stored(file))
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    needed |= {name for name, _ in model.named_parameters() if part_of(name) == "image_newline"}
    if missing := sorted(needed - found):
        raise ValueError(f"{file} lacks {len(missing)} of {len(needed)} weights, the first is {missing[0]}")
    if unexpected := sorted(found - needed):
        raise ValueError(
            f"{file} holds {len(unexpected)} weights that this adapter does not have, the first is {unexpected[0]}: "
            "the options of LoRA or the base model are others than those of the run"
        )


def _check_targets(model: PreTrainedModel, target_modules: str) -> None:
    names = [name for name, _ in model.named_modules() if re.fullmatch(target_modules, name)]
    if not names:
        raise ValueError(
            f"lora_target_modules={target_modules!r} matches no module of {type(model).__name__}: names look like "
            f"{next(name for name, module in model.named_modules() if _is_target(name, module))!r}"
        )
    for name in names:
        if not _is_target(name, model.get_submodule(name)):
            raise ValueError(
                f"lora_target_modules={target_modules!r} matches {name!r}, which is not a linear layer inside the "
                "language model: make the expression narrower"
            )


def _is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and part_of(f"{name}.") == "language_model" and not name.endswith("lm_head")


def _base_of(adapter: Path) -> Path:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{adapter} is not an adapter folder: adapter_config.json is missing")
    base = read_object(file).get("base_model_name_or_path")
    if not base or not isinstance(base, str) or "\0" in base:
        raise ValueError(f"{file} names no base model: name it with --base")
    return Path(base)
