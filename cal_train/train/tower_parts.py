"""The parts of a tower run, built from its options: tokenizer, towers, image processor, options of the objective."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from cal_train.conf_towers import TowerArguments
from cal_train.folders import from_folder
from cal_train.objectives.families import OBJECTIVES, option_names
from cal_train.towers.export import square_image_processor
from cal_train.towers.loading import stored_image_processor
from cal_train.towers.two_tower import TwoTower, build_two_tower

NORMALISATION = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
"""Mean and deviation of pixels for towers that start from random weights: that of the class's published models."""

CAPTIONING = ("coca", "sycoca")


@dataclass(frozen=True)
class Processors:
    """What makes inputs for the towers."""

    image_processor: Any
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path) -> None:
        """Write both beside the towers that they belong to."""
        self.image_processor.save_pretrained(folder / "vision")
        self.tokenizer.save_pretrained(folder / "text")


def load_tokenizer(towers: TowerArguments) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which pads on the right.

    Raises:
        ValueError: If the recipe names none, the folder holds none, or it cannot pad.
    """
    folder = towers.tokenizer or (towers.text_tower if isinstance(towers.text_tower, str) else None)
    if folder is None:
        raise ValueError("the recipe sets no tokenizer: name a folder with one (text_tower is a configuration)")
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist")
    tokenizer = from_folder(AutoTokenizer, folder)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no padding token: set pad_token in its configuration")
    tokenizer.padding_side = "right"
    return tokenizer


def build_towers(towers: TowerArguments, tokenizer: PreTrainedTokenizerBase) -> TwoTower:
    """Return the two towers of a recipe.

    Raises:
        ValueError: If a tower is not named, does not exist, or has too small a vocabulary for the tokenizer.
    """
    text = tower_source(towers.text_tower, "text_tower")
    if isinstance(text, dict):
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        text = {"vocab_size": len(tokenizer), **{name: i for name, i in ids.items() if i is not None}, **text}
    built = build_two_tower(
        tower_source(towers.vision_tower, "vision_tower"),
        text,
        image_size=towers.image_size,
        num_mixture_tokens=towers.num_mixture_tokens,
        patch_dropout=towers.patch_dropout,
        text_pooling=cast(Any, towers.text_pooling or ("cls_appended" if towers.objective in CAPTIONING else "eos")),
        context_length=towers.context_length,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        lock_image=towers.lock == "image",
        lock_text=towers.lock == "text",
    )
    if len(tokenizer) > built.shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the text tower only {built.shape.vocab_size}: they do not "
            "belong together"
        )
    return built


def tower_source(value: Mapping[str, Any] | str | None, name: str) -> dict[str, Any] | Path:
    """Return a configuration, or the path of a folder that exists.

    Raises:
        ValueError: If the recipe gives neither.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if not value:
        raise ValueError(f"the recipe does not set {name}: a folder, or a configuration with model_type")
    if not Path(value).is_dir():
        raise ValueError(f"{name} {value} does not exist: name a folder, or a configuration with model_type")
    return Path(value)


def image_processor_of(towers: TowerArguments, built: TwoTower) -> Any:
    """Return the image processor of evaluation and of the exported tower, with the pretrained tower's normalisation."""
    config = built.vision.encoder.config
    if not isinstance(towers.vision_tower, str):
        return square_image_processor(config.image_size, *map(tuple, NORMALISATION[config.model_type]))
    own = stored_image_processor(Path(towers.vision_tower))
    return square_image_processor(config.image_size, tuple(own.image_mean), tuple(own.image_std))


def objective_options(towers: TowerArguments, global_batch_size: int) -> dict[str, Any]:
    """Return the recipe's options, with the batch size filled in for objectives that start from it."""
    options = dict(towers.objective_options or {})
    if towers.objective in OBJECTIVES and "global_batch_size" in option_names(towers.objective):
        options.setdefault("global_batch_size", global_batch_size)
    return options
