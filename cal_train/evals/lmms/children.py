"""One evaluation in a process of its own: whatever happens in it, its memory is free again, and its parent goes on."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from cal_train.evals.lmms.results import read_results, write_results
from cal_train.train.safe_save import PARTIAL_SUFFIX
from cal_train.train.suite_evaluation import EvaluationFailedError

ADAPTER = "adapter_config.json"

Evaluate = Callable[[Path, Path], None]
"""(model folder, results folder) -> nothing; raises `EvaluationFailedError`."""


def run_in_child(
    suite: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluate:
    """Return an `Evaluate` that starts ``cal-train eval`` for each model, after ``cal-train merge`` for adapters.

    Args:
        suite: Suite file.
        options: Further words of ``cal-train eval``.
        environment: Of the process. Default: this one's.
        should_stop: Asked twice a second; the evaluation then fails.
    """

    def evaluate(model: Path, output: Path) -> None:
        aside = output.with_name(output.name + PARTIAL_SUFFIX)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        whole, is_adapter = model, (model / ADAPTER).is_file()
        with (aside / "log.txt").open("wb") as log:
            try:
                if is_adapter:
                    whole = aside / "merged"
                    words = ["merge", "--adapter", str(model), "--output", str(whole)]
                    _call(words, log, environment, should_stop)
                words = ["eval", "--model", str(whole), "--suite", str(suite), "--output", str(aside / "results")]
                _call([*words, *options], log, environment, should_stop)
            finally:
                shutil.rmtree(aside / "merged", ignore_errors=True)
        if is_adapter:  # the merged folder is gone; what was evaluated is the adapter
            summary, samples = read_results(aside / "results")
            write_results(aside / "results", summary | {"model": str(model)}, samples)
        (aside / "log.txt").rename(aside / "results" / "log.txt")
        shutil.rmtree(output, ignore_errors=True)
        (aside / "results").rename(output)
        aside.rmdir()

    return evaluate


def _call(
    words: Sequence[str], log: IO[bytes], environment: Mapping[str, str] | None, should_stop: Callable[[], bool]
) -> None:
    """Run one command of this program to its end."""
    start = log.tell()
    process = subprocess.Popen(
        [sys.executable, "-m", "cal_train", *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=None if environment is None else dict(environment),
    )
    is_stopped = False
    try:
        while process.poll() is None:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                if should_stop():
                    is_stopped = True
                    break
    finally:  # also where this process is interrupted
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    log.seek(0, 2)
    if is_stopped:
        raise EvaluationFailedError("given up, because the run was asked to stop")
    if process.returncode:
        lines = Path(log.name).read_bytes()[start:].decode(errors="replace").strip().splitlines()
        # behind an error, progress bars are still closed
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it said nothing")
        raise EvaluationFailedError(f"{words[0]} ended with {process.returncode}: {last} (all of it: {log.name})")
