"""Verb ``train``: a recipe becomes a run folder."""

import argparse
import os

from cal_train.cli.options import say_how_to_resume
from cal_train.cli.recipe import describe_options, load_recipe
from cal_train.train.engines import asked_by
from cal_train.train.run import train
from cal_train.train.signals import StoppedBySignal

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe; every option of it can follow as ``--key value``."""
    parser.add_argument("recipe", help="YAML file; any option of it can follow as --key value, --cal turns CAL on")
    parser.epilog = "options of a recipe:\n" + describe_options()


def run(arguments: argparse.Namespace) -> int:
    """Train, save, and say what to run next; a run that a signal stopped ends with 128 + its number."""
    asked = asked_by(os.environ)
    try:
        train(load_recipe(arguments.recipe, arguments.options), asked)
    except StoppedBySignal as stopped:
        if stopped.is_main_process:
            say_how_to_resume("train", arguments.recipe, arguments.options)
        raise
    return 0
