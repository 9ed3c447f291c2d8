"""Pixels of tower images: random crops in training, resize and centre crop in evaluation, normalised alike."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class CropTransform:
    """A random part of the image, resized with bicubic interpolation and normalised.

    The area of the part is drawn from ``[min_scale, 1]`` of the image, its aspect ratio log-uniformly from [3/4, 4/3].

    Source: the training transform of open_clip and Llip, RandomResizedCrop(scale=(0.9, 1), bicubic) of torchvision;
    the crop is drawn with its rule. Differs: the random numbers are handed in, so that a resumed run repeats them.

    Attributes:
        size: Side of the result, pixels.
        mean, std: Per channel, of values in [0, 1].
        min_scale: 1 takes nearly everything: only the aspect ratio of an image that is not square varies.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_scale: float = 0.9

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Return ``pixel_values`` (3, size, size) float32 of an RGB image."""
        left, top, width, height = random_box(image.width, image.height, self.min_scale, rng)
        part = image.crop((left, top, left + width, top + height))
        return self.normalize(part.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def normalize(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB image as (3, height, width) float32, scaled to [0, 1] and normalised."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


def random_box(width: int, height: int, min_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a part of an image: (left, top, width, height) in pixels, inside it.

    If ten draws do not fit into the image, the largest centred part with an allowed aspect ratio is taken.
    """
    log_ratios = np.log(_ASPECT_RATIOS)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(*log_ratios))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = rng.integers(0, [width - box_width + 1, height - box_height + 1])
            return int(left), int(top), box_width, box_height
    box_width = min(width, max(1, round(height * _ASPECT_RATIOS[1])))
    box_height = min(height, max(1, round(width / _ASPECT_RATIOS[0])))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def training_transform(image_processor: BaseImageProcessor, min_scale: float = 0.9) -> CropTransform:
    """Return the transform whose size, mean and deviation are those of an image processor.

    Raises:
        ValueError: If the processor does not make square images, or does not normalise.
    """
    settings = image_processor.to_dict()
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    height, width = (size or {}).get("height"), (size or {}).get("width")
    if height is None or height != width:
        raise ValueError(
            f"{type(image_processor).__name__} makes no square images (size {size}): set do_center_crop and crop_size"
        )
    if not (settings.get("do_normalize") and settings.get("do_rescale")):
        raise ValueError(f"{type(image_processor).__name__} does not rescale and normalise: towers need both")
    mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    return CropTransform(int(height), mean, std, min_scale)


@dataclass(frozen=True)
class EvaluationTransform:
    """The image processor itself: what users of the exported tower run."""

    image_processor: BaseImageProcessor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return ``pixel_values`` (3, size, size) float32 of an RGB image."""
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
