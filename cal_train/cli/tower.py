"""Verb ``tower``: pretrain an image and a text tower by a recipe."""

import argparse

from cal_train.cli.options import describe_options
from cal_train.cli.tower_recipe import OPTIONS, load_tower_recipe
from cal_train.evals.during_training import evaluation_of
from cal_train.train.tower_run import train_towers

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe; every option of it can follow as ``--key value``."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value")
    parser.epilog = "options of a recipe:\n" + describe_options(OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what to run next."""
    recipe = load_tower_recipe(arguments.recipe, arguments.options)
    train_towers(recipe, evaluation_of(recipe))
    return 0
