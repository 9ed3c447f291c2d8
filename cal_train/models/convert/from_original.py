"""Original checkpoint folders -> Hugging Face layout.

Peak memory: weights stay mapped to their files until they are written, shard by shard, so it is about one shard, the
grown embedding and head, and what changes dtype or has LoRA folded in.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from cal_train.models.aux_tower import aux_config, aux_state
from cal_train.models.convert.adapter import ADAPTER_CONFIG, SIDE_FILE, fold, read_side_file
from cal_train.models.convert.keys import (
    AUX_TOWER,
    DROPPED,
    EMBEDDING,
    HEAD,
    NEWLINE,
    TOWER,
    UNUSED_NEWLINE,
    check_state,
    disk_rules,
    original_rules,
    rename,
)
from cal_train.models.convert.projector import ACTIVATION, add_identities
from cal_train.models.convert.reading import has_weights, inside, read_json, read_weights
from cal_train.models.convert.report import Report
from cal_train.models.convert.settings import Settings, read_settings
from cal_train.models.convert.towers import VisionTower, vision_tower
from cal_train.models.convert.vocabulary import SENTENCEPIECE, find_template, find_tokenizer, grow_rows
from cal_train.models.convert.writing import folder_aside, in_dtype, write_weights
from cal_train.models.layout import build_config, build_processor
from cal_train.models.vocabulary import add_image_and_pad_token, stop_token_ids
from cal_train.types import IMAGE_MARK

PROJECTOR_FILE = "mm_projector.bin"


@dataclass(frozen=True)
class Parts:
    """Folders that a checkpoint may need beside its own."""

    base: Path | None = None
    vision_tower: Path | None = None
    aux_tower: Path | None = None


def from_original(
    source: Path, output: Path, parts: Parts, template: str | None, dtype: str, pad_vocabulary_to: int
) -> Report:
    """Write an original checkpoint in Hugging Face layout; arguments and errors: `cal_train.models.convert.run`."""
    raw = read_json(source / "config.json")
    settings = read_settings(raw, str(source / "config.json"))
    report = Report("original -> hf", settings.family, source_config=raw)
    tensors = _memory_state(_read_state(source, parts, report), settings, str(source), report)
    tower = _add_towers(tensors, settings, parts, str(source), report)
    report.added.update(dict.fromkeys(add_identities(tensors, settings.projector_type), "identity"))
    if settings.family == "llava_next" and NEWLINE not in tensors and _is_stage_one(source):
        _add_newline(tensors, report)

    tokenizer, chat_template, copied = _vocabulary(
        tensors, settings, source, parts, template, pad_vocabulary_to, report
    )
    torch_dtype = tensors[EMBEDDING].dtype if dtype == "auto" else getattr(torch, dtype)
    tensors, report.num_converted = in_dtype(tensors, torch_dtype)
    config = _config(settings, tower, tensors, tokenizer, torch_dtype)
    model = empty_model(config, source)
    config.architectures = [type(model).__name__]
    rules = original_rules(settings.family, settings.projector_type)
    check_state(tensors, weights_of(model), str(source), rules)
    processor = build_processor(settings.family, config, tower.image_processor, tokenizer, chat_template)
    _write(output, config, tensors, processor, copied, report)
    return report


def empty_model(config: PreTrainedConfig, source: Path) -> Any:
    """Return the model without memory for its weights.

    Raises:
        ValueError: If there is no model of these numbers; names the folder that they are from.
    """
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # of whatever kind the layer raises whose size is none
        raise ValueError(f"{source / 'config.json'} describes no model ({type(error).__name__}): {error}") from error


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return names and shapes of a model's weights; a head that is tied to the embedding is not one of them."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(HEAD)
    return state


def drop_tied_head(tensors: dict[str, Tensor], where: str) -> bool:
    """Remove a head that is the embedding, in place; return whether there was one.

    Raises:
        ValueError: If its values are others.
    """
    head = tensors.pop(HEAD, None)
    if head is not None and not torch.equal(head, tensors[EMBEDDING]):
        raise ValueError(
            f"{where}: config.json ties the output head to the embedding, but {HEAD} differs from it: set "
            "tie_word_embeddings to false there if the head is meant to be its own"
        )
    return head is not None


def _is_stage_one(source: Path) -> bool:
    return not (source / ADAPTER_CONFIG).is_file() and not has_weights(source)


def _read_state(source: Path, parts: Parts, report: Report) -> dict[str, Tensor]:
    """Return all weights by their original names: of a full folder, or of the base model under what was trained."""
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if not is_adapter and not _is_stage_one(source):
        return read_weights(source)
    side_file = SIDE_FILE if is_adapter else PROJECTOR_FILE
    if not (source / side_file).is_file():
        expected = f"{side_file} beside {ADAPTER_CONFIG}" if is_adapter else f"weights of a model, or {PROJECTOR_FILE}"
        raise ValueError(f"{source} has no {expected}")
    if parts.base is None:
        kind = "a LoRA adapter" if is_adapter else "the projector only"
        raise ValueError(f"{source} holds {kind}: name the folder of its language model with --base")
    state = read_weights(parts.base)
    report.notes.append(f"{len(state)} weights are those of {parts.base.name}")
    if is_adapter:
        state, num_folded = fold(source, state)
        report.notes.append(f"LoRA folded into {num_folded} weights")
    trained = read_side_file(inside(source, side_file))
    report.notes.append(f"{len(trained)} weights are those of {side_file}")
    return state | trained


def _memory_state(state: dict[str, Tensor], settings: Settings, where: str, report: Report) -> dict[str, Tensor]:
    dropped = DROPPED if settings.family == "llava_next" else (*DROPPED, UNUSED_NEWLINE)
    renamed = rename(state, original_rules(settings.family, settings.projector_type), where, dropped)
    report.moved, report.dropped = renamed.moved, renamed.dropped
    tensors = renamed.tensors
    if EMBEDDING not in tensors:
        raise ValueError(f"{where}: the checkpoint holds no language model (model.embed_tokens.weight)")
    if settings.text_config.tie_word_embeddings and drop_tied_head(tensors, where):
        report.dropped[HEAD, "tied to the embedding"] += 1
    return tensors


def _add_towers(
    tensors: dict[str, Tensor], settings: Settings, parts: Parts, where: str, report: Report
) -> VisionTower:
    """Add the weights of towers that the checkpoint only names, in place."""
    has_tower = any(name.startswith(TOWER) for name in tensors)
    aspect: Any = settings.image_aspect_ratio
    tower = vision_tower(parts.vision_tower, settings.tower_name, aspect, has_tower, where)
    tensors.update(tower.state)
    report.added.update(dict.fromkeys(tower.state, tower.source))
    if has_tower and parts.vision_tower is not None:
        report.notes.append("the vision tower's weights are those of the checkpoint, not of --vision_tower")
    if settings.family == "mgm" and not any(name.startswith(AUX_TOWER) for name in tensors):
        if parts.aux_tower is None:
            raise ValueError(
                f"{where} does not hold the weights of its second tower ({settings.aux_tower_name}): name the tower's "
                "folder with --aux_tower"
            )
        state = {f"{AUX_TOWER}{name}": value for name, value in aux_state(parts.aux_tower).items()}
        tensors.update(state)
        report.added.update(dict.fromkeys(state, parts.aux_tower.name))
    return tower


def _add_newline(tensors: dict[str, Tensor], report: Report) -> None:
    """Add the vector that ends a row of patches, as the original draws it: stage 1 neither trains nor saves it."""
    width, dtype = tensors[EMBEDDING].shape[1], tensors[EMBEDDING].dtype
    tensors[NEWLINE] = (torch.randn(width, generator=torch.Generator().manual_seed(0)) / math.sqrt(width)).to(dtype)
    report.added[NEWLINE] = "untrained: stage 1 does not save it"


def _vocabulary(
    tensors: dict[str, Tensor],
    settings: Settings,
    source: Path,
    parts: Parts,
    template: str | None,
    pad_vocabulary_to: int,
    report: Report,
) -> tuple[PreTrainedTokenizerBase, str, Path | None]:
    """Give new tokens their rows, in place; return tokenizer, chat template, and a file to copy along."""
    num_stored = len(tensors[EMBEDDING])
    if num_stored != settings.text_config.vocab_size:
        raise ValueError(
            f"{source}: the embedding has {num_stored} rows, vocab_size in config.json is "
            f"{settings.text_config.vocab_size}: is it the config.json of this checkpoint?"
        )
    tokenizer, folder = find_tokenizer([source, *([parts.base] if parts.base else [])])
    report.source_pad_token = tokenizer.special_tokens_map.get("pad_token")
    name, chat_template = find_template(tokenizer, settings.family, settings.text_config.model_type, template)
    report.notes.append(f"chat template: {name}{'' if template else ', by language model and tokenizer'}")
    add_image_and_pad_token(tokenizer, chat_template)
    tokenizer.chat_template = chat_template
    report.added_rows = grow_rows(tensors, len(tokenizer), pad_vocabulary_to)
    report.notes.append(f"vocabulary: {len(tokenizer)} tokens, {report.added_rows} rows added")
    copied = inside(folder, SENTENCEPIECE) if (folder / SENTENCEPIECE).is_file() else None
    return tokenizer, chat_template, copied


def _config(
    settings: Settings,
    tower: VisionTower,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> PreTrainedConfig:
    text_config: Any = settings.text_config
    text_config.vocab_size = len(tensors[EMBEDDING])
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.dtype = tower.config.dtype = dtype
    tower.config._name_or_path = ""
    aux = aux_config(tensors, AUX_TOWER) if settings.family == "mgm" else None
    options = {"projector_hidden_act": ACTIVATION[settings.projector_type], **settings.family_options}
    config: Any = build_config(
        settings.family,
        text_config,
        tower.config,
        tokenizer.get_vocab()[IMAGE_MARK],
        settings.layer,
        aux,
        **options,
    )
    if settings.select_strategy == "full":
        config.vision_feature_select_strategy = "full"
    return config


def _write(
    output: Path, config: Any, tensors: dict[str, Tensor], processor: Any, copied: Path | None, report: Report
) -> None:
    tokenizer = processor.tokenizer
    renamed = rename(tensors, disk_rules(report.family, config.vision_config.model_type), str(output))
    with folder_aside(output) as folder:
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=stop_token_ids(tokenizer, processor.chat_template),
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(folder)
        if copied is not None:
            shutil.copyfile(copied, folder / copied.name)
        write_weights(folder, renamed.tensors)
        report.write(folder)
