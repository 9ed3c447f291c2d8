"""``cal-train preview RECIPE --rows N``: the tokens of the first rows, coloured by what they are for."""

import argparse
from pathlib import Path

from rich.console import Console

from cal_train.cli.recipe import load_recipe, recipe_processor
from cal_train.data.dataset import build_dataset
from cal_train.data.preview import preview_row, to_html, to_terminal

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (.yaml); any option of it can follow as --key value")
    parser.add_argument("--rows", type=int, default=4, help="how many rows, from the first (default 4)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page instead of the terminal output")


def run(args: argparse.Namespace) -> int:
    """Show the rows; return 0."""
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: give at least 1")
    recipe = load_recipe(args.recipe, args.options, will_train=False)
    dataset = build_dataset(recipe.data, recipe_processor(recipe))
    previews = [preview_row(dataset, i) for i in range(min(args.rows, len(dataset)))]
    if args.html:
        Path(args.html).write_text(to_html(previews), encoding="utf-8")
        Console().print(f"wrote {args.html}")
    else:
        Console().print(to_terminal(previews))
    return 0
