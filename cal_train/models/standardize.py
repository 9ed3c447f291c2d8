"""Start a projector as if the tower's features were standardised.

A tower's features share a large mean and differ in scale by channel, and a new projector spends its first steps on
that. Written into its first layer, features with mean m and standard deviation s per channel give

    W' = W / s,   b' = b - W (m / s),   so that   W' x + b' = W ((x - m) / s) + b,

and the model stays a plain one. Differs from LLaVA, whose projector starts as `torch.nn.Linear` does; off by default.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from cal_train.data.images import open_image
from cal_train.models.tower import selected_features

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
BATCH_SIZE = 32
MOST_IMAGES = 512
"""Images that are read: a few hundred, of some dozen patches each, settle a mean to about 1 % of a deviation."""


@torch.no_grad()
def standardize_projector(model: PreTrainedModel, image_processor: LlavaImageProcessorPil, images: Path) -> int:
    """Fold the mean and deviation of the selected features into the projector's first layer, in place.

    Args:
        model: A VLM with an untrained projector that reads a tower's features (LLaVA and LLaVA-NeXT).
        image_processor: Makes square images for the tower.
        images: Folder of images like those of the training data.

    Returns:
        The number of images that were read.

    Raises:
        ValueError: If the folder holds no image, or one that cannot be read.
    """
    paths = image_files(images)
    first = model.model.multi_modal_projector.linear_1
    mean, deviation = channel_statistics(_features(model, image_processor, paths))
    weight, bias = first.weight.double(), first.bias.double()
    first.weight.copy_(weight / deviation)
    first.bias.copy_(bias - weight @ (mean / deviation))
    return len(paths)


def image_files(folder: Path) -> list[Path]:
    """Return up to `MOST_IMAGES` images of a folder and those below it, evenly spaced in the order of their names."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"no image in {folder}: name a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    step = max(len(paths) / MOST_IMAGES, 1.0)
    return [paths[int(i * step)] for i in range(min(len(paths), MOST_IMAGES))]


def channel_statistics(batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) in float64 over all tokens of the batches (tokens, D).

    A channel that hardly varies gets a deviation of 1 % of the median, so that its noise is not blown up.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for tokens in (batch.double() for batch in batches):
        count, total, squares = count + len(tokens), total + tokens.sum(0), squares + tokens.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean, deviation.clamp(min=0.01 * float(deviation.median()) or 1.0)


def _features(
    model: PreTrainedModel, image_processor: LlavaImageProcessorPil, paths: Sequence[Path]
) -> Iterator[Tensor]:
    """Yield what the projector reads of the images, batch by batch, as (tokens, D)."""
    tower = model.model.vision_tower
    has_class_token = model.config.vision_feature_select_strategy == "default"
    for start in range(0, len(paths), BATCH_SIZE):
        pictures = [open_image(path) for path in paths[start : start + BATCH_SIZE]]
        pixel_values = image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(tower.dtype)
        hidden = selected_features(tower, pixel_values, cast(int, model.config.vision_feature_layer))
        yield hidden[:, int(has_class_token) :].flatten(0, 1)
