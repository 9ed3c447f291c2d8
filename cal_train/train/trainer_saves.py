"""How both trainers save: what Hugging Face's Trainer writes, led aside and renamed when it is complete."""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, cast

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from cal_train.train.provenance import RECORDS
from cal_train.train.safe_save import Ranks, rotate, write_checkpoint, write_output
from cal_train.train.step_guard import StepGuard
from cal_train.train.stream import EpochBatches


class SavesAside(Protocol):
    """The part of a Trainer that saving needs.

    Attributes:
        aside: While a checkpoint is written, the folder that stands for the run folder; else None.
    """

    aside: Path | None
    accelerator: Accelerator
    args: TrainingArguments
    state: TrainerState
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool


class SafeTrainer(Trainer):
    """The Trainer, saving aside and with a guard of its steps; what both of ours build on."""

    aside: Path | None = None
    guard: StepGuard

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        self.guard.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.grad_norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _naming(checkpoint, "optimizer and schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _naming(checkpoint, "the random generators"):
            super()._load_rng_state(checkpoint)

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # resumed at the very end, it would take one step more
            super()._run_epoch(**arguments)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the rows of an epoch; of a stream, whose length is in batches, those that all ranks take."""
        num_examples = super().num_examples(dataloader)
        if isinstance(dataloader.dataset, EpochBatches):
            return num_examples * self.args.per_device_train_batch_size * self.args.world_size
        return num_examples

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what the run trains, into the run folder by default; older files go once the new ones are written."""
        if self.aside is not None:  # part of a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        save_output(self, output_dir, functools.partial(super().save_model, _internal_call=True))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save_checkpoint(self, functools.partial(super()._save_checkpoint, model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.aside is None else str(self.aside)


@contextmanager
def _naming(checkpoint: str | None, what: str) -> Iterator[None]:
    """Name the checkpoint where a state that is read from it turns out not to fit."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError, UnpicklingError) as error:
        if checkpoint is None:
            raise
        raise ValueError(f"{checkpoint}: the state of {what} cannot be taken up ({error!r})") from error


def save_checkpoint(trainer: SavesAside, write: Callable[[], None]) -> None:
    """Write the checkpoint of the current step, then delete the oldest beyond ``save_total_limit``.

    Args:
        trainer: Its ``_get_output_dir`` returns ``aside`` while that is set.
        write: The Trainer's own way to save a checkpoint.

    Raises:
        OSError: If it could not be written; see `cal_train.train.safe_save.write_checkpoint`.
    """
    run_folder, state = Path(cast(str, trainer.args.output_dir)), trainer.state
    final = run_folder / f"checkpoint-{state.global_step}"

    def write_aside(aside: Path) -> None:
        trainer.aside = aside
        try:
            write()
        finally:
            trainer.aside = None
        if trainer.args.should_save:
            for record in filter(Path.is_file, (run_folder / name for name in RECORDS)):
                shutil.copy(record, aside / final.name)
        if state.best_model_checkpoint == str(aside / final.name):  # where it stands now, not where it will be found
            state.best_model_checkpoint = str(final)
            if trainer.args.should_save:
                state.save_to_json(str(aside / final.name / TRAINER_STATE_NAME))

    write_checkpoint(run_folder, state.global_step, write_aside, _ranks(trainer))
    if trainer.args.should_save:
        best = {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()
        rotate(run_folder, trainer.args.save_total_limit, keep={final} | best)


def save_output(trainer: SavesAside, output_dir: str | None, write: Callable[[str], None]) -> None:
    """Write the model into a folder, the run folder by default; ``write`` is the Trainer's own way to save a model.

    Raises:
        OSError: If it could not be written; see `cal_train.train.safe_save.write_output`.
    """
    folder = Path(output_dir or cast(str, trainer.args.output_dir))
    write_output(folder, lambda aside: write(str(aside)), _ranks(trainer))


def _ranks(trainer: SavesAside) -> Ranks:
    is_collective = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    # with a best checkpoint to look for, the Trainer waits for all ranks in the middle of its saving
    waits_inside = trainer.state.best_global_step is not None
    return Ranks(trainer.accelerator, trainer.args.should_save, may_agree=not (is_collective or waits_inside))
