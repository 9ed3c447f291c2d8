"""Verb ``eval``: run a suite of lmms-eval on a model; ``eval compare A B``: two results folders against each other."""

import argparse
import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cal_train.evals.lmms.compare import compare_folders, markdown_of, records_of, table_of
from cal_train.evals.lmms.suites import load_suite

SCENE_TABLES = Path(".cache/demo/eval")
"""Where the task files of ``eval/tasks`` look for the demo's scenes, from the root of the repository."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--model", metavar="DIR", help="model folder in Hugging Face layout")
    parser.add_argument("--suite", metavar="FILE", help="which tasks: eval/suites/NAME.yaml")
    parser.add_argument("--output", metavar="DIR", help="folder of the results")
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
    actions = parser.add_subparsers(dest="action", metavar="compare")
    compare = actions.add_parser("compare", help="the difference of two results folders, per task")
    compare.add_argument("first", metavar="A", help="results folder, such as the baseline's")
    compare.add_argument("second", metavar="B", help="results folder, such as CAL's")
    compare.add_argument("--write", type=Path, metavar="DIR", help="also write compare.json and compare.md there")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate or compare, and say where the results are."""
    logging.basicConfig(format="%(message)s")
    return _compare(arguments) if arguments.action == "compare" else _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    if missing := [f"--{name}" for name in ("model", "suite", "output") if not getattr(arguments, name)]:
        raise ValueError(f"cal-train eval needs {', '.join(missing)}")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} is not a positive number of documents")
    suite = load_suite(arguments.suite)
    if find_spec("lmms_eval") is None:
        raise ValueError("lmms-eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    if suite.local_data is not None:
        _prepare(suite.local_data, Path(arguments.suite))
    from cal_train.evals.lmms.run import evaluate  # imports lmms-eval, which takes seconds

    summary = evaluate(
        arguments.model, suite, arguments.output, arguments.limit, arguments.batch_size, arguments.device,
        arguments.dtype, arguments.through,
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
    from cal_train.demo.assets import fetch_assets, fill_once  # needs the extra `demo`
    from cal_train.demo.eval_tables import write_eval_tables
    from cal_train.demo.run import IMAGE_SIZE_PX, NUM_TEST_SCENES

    assets = fetch_assets(folder.parent)
    fill_once(folder, lambda part: write_eval_tables(part, assets, NUM_TEST_SCENES, IMAGE_SIZE_PX))


_LOCAL_DATA: dict[str, Callable[[Path], None]] = {"demo_scenes": _scene_tables}


def _table(summary: dict) -> Table:
    table = Table("task", "metric", "value", "documents", title=f"{summary['suite']}: {summary['model']}")
    for task, found in summary["tasks"].items():
        for metric, value in found["metrics"].items():
            table.add_row(task, metric, f"{value:.4f}", str(found["num_documents"]))
    return table
