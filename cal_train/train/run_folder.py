"""What every run does around its training: logging, the folder, and the record of what it was made with."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import yaml
from transformers import TrainerState, TrainingArguments

from cal_train.train.checkpoint import resolve_resume
from cal_train.train.provenance import environment
from cal_train.train.signals import StoppedBySignal, signal_name, stop_requests
from cal_train.train.step_guard import StepGuard

logger = logging.getLogger(__name__)

RESULTS = ("model*.safetensors", "adapter_model.safetensors", "objective.safetensors")
"""Names of the weights that a run leaves in its folder."""


class GuardedTrainer(Protocol):
    """A Trainer with a `StepGuard`."""

    guard: StepGuard
    args: TrainingArguments
    state: TrainerState
    train: Callable[..., Any]


def output_folder(args: TrainingArguments) -> Path:
    """Return the run folder, which every recipe names."""
    return Path(cast(str, args.output_dir))


def set_up_logging(args: TrainingArguments) -> None:
    """One line per event on the main process; other ranks only warn."""
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cal_train").setLevel(level)


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the row order and of fractional source weights."""
    return args.data_seed if args.data_seed is not None else args.seed


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that a recipe resumes from, None for the beginning; all ranks call this.

    Raises:
        ValueError: If there is none, it is not to be trusted, or a run from the beginning would overwrite another one.
    """
    with args.main_process_first(local=args.save_on_each_node, desc="checkpoints"):
        checkpoint = resolve_resume(args.resume_from_checkpoint, output_folder(args), args.should_save)
        if checkpoint is None:
            clear_or_refuse(output_folder(args), cast(Any, args).overwrite_output_dir, args.should_save)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    return checkpoint


def clear_or_refuse(folder: Path, may_overwrite: bool, is_main_process: bool) -> None:
    """Make sure that a run from the beginning does not mix with what an earlier one left.

    Args:
        folder: The run folder.
        may_overwrite: Remove the checkpoints of the earlier run; its model is replaced at the end.
        is_main_process: The one that removes.

    Raises:
        ValueError: If the folder holds checkpoints or a model and they may not be overwritten.
    """
    checkpoints = sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())
    models = [path for name in RESULTS for path in sorted(folder.glob(name))]
    if not may_overwrite and (left := [*checkpoints, *models]):
        raise ValueError(
            f"{folder} holds {left[-1].name} of an earlier run, which this one would overwrite: add "
            "--resume_from_checkpoint latest to go on with it, choose another output_dir, or set overwrite_output_dir: "
            "true"
        )
    if is_main_process:
        for checkpoint in checkpoints:
            logger.warning("%s of an earlier run is removed", checkpoint)
            shutil.rmtree(checkpoint)


def train_until_stopped(trainer: GuardedTrainer, resume: str | None) -> None:
    """Train to the end, or until SIGTERM or SIGINT.

    Raises:
        StoppedBySignal: After the step in hand was finished and saved; it ends the process with 143 or 130.
    """
    with stop_requests() as trainer.guard.request:
        trainer.train(resume_from_checkpoint=resume)
    number = trainer.guard.stopping
    if number is not None:
        checkpoint = output_folder(trainer.args) / f"checkpoint-{trainer.state.global_step}"
        logger.info(
            "stopped by %s after step %d of %d, saved in %s. To go on, start the same again with "
            "--resume_from_checkpoint latest",
            signal_name(number),
            trainer.state.global_step,
            trainer.state.max_steps,
            checkpoint,
        )
        raise StoppedBySignal(number, checkpoint, trainer.args.process_index == 0)


def write_record(args: TrainingArguments, groups: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Write the resolved recipe, versions, commit and seed into the run folder, before step 1.

    Args:
        args: Training arguments; only the process that saves writes.
        groups: The recipe's other dataclasses.
        facts: What else belongs into ``environment.json``.
    """
    if not args.should_save:
        return
    folder = output_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved(args, groups), sort_keys=True))
    record = environment() | {"seed": args.seed, "world_size": args.world_size, **facts}
    (folder / "environment.json").write_text(json.dumps(record, indent=2))


def resolved(args: TrainingArguments, groups: Sequence[Any]) -> dict[str, Any]:
    """Return every option with its value, as plain values that JSON holds."""
    values: dict[str, Any] = {}
    for group in groups:
        values |= dataclasses.asdict(group)
    return json.loads(json.dumps(values | args.to_dict(), default=str))
