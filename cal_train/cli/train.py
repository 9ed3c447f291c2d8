"""Verb ``train``: a recipe becomes a run folder."""

import argparse

from cal_train.cli.recipe import describe_options, load_recipe
from cal_train.train.run import train

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe; every option of it can follow as ``--key value``."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value, --cal turns CAL on")
    parser.epilog = "options of a recipe:\n" + describe_options()


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what to run next."""
    train(load_recipe(arguments.recipe, arguments.options))
    return 0
