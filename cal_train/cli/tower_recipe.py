"""YAML recipe and command line of a tower run -> `TowerRecipe`."""

from collections.abc import Sequence
from pathlib import Path

from cal_train.cli.options import OptionSet, load_groups
from cal_train.conf_towers import TowerArguments, TowerEvalArguments, TowerTrainingArguments
from cal_train.data.pairs import PairOptions
from cal_train.train.tower_run import TowerRecipe

ALIASES = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names of older transformers -> ours."""

OPTIONS = OptionSet(
    verb="tower",
    groups=(TowerArguments, PairOptions, TowerEvalArguments, TowerTrainingArguments),
    required=("objective", "output_dir"),
    structured=("data", "objective_options", "vision_tower", "text_tower"),
    aliases=ALIASES,
    elsewhere={
        "model_name_or_path": "this is the recipe of a VLM, run it with `cal-train train`",
        "cal": "CAL weights the answers of a VLM and has no part in training a tower",
    },
)


def load_tower_recipe(path: str | Path, overrides: Sequence[str] = (), will_train: bool = True) -> TowerRecipe:
    """Return the recipe of a YAML file with ``--key value`` overrides applied.

    A mapping on the command line (``--objective_options "{bias_init: auto}"``) replaces that of the file as a whole.

    Raises:
        ValueError: See `cal_train.cli.options.load_groups`.
    """
    return TowerRecipe(*load_groups(OPTIONS, path, overrides, will_train))
