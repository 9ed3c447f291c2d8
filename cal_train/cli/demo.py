"""Verb ``demo``: train and compare a small real VLM with and without CAL."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cal_train.demo.run import demo_plan, long_plan, run_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--long", action="store_true", help="SmolLM2-135M and three seeds: hours on two cores")
    parser.add_argument("--recipes", type=Path, help="folder of pretrain.yaml and finetune.yaml (default: recipes/...)")
    parser.add_argument(
        "--vision_tower",
        type=Path,
        metavar="DIR",
        help="a tower of export_tower (or any that compose takes) instead of the demo's own; results go to a folder of "
        "their own",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; everything lands in .cache/ and runs/ of the current directory."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cal_train").setLevel(logging.INFO)
    recipes = arguments.recipes or Path("recipes/demo_long" if arguments.long else "recipes/demo")
    if not (recipes / "finetune.yaml").is_file():
        raise ValueError(f"no recipes in {recipes}: run from the root of the repository, or name them with --recipes")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width of its own
    plan = long_plan(recipes) if arguments.long else demo_plan(recipes)
    if arguments.vision_tower is not None:
        tower = arguments.vision_tower
        if not (tower / "model.safetensors").is_file():
            raise ValueError(f"vision tower {tower} has no model.safetensors: give a folder of cal-train export_tower")
        plan = replace(plan, vision_tower=tower, runs=plan.runs.with_name(f"{plan.runs.name}-{tower.name}"))
    run_demo(plan, console)
    return 0
