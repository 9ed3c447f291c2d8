"""After each save, the checkpoint's scores on a suite of benchmarks, logged at its step.

How a checkpoint is evaluated is the caller's business (`cal_train.evals.lmms.checkpoints` does it in a process of its
own); here is when, on which rank, and that a failure of it never ends a training.
"""

import datetime
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cal_train.train.metrics import LogWindow
from cal_train.train.run_folder import output_folder
from cal_train.train.step_guard import StepGuard

logger = logging.getLogger(__name__)

LONGEST_EVALUATION = datetime.timedelta(days=7)
"""How long the other ranks wait for the main process."""

EvaluateCheckpoint = Callable[[Path, Callable[[], bool]], Mapping[str, float]]
"""(checkpoint folder, whether to give up) -> ``TASK/METRIC`` and its value; raises `EvaluationFailedError`."""


class EvaluationFailedError(Exception):
    """An evaluation that came to nothing: why, in one line, and where its output is."""


class LogsAndStops(Protocol):
    """The part of a trainer that this needs."""

    guard: StepGuard
    window: LogWindow

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of numbers."""
        ...


class SuiteEvaluation(TrainerCallback):
    """Evaluates each checkpoint on the main process while the other ranks wait.

    Args:
        trainer: Logs the results as ``suite/TASK/METRIC``.
        evaluate: What is done with a checkpoint.
    """

    def __init__(self, trainer: LogsAndStops, evaluate: EvaluateCheckpoint):
        self.trainer, self.evaluate = trainer, evaluate
        self.num_failed = 0
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a way to wait whose patience does not end with ``ddp_timeout``."""
        if args.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_EVALUATION)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate what was just saved."""
        started = time.perf_counter()
        if args.process_index == 0:
            self._evaluate(output_folder(args) / f"checkpoint-{state.global_step}")
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
        self.trainer.window.leave_out(time.perf_counter() - started)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many evaluations failed."""
        if self.num_failed:
            logger.warning(
                "%d evaluations by eval_suite failed or were given up; `cal-train eval --run` makes up for those whose "
                "checkpoints are still there",
                self.num_failed,
            )

    def _evaluate(self, checkpoint: Path) -> None:
        def is_stopping() -> bool:
            return self.trainer.guard.request.number is not None or self.trainer.guard.stopping is not None

        if is_stopping():  # a scheduler that asks a run to stop gives it little time
            logger.warning("%s is not evaluated: the run was asked to stop", checkpoint)
            self.num_failed += 1
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the evaluation may run on the same device
        try:
            metrics = dict(self.evaluate(checkpoint, is_stopping))
        except (EvaluationFailedError, OSError, ValueError, KeyError, TypeError) as error:  # such as a full disk
            self.num_failed += 1
            logger.warning("eval_suite failed for %s, training goes on: %s", checkpoint, error)
            metrics = {"failed": float(self.num_failed)}
        self.trainer.log({f"suite/{name}": value for name, value in metrics.items()})
