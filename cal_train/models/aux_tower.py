"""The ConvNeXt tower that reads images at high resolution (MGM), from transformers' layout or open_clip's.

LAION published the tower of MGM in open_clip's layout alone; its configuration is read off the shapes of its weights.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from cal_train.models.convert.keys import CONVNEXT, rename
from cal_train.models.convert.reading import inside, read_json, read_tensors
from cal_train.towers.loading import folder_config, load_strict

logger = logging.getLogger(__name__)

_OPEN_CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
_TRUNK = "visual.trunk."


def load_aux_tower(folder: Path) -> ConvNextModel:
    """Return the tower in float32 and eval mode, without the norm behind its last stage, which MGM does not read.

    Args:
        folder: Of a transformers ``convnext``, or of an open_clip model with a ConvNeXt (timm's names).

    Raises:
        ValueError: If the folder is neither, lacks weights, or has some that the tower has no place for.
    """
    state = aux_state(folder)
    tower: Any = ConvNextModel(aux_config(state))
    tower.layernorm = nn.Identity()
    own = tower.state_dict()
    unlike = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    if problems := sorted((own.keys() ^ state.keys()) | unlike):
        raise ValueError(
            f"auxiliary tower {folder}: {len(problems)} weights are missing, left over or of another shape, the first "
            f"is {problems[0]}"
        )
    tower.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})
    return tower.eval()


def aux_state(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a ConvNeXt tower by transformers' names, without the norm behind the last stage.

    Raises:
        ValueError: If the folder holds none.
    """
    for file in _OPEN_CLIP_FILES:
        if (folder / file).is_file():
            trunk = {
                key.removeprefix(_TRUNK): value
                for key, value in read_tensors(inside(folder, file)).items()
                if key.startswith((f"{_TRUNK}stem.", f"{_TRUNK}stages."))
            }
            return rename(trunk, CONVNEXT, str(folder)).tensors
    config = folder_config(folder, "auxiliary tower")
    if config.model_type != "convnext":
        raise ValueError(f"auxiliary tower {folder} is a {config.model_type!r}: MGM reads a ConvNeXt")
    if config.hidden_act != "gelu":  # the configuration is made anew, from the weights alone
        raise ValueError(f"auxiliary tower {folder} has hidden_act {config.hidden_act!r}: only 'gelu' is supported")
    state = load_strict(ConvNextModel, folder, "auxiliary tower", may_lack=["layernorm"]).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("layernorm.")}


def warn_of_other_normalization(folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Warn if the tower was trained on images of another mean or standard deviation than those that it will see.

    MGM gives both towers the same pixels, and its original code asserts that both were trained on such. A folder that
    does not say how its images were normalised is passed over.

    Args:
        folder: Of the auxiliary tower.
        mean: Of the images, per channel: those of the first tower.
        std: The same for the standard deviation.
    """
    stored: list[object] = []
    if (folder / "open_clip_config.json").is_file():
        fields = read_json(folder / "open_clip_config.json").get("preprocess_cfg") or {}
        stored = [fields.get("mean"), fields.get("std")]
    elif (folder / "preprocessor_config.json").is_file():
        fields = read_json(folder / "preprocessor_config.json")
        stored = [fields.get("image_mean"), fields.get("image_std")]
    if any(theirs is not None and theirs != list(ours) for theirs, ours in zip(stored, (mean, std), strict=False)):
        logger.warning(
            "auxiliary tower %s was trained on images with mean %s and standard deviation %s, but sees those of the "
            "first tower, with %s and %s: take two towers that agree, as MGM does",
            *(folder, *stored, list(mean), list(std)),
        )


def aux_config(state: Mapping[str, Tensor], prefix: str = "") -> ConvNextConfig:
    """Return the configuration of a ConvNeXt tower, read off the shapes of its weights.

    Args:
        state: Weights by transformers' names behind ``prefix``.
        prefix: In front of the tower's own names.

    Raises:
        ValueError: If the stem or a stage is missing.
    """
    layer = re.compile(re.escape(prefix) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight")
    found = {(int(match[1]), int(match[2])): name for name in state if (match := layer.fullmatch(name))}
    stem = state.get(f"{prefix}embeddings.patch_embeddings.weight")
    num_stages = len({stage for stage, _ in found})
    if stem is None or not all((stage, 0) in found for stage in range(max(num_stages, 1))):
        raise ValueError("the weights of the second tower are incomplete: its stem or the first block of a stage lacks")
    return ConvNextConfig(
        num_channels=stem.shape[1],
        patch_size=stem.shape[-1],
        num_stages=num_stages,
        hidden_sizes=[state[found[stage, 0]].shape[0] for stage in range(num_stages)],
        depths=[sum(where == stage for where, _ in found) for stage in range(num_stages)],
        hidden_act="gelu",
    )
