"""Verb ``train``: a recipe becomes a run folder."""

import argparse
import os
from collections.abc import Mapping

from cal_train.cli.options import say_how_to_resume
from cal_train.cli.recipe import describe_options, load_recipe
from cal_train.evals.lmms.checkpoints import evaluation_of
from cal_train.train.engines import asked_by
from cal_train.train.run import train
from cal_train.train.signals import StoppedBySignal

TAKES_OPTIONS = True

OF_LAUNCHERS = (
    "ACCELERATE_", "FSDP_", "GROUP_", "LOCAL_", "MASTER_", "OMPI_", "PARALLELISM_CONFIG_", "PMI_", "RANK", "ROLE_",
    "TORCHELASTIC_", "WORLD_SIZE",
)  # fmt: skip
"""Beginnings of the variables by which a launcher tells a process that it is one of several."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe; every option of it can follow as ``--key value``."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value, --cal turns CAL on")
    parser.epilog = "options of a recipe:\n" + describe_options()


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what to run next; a run that a signal stopped ends with 128 + its number."""
    asked = asked_by(os.environ)
    recipe = load_recipe(arguments.recipe, arguments.options)
    evaluate_checkpoint = evaluation_of(recipe, alone(os.environ))
    try:
        train(recipe, asked, evaluate_checkpoint)
    except StoppedBySignal as stopped:
        if stopped.is_main_process:
            say_how_to_resume("train", arguments.recipe, arguments.options)
        raise
    return 0


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process that is no rank of this run."""
    kept = {name: value for name, value in environment.items() if not name.startswith(OF_LAUNCHERS)}
    return kept | {name: environment[name] for name in ("ACCELERATE_USE_CPU",) if name in environment}
