"""Build an untrained VLM from a language model and a vision tower, in plain Hugging Face layout.

The parts go into transformers' `LlavaForConditionalGeneration` with LLaVA-1.5's projector (two linear layers with a
GELU between them). The folder is written, loaded again, and only kept if it computes what its parts compute: text
logits equal the language model's, image features the tower's.

Source: Liu et al. 2023, arXiv:2310.03744, section 3; class layout of transformers 5. Differs: the image token is a row
of the vocabulary, as in all of transformers, not a negative placeholder id.
"""

import logging
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from cal_train.models.llm import (
    check_folder,
    embedding_of,
    fold_logit_scale,
    grow_embeddings,
    load_llm,
    softcap_of,
    text_logits,
)
from cal_train.models.standardize import standardize_projector
from cal_train.models.tower import load_image_processor, selected_features
from cal_train.models.vocabulary import add_image_and_pad_token, choose_template, load_tokenizer, stop_token_ids
from cal_train.towers.loading import at_image_size, has_class_token, load_tower
from cal_train.types import IMAGE_MARK

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


def compose(
    llm: Path,
    vision_tower: Path,
    output: Path,
    gguf_file: str | None = None,
    template: str | None = None,
    image_size: int | None = None,
    image_aspect_ratio: Literal["square", "pad"] = "square",
    vision_feature_layer: int = -2,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    pad_vocabulary_to: int = 1,
    standardize_on: Path | None = None,
    seed: int = 0,
) -> Path:
    """Write an untrained VLM folder that transformers' auto classes load.

    Args:
        llm: Folder of a causal language model, or one that holds ``gguf_file``.
        vision_tower: Folder of a CLIP, SigLIP or DINOv2 tower, or of a CLIP or SigLIP dual encoder.
        output: Folder to write; it must not exist or be empty.
        gguf_file: Name of a GGUF file in ``llm``.
        template: Chat template to save. Default: the language model's own, else ``vicuna_v1``.
        image_size: Side of the images in pixels. Default: that of the tower's own image processor.
        image_aspect_ratio: How images become square: ``square`` crops the centre, ``pad`` pads with the mean colour.
        vision_feature_layer: Hidden state of the tower that the projector reads (LLaVA: -2).
        dtype: Of all weights. ``auto``: as the language model is stored; float32 for GGUF.
        pad_vocabulary_to: The vocabulary's rows become a multiple of this.
        standardize_on: Folder of images: the projector starts as if the features of these were standardised
            (`cal_train.models.standardize`). Default: LLaVA's plain start.
        seed: Of the projector's initial weights.

    Returns:
        The output folder.

    Raises:
        ValueError: If a part cannot be used, or the composed model does not compute what its parts compute. Nothing
            is left in the output folder then.
    """
    llm, vision_tower, output = Path(llm), Path(vision_tower), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")
    check_folder(llm, gguf_file)
    image_processor = load_image_processor(vision_tower, image_size, image_aspect_ratio)
    size = image_processor.crop_size["height"]
    tokenizer = load_tokenizer(llm, gguf_file)
    chat_template = choose_template(tokenizer, template)

    tower = load_tower(vision_tower)
    resized_tower = at_image_size(tower, size)
    language_model = load_llm(llm, gguf_file, dtype)
    logger.info("language model: %s, %s", type(language_model).__name__, language_model.dtype)
    logger.info("vision tower: %s, layer %d at %d px", type(tower).__name__, vision_feature_layer, size)
    tower.to(dtype=language_model.dtype)  # pyright: ignore[reportCallIssue]  (transformers wraps `to` without types)
    probe = _probe(language_model, tower, vision_feature_layer, size, seed)

    add_image_and_pad_token(tokenizer, chat_template)
    scale = fold_logit_scale(language_model)
    num_rows = grow_embeddings(language_model, len(tokenizer), pad_vocabulary_to)
    logger.info("vocabulary: %d tokens, %d rows added, logit scale %g", len(tokenizer), num_rows, scale)

    model = _assemble(language_model, resized_tower, tokenizer, vision_feature_layer, seed)
    if standardize_on is not None:
        num_images = standardize_projector(model, image_processor, standardize_on)
        logger.info("projector: starts on features standardised on %d images of %s", num_images, standardize_on)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer, chat_template),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.chat_template = chat_template
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=resized_tower.config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token(resized_tower.config)),
        image_token=IMAGE_MARK,
        chat_template=chat_template,
    )
    try:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        del model, language_model, resized_tower  # the reload below needs their memory
        _check(output, probe)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # a folder that fails its check must not look usable
        raise
    return output


def _assemble(
    llm: PreTrainedModel,
    tower: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision_feature_layer: int,
    seed: int,
) -> LlavaForConditionalGeneration:
    dtype = llm.dtype
    text_config, vision_config = deepcopy(llm.config), deepcopy(tower.config)
    vars(text_config).pop("quantization_config", None)  # left by GGUF, whose weights are plain by now
    for part_config in (text_config, vision_config):
        part_config._name_or_path = Path(part_config._name_or_path).name  # paths of this machine do not travel
    text_config.dtype = vision_config.dtype = dtype
    text_config.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.get_vocab()[IMAGE_MARK],
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if has_class_token(tower.config) else "full",
        projector_hidden_act="gelu",
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if type(model.model.language_model) is not type(llm.base_model):
        raise ValueError(
            f"{type(llm).__name__} cannot be taken apart into decoder and head: its decoder is a "
            f"{type(llm.base_model).__name__}, LLaVA would build a {type(model.model.language_model).__name__}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)  # nn.Linear's own initialisation, as LLaVA's
    parts = {
        "model.language_model": llm.base_model,
        "model.vision_tower": tower,
        "model.multi_modal_projector": projector,
        "lm_head": llm.get_output_embeddings(),
    }
    state = {f"{at}.{key}": value.to(dtype) for at, part in parts.items() for key, value in part.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _probe(llm: PreTrainedModel, tower: PreTrainedModel, layer: int, image_size: int, seed: int) -> Probe:
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
def _check(folder: Path, probe: Probe) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    model.eval()
    if unaccounted := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"the saved model does not load again: weight {unaccounted[0]} is missing or not expected")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")

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

    num_features = model.model.get_image_features(probe.pixel_values).pooler_output[0].shape[0]
    num_tokens = processor._get_num_multimodal_tokens([tuple(probe.pixel_values.shape[-2:])]).num_image_tokens[0]
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
