"""LoRA on the language model, with the projector inside the adapter, and merging an adapter into a plain checkpoint.

The original LLaVA keeps a LoRA run's projector in a side file that is written only at the very end. Here the projector
is one of peft's ``modules_to_save``: every saved adapter is complete and can be resumed, merged and moved on its own.
"""

import json
import re
import shutil
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel

from cal_train.conf import LORA_TARGETS
from cal_train.models.parts import part_of

PROJECTOR = "multi_modal_projector"


def add_lora(
    model: PreTrainedModel, r: int, alpha: int, dropout: float, target_modules: str = LORA_TARGETS
) -> PeftModel:
    """Return the model behind peft, with LoRA on linear layers of the language model and a trained projector.

    Args:
        model: The VLM; a quantised language model is fine. Its ``name_or_path`` is remembered for `merge`.
        r: Rank.
        alpha: Scale; the update is multiplied by ``alpha / r``.
        dropout: Dropout in front of the LoRA matrices.
        target_modules: Regular expression that a module's full name must match.

    Raises:
        ValueError: If the expression matches nothing, or anything outside the language model.
    """
    _check_targets(model, target_modules)
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, modules_to_save=[PROJECTOR]
    )
    return get_peft_model(model, config)


def merge(adapter: Path, output: Path, base: Path | None = None) -> Path:
    """Fold an adapter into its base model and save a plain checkpoint folder with processor and chat template.

    Args:
        adapter: Folder of the adapter. A processor or generation configuration in it wins over the base model's.
        output: Folder to write; it must not exist or be empty.
        base: Folder of the base model. Default: the one that the adapter names.

    Returns:
        The output folder.

    Raises:
        ValueError: If a folder is not what it should be, or the output folder is not empty.
    """
    adapter, output = Path(adapter), Path(output)
    base = _base_of(adapter) if base is None else Path(base)
    if not (base / "config.json").is_file():
        raise ValueError(f"base model {base} of adapter {adapter} is not a model folder: name it with --base")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    for source in (adapter, base):
        if (source / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(source)
            break
    processor = AutoProcessor.from_pretrained(
        adapter if (adapter / "processor_config.json").is_file() else base, backend="pil"
    )
    try:
        merged.save_pretrained(output)
        processor.save_pretrained(output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a checkpoint must not look like one
        raise
    return output


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
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} names no base model: name it with --base")
    return Path(base)
