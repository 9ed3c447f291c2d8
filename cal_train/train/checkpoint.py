"""Read weights back so that not a single one is missed, and find the checkpoint to go on from."""

import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from cal_train.folders import check_files, check_shards, from_folder
from cal_train.train.safe_save import complete_checkpoints, incomplete_because, settle_partials, step_of

logger = logging.getLogger(__name__)

NEVER_READ = "training_args.bin"
"""Written by the Trainer for people; nothing here loads it."""

DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""Plain classes in DeepSpeed's own checkpoint files, which it reads as pickles without restriction."""


@torch.no_grad()
def load_weights_strictly(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights of a checkpoint folder into the model, every one of them.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape.
    """
    loaded, info = cast(
        tuple[PreTrainedModel, dict[str, Any]],
        from_folder(type(model), folder, dtype=model.dtype, output_loading_info=True),
    )
    problems = {name: keys for name, keys in info.items() if keys and name.endswith("keys")}
    if problems:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {problems}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def resolve_resume(resume_from_checkpoint: str | None, output_dir: str | Path, is_main_process: bool) -> str | None:
    """Return the checkpoint folder to resume from, checked: complete, no pickle that runs code, no file outside.

    Args:
        resume_from_checkpoint: A folder; ``latest`` for the complete checkpoint of the highest step in ``output_dir``;
            ``auto`` for the same, or the beginning if there is none; None for the beginning.
        output_dir: The run folder. The main process first clears up what a killed run left there half-written.
        is_main_process: The others must call this after it has returned on the main process.

    Raises:
        ValueError: If there is none, or it is not to be trusted.
    """
    run_folder = Path(output_dir)
    if is_main_process:
        settle_partials(run_folder)
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint not in ("latest", "auto"):
        checkpoint = Path(resume_from_checkpoint)
        if reason := incomplete_because(checkpoint):
            raise ValueError(f"resume_from_checkpoint={checkpoint} is not a complete checkpoint folder: {reason}")
    else:
        complete = complete_checkpoints(run_folder)
        for path in (path for path in run_folder.glob("checkpoint-*") if step_of(path) >= 0 and path not in complete):
            logger.warning("%s is incomplete (%s): passed by", path, incomplete_because(path))
        if not complete and resume_from_checkpoint == "auto":
            return None
        if not complete:
            raise ValueError(f"resume_from_checkpoint=latest, but {output_dir} holds no complete checkpoint-N folder")
        checkpoint = complete[-1]
    check_files(checkpoint)
    check_shards(checkpoint)
    check_pickles(checkpoint)
    check_state(checkpoint)
    return str(checkpoint)


def check_state(checkpoint: Path) -> None:
    """Raise if the Trainer's state is none, or is of another step than the folder.

    Raises:
        ValueError: Naming the file and what is wrong.
    """
    file = checkpoint / TRAINER_STATE_NAME
    if not file.is_file():
        return  # the Trainer names what is missing
    try:
        state = TrainerState.load_from_json(str(file))
        numbers = [state.epoch or 0, state.global_step, state.max_steps, state.num_input_tokens_seen, state.total_flos]
        is_one = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
        is_one &= isinstance(state.log_history, list) and all(isinstance(line, dict) for line in state.log_history)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{file} is not the state of a run ({error!r}): resume from another checkpoint") from error
    if not is_one or not isinstance(state.global_step, int):
        raise ValueError(f"{file} holds numbers or log lines that are none: resume from another checkpoint")
    if state.global_step and step_of(checkpoint) not in (-1, state.global_step):
        raise ValueError(f"{file} says step {state.global_step}, the folder is of another: resume from another one")


def check_pickles(checkpoint: Path) -> None:
    """Raise if a file of optimizer, scheduler or random state names code that reading it must not reach.

    The files are taken apart, not loaded. This covers DeepSpeed's too, which are later loaded without ``weights_only``.

    Raises:
        ValueError: Naming the file and what it asks for.
    """
    pointer = checkpoint / "latest"  # DeepSpeed reads the files of the folder that this names
    if pointer.is_file():
        tag = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if tag == ".." or Path(tag).name != tag or (checkpoint / tag).is_symlink():
            raise ValueError(f"{pointer} points to {tag!r}, which lies elsewhere: do not use this folder")
    files = sorted(path for end in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(end))
    for path in (path for path in files if path.name != NEVER_READ):
        try:
            with safe_globals():
                asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except (ValueError, RuntimeError, KeyError, IndexError, EOFError) as error:
            raise ValueError(f"{path} is not a file of torch.save, damaged or old: {error}") from None
        if foreign := sorted(asked - DEEPSPEED_CLASSES):
            raise ValueError(
                f"{path} asks for {', '.join(foreign[:5])}, which no checkpoint needs: loading it could run code. Do "
                "not use this folder"
            )
