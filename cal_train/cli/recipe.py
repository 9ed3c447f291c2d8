"""YAML recipe and command line -> `Recipe`. Unknown keys are errors that suggest the nearest name."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from cal_train.conf import CalArguments, DataArguments, ModelArguments, Recipe, VlmTrainingArguments

GROUPS = (ModelArguments, DataArguments, CalArguments, VlmTrainingArguments)
FIELDS = {f.name: f for group in GROUPS for f in dataclasses.fields(group) if f.init}
ALIASES = {
    "mm_vision_tower_lr": "vision_tower_lr",
    "version": "template",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""LLaVA's names and names of older transformers -> ours."""


NEEDS_GPU = ("bf16", "fp16", "tf32", "deepspeed", "fsdp")
"""Options that `TrainingArguments` refuses on a machine without a GPU."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), will_train: bool = True) -> Recipe:
    """Return the recipe of a YAML file with ``--key value`` overrides applied.

    Data paths of the file are relative to the current directory. ``--cal`` alone turns CAL on. With
    ``will_train=False`` options that need a GPU are left out, so that a recipe for a cluster can be looked at anywhere.

    Raises:
        ValueError: If the file is not a mapping, a key is unknown (the nearest name is suggested), or a value does not
            fit its type.
    """
    values = read_yaml(path) | parse_overrides(overrides)
    if not will_train:
        values = {name: value for name, value in values.items() if name not in NEEDS_GPU} | {"use_cpu": True}
    return build_recipe(values, origin=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the keys of a recipe file under their own names."""
    if not Path(path).is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of option names to values, not a {type(values).__name__}")
    return {canonical_name(str(key), str(path)): value for key, value in values.items()}


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return ``--key value``, ``--key=value`` and bare ``--flag`` arguments as a dict of options."""
    values: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --key value on the command line, got {argument!r}")
        key, has_value, value = argument[2:].partition("=")
        name = canonical_name(key.replace("-", "_"), "the command line")
        if not has_value:
            value = pending.pop(0) if pending and not pending[0].startswith("--") else "true"
        if value == "true" and not has_value and "bool" not in str(FIELDS[name].type):
            raise ValueError(f"--{key} needs a value")
        values[name] = yaml.safe_load(value) if value[:1] in "[{" or value in ("null", "none") else value
    return values


def canonical_name(name: str, origin: str) -> str:
    """Return the option's own name; raise ``ValueError`` with the nearest names if there is none."""
    name = ALIASES.get(name, name)
    if name not in FIELDS:
        near = difflib.get_close_matches(name, [*FIELDS, *ALIASES], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `cal-train train --help` for all options"
        raise ValueError(f"unknown option {name!r} in {origin}: {hint}")
    return name


def build_recipe(values: dict[str, Any], origin: str) -> Recipe:
    """Return the typed recipe; text is converted to the type of its field (``2e-5`` is text in YAML 1.1)."""
    for name in ("model_name_or_path", "output_dir"):
        if not values.get(name):
            raise ValueError(f"{origin} does not set {name}")
    sources = values.pop("data", None)
    command_line = []
    for name, value in values.items():
        if value is None:
            continue
        text = json.dumps(value) if isinstance(value, dict) else value
        command_line += [f"--{name}", *map(str, text if isinstance(text, list) else [text])]
    groups: Any = GROUPS  # the parser's annotation is a NewType that no class belongs to
    parser = HfArgumentParser(groups, allow_abbrev=False)
    parser.error = lambda message: _refuse(origin, message)
    model, data, cal, training = parser.parse_args_into_dataclasses(args=command_line, look_for_args_file=False)
    data.data = sources  # a list of mappings, which the parser has no type for; checked where the files are opened
    return Recipe(model, data, cal, training)


def _refuse(origin: str, message: str) -> NoReturn:
    raise ValueError(f"{origin}: {message}")


def processor_options(recipe: Recipe) -> tuple[str, str, Literal["pad", "square"] | None]:
    """Return what `cal_train.data.processor.load_processor` needs of a recipe."""
    return recipe.model.model_name_or_path, recipe.data.template, recipe.model.image_aspect_ratio


def describe_options() -> str:
    """Return one line per option of ours: name, default and help; Hugging Face's are only counted."""
    lines = []
    for group in GROUPS[:-1]:
        lines.append(f"\n{group.__name__}: {(group.__doc__ or '').splitlines()[0]}")
        for f in dataclasses.fields(group):
            default = "required" if f.default is dataclasses.MISSING else f.default
            lines.append(f"  --{f.name} ({default})  {f.metadata.get('help', '')}")
    lines.append("\nand every option of transformers.TrainingArguments (learning_rate, max_steps, save_steps, ...).")
    return "\n".join(lines)
