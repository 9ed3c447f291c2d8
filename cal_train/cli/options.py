"""YAML file and command line -> dataclasses of options. Unknown keys are errors that suggest the nearest name."""

import dataclasses
import difflib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from cal_train.train.yaml_files import load_yaml, read_mapping

NEEDS_GPU = ("bf16", "fp16", "tf32", "deepspeed", "fsdp")
"""Options that `TrainingArguments` refuses on a machine without a GPU."""


@dataclass(frozen=True)
class OptionSet:
    """The options of one kind of recipe.

    Attributes:
        verb: The command that takes the recipe, for messages.
        groups: Dataclasses; the last one is Hugging Face's training arguments.
        required: Names without which there is no run.
        structured: Names whose value is a mapping or a list of mappings, for which the parser has no type: they are
            set as they are.
        aliases: Other names -> ours.
        elsewhere: Options of another verb -> what to say to someone who brings them here.
    """

    verb: str
    groups: tuple[type, ...]
    required: tuple[str, ...]
    structured: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, dataclasses.Field]:
        """Return all options by name."""
        return {f.name: f for group in self.groups for f in dataclasses.fields(group) if f.init}


def load_groups(
    options: OptionSet, path: str | Path, overrides: Sequence[str] = (), will_train: bool = True
) -> tuple[Any, ...]:
    """Return one filled dataclass per group from a YAML file with ``--key value`` overrides applied.

    With ``will_train=False`` options that need a GPU are left out, so that a recipe for a cluster can be looked at
    anywhere.

    Raises:
        ValueError: If the file is not a mapping, a key is unknown (the nearest name is suggested), or a value does not
            fit its type.
    """
    values = read_yaml(options, path) | parse_overrides(options, overrides)
    if not will_train:
        values = {name: value for name, value in values.items() if name not in NEEDS_GPU} | {"use_cpu": True}
    return build_groups(options, values, origin=str(path))


def read_yaml(options: OptionSet, path: str | Path) -> dict[str, Any]:
    """Return the keys of a recipe file under their own names."""
    if not Path(path).is_file():
        raise ValueError(f"no recipe at {path}")
    values = read_mapping(Path(path))
    return {canonical_name(options, str(key), str(path)): value for key, value in values.items()}


def parse_overrides(options: OptionSet, arguments: Sequence[str]) -> dict[str, Any]:
    """Return ``--key value``, ``--key=value`` and bare ``--flag`` arguments as a dict of options."""
    values: dict[str, Any] = {}
    pending = list(arguments)
    fields = options.fields
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --key value on the command line, got {argument!r}")
        key, has_value, value = argument[2:].partition("=")
        name = canonical_name(options, key.replace("-", "_"), "the command line")
        if not has_value:
            value = pending.pop(0) if pending and not pending[0].startswith("--") else "true"
        if value == "true" and not has_value and "bool" not in str(fields[name].type):
            raise ValueError(f"--{key} needs a value")
        values[name] = _structured(key, value) if value[:1] in ("[", "{") or value in ("null", "none") else value
    return values


def _structured(key: str, value: str) -> Any:
    try:
        return load_yaml(value)
    except ValueError as error:
        raise ValueError(f"--{key} {value} is not a list or mapping in YAML's notation: {error}") from None


def canonical_name(options: OptionSet, name: str, origin: str) -> str:
    """Return the option's own name; raise ``ValueError`` with the nearest names if there is none."""
    name = options.aliases.get(name, name)
    fields = options.fields
    if name in options.elsewhere:
        raise ValueError(f"option {name!r} in {origin}: {options.elsewhere[name]}")
    if name not in fields:
        near = difflib.get_close_matches(name, [*fields, *options.aliases], n=3)
        help_line = f"see `cal-train {options.verb} --help` for all options"
        hint = f"did you mean {' or '.join(near)}?" if near else help_line
        raise ValueError(f"unknown option {name!r} in {origin}: {hint}")
    return name


def build_groups(options: OptionSet, values: dict[str, Any], origin: str) -> tuple[Any, ...]:
    """Return the filled groups; text is converted to the type of its field (``2e-5`` is text in YAML 1.1)."""
    for name in options.required:
        if not values.get(name):
            raise ValueError(f"{origin} does not set {name}")
    values = dict(values)
    structured = {name: values.pop(name) for name in options.structured if name in values}
    command_line = []
    for name, value in values.items():
        if value is None or value == []:  # the parser wants at least one entry of a list
            continue
        if isinstance(value, list):
            command_line += [f"--{name}", *map(str, value)]
        else:  # in one piece: a value such as -1e-2 would be taken for an option
            command_line.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    groups: Any = options.groups  # the parser's annotation is a NewType that no class belongs to
    parser = HfArgumentParser(groups, allow_abbrev=False)
    parser.error = lambda message: _refuse(origin, message)
    try:
        filled = parser.parse_args_into_dataclasses(args=command_line, look_for_args_file=False)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # by Hugging Face's own checks
        raise ValueError(f"{origin}: {error}") from error
    for group in filled:
        for name in structured.keys() & {f.name for f in dataclasses.fields(group)}:
            object.__setattr__(group, name, structured[name])  # checked where the value is used
    return filled


def _refuse(origin: str, message: str) -> NoReturn:
    raise ValueError(f"{origin}: {message}")


def say_how_to_resume(verb: str, recipe: str, arguments: Sequence[str]) -> None:
    """Print the command that goes on with a stopped run, as it was typed but for where it starts."""
    kept, pending = [], list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument.partition("=")[0].replace("-", "_") != "__resume_from_checkpoint":
            kept.append(argument)
        elif "=" not in argument and pending and not pending[0].startswith("--"):
            pending.pop(0)
    command = shlex.join(["cal-train", verb, recipe, *kept, "--resume_from_checkpoint", "latest"])
    print(f"resume (under the launcher of this run, if any): {command}", file=sys.stderr)


def describe_options(options: OptionSet) -> str:
    """Return one line per option of ours: name, default and help; Hugging Face's are only counted."""
    lines = []
    for group in options.groups[:-1]:
        lines.append(f"\n{group.__name__}: {(group.__doc__ or '').splitlines()[0]}")
        for f in dataclasses.fields(group):
            has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            default = f.default if f.default is not dataclasses.MISSING else "{}" if has_default else "required"
            lines.append(f"  --{f.name} ({default})  {f.metadata.get('help', '')}")
    lines.append("\nand every option of transformers.TrainingArguments (learning_rate, max_steps, save_steps, ...).")
    return "\n".join(lines)
