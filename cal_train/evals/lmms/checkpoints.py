"""The checkpoints of a VLM run through lmms-eval, each once, while it trains or afterwards.

A run's results stand in the run folder (what towers measure during training is `cal_train.evals.during_training`):

    RUN/eval/SUITE/checkpoint-8/            a results folder, as of ``cal-train eval``, and ``log.txt``
    RUN/eval/SUITE/checkpoint-8.partial/    while it is made; its log is left there if it fails
    RUN/eval/SUITE/final/                   of the model at the end, unless that is the last checkpoint
    RUN/eval/SUITE/curves.png

Each is evaluated in a process of its own (`cal_train.evals.lmms.children`).
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cal_train.conf import Recipe
from cal_train.evals.lmms.children import Evaluate, run_in_child
from cal_train.evals.lmms.results import RESULTS
from cal_train.evals.lmms.suites import load_suite
from cal_train.evals.report.task_curves import draw_curves, final_step, read_task_curves
from cal_train.train.run_folder import output_folder
from cal_train.train.safe_save import MARKER_NAME, complete_checkpoints
from cal_train.train.suite_evaluation import EvaluateCheckpoint, EvaluationFailedError

POLL_S = 10.0
MODEL_ID = "cal_train"
"""Our model of lmms-eval, by its name in `cal_train.evals.lmms.manifest`, which needs lmms-eval."""
SETTINGS = ("limit", "dtype", "through", "without_image", "vcd_alpha", "vcd_beta")
"""Of an evaluation: those that change its numbers."""
ENTRANCES = ("adapter_config.json", "config.json")


@dataclass
class Outcome:
    """What became of a run's checkpoints: names of those evaluated now, failed, and deleted meanwhile."""

    evaluated: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


def results_of_run(run: Path, suite: str) -> Path:
    """Return the folder of a suite's results in a run folder."""
    return run / "eval" / suite


def evaluate_run(
    run: Path,
    results: Path,
    evaluate: Evaluate,
    watch: bool = False,
    say: Callable[[str], None] = print,
    wait: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Evaluate the checkpoints of a run that have no results yet, oldest first, and its final model.

    Args:
        run: The run folder.
        results: As of `results_of_run`.
        evaluate: What is done with each.
        watch: Go on until the run has ended. One that was killed has not: it may be resumed.
        say: Is told what happens.
        wait: Sleeps so many seconds.

    Raises:
        ValueError: If the run folder does not exist, or has nothing to evaluate and is not watched.
    """
    if not run.is_dir():
        raise ValueError(f"run folder {run} does not exist: give the output_dir of a run")
    outcome = Outcome()
    tried: set[Path] = set()
    while True:
        is_over = not watch or has_ended(run)  # asked first: what is saved before the end is then found below
        due = [model for model in due_models(run, results) if model not in tried]
        if not due and is_over:
            break
        if not due:
            wait(POLL_S)
            continue
        model, name = due[0], name_of(run, due[0])
        tried.add(model)
        say(f"{name}: evaluating, {len(due) - 1} more to do")
        try:
            evaluate(model, results / name)
        except EvaluationFailedError as error:
            is_deleted = not model.exists()
            (outcome.deleted if is_deleted else outcome.failed).append(name)
            say(
                f"{name}: "
                + ("deleted by save_total_limit meanwhile, no results" if is_deleted else f"failed: {error}")
            )
        else:
            outcome.evaluated.append(name)
    if not (outcome.evaluated or outcome.failed or outcome.deleted or list(results.glob(f"*/{RESULTS}"))):
        raise ValueError(f"{run} has no complete checkpoint and no final model: nothing to evaluate (--watch waits)")
    return outcome


def due_models(run: Path, results: Path) -> list[Path]:
    """Return the complete checkpoints without results of their own, oldest first, then the run folder if it is due.

    Results that are older than a checkpoint of their name are another run's in the same folder.
    """
    while True:
        try:
            found = [path for path in complete_checkpoints(run) if not _has_results(path / MARKER_NAME, results, path)]
            entrance = next((run / name for name in ENTRANCES if (run / name).is_file()), None)
            is_extra = has_ended(run) and not ends_with_checkpoint(run)
            if entrance is not None and is_extra and not _has_results(entrance, results, Path("final")):
                found.append(run)
            return found
        except FileNotFoundError:
            continue  # a checkpoint was deleted while it was looked at


def has_ended(run: Path) -> bool:
    """Return whether the run has written its final state since it was last started."""
    state, started = run / "trainer_state.json", run / "recipe.yaml"
    if not state.is_file():
        return False
    return not started.is_file() or state.stat().st_mtime >= started.stat().st_mtime


def ends_with_checkpoint(run: Path) -> bool:
    """Return whether the final model is the one of the last checkpoint, and not the best of several."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    last = run / f"checkpoint-{final_step(run)}"
    return state.get("best_model_checkpoint") is None and last in complete_checkpoints(run)


def name_of(run: Path, model: Path) -> str:
    """Return the name of a model's results folder."""
    return "final" if model == run else model.name


def check_settings(results: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to put results beside others that were made with other settings: a curve would show the difference.

    Raises:
        ValueError: Naming the setting and both values.
    """
    for path in sorted(results.glob(f"*/{RESULTS}")):
        there = json.loads(path.read_text(encoding="utf-8"))["settings"]
        for name in SETTINGS:
            if there.get(name) != settings.get(name):
                raise ValueError(
                    f"{path.parent} was made with {name} {there.get(name)!r}, asked is {settings.get(name)!r}: remove "
                    f"{results}, or evaluate as before"
                )


def evaluation_of(recipe: Recipe, environment: Mapping[str, str] | None = None) -> EvaluateCheckpoint | None:
    """Return what a recipe's ``eval_suite`` does with a checkpoint during training, or None if it has none.

    Args:
        recipe: All options.
        environment: Of the processes that evaluate: without what a launcher left there.

    Raises:
        ValueError: If the suite cannot be used, lmms-eval is missing, nothing would be saved, or results of other
            settings are in the run folder.
    """
    args = recipe.training
    if args.eval_suite is None:
        if args.eval_suite_limit is not None:
            raise ValueError("eval_suite_limit belongs to eval_suite, which is not given")
        return None
    suite = load_suite(args.eval_suite)
    if find_spec("lmms_eval") is None:
        raise ValueError("eval_suite needs lmms-eval: pip install -c constraints.txt -e '.[eval]'")
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        raise ValueError("eval_suite evaluates what is saved, but save_strategy is no: set save_strategy: steps")
    if args.eval_suite_limit is not None and args.eval_suite_limit < 1:
        raise ValueError(f"eval_suite_limit {args.eval_suite_limit} is not a positive number of documents")
    dtype = "bfloat16" if args.bf16 else "auto"
    options = ["--device", str(args.device), "--dtype", dtype, "--batch_size", str(args.per_device_eval_batch_size)]
    if args.eval_suite_limit is not None:
        options += ["--limit", str(args.eval_suite_limit)]
    run, path = output_folder(args), Path(args.eval_suite)
    results = results_of_run(run, suite.name)
    if not args.overwrite_output_dir:
        settings = {"limit": args.eval_suite_limit or suite.limit, "dtype": dtype, "through": MODEL_ID}
        check_settings(results, settings)

    def evaluate(checkpoint: Path, should_stop: Callable[[], bool]) -> Mapping[str, float]:
        try:
            run_in_child(path, options, environment, should_stop)(checkpoint, results / checkpoint.name)
            draw_suite(run, suite.name)
            return metrics_in(results / checkpoint.name)
        except (OSError, ValueError) as error:  # such as a full disk, which is no reason to end a training
            raise EvaluationFailedError(f"{type(error).__name__}: {error}") from error

    return evaluate


def draw_suite(run: Path, suite: str) -> Path | None:
    """Draw a suite's metrics over the steps of a run, once there are two points; return the picture's path."""
    curves = read_task_curves(run).get(suite, {})
    if max(map(len, curves.values()), default=0) < 2:
        return None
    name = run.resolve().name
    by_run = {metric: {name: points} for metric, points in curves.items()}
    return draw_curves(by_run, f"{name}: {suite}", results_of_run(run, suite) / "curves.png")


def metrics_in(folder: Path) -> dict[str, float]:
    """Return ``TASK/METRIC`` and its value of a results folder."""
    summary = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return {
        f"{task}/{metric}": float(value)
        for task, found in summary["tasks"].items()
        for metric, value in found["metrics"].items()
    }


def _has_results(made: Path, results: Path, model: Path) -> bool:
    found = results / model.name / RESULTS
    return found.is_file() and found.stat().st_mtime >= made.stat().st_mtime
