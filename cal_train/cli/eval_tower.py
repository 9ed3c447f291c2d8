"""Verb ``eval_tower``: what a finished tower run scores on pairs: retrieval, zero-shot, linear probe."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cal_train.data.pair_set import PairSet, read_pair_set
from cal_train.data.pairs import PairSource
from cal_train.evals.towers import class_names, load_evaluator
from cal_train.evals.zero_shot import TEMPLATES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Folder of a tower run, or a checkpoint.")
    parser.add_argument("--data", metavar="FILE", help="Pairs for retrieval in both directions: R@1, R@5, R@10.")
    parser.add_argument("--image_root", metavar="DIR", help="Folder of all images. Default: that of each data file.")
    parser.add_argument(
        "--zero_shot", metavar="FILE", help="Images whose first caption is the name of their class: zero-shot accuracy."
    )
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", help="Prompts with {} for the class. Default: four neutral ones."
    )
    parser.add_argument(
        "--probe_train", metavar="FILE", help="Labelled images on which a linear probe of the patch tokens is fitted."
    )
    parser.add_argument("--probe_test", metavar="FILE", help="Labelled images on which the probe is tested.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images, or texts, of a forward pass. Default: 64.")
    parser.add_argument("--max_bad_samples", type=int, default=0, help="Bad rows left out of a file before it stops.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the results.")


def run(arguments: argparse.Namespace) -> int:
    """Measure what there is data for, print one table, and write it if asked."""
    _check(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluator = load_evaluator(arguments.checkpoint, arguments.batch_size, device)
    results: dict[str, dict[str, float]] = {}
    if arguments.data:
        results["retrieval"] = evaluator.retrieval(_read(arguments, arguments.data))
    if arguments.zero_shot:
        pairs = _read(arguments, arguments.zero_shot)
        results["zero_shot"] = evaluator.zero_shot(pairs, class_names(pairs), arguments.templates or TEMPLATES)
    if arguments.probe_train:
        train, test = _read(arguments, arguments.probe_train), _read(arguments, arguments.probe_test)
        results["linear_probe"] = evaluator.linear_probe(train, test, class_names(train))
    Console().print(_table(arguments.checkpoint, results))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"checkpoint": arguments.checkpoint, **results}, indent=2) + "\n")
        print(f"wrote {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.data or arguments.zero_shot or arguments.probe_train):
        raise ValueError("nothing to measure: give --data, --zero_shot, or --probe_train with --probe_test")
    if bool(arguments.probe_train) != bool(arguments.probe_test):
        raise ValueError("a linear probe takes both --probe_train and --probe_test")
    if arguments.templates and not arguments.zero_shot:
        raise ValueError("--templates belong to --zero_shot, which is not given")
    if bad := [template for template in arguments.templates or [] if "{}" not in template]:
        raise ValueError(f"template {bad[0]!r} has no {{}} for the name of the class")


def _read(arguments: argparse.Namespace, file: str) -> PairSet:
    return read_pair_set([PairSource(file, arguments.image_root)], arguments.max_bad_samples)


def _table(checkpoint: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=checkpoint)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for kind, values in results.items():
        for name, value in values.items():
            table.add_row(f"{kind} {name}", f"{value:.4f}")
    return table
