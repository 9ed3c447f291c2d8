"""Verb ``eval``: run a suite of lmms-eval on a model, or on all checkpoints of a run; ``eval compare A B``."""

import argparse
import json
import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cal_train.demo.filling import fill_once
from cal_train.evals.lmms.compare import compare_folders, markdown_of, records_of, table_of
from cal_train.evals.lmms.scene_tasks import SCENE_TABLES
from cal_train.evals.lmms.suites import load_suite, only_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--model", metavar="DIR", help="model folder in Hugging Face layout")
    parser.add_argument(
        "--run", metavar="DIR",
        help="instead of --model: all complete checkpoints of a run and its final model, those evaluated before left "
        "out, into DIR/eval/SUITE, with curves over steps; adapters are merged for it",
    )  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="with --run: go on until the run has ended")
    parser.add_argument("--suite", metavar="FILE", help="which tasks: eval/suites/NAME.yaml")
    parser.add_argument("--output", metavar="DIR", help="folder of the results")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these tasks of the suite")
    parser.add_argument("--limit", type=int, help="documents of each task (default: the suite's)")
    parser.add_argument("--batch_size", type=int, default=1, help="documents of a forward pass")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: what accelerate picks)")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16")
    parser.add_argument(
        "--through",
        choices=["cal_train", "llava_hf"],
        default="cal_train",
        help="our model of lmms-eval, or its own one for LLaVA and LLaVA-NeXT, as a check",
    )
    add_asking_arguments(parser)
    actions = parser.add_subparsers(dest="action", metavar="compare")
    compare = actions.add_parser("compare", help="the difference of two results folders, per task")
    compare.add_argument("first", metavar="A", help="results folder, such as the baseline's")
    compare.add_argument("second", metavar="B", help="results folder, such as CAL's")
    compare.add_argument("--write", type=Path, metavar="DIR", help="also write compare.json and compare.md there")


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that change how documents are asked and answers decoded."""
    parser.add_argument(
        "--without_image", choices=["true", "false"], default="false", help="ask without pictures, as a sanity check"
    )
    parser.add_argument(
        "--vcd_alpha",
        type=float,
        metavar="A",
        help="contrastive decoding: (1 + A) x logits with the image - A x without (the paper: 1; default: off)",
    )
    parser.add_argument(
        "--vcd_beta",
        type=float,
        metavar="B",
        help="of contrastive decoding: only tokens with B x the largest probability with the image (default 0.1)",
    )


def asking_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return those of these options that were given, by the names of our model's arguments.

    Raises:
        ValueError: If they do not go together.
    """
    if arguments.vcd_beta is not None and not arguments.vcd_alpha:
        raise ValueError("--vcd_beta belongs to --vcd_alpha, which is not given or 0")
    asking: dict[str, Any] = {"without_image": True} if arguments.without_image == "true" else {}
    if arguments.vcd_alpha:
        beta = 0.1 if arguments.vcd_beta is None else arguments.vcd_beta
        asking |= {"vcd_alpha": arguments.vcd_alpha, "vcd_beta": beta}
    return asking


def run(arguments: argparse.Namespace) -> int:
    """Evaluate or compare, and say where the results are."""
    logging.basicConfig(format="%(message)s")
    if arguments.action == "compare":
        return _compare(arguments)
    if arguments.watch and not arguments.run:
        raise ValueError("--watch belongs to --run, which is not given")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} is not a positive number of documents")
    return _evaluate_run(arguments) if arguments.run else _evaluate(arguments)


def _evaluate_run(arguments: argparse.Namespace) -> int:
    """Evaluate the checkpoints of a run; return 1 if one failed."""
    if given := [f"--{name}" for name in ("model", "output", "tasks") if getattr(arguments, name)]:
        raise ValueError(f"{given[0]} does not go with --run, which names its results itself and runs whole suites")
    if not arguments.suite:
        raise ValueError("cal-train eval --run needs --suite")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--run evaluates on one process: start it without a launcher")
    suite, run_folder = load_suite(arguments.suite), Path(arguments.run)
    _require_lmms_eval()
    # these know how runs are saved, and import torch for it
    from cal_train.evals.lmms.checkpoints import check_settings, draw_suite, evaluate_run, results_of_run
    from cal_train.evals.lmms.children import run_in_child

    results = results_of_run(run_folder, suite.name)
    limit = arguments.limit or suite.limit
    check_settings(results, {**vars(arguments), "limit": limit, "without_image": None, **asking_of(arguments)})
    evaluate = run_in_child(Path(arguments.suite), _words(arguments))
    say = Console(soft_wrap=True).print
    outcome = evaluate_run(run_folder, results, evaluate, arguments.watch, lambda text: say(text, markup=False))
    picture = draw_suite(run_folder, suite.name)
    say(
        f"{len(outcome.evaluated)} evaluated, {len(outcome.failed)} failed, {len(outcome.deleted)} deleted meanwhile; "
        f"results: {results}" + (f", over steps: {picture}" if picture else ""),
        highlight=False,
    )
    return 1 if outcome.failed else 0


def _words(arguments: argparse.Namespace) -> list[str]:
    """Return what a process for one of the checkpoints is told besides model, suite and output."""
    own = ("model", "run", "watch", "suite", "output", "tasks", "action")
    given = {name: value for name, value in vars(arguments).items() if name not in own and value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _require_lmms_eval() -> None:
    if find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed: pip install -c constraints.txt -e '.[eval]'")


def _evaluate(arguments: argparse.Namespace) -> int:
    if missing := [f"--{name}" for name in ("model", "suite", "output") if not getattr(arguments, name)]:
        raise ValueError(f"cal-train eval needs {', '.join(missing)}")
    suite = load_suite(arguments.suite)
    if arguments.tasks:
        suite = only_tasks(suite, arguments.tasks)
    _require_lmms_eval()
    if suite.local_data is not None:
        _prepare(suite.local_data, Path(arguments.suite))
    from cal_train.evals.lmms.run import evaluate  # imports lmms-eval, which takes seconds

    summary = evaluate(
        arguments.model, suite, arguments.output, arguments.limit, arguments.batch_size, arguments.device,
        arguments.dtype, arguments.through, asking_of(arguments),
    )  # fmt: skip
    if summary is not None:
        Console().print(_table(summary))
        Console().print(f"results: {Path(arguments.output) / 'results.md'}", highlight=False)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    lines, left_out = compare_folders(arguments.first, arguments.second)
    Console().print(table_of(lines))
    for line in (line for line in lines if line.low > 0 or line.high < 0):
        Console().print(f"{line.task}, {line.metric}: {line.verdict}", highlight=False)
    for note in left_out:
        Console().print(note, highlight=False)
    if arguments.write is not None:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "compare.json").write_text(json.dumps(records_of(lines), indent=2) + "\n", "utf-8")
        (arguments.write / "compare.md").write_text(markdown_of(lines, left_out), "utf-8")
    return 0


def _prepare(name: str, suite: Path) -> None:
    """Make a suite's data if it is not there; its tasks look for it from their own folder, so from the suite's."""
    if name not in _LOCAL_DATA:
        raise ValueError(f"{suite}: local_data {name!r} is unknown: it can be {', '.join(_LOCAL_DATA)}")
    _LOCAL_DATA[name](suite.resolve().parents[2])


def _scene_tables(root: Path) -> None:
    folder = root / SCENE_TABLES
    if folder.is_dir():
        return
    from cal_train.demo.assets import fetch_assets  # needs the extra `demo`
    from cal_train.demo.eval_tables import write_eval_tables
    from cal_train.demo.run import IMAGE_SIZE_PX, NUM_TEST_SCENES

    assets = fetch_assets(folder.parent)
    fill_once(folder, lambda part: write_eval_tables(part, assets, NUM_TEST_SCENES, IMAGE_SIZE_PX))


def _pope_tables(root: Path) -> None:
    from cal_train.demo.assets import fetch_assets  # needs the extra `demo`
    from cal_train.demo.pope import POPE_TABLES, write_pope_tables
    from cal_train.demo.run import IMAGE_SIZE_PX, NUM_TEST_SCENES

    folder = root / POPE_TABLES
    if folder.is_dir():
        return
    assets = fetch_assets(folder.parent)
    fill_once(folder, lambda part: write_pope_tables(part, assets, NUM_TEST_SCENES, IMAGE_SIZE_PX))


def _reading_tables(root: Path) -> None:
    from cal_train.evals.lmms.reading import READING_TABLES, write_reading_tables  # imports datasets

    fill_once(root / READING_TABLES, write_reading_tables)


_LOCAL_DATA: dict[str, Callable[[Path], None]] = {
    "demo_scenes": _scene_tables,
    "demo_pope": _pope_tables,
    "reading": _reading_tables,
}


def _table(summary: dict) -> Table:
    table = Table("task", "metric", "value", "documents", title=f"{summary['suite']}: {summary['model']}")
    for task, found in summary["tasks"].items():
        for metric, value in found["metrics"].items():
            table.add_row(task, metric, f"{value:.4f}", str(found["num_documents"]))
    return table
