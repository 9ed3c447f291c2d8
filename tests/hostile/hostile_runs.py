"""What runs leave behind, spoiled: adapters, checkpoints to resume, score files, and original folders to convert.

Each maps a name to ``spoil(folder, outside)``; the unspoiled folder works, the spoiled one must be refused.
"""

import os
import pickle
import struct
from pathlib import Path

import torch
from hostile_folders import field, link, pipe, text
from hostile_recipes import laughs


class Touch:
    """What a pickle that runs code holds: loading it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def pickled(name):
    """Replace a file by a pickle that runs code."""
    return lambda folder, outside: (folder / name).write_bytes(pickle.dumps(Touch(folder / "canary")))


def torch_pickled(name):
    """Replace a file by one of torch.save that runs code."""
    return lambda folder, outside: torch.save({"state": Touch(folder / "canary")}, folder / name)


def saved(name, content):
    """Replace a file by one of torch.save."""
    return lambda folder, outside: torch.save(content, folder / name)


def cut(name, num_bytes=20):
    """Cut a file off."""
    return lambda folder, outside: os.truncate(folder / name, num_bytes)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

ADAPTERS = {
    "config: empty": text(CONFIG, ""),
    "config: list": text(CONFIG, "[]"),
    "config: nested": text(CONFIG, '{"a":' * 100_000),
    "config: link outside": link(CONFIG, "adapter_config.json"),
    "config: pipe": pipe(CONFIG),
    "config: other kind": field(CONFIG, "peft_type", value="IA3"),
    "config: kind of a list": field(CONFIG, "peft_type", value=["LORA"]),
    "config: rank of a billion": field(CONFIG, "r", value=10**9),
    "config: rank of text": field(CONFIG, "r", value="4"),
    "config: rank 0": field(CONFIG, "r", value=0),
    "config: another rank": field(CONFIG, "r", value=5),
    "config: base of a number": field(CONFIG, "base_model_name_or_path", value=7),
    "config: base with nul": field(CONFIG, "base_model_name_or_path", value="a\0b"),
    "config: base of a device": field(CONFIG, "base_model_name_or_path", value="/dev/zero"),
    "config: targets are no expression": field(CONFIG, "target_modules", value="("),
    "config: targets are a number": field(CONFIG, "target_modules", value=7),
    "config: layers repeated": field(CONFIG, "layer_replication", value=[[0, 10**9]]),
    "config: imports a module": field(CONFIG, "megatron_config", value={"a": 1}),
    "weights: empty": text(WEIGHTS, ""),
    "weights: cut": cut(WEIGHTS, 500),
    "weights: header of 2^60": text(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
    "weights: pipe": pipe(WEIGHTS),
    "weights: link outside": link(WEIGHTS, "model.safetensors"),
    "weights: missing": lambda folder, outside: (folder / WEIGHTS).unlink(),
}

CHECKPOINTS = {
    "optimizer: pickle": pickled("optimizer.pt"),
    "optimizer: torch pickle": torch_pickled("optimizer.pt"),
    "optimizer: cut": cut("optimizer.pt"),
    "optimizer: list": saved("optimizer.pt", [1, 2]),
    "optimizer: other groups": saved("optimizer.pt", {"state": {}, "param_groups": []}),
    "schedule: torch pickle": torch_pickled("scheduler.pt"),
    "schedule: number": saved("scheduler.pt", 7),
    "random state: pickle": pickled("rng_state.pth"),
    "random state: torch pickle": torch_pickled("rng_state.pth"),
    "random state: empty": saved("rng_state.pth", {}),
    "random state: lies": saved("rng_state.pth", {"python": 1, "numpy": 2, "cpu": 3}),
    "state: empty": text("trainer_state.json", ""),
    "state: list": text("trainer_state.json", "[]"),
    "state: nested": text("trainer_state.json", "[" * 100_000),
    "state: unknown field": field("trainer_state.json", "canary", value=1),
    "state: step of text": field("trainer_state.json", "global_step", value="many"),
    "state: step of another": field("trainer_state.json", "global_step", value=10**12),
    "state: negative step": field("trainer_state.json", "global_step", value=-1),
    "state: endless epoch": field("trainer_state.json", "epoch", value=float("inf")),
    "state: log of text": field("trainer_state.json", "log_history", value="none"),
    "stream: list": text("stream.json", "[]"),
    "stream: nested": text("stream.json", "[" * 100_000),
    "stream: not utf-8": text("stream.json", b"\xff"),
    "stream: position of text": field("stream.json", "position", value="x"),
    "stream: negative position": field("stream.json", "position", value=-5),
    "stream: endless epoch": field("stream.json", "epoch", value=float("inf")),
    "marker: list": text("complete.json", "[]"),
    "marker: nested": text("complete.json", "[" * 100_000),
    "weights: cut": cut("model.safetensors", 50_000),
    "weights: empty": text("model.safetensors", ""),
    "weights: link outside": link("model.safetensors", "model.safetensors"),
    "marker: file with a long name": field("complete.json", "files", value={"a" * 5000: 1}),
    "marker: file of text": field("complete.json", "files", value="all"),
    "marker: file outside": field("complete.json", "files", value={"../../outside/secret.txt": 1}),
    "recipe: list": text("recipe.yaml", "- a\n"),
    "recipe: not yaml": text("recipe.yaml", "a: [1"),
    "recipe: not utf-8": text("recipe.yaml", b"a: \xff"),
    "recipe: nested": text("recipe.yaml", "a: " + "[" * 100_000),
    "recipe: billion laughs": text("recipe.yaml", laughs(10, "learning_rate")),
    "recipe: python object": text("recipe.yaml", "seed: !!python/object/apply:os.system [touch canary]\n"),
    "recipe: batch of text": text("recipe.yaml", "per_device_train_batch_size: many\n"),
    "recipe: link outside": link("recipe.yaml", "secret.txt"),
    "facts: list": text("environment.json", "[]"),
    "facts: nested": text("environment.json", "[" * 100_000),
    "facts: files of text": field("environment.json", "data_files", value="all"),
    "facts: link outside": link("environment.json", "secret.json"),
    "pointer: outside": text("latest", "../outside"),
    "pointer: not utf-8": text("latest", b"\xff/\xfe"),
}

NOTE = "scores.jsonl.about.json"

SCORES = {
    "empty": text("scores.jsonl", ""),
    "text": text("scores.jsonl", "hello\n"),
    "nested": text("scores.jsonl", "[" * 100_000),
    "numbers": text("scores.jsonl", "7\n7\n"),
    "cut": cut("scores.jsonl", 300),
    "row of another": text("scores.jsonl", '{"id": "x", "row": 99, "input_ids": []}\n'),
    "negative row": text("scores.jsonl", '{"row": -1, "id": "x", "input_ids": []}\n'),
    "pipe": pipe("scores.jsonl"),
    "folder": lambda folder, outside: ((folder / "scores.jsonl").unlink(), (folder / "scores.jsonl").mkdir()),
    "note: missing": lambda folder, outside: (folder / NOTE).unlink(),
    "note: list": text(NOTE, "[]"),
    "note: nested": text(NOTE, "[" * 100_000),
    "note: left out of text": field(NOTE, "left_out", value="all"),
    "note: left out rows that are not there": field(NOTE, "left_out", value=[-1, 10**9]),
    "note: of other data": field(NOTE, "data_sha256", value="0" * 64),
    "note: weighting of text": field(NOTE, "weighting", value="x"),
}

ORIGINALS = {
    "config: nested": text("config.json", '{"a":' * 100_000),
    "config: list": text("config.json", "[]"),
    "config: link outside": link("config.json", "config.json"),
    "config: pipe": pipe("config.json"),
    "config: unknown model": field("config.json", "model_type", value="canary"),
    "config: model of a list": field("config.json", "model_type", value=["llava"]),
    "config: unknown projector": field("config.json", "mm_projector_type", value="canary"),
    "config: projector of a list": field("config.json", "mm_projector_type", value=[]),
    "config: layer of text": field("config.json", "mm_vision_select_layer", value="x"),
    "config: feature of a list": field("config.json", "mm_vision_select_feature", value=[]),
    "config: a billion layers": field("config.json", "num_hidden_layers", value=10**9),
    "config: width of text": field("config.json", "hidden_size", value="x"),
    "config: no heads": field("config.json", "num_attention_heads", value=0),
    "config: another width": field("config.json", "hidden_size", value=64),
    "weights: pickle": lambda folder, outside: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").unlink(),
        pickled("pytorch_model.bin")(folder, outside),
    ),
    "weights: torch pickle": lambda folder, outside: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").unlink(),
        torch_pickled("pytorch_model.bin")(folder, outside),
    ),
    "weights: cut": cut("model.safetensors", 50_000),
    "weights: link outside": link("model.safetensors", "model.safetensors"),
    "index: parent": text("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
    "index: number": text("model.safetensors.index.json", '{"weight_map": {"a": 7}}'),
    "index: list": text("model.safetensors.index.json", '{"weight_map": {"a": []}}'),
    "index: nul": text("model.safetensors.index.json", '{"weight_map": {"a": "a\\u0000b"}}'),
    "index: nested": text("model.safetensors.index.json", "[" * 100_000),
    "adapter of a number": text("adapter_config.json", "7"),
    "adapter without its side file": text("adapter_config.json", "{}"),
    "tokenizer: nested": text("tokenizer.json", '{"a":' * 100_000),
    "tokenizer: pipe": pipe("tokenizer.json"),
}
