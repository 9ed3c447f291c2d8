"""Verb ``report``: a run, a score file, or a baseline/CAL pair as one self-contained page."""

import argparse
from pathlib import Path

from rich.console import Console

from cal_train.evals.report.build import MAX_THUMBNAILS, DataPlace, gather
from cal_train.evals.report.maps import MapRequest, add_maps
from cal_train.evals.report.page import write_page
from cal_train.evals.report.pictures import write_pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("paths", nargs="+", metavar="RUN_OR_SCORE", help="score file or run folder; two make a pair")
    parser.add_argument("--output", required=True, metavar="FILE", help="HTML page to write")
    parser.add_argument("--data", metavar="FILE", help="the data file that was scored (default: where it was then)")
    parser.add_argument("--image_root", metavar="DIR", help="folder of its images (default: the folder of --data)")
    parser.add_argument("--cal_low", type=float, help="lower clamp limit to draw (default: as scored, else 1)")
    parser.add_argument("--cal_high", type=float, help="upper clamp limit to draw (default: as scored, else 5)")
    parser.add_argument(
        "--max_images", type=int, default=MAX_THUMBNAILS, help=f"distinct images on the page (default {MAX_THUMBNAILS})"
    )
    parser.add_argument(
        "--maps", type=int, default=0, metavar="N",
        help="for N samples, half of them the most surprising, show where the models look for each word, and the "
        "vocabulary's word nearest to each image token; loads the models",
    )  # fmt: skip
    parser.add_argument(
        "--map_layers", metavar="A:B", help="average attention over layers A to B, from 0, both included (default: all)"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="DIR",
        help="model of the maps, once for each score file (default: the folders that were scored)",
    )  # fmt: skip
    parser.add_argument(
        "--png", metavar="DIR", help="also write curves, histogram, first heat maps and all maps as PNG"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    if len(arguments.paths) > 2:
        raise ValueError(f"{len(arguments.paths)} paths: give one, or two to compare")
    if arguments.image_root and not arguments.data:
        raise ValueError("--image_root belongs to --data, which is not given")
    if arguments.max_images < 0:
        raise ValueError(f"--max_images {arguments.max_images}: give 0 or more")
    place = None
    if arguments.data:
        place = DataPlace(Path(arguments.data), Path(arguments.image_root) if arguments.image_root else None)
    layers = _layers(arguments.map_layers)
    if arguments.maps < 0 or (not arguments.maps and (arguments.model or layers)):
        raise ValueError(f"--maps {arguments.maps}: give the number of samples; --model and --map_layers belong to it")
    content = gather(arguments.paths, place, arguments.cal_low, arguments.cal_high, arguments.max_images)
    if arguments.maps:
        content = add_maps(content, MapRequest(arguments.maps, layers, arguments.model))
    page = write_page(content, arguments.output)
    console = Console(soft_wrap=True)
    for note in content.notes:
        console.print(note, markup=False, highlight=False)
    console.print(f"wrote {page} ({page.stat().st_size / 2**20:.1f} MiB): {page.resolve().as_uri()}", highlight=False)
    if arguments.png:
        for picture in write_pictures(content, arguments.png):
            console.print(f"wrote {picture}", highlight=False)
    return 0


def _layers(text: str | None) -> range | None:
    """Return the layers that ``A:B`` names, both ends included."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ValueError(f"--map_layers {text!r}: give two layer numbers as in 8:15, from 0, both included")
    return range(int(first), int(last) + 1)
