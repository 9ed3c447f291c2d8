"""Hugging Face folders -> the same folder with canonical names, or the layout of the original repositories.

Peak memory: about one shard, as in `cal_train.models.convert.from_original`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from cal_train.folders import from_folder
from cal_train.models.convert.from_original import drop_tied_head, empty_model, weights_of
from cal_train.models.convert.keys import (
    EMBEDDING,
    HEAD,
    check_state,
    disk_rules,
    original_rules,
    rename,
    rename_disk,
    turned,
)
from cal_train.models.convert.projector import remove_identities
from cal_train.models.convert.reading import read_json, read_weights, side_files
from cal_train.models.convert.report import REPORT_FILE, Report, added_before
from cal_train.models.convert.settings import original_config
from cal_train.models.convert.tokenizer_files import write_tokenizer_files
from cal_train.models.convert.towers import known_name
from cal_train.models.convert.writing import folder_aside, in_dtype, write_weights
from cal_train.models.layout import PARTS_OF

_INDEX = "model.safetensors.index.json"
_HF_ONLY = {
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    REPORT_FILE,
}
"""Files that the original repositories have no use for, or that are written anew."""


def to_canonical(source: Path, output: Path, dtype: str) -> Report:
    """Write a Hugging Face folder again under canonical names; for errors see `cal_train.models.convert.run`."""
    config, tensors, origins, report = _read(source, "hf -> hf")
    rules = disk_rules(report.family, config.vision_config.model_type)
    renamed = rename(tensors, rules, str(source), origins=origins)
    report.moved = renamed.moved
    torch_dtype = tensors[EMBEDDING].dtype if dtype == "auto" else getattr(torch, dtype)
    state, report.num_converted = in_dtype(renamed.tensors, torch_dtype)
    raw = read_json(source / "config.json")
    earlier = added_before(source)
    report.added_rows = earlier.get("added_rows", 0)  # so that the way back to the original layout stays open
    report.source_config, report.source_pad_token = earlier.get("source_config"), earlier.get("source_pad_token")
    with folder_aside(output) as folder:
        for path in side_files(source):
            shutil.copyfile(path, folder / path.name)
        if dtype != "auto":
            (folder / "config.json").write_text(json.dumps(_with_dtype(raw, dtype), indent=2) + "\n", encoding="utf-8")
        write_weights(folder, state)
        report.write(folder)
    return report


def to_original(source: Path, output: Path, tower_name: str | None, aux_name: str | None, dtype: str) -> Report:
    """Write a Hugging Face folder in the layout of its original repository.

    What `from_original` added (rows of new tokens, layers of a simpler projector) is taken away again, as its record in
    the folder says; a folder without that record keeps every row.
    """
    config, tensors, origins, report = _read(source, "hf -> original")
    earlier = added_before(source)
    original = earlier.get("source_config")
    projector_type = original["mm_projector_type"] if original and "mm_projector_type" in original else (
        "linear" if original else "mlp2x_gelu")  # fmt: skip
    removed = remove_identities(tensors, projector_type, str(source))
    report.dropped.update({(name, "an identity, which the original projector does not have"): 1 for name in removed})
    num_rows = _cut_rows(tensors, earlier.get("added_rows", 0), report)
    if any(entry["name"] == HEAD for entry in earlier.get("dropped", [])):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        origins[HEAD] = origins[EMBEDDING]
    flat = _flat_config(source, config, original, tower_name, aux_name)
    flat["vocab_size"] = num_rows
    torch_dtype = tensors[EMBEDDING].dtype if dtype == "auto" else getattr(torch, dtype)
    flat["torch_dtype"] = str(torch_dtype).removeprefix("torch.")
    rules = turned(original_rules(report.family, projector_type))
    renamed = rename(tensors, rules, str(source), origins=origins)
    report.moved = renamed.moved
    state, report.num_converted = in_dtype(renamed.tensors, torch_dtype)
    with folder_aside(output) as folder:
        (folder / "config.json").write_text(json.dumps(flat, indent=2) + "\n", encoding="utf-8")
        files = (path for path in side_files(source) if path.name not in _HF_ONLY)
        write_tokenizer_files(files, folder, num_rows, earlier.get("source_pad_token"))
        write_weights(folder, state)
        _write_index(folder, state)
        report.write(folder)
    return report


def _read(source: Path, direction: str) -> tuple[Any, dict[str, Tensor], dict[str, str], Report]:
    """Return configuration, weights by their names in memory, checked, the names' origins, and a new report."""
    family = read_json(source / "config.json").get("model_type")
    if not isinstance(family, str) or family not in PARTS_OF:
        raise ValueError(f"{source / 'config.json'}: model_type {family!r} is not one of {', '.join(PARTS_OF)}")
    config: Any = from_folder(AutoConfig, source)
    report = Report(direction, family)
    renamed = rename_disk(read_weights(source), str(source))
    tensors = renamed.tensors
    for name in [name for name in tensors if name.endswith(("embeddings.position_ids", "rotary_emb.inv_freq"))]:
        del tensors[name]
        report.dropped[name, "computed from the configuration"] += 1
    if config.tie_word_embeddings and drop_tied_head(tensors, str(source)):
        report.dropped[HEAD, "tied to the embedding"] += 1
    check_state(tensors, weights_of(empty_model(config, source)), str(source))
    return config, tensors, renamed.origins, report


def _cut_rows(tensors: dict[str, Tensor], num_added: int, report: Report) -> int:
    """Take the last rows off the embedding and the head, in place; return how many rows stay."""
    num_rows = len(tensors[EMBEDDING]) - num_added
    if num_added:
        for name in (EMBEDDING, HEAD):
            if name in tensors:
                tensors[name] = tensors[name][:num_rows]
        report.notes.append(f"{num_added} rows of the vocabulary that conversion had added are taken away")
    return num_rows


def _flat_config(
    source: Path, config: PreTrainedConfig, original: dict[str, Any] | None, tower: str | None, aux: str | None
) -> dict[str, Any]:
    """Return the original config.json: the recorded one if there is one, else one made from the model's."""
    names = {"mm_vision_tower": tower, "mm_vision_tower_aux": aux}
    if original is not None:
        return original | {name: value for name, value in names.items() if value is not None}
    ours: Any = config
    tower = tower or known_name(ours.vision_config)
    if tower is None or (config.model_type == "mgm" and aux is None):
        lacking = ["--vision_tower"] * (tower is None) + ["--aux_tower"] * (config.model_type == "mgm" and aux is None)
        option = " and ".join(lacking)
        raise ValueError(
            f"{source}: the original layout names its towers instead of describing them: give the folder or hub name "
            f"that config.json shall name with {option}"
        )
    return original_config(config, tower, aux, _aspect_ratio(source))


def _aspect_ratio(source: Path) -> str:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (source / name).is_file():
            raw = read_json(source / name)
            return "pad" if raw.get("image_processor", raw).get("do_pad") else "square"
    return "square"


def _with_dtype(raw: Any, dtype: str) -> Any:
    if not isinstance(raw, dict):
        return raw
    return {
        name: dtype if name in ("dtype", "torch_dtype") and value is not None else _with_dtype(value, dtype)
        for name, value in raw.items()
    }


def _write_index(folder: Path, state: dict[str, Tensor]) -> None:
    """Write an index for a single file too: MGM's original code looks its weights up there."""
    if not (folder / _INDEX).is_file():
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        weight_map = dict.fromkeys(sorted(state), "model.safetensors")
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
