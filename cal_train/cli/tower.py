"""Verb ``tower``: pretrain an image and a text tower by a recipe."""

import argparse
import os

from cal_train.cli.options import describe_options, say_how_to_resume
from cal_train.cli.tower_recipe import OPTIONS, load_tower_recipe
from cal_train.evals.during_training import evaluation_of
from cal_train.train.engines import asked_by
from cal_train.train.signals import StoppedBySignal
from cal_train.train.tower_run import train_towers

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe; every option of it can follow as ``--key value``."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value")
    parser.epilog = "options of a recipe:\n" + describe_options(OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what to run next; a run that a signal stopped ends with 128 + its number."""
    asked = asked_by(os.environ)
    recipe = load_tower_recipe(arguments.recipe, arguments.options)
    try:
        train_towers(recipe, evaluation_of(recipe), asked)
    except StoppedBySignal as stopped:
        if stopped.is_main_process:
            say_how_to_resume("tower", arguments.recipe, arguments.options)
        raise
    return 0
