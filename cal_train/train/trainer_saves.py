"""How both trainers save: what Hugging Face's Trainer writes, led aside and renamed when it is complete."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from cal_train.train.safe_save import Ranks, rotate, write_checkpoint, write_output


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
