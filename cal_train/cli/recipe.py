"""YAML recipe and command line of a VLM run -> `Recipe`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cal_train.cli.options import OptionSet, load_groups
from cal_train.cli.options import describe_options as describe
from cal_train.conf import CalArguments, DataArguments, ModelArguments, Recipe, VlmTrainingArguments

ALIASES = {
    "mm_vision_tower_lr": "vision_tower_lr",
    "version": "template",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""LLaVA's names and names of older transformers -> ours."""

OPTIONS = OptionSet(
    verb="train",
    groups=(ModelArguments, DataArguments, CalArguments, VlmTrainingArguments),
    required=("model_name_or_path", "output_dir"),
    structured=("data",),
    aliases=ALIASES,
    elsewhere={"objective": "this is the recipe of a vision tower, run it with `cal-train tower`"},
)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), will_train: bool = True) -> Recipe:
    """Return the recipe of a YAML file with ``--key value`` overrides applied.

    Data paths of the file are relative to the current directory. ``--cal`` alone turns CAL on. With
    ``will_train=False`` options that need a GPU are left out, so that a recipe for a cluster can be looked at anywhere.

    Raises:
        ValueError: If the file is not a mapping, a key is unknown (the nearest name is suggested), or a value does not
            fit its type.
    """
    return Recipe(*load_groups(OPTIONS, path, overrides, will_train))


def processor_options(recipe: Recipe) -> tuple[str, str, Literal["pad", "square", "anyres"] | None]:
    """Return what `cal_train.data.processor.load_processor` needs of a recipe."""
    return recipe.model.model_name_or_path, recipe.data.template, recipe.model.image_aspect_ratio


def describe_options() -> str:
    """Return one line per option of ours: name, default and help; Hugging Face's are only counted."""
    return describe(OPTIONS)
