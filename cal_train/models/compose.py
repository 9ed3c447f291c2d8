"""Build an untrained VLM from a language model and vision towers, in plain Hugging Face layout.

The parts go into transformers' `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration` or our MGM class,
with LLaVA-1.5's projector (two linear layers with a GELU between them). The folder is written, loaded again, and only
kept if it computes what its parts compute: text logits equal the language model's, image features the tower's.

Source: Liu et al. 2023, arXiv:2310.03744, section 3; class layout of transformers 5. Differs: the image token is a row
of the vocabulary, as in all of transformers, not a negative placeholder id.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cal_train.models.anyres import check_grid
from cal_train.models.aux_tower import load_aux_tower, warn_of_other_normalization
from cal_train.models.layout import PARTS_OF, PRETRAINED_PARTS, build_config, build_processor
from cal_train.models.llm import check_folder, fold_logit_scale, grow_embeddings, load_llm
from cal_train.models.probe import check_folder_computes, probe_parts
from cal_train.models.standardize import standardize_projector
from cal_train.models.tower import load_image_processor
from cal_train.models.vocabulary import add_image_and_pad_token, choose_template, load_tokenizer, stop_token_ids
from cal_train.towers.loading import at_image_size, load_tower
from cal_train.types import IMAGE_MARK

logger = logging.getLogger(__name__)

Family = Literal["llava", "llava_next", "mgm"]


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
    family: Family = "llava",
    aux_tower: Path | None = None,
    grid_pinpoints: Sequence[Sequence[int]] | None = None,
    image_grid: int = 1,
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
        seed: Of the initial weights of the projector and of what else is new.
        family: Which class the parts go into.
        aux_tower: Folder of a ConvNeXt tower for high-resolution images (``mgm``).
        grid_pinpoints: Grids of tiles as (height, width) in pixels (``llava_next``). Default: LLaVA-NeXT's five, in the
            order that makes transformers choose as the original code does.
        image_grid: Tiles along a side (``mgm``): 1, or 2 for MGM-HD, which also sees the whole image.

    Returns:
        The output folder.

    Raises:
        ValueError: If a part cannot be used, or the composed model does not compute what its parts compute. Nothing
            is left in the output folder then.
    """
    llm, vision_tower, output = Path(llm), Path(vision_tower), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")
    _check_options(family, image_aspect_ratio, aux_tower, grid_pinpoints, image_grid, standardize_on)
    check_folder(llm, gguf_file)
    image_processor = load_image_processor(vision_tower, image_size, image_aspect_ratio)
    size = image_processor.crop_size["height"]
    family_options: dict[str, Any] = {}
    if grid_pinpoints is not None:
        family_options["image_grid_pinpoints"] = check_grid(grid_pinpoints, size)
    tokenizer = load_tokenizer(llm, gguf_file)
    chat_template = choose_template(tokenizer, template)

    tower = load_tower(vision_tower)
    resized_tower = at_image_size(tower, size)
    language_model = load_llm(llm, gguf_file, dtype)
    aux = None if aux_tower is None else load_aux_tower(Path(aux_tower))
    if aux is not None and aux_tower is not None:
        warn_of_other_normalization(Path(aux_tower), image_processor.image_mean, image_processor.image_std)
        family_options |= _mgm_options(resized_tower.config, aux.config, image_grid)
    logger.info("language model: %s, %s", type(language_model).__name__, language_model.dtype)
    logger.info("vision tower: %s, layer %d at %d px", type(tower).__name__, vision_feature_layer, size)
    tower.to(dtype=language_model.dtype)  # pyright: ignore[reportCallIssue]  (transformers wraps `to` without types)
    probe = probe_parts(language_model, tower, vision_feature_layer, size, seed)

    add_image_and_pad_token(tokenizer, chat_template)
    scale = fold_logit_scale(language_model)
    num_rows = grow_embeddings(language_model, len(tokenizer), pad_vocabulary_to)
    logger.info("vocabulary: %d tokens, %d rows added, logit scale %g", len(tokenizer), num_rows, scale)

    model = _assemble(family, language_model, resized_tower, aux, tokenizer, vision_feature_layer, seed, family_options)
    if standardize_on is not None:
        num_images = standardize_projector(model, image_processor, standardize_on)
        logger.info("projector: starts on features standardised on %d images of %s", num_images, standardize_on)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer, chat_template),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.chat_template = chat_template
    processor = build_processor(family, model.config, image_processor, tokenizer, chat_template)
    try:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        del model, language_model, resized_tower, aux  # the reload below needs their memory
        check_folder_computes(output, probe)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # a folder that fails its check must not look usable
        raise
    return output


def _check_options(
    family: str,
    image_aspect_ratio: str,
    aux_tower: Path | None,
    grid_pinpoints: Sequence[Sequence[int]] | None,
    image_grid: int,
    standardize_on: Path | None,
) -> None:
    """Refuse options that the family does not read."""
    misplaced = [
        (image_aspect_ratio == "pad" and family == "llava_next", "image_aspect_ratio=pad", "it cuts images into tiles"),
        (aux_tower is not None and family != "mgm", "aux_tower", "only mgm has an auxiliary tower"),
        (grid_pinpoints is not None and family != "llava_next", "grid_pinpoints", "only llava_next has them"),
        (image_grid != 1 and family != "mgm", "image_grid", "only mgm has one"),
        (standardize_on is not None and family == "mgm", "standardize_on", "its projector reads mined features"),
    ]
    for is_misplaced, option, reason in misplaced:
        if is_misplaced:
            raise ValueError(f"{option} does not apply to family {family!r}: {reason}. Leave it out")
    if family == "mgm" and aux_tower is None:
        raise ValueError("family 'mgm' needs an auxiliary tower for high-resolution images: name one with --aux_tower")


def _mgm_options(vision_config: Any, aux_config: Any, image_grid: int) -> dict[str, Any]:
    """Return MGM's sizes: 8 x 8 cells of the auxiliary tower's largest map per patch, as in MGM (768 px) and MGM-HD."""
    side = 8 * aux_config.patch_size * image_grid * (vision_config.image_size // vision_config.patch_size)
    return {"image_grid": image_grid, "image_global": image_grid > 1, "high_res_size": side}


def _assemble(
    family: str,
    llm: PreTrainedModel,
    tower: PreTrainedModel,
    aux: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    vision_feature_layer: int,
    seed: int,
    family_options: dict[str, Any],
) -> PreTrainedModel:
    vars(llm.config).pop("quantization_config", None)  # left by GGUF, whose weights are plain by now
    for part in (llm, tower, aux):
        if part is not None:
            part.config._name_or_path = Path(part.config._name_or_path).name  # paths of this machine do not travel
            part.config.dtype = llm.dtype
    llm.config.pad_token_id = tokenizer.pad_token_id
    image_token_id = tokenizer.get_vocab()[IMAGE_MARK]
    aux_config = None if aux is None else aux.config
    config = build_config(
        family, llm.config, tower.config, image_token_id, vision_feature_layer, aux_config, **family_options
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    if type(model.model.language_model) is not type(llm.base_model):
        raise ValueError(
            f"{type(llm).__name__} cannot be taken apart into decoder and head: its decoder is a "
            f"{type(llm.base_model).__name__}, LLaVA would build a {type(model.model.language_model).__name__}"
        )
    sources = {"language_model": llm.base_model, "lm_head": llm.get_output_embeddings(), "vision_tower": tower}
    if aux is not None:
        sources["aux_tower"] = aux
    prefixes = PARTS_OF[family]
    state = {
        f"{prefixes[name]}.{key}": value for name, part in sources.items() for key, value in part.state_dict().items()
    }
    for name, prefix in prefixes.items():
        if name not in PRETRAINED_PARTS:
            state |= _untrained(model, prefix, seed)
    model.load_state_dict({key: value.to(llm.dtype) for key, value in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model


def _untrained(model: PreTrainedModel, prefix: str, seed: int) -> dict[str, Tensor]:
    """Return start weights of a new part by their names in the model, float32, a function of the seed alone.

    Modules start as torch starts them, which is how LLaVA's projector does; LLaVA-NeXT's newline is drawn from
    N(0, 1 / D).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parent, _, name = prefix.rpartition(".")
        parameter = getattr(model.get_submodule(parent), name)
        if isinstance(parameter, torch.nn.Parameter):
            return {prefix: torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5}
        part = parameter.to_empty(device="cpu").float()
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return {f"{prefix}.{key}": value for key, value in part.state_dict().items()}
