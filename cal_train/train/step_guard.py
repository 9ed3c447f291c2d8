"""Looks at every optimizer step before it is taken: is it finite on all ranks, and has someone asked to stop?

A step with a loss or gradient that is not finite is skipped on all ranks: weights, optimizer state and learning rate
stay as they were. It counts as a step (its rows are not read again), so that the schedule ends that many steps early.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from cal_train.train.signals import STOP_SIGNALS, StopRequest

logger = logging.getLogger(__name__)

SKIPPED = "skipped_samples"
"""Key of the lines that skipped steps leave in the log history of ``trainer_state.json``."""


@dataclass
class MicroBatch:
    """What the guard remembers of a micro-batch until its optimizer step is taken."""

    loss: float
    rank: int
    sample_ids: list[str] = field(default_factory=list)


class StepGuard(TrainerCallback):
    """Skips steps that are not finite, and ends training after a step once any rank was told to stop.

    Args:
        trainer: Tells the guard every loss and gradient norm.
        max_nonfinite_steps: How many steps of the run may be skipped, before it was resumed included.
    """

    def __init__(self, trainer: Trainer, max_nonfinite_steps: int):
        self.trainer = trainer
        self.max_nonfinite_steps = max_nonfinite_steps
        self.request = StopRequest()
        self.stopping: int | None = None
        self.grad_norm: Tensor | float | None = None
        self._batches: list[MicroBatch] = []
        self._num_steps = self._num_skipped = 0  # since the last log line
        self._loss_before = torch.zeros(())
        if trainer.is_deepspeed_enabled and max_nonfinite_steps:
            logger.warning(
                "max_nonfinite_steps=%d: DeepSpeed takes the step inside the backward pass, where it cannot be "
                "skipped. The run stops at the first loss or gradient that is not finite",
                max_nonfinite_steps,
            )

    def note_loss(self, loss: Tensor, sample_ids: list[str] | None) -> bool:
        """Remember the loss of a micro-batch; return whether it is finite.

        Raises:
            FloatingPointError: Under DeepSpeed, if it is not.
        """
        batch = MicroBatch(loss.item(), self.trainer.args.process_index, list(sample_ids or ["?"]))
        self._batches.append(batch)
        if not math.isfinite(batch.loss) and self.trainer.is_deepspeed_enabled:
            raise FloatingPointError(self._message([batch]))
        return math.isfinite(batch.loss)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the last step."""
        self._batches = []
        self._loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Meet the other ranks: one small reduction per step."""
        is_bad = not all(math.isfinite(batch.loss) for batch in self._batches) or self._gradient_is_bad()
        own = [is_bad, *(self.request.number == number for number in STOP_SIGNALS)]
        sums = torch.tensor(own, dtype=torch.float32, device=args.device)
        any_bad, *asked = cast(Tensor, self.trainer.accelerator.reduce(sums, "sum")).tolist()
        self.stopping = next((number for number, count in zip(STOP_SIGNALS, asked, strict=True) if count), None)
        self._num_steps += 1
        if self.trainer.is_deepspeed_enabled:
            if any_bad:
                raise FloatingPointError(self._message(self._batches) + ". The weights in memory are lost")
        else:
            self._take_or_skip(bool(any_bad))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the step in which the ranks agreed to stop: save and leave."""
        if self.stopping is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do not save and evaluate once more where a stop ended the epoch early."""
        if self.stopping is not None:
            control.should_save = control.should_evaluate = False

    def correct_mean(self, logs: dict[str, float]) -> None:
        """Make the logged loss the mean over the steps that were taken; call once per log line with a loss."""
        if self._num_skipped:
            num_taken = self._num_steps - self._num_skipped
            logs["loss"] = logs["loss"] * self._num_steps / num_taken if num_taken else math.nan
            logs["nonfinite_steps"] = self._num_nonfinite()
        self._num_steps = self._num_skipped = 0

    def _gradient_is_bad(self) -> bool:
        # float16: gradients overflow while the loss scale is sought; the scaler skips those steps itself
        if self.grad_norm is None or self.trainer.args.fp16:
            return False
        return not math.isfinite(float(self.grad_norm))

    def _take_or_skip(self, skip: bool) -> None:
        optimizer = cast(Any, self.trainer.optimizer)
        if self.trainer.accelerator.scaler is None:  # a scaler finds the same by itself
            # The Trainer leaves the schedule where it is if the wrapped optimizer says that it did not step.
            optimizer._is_overflow = skip
            if skip:
                optimizer.zero_grad(set_to_none=True)  # an optimizer passes by parameters without gradient
        if skip:
            self._report_skipped()

    def _report_skipped(self) -> None:
        state, batches = self.trainer.state, cast(list[MicroBatch], gather_object(self._batches))
        bad = [batch for batch in batches if not math.isfinite(batch.loss)]
        cast(list[dict[str, Any]], state.log_history).append(
            {
                "step": state.global_step + 1,
                "nonfinite": "loss" if bad else "gradient",
                SKIPPED: [sample for batch in bad or batches for sample in batch.sample_ids],
            }
        )
        self._num_skipped += 1
        self.trainer._tr_loss.copy_(self._loss_before)
        count = self._num_nonfinite()
        if count > self.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self._message(batches)}. {count} such steps, max_nonfinite_steps is {self.max_nonfinite_steps}"
            )
        logger.warning(
            "%s. Step skipped, %d of max_nonfinite_steps=%d", self._message(batches), count, self.max_nonfinite_steps
        )

    def _num_nonfinite(self) -> int:
        return sum(SKIPPED in line for line in self.trainer.state.log_history)

    def _message(self, batches: list[MicroBatch]) -> str:
        """Say what was not finite: the losses, or else the gradient of all these micro-batches."""
        bad = [batch for batch in batches if not math.isfinite(batch.loss)]
        step = self.trainer.state.global_step + 1
        if bad:
            what = f"loss is {bad[0].loss} at step {step} on rank {bad[0].rank}"
        else:
            what = f"gradient norm is {float(cast(float, self.grad_norm))} at step {step}"
        ids = [sample for batch in bad or batches for sample in batch.sample_ids]
        named = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        return (
            f"{what}, samples {named}. Lower learning_rate or look at these rows; resume from the last checkpoint in "
            f"{self.trainer.args.output_dir}"
        )
