"""Check that a composed model computes what its parts compute: text logits, image features, numbers of tokens."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from cal_train.data.images import image_inputs
from cal_train.folders import from_folder
from cal_train.models.families import family_of
from cal_train.models.llm import embedding_of, softcap_of, text_logits
from cal_train.models.tower import selected_features

logger = logging.getLogger(__name__)

PROBE_TOKENS = 12


@dataclass(frozen=True)
class Probe:
    """Inputs, and what the parts made of them before they were put together."""

    input_ids: Tensor
    logits: Tensor
    softcap: float | None
    pixel_values: Tensor
    features: Tensor


def probe_parts(llm: PreTrainedModel, tower: PreTrainedModel, layer: int, image_size: int, seed: int) -> Probe:
    """Return what the parts make of random tokens and of a random image."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(embedding_of(llm).num_embeddings, (1, PROBE_TOKENS), generator=generator)
    pixel_values = torch.randn(1, 3, image_size, image_size, generator=generator).to(tower.dtype)
    return Probe(
        input_ids=input_ids,
        logits=text_logits(llm, input_ids),
        softcap=softcap_of(llm),
        pixel_values=pixel_values,
        features=selected_features(tower, pixel_values, layer).float(),
    )


@torch.no_grad()
def check_folder_computes(folder: Path, probe: Probe) -> None:
    """Load a composed folder again and compare it with its parts.

    Raises:
        ValueError: If a weight is missing or left over, logits or features differ beyond rounding, or model and
            processor do not agree on the tokens of an image.
    """
    loaded = from_folder(AutoModelForImageTextToText, folder, dtype="auto", output_loading_info=True)
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    model.eval()
    if unaccounted := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"the saved model does not load again: weight {unaccounted[0]} is missing or not expected")

    plain = text_logits(model, probe.input_ids)[..., : probe.logits.shape[-1]]
    logits = plain if probe.softcap is None else probe.softcap * torch.tanh(plain / probe.softcap)
    _require_equal("text logits", "language model", logits, probe.logits, model.dtype)
    if probe.softcap is not None:
        logger.warning(
            "the language model caps its logits at %g, which LLaVA's class does not: on a probe text the logits differ "
            "by up to %.3g. Training then goes without the cap.",
            probe.softcap,
            (plain - probe.logits).abs().max(),
        )
    features = selected_features(model.model.vision_tower, probe.pixel_values, model.config.vision_feature_layer)
    _require_equal("image features", "vision tower", features.float(), probe.features, model.dtype)
    _check_token_counts(model, from_folder(AutoProcessor, folder, backend="pil"))


def _check_token_counts(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    family, side = family_of(model), model.config.vision_config.image_size
    inputs, (num_tokens,) = image_inputs(processor, [Image.new("RGB", (2 * side, side))])
    images = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    num_features = len(family.image_embeds(model, family.vision_features(model, images), images))
    if num_features != num_tokens:
        raise ValueError(f"the model makes {num_features} features of an image, the processor {num_tokens} tokens")


def _require_equal(what: str, part: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Refuse a difference beyond rounding: 1e-5 in float32 (relative where values exceed 1), 2 % in half precision."""
    largest = float(theirs.abs().max())
    limit = 1e-5 * max(1.0, largest) if dtype == torch.float32 else 0.02 * largest
    difference = float((ours - theirs).abs().max())
    if not difference <= limit:  # catches NaN too
        raise ValueError(
            f"the {what} of the composed model differ from those of its {part} by up to {difference:.3g} "
            f"(allowed: {limit:.3g}): LLaVA's class does not compute what this {part} computes, choose another one"
        )
    logger.info("check: %s differ from the %s's by at most %.2g", what, part, difference)
