"""``cal-train preview RECIPE --rows N``: the tokens of the first rows, coloured by what they are for."""

import argparse
import itertools
from pathlib import Path

from rich.console import Console

from cal_train.cli.recipe import load_recipe, recipe_processor
from cal_train.data.dataset import build_dataset
from cal_train.data.examples import build_encoder
from cal_train.data.preview import preview_row, preview_sample, to_html, to_terminal
from cal_train.data.sample_stream import open_sources

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
    processor = recipe_processor(recipe)
    if recipe.data.streaming:
        encoder = build_encoder(recipe.data, processor)
        rows = itertools.chain.from_iterable(open_sources(recipe.data))
        previews = [preview_sample(row, encoder) for row in itertools.islice(rows, args.rows)]
    else:
        dataset = build_dataset(recipe.data, processor)
        previews = [preview_row(dataset, i) for i in range(min(args.rows, len(dataset)))]
    if args.html:
        Path(args.html).write_text(to_html(previews), encoding="utf-8")
        Console().print(f"wrote {args.html}")
    else:
        Console().print(to_terminal(previews))
    return 0
