"""``cal-train check_data RECIPE_OR_JSON``: would every row train?"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cal_train.cli.recipe import load_recipe, recipe_processor
from cal_train.data.check import CheckReport, check_files, check_source
from cal_train.data.dataset import build_dataset, build_eval_dataset
from cal_train.data.examples import SampleEncoder, build_encoder
from cal_train.data.images import DEFAULT_LIMITS, ImageLimits
from cal_train.data.records import Rows
from cal_train.data.sample_stream import SampleFiles, open_sources
from cal_train.data.sources import RowSummary, Source, summarize

_MAX_LISTED = 200
_MAX_SHOWN = 500

CheckPart = Callable[[CheckReport, Callable[[int], None]], None]
"""Checks the rows of one source; tells how many are done."""

Part = tuple[int, CheckPart]
"""Rows of a source, and how they are checked."""

TAKES_OPTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "path",
        metavar="RECIPE_OR_JSON",
        help="a recipe (.yaml), whose options can follow as --key value, or a data file: JSON, JSONL, Parquet",
    )
    parser.add_argument("--image_root", help="image root of a data file (default: its folder); a recipe has its own")


def run(args: argparse.Namespace) -> int:
    """Check every row; return 1 if any of them would fail, else 0."""
    is_recipe = Path(args.path).suffix.lower() in (".yaml", ".yml")
    if is_recipe and args.image_root:
        raise ValueError("--image_root goes with a data file; a recipe names its own image_folder")
    if args.options and not is_recipe:
        raise ValueError(f"{args.options[0]} is an option of a recipe, and {args.path} is a data file: leave it out")
    parts = recipe_parts(args.path, args.options) if is_recipe else [file_part(args.path, args.image_root)]
    report = CheckReport()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("checking rows", total=sum(num_rows for num_rows, _ in parts))
        for _, check in parts:
            check(report, lambda n: progress.advance(task, n))
    print_report(report, is_recipe)
    return 1 if report.problems else 0


def recipe_parts(path: str, options: Sequence[str] = ()) -> list[Part]:
    """Return the sources of a recipe's training and evaluation data, to be tokenized by the recipe's own processor."""
    recipe = load_recipe(path, options, will_train=False)
    processor = recipe_processor(recipe)
    parts = list[Part]()
    if recipe.data.streaming:
        encoder = build_encoder(recipe.data, processor)
        parts += [(len(files), stream_check(files, encoder)) for files in open_sources(recipe.data)]
    datasets = [] if recipe.data.streaming else [build_dataset(recipe.data, processor)]
    if (eval_dataset := build_eval_dataset(recipe.data, processor)) is not None:
        datasets.append(eval_dataset)
    for dataset in datasets:
        for source, rows, summary in zip(dataset.sources, dataset.rows, dataset.summaries, strict=True):
            parts.append((len(rows), file_check(source, rows, summary, dataset.limits, dataset.encoder)))
    return parts


def file_check(
    source: Source, rows: Rows, summary: RowSummary, limits: ImageLimits, encoder: SampleEncoder | None
) -> CheckPart:
    """Return the check of a data file."""
    return lambda report, on_rows: check_source(report, source, rows, summary, limits, encoder, on_rows)


def stream_check(files: SampleFiles, encoder: SampleEncoder) -> CheckPart:
    """Return the check of a streamed source."""
    return lambda report, on_rows: check_files(report, files, encoder.limits, encoder, on_rows)


def file_part(path: str, image_root: str | None) -> Part:
    """Return a data file on its own; without a model folder, nothing is tokenized."""
    rows = Rows(path)
    source = Source(Path(path), Path(image_root) if image_root else None)
    return len(rows), file_check(source, rows, summarize(rows), DEFAULT_LIMITS, None)


def print_report(report: CheckReport, is_tokenized: bool) -> None:
    """Print problems, repeated ids and counts."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width of its own
    if report.problems:
        table = Table("file", "row", "id", "problem", "cure", title="rows that would fail", show_lines=True)
        for problem in report.problems[:_MAX_LISTED]:
            cells = (problem.file, str(problem.row), problem.id, problem.problem, problem.cure)
            table.add_row(*(Text(_shown(cell), overflow="fold") for cell in cells))
        console.print(table)
        if len(report.problems) > _MAX_LISTED:
            console.print(f"and {len(report.problems) - _MAX_LISTED} more")
    if report.duplicate_ids:
        table = Table("file", "id", "rows", title="ids that occur more than once (these rows do train)")
        for file, id, count in report.duplicate_ids[:_MAX_LISTED]:
            table.add_row(Text(file, overflow="fold"), Text(_shown(id), overflow="fold"), str(count))
        console.print(table)
        if len(report.duplicate_ids) > _MAX_LISTED:
            console.print(f"and {len(report.duplicate_ids) - _MAX_LISTED} more")
    console.print(
        f"{report.num_rows} rows, {len(report.problems)} would fail; {report.num_images} images, "
        f"{report.num_text_only} text-only rows, {len(report.duplicate_ids)} repeated ids, "
        f"{report.num_leading_answers} rows whose leading assistant turn is dropped"
    )
    if is_tokenized:
        console.print(
            f"{report.num_supervised} supervised tokens; "
            f"{report.num_truncated} rows truncated by {report.num_cut} tokens"
        )
    else:
        console.print("tokens and lengths were not checked: that takes a recipe with a model folder")


def _shown(text: str) -> str:
    """Return a text of the data as a terminal can show it: control characters, which could rewrite it, as escapes."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_MAX_SHOWN])
    return shown + ("..." if len(text) > _MAX_SHOWN else "")
