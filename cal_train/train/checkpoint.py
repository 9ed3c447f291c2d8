"""Read weights back so that not a single one is missed, and find the checkpoint to go on from."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint


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

    Raises:
        ValueError: If there is none.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != "latest":
        if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint} is not a checkpoint folder of a run")
        return resume_from_checkpoint
    latest = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if latest is None:
        raise ValueError(f"resume_from_checkpoint=latest, but {output_dir} holds no checkpoint-N folder")
    return latest
