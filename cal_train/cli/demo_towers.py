"""Verb ``demo_towers``: pretrain real towers by every method on the same budget, and compare them."""

import argparse
import logging
from pathlib import Path

from rich.console import Console

from cal_train.demo.towers import METHODS, TowerPlan, run_tower_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--recipes", type=Path, default=Path("recipes/demo/towers"), help="folder of NAME.yaml")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; everything lands in .cache/ and runs/ of the current directory."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cal_train").setLevel(logging.INFO)
    if missing := [name for name in arguments.methods if not (arguments.recipes / f"{name}.yaml").is_file()]:
        raise ValueError(
            f"no {missing[0]}.yaml in {arguments.recipes}: run from the root of the repository, or give --recipes"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width of its own
    run_tower_demo(
        TowerPlan(Path(".cache/demo"), Path("runs/demo_towers"), arguments.recipes, tuple(arguments.methods)), console
    )
    return 0
