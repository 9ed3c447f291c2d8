"""The image tower as a plain Hugging Face folder: class, weights and image processor, for `compose` or any other use.

What belongs to the objective (projections, scale, poolers, decoders) stays behind. Of Llip's K mixture tokens the first
is the encoder's class token and stays as it is; a plain ViT has no place for the others. The patch tokens change,
because they attend to one token where there were K: by how much is measured and logged. The mean of all K in its place
is a token that no layer was trained on; in tiny trials it kept the patch tokens about as well (within 13 to 15 %).
"""

import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedModel

from cal_train.towers.loading import load_tower, stored_image_processor
from cal_train.towers.two_tower import TwoTower, load_two_tower
from cal_train.towers.vision import VisionTower

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of a patch token after a round trip, relative where tokens exceed 1."""
PROBE_IMAGES = 2


def square_image_processor(
    image_size: int, image_mean: tuple[float, ...], image_std: tuple[float, ...]
) -> CLIPImageProcessorPil:
    """Return the image processor of evaluation: short side to ``image_size`` (bicubic), centre crop, normalisation.

    Args:
        image_size: Side in pixels.
        image_mean: Per channel, of values in [0, 1].
        image_std: Per channel, of values in [0, 1].
    """
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def export_tower(towers: TwoTower | Path, output: Path, image_processor: Any | None = None) -> Path:
    """Write the image tower and its image processor as a folder that its Hugging Face class loads, and check it.

    Args:
        towers: Two towers, or a folder of `TwoTower.save_pretrained`.
        output: Folder to write; it must not exist or be empty.
        image_processor: A Hugging Face image processor. Default: that in the folder's ``vision/``.

    Returns:
        The output folder.

    Raises:
        ValueError: If there is no image processor or it makes images of another size, the output exists, or the folder
            does not give the tower's patch tokens when it is read back. Nothing is left in the output folder then.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")
    processor = image_processor
    if processor is None:
        if isinstance(towers, TwoTower):
            raise ValueError("towers in memory have no image processor: pass image_processor")
        if not (Path(towers) / "vision").is_dir():
            raise ValueError(f"{towers} is not the folder of a tower run, or of a checkpoint of one: check the path")
        processor = stored_image_processor(Path(towers) / "vision")
    vision = (towers if isinstance(towers, TwoTower) else load_two_tower(towers)).vision
    encoder = exported_encoder(vision)
    _check_size(processor, encoder.config.image_size)
    try:
        encoder.save_pretrained(output)
        processor.save_pretrained(output)
        _check_round_trip(encoder, output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # a folder that fails its check must not look usable
        raise
    logger.info("%s with %d parameters written to %s", type(encoder).__name__, encoder.num_parameters(), output)
    return output


def exported_encoder(vision: VisionTower) -> PreTrainedModel:
    """Return the encoder alone, as a float32 copy in evaluation mode, without Llip's further mixture tokens."""
    encoder: Any = deepcopy(vision.encoder).float().cpu().eval().requires_grad_(True)
    encoder.config._name_or_path = ""  # paths of this machine do not travel
    if vision.extra_tokens is not None:
        logger.warning(
            "%d of %d mixture tokens dropped: %s has a single class token, which is the first of them. The exported "
            "tower's patch tokens differ from the trained one's by %.1f %% of their norm on noise images.",
            len(vision.extra_tokens),
            vision.num_mixture_tokens,
            type(encoder).__name__,
            100 * _relative_difference(vision, encoder),
        )
    return encoder


def _relative_difference(vision: VisionTower, encoder: PreTrainedModel) -> float:
    trained = deepcopy(vision).float().cpu().eval()
    images = _probe(encoder)
    with torch.no_grad():
        before, after = trained(images)[1], VisionTower(encoder).eval()(images)[1]
    return float((after - before).norm() / before.norm())


def _check_size(image_processor: Any, image_size: int) -> None:
    size = dict(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)
    if (size.get("height"), size.get("width")) != (image_size, image_size):
        raise ValueError(f"the image processor makes images of {size}, the tower takes {image_size} pixels")


def _check_round_trip(encoder: PreTrainedModel, folder: Path) -> None:
    images = _probe(encoder)
    with torch.no_grad():
        saved = VisionTower(load_tower(folder)).eval()(images)[1]
        original = VisionTower(encoder).eval()(images)[1]
    difference = float((saved - original).abs().max())
    allowed = TOLERANCE * max(1.0, float(original.abs().max()))
    if not difference <= allowed:  # catches NaN too
        raise ValueError(f"the exported tower's patch tokens differ by {difference:.3g} (allowed: {allowed:.3g})")
    logger.info("check: patch tokens differ by at most %.2g after reading the folder back", difference)


def _probe(encoder: PreTrainedModel) -> Tensor:
    side = encoder.config.image_size
    return torch.randn(PROBE_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
