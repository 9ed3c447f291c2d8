"""YAML recipe and command line of a VLM run -> `Recipe`."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, ProcessorMixin

from cal_train.cli.options import OptionSet, load_groups
from cal_train.cli.options import describe_options as describe
from cal_train.conf import CalArguments, DataArguments, ModelArguments, Recipe, VlmTrainingArguments
from cal_train.data.processor import load_processor
from cal_train.folders import from_folder
from cal_train.models.mgm_hd import for_grid, with_grid

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


def recipe_processor(recipe: Recipe) -> ProcessorMixin:
    """Return the processor that a run of the recipe would have.

    Raises:
        ValueError: As `cal_train.data.processor.load_processor` and `cal_train.models.mgm_hd.with_grid`.
    """
    options, folder = recipe.model, recipe.model.model_name_or_path
    processor = load_processor(folder, recipe.data.template, options.image_aspect_ratio)
    if options.image_grid is None:
        return processor
    return for_grid(with_grid(from_folder(AutoConfig, folder), options.image_grid, folder), processor)


def describe_options() -> str:
    """Return one line per option of ours: name, default and help; Hugging Face's are only counted."""
    return describe(OPTIONS)
