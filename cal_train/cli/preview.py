"""``cal-train preview RECIPE --rows N``: the tokens of the first rows, coloured by what they are for.

With ``--cal`` the recipe's model scores the rows, and the supervised tokens are coloured by delta instead.
"""

import argparse
import itertools
from pathlib import Path

from rich.console import Console

from cal_train.cli.options import parse_overrides
from cal_train.cli.recipe import OPTIONS, load_recipe, recipe_processor
from cal_train.conf import Recipe
from cal_train.data.dataset import VlmDataset, build_dataset
from cal_train.data.examples import SampleEncoder, build_encoder
from cal_train.data.preview import preview_sample, to_html, to_terminal
from cal_train.data.sample_stream import open_sources
from cal_train.evals.terminal_map import score_rows, to_heat_map
from cal_train.train.run import weighting_of
from cal_train.types import BadSampleError, Problem, Sample

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe (.yaml); any option of it can follow as --key value")
    parser.add_argument("--rows", type=int, default=4, help="how many rows, from the first (default 4)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page instead of the terminal output")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="with --cal, whose deltas are shown, such as a trained one (default: the recipe's)",
    )


def run(args: argparse.Namespace) -> int:
    """Show the rows; return 0."""
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: give at least 1")
    wants_heat_map = str(parse_overrides(OPTIONS, args.options).get("cal", "false")).lower() == "true"
    if args.model and not wants_heat_map:
        raise ValueError("--model is for the deltas that --cal shows: add --cal")
    if args.html and wants_heat_map:
        raise ValueError("--html and --cal do not go together: for a page of deltas use cal-train score and report")
    model = ["--model_name_or_path", args.model] if args.model else []
    recipe = load_recipe(args.recipe, [*args.options, *model], will_train=False)
    rows, encoder = _first_rows(recipe, args.rows)
    if wants_heat_map:
        _show_heat_map(recipe, rows, encoder)
        return 0
    previews = [preview_sample(row, encoder) for row in rows]
    if args.html:
        Path(args.html).write_text(to_html(previews), encoding="utf-8")
        Console().print(f"wrote {args.html}")
    else:
        Console().print(to_terminal(previews))
    return 0


def _first_rows(recipe: Recipe, count: int) -> tuple[list[Sample | Problem], SampleEncoder]:
    """Return the first rows of a run, and what makes examples of them."""
    processor = recipe_processor(recipe)
    if recipe.data.streaming:
        rows = itertools.chain.from_iterable(open_sources(recipe.data))
        return list(itertools.islice(rows, count)), build_encoder(recipe.data, processor)
    dataset = build_dataset(recipe.data, processor)
    return [_row(dataset, i) for i in range(min(count, len(dataset)))], dataset.encoder


def _row(dataset: VlmDataset, i: int) -> Sample | Problem:
    try:
        return dataset.load_sample(i)
    except BadSampleError as error:
        return error.problem


def _show_heat_map(recipe: Recipe, rows: list[Sample | Problem], encoder: SampleEncoder) -> None:
    weighting = weighting_of(recipe.cal)
    assert weighting is not None  # --cal was given
    scored = score_rows(recipe.model.model_name_or_path, rows, encoder, weighting)
    console = Console()
    has_colours = console.is_terminal and not console.no_color
    console.print(to_heat_map(scored, weighting.low, weighting.high, has_colours))
