"""Read weights back so that not a single one is missed, and find the checkpoint to go on from."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"


@torch.no_grad()
def load_weights_strictly(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights of a checkpoint folder into the model, every one of them.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape.
    """
    loaded, info = cast(
        tuple[PreTrainedModel, dict[str, Any]],
        type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True),
    )
    problems = {name: keys for name, keys in info.items() if keys and name.endswith("keys")}
    if problems:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: {problems}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def resolve_resume(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint folder to resume from: a folder, or with ``latest`` the newest one of ``output_dir``.

    A folder without ``trainer_state.json``, which is written last, is what a run left that was killed while it saved:
    ``latest`` passes it by with a warning.

    Raises:
        ValueError: If there is none.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != "latest":
        if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint} is not a checkpoint folder of a run")
        return resume_from_checkpoint
    for checkpoint in sorted(Path(output_dir).glob("checkpoint-*"), key=_step_of, reverse=True):
        if (checkpoint / TRAINER_STATE_NAME).is_file():
            return str(checkpoint)
        logger.warning("%s is incomplete (no %s): passed by", checkpoint, TRAINER_STATE_NAME)
    raise ValueError(f"resume_from_checkpoint=latest, but {output_dir} holds no complete checkpoint-N folder")


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1
