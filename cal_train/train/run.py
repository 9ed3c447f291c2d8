"""A training run from recipe to result folder, as a table of contents."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from cal_train.cal.strategies import TokenWeighting, resolve_weighting
from cal_train.conf import CalArguments, ModelArguments, Recipe, VlmTrainingArguments
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset, build_dataset, build_eval_dataset
from cal_train.data.processor import load_processor
from cal_train.data.sampling import ModalityLengthSampler, ShuffledSampler
from cal_train.data.sources import training_sources
from cal_train.models.anyres import check_grids
from cal_train.models.families import FAMILIES
from cal_train.models.lora import add_lora
from cal_train.models.parts import Part, PartCount, freeze
from cal_train.models.vocabulary import stop_token_ids
from cal_train.train.checkpoint import resolve_resume
from cal_train.train.features import FeatureCache
from cal_train.train.run_folder import data_seed, output_folder, set_up_logging, write_record
from cal_train.train.trainer import VlmTrainer

logger = logging.getLogger(__name__)

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation options that only sampling reads."""


def train(recipe: Recipe) -> Path:
    """Run a recipe and return the folder with the trained model, in plain Hugging Face layout."""
    set_up_logging(recipe.training)
    resume = resolve_resume(recipe.training.resume_from_checkpoint, output_folder(recipe.training))
    weighting = weighting_of(recipe.cal)
    set_seed(recipe.training.seed)
    if not torch.cuda.is_available():
        recipe.training.dataloader_pin_memory = False  # it warns where there is nothing to pin for

    processor = load_processor(recipe.model.model_name_or_path, recipe.data.template, recipe.model.image_aspect_ratio)
    model = load_model(recipe.model, recipe.training)
    check_grids(model.config, processor, recipe.model.model_name_or_path)
    model.generation_config.eos_token_id = stop_token_ids(processor.tokenizer, cast(str, processor.chat_template))
    drop_idle_sampling_options(model)
    trainable = wrap_lora(model, recipe.model)
    counts = freeze(trainable, recipe.model.stage, part_overrides(recipe.model))
    dataset = build_dataset(recipe.data, processor, data_seed(recipe.training))
    eval_dataset = build_eval_dataset(recipe.data, processor)
    features = cache_features(recipe, model, processor, [dataset, *([eval_dataset] if eval_dataset else [])])
    write_provenance(recipe, weighting)

    trainer = VlmTrainer(
        model=trainable,
        args=recipe.training,
        processor=processor,
        weighting=weighting,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        train_sampler=build_sampler(recipe, dataset),
        eval_dataset=eval_dataset,
        mm_projector_lr=recipe.model.mm_projector_lr,
        vision_tower_lr=recipe.model.vision_tower_lr,
        max_bad_samples=recipe.data.max_bad_samples,
        has_cached_features=features is not None,
    )
    announce(recipe, weighting, dataset, counts)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    report_end(trainer, recipe)
    return output_folder(recipe.training)


def weighting_of(cal: CalArguments) -> TokenWeighting | None:
    """Return how label tokens are weighted; None (stock loss) when CAL is off and no other normaliser is asked for."""
    strategy = cal.cal_strategy if cal.cal else "uniform"
    weighting = resolve_weighting(
        strategy, cal.cal_low, cal.cal_high, cal.cal_window, cal.cal_ablation, cal.cal_scope, cal.loss_normalizer
    )
    return weighting if cal.cal or cal.loss_normalizer else None


def load_model(model_args: ModelArguments, args: VlmTrainingArguments) -> PreTrainedModel:
    """Return the VLM in training precision.

    Raises:
        ValueError: If the folder holds a model of a family that is not supported.
    """
    folder = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model; supported are {', '.join(FAMILIES)}. Build one from parts "
            "with `cal-train compose`"
        )
    if model_args.mm_vision_select_layer is not None:
        if model_args.lora_enable:
            raise ValueError(
                "mm_vision_select_layer cannot be changed in a LoRA run, whose adapter would not remember it: choose "
                "the layer in `cal-train compose` or in stage 1"
            )
        config.vision_feature_layer = model_args.mm_vision_select_layer
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if args.deepspeed_plugin is not None and args.bf16 else "float32"
    attention = model_args.attn_implementation or (
        "flash_attention_2" if is_flash_attn_2_available() and (args.bf16 or dtype == "bfloat16") else "sdpa"
    )
    return AutoModelForImageTextToText.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), attn_implementation=attention_per_part(attention)
    )


def attention_per_part(name: str) -> str | dict[str, str]:
    """Return what ``from_pretrained`` takes to give the parts of a VLM their attention.

    FlashAttention is for the language model, whose padded rows it leaves out. A tower has nothing to leave out, so that
    ``sdpa`` is as fast for it; and ``sdpa`` also takes float32, in which the feature cache runs a tower.
    """
    return {"text_config": name, "vision_config": "sdpa"} if name.startswith("flash") else name


def drop_idle_sampling_options(model: PreTrainedModel) -> None:
    """Unset sampling options where generation does not sample: it ignores them, and transformers refuses to save them.

    The run would end at its first checkpoint.

    Raises:
        ValueError: If the generation configuration is contradictory in another way.
    """
    config = model.generation_config
    idle = () if config.do_sample else SAMPLING_OPTIONS
    dropped = [name for name in idle if getattr(config, name, None) is not None]
    for name in dropped:
        setattr(config, name, None)
    if dropped:
        logger.warning("generation_config: %s dropped, do_sample is not set", ", ".join(dropped))
    config.validate(strict=True)


def part_overrides(model_args: ModelArguments) -> dict[Part, bool | None]:
    """Return the recipe's choice per part; None leaves it to the stage."""
    return {
        "projector": model_args.tune_projector,
        "language_model": model_args.tune_language_model,
        "vision_tower": model_args.tune_vision_tower,
        "image_newline": model_args.tune_image_newline,
    }


def wrap_lora(model: PreTrainedModel, model_args: ModelArguments) -> nn.Module:
    """Return the model itself, or a peft wrapper with adapters on the language model."""
    if not model_args.lora_enable:
        return model
    return add_lora(
        model, model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout, model_args.lora_target_modules
    )


def cache_features(
    recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, datasets: Sequence[VlmDataset]
) -> FeatureCache | None:
    """Fill the feature cache for every image of the run, if the recipe asks for it, and let the data sets read it."""
    if recipe.data.vision_feature_cache is None:
        return None
    args = recipe.training
    cache = FeatureCache(Path(recipe.data.vision_feature_cache), model, processor)
    for dataset in datasets:
        cache.fill(
            dataset,
            args.device,
            args.dataloader_num_workers,
            args.process_index,
            args.world_size,
            show_progress=not args.disable_tqdm,
        )
        dataset.load_features = cache
    return cache


def build_sampler(recipe: Recipe, dataset: VlmDataset) -> ShuffledSampler:
    """Return the order of rows, a function of (seed, epoch)."""
    args = recipe.training
    if not recipe.data.group_by_modality_length:
        return ShuffledSampler(dataset, data_seed(args))
    with args.main_process_first(local=False, desc="image sizes"):  # the others find the file
        dataset.measure(output_folder(args) / "image_sizes.npz", show_progress=not args.disable_tqdm)
    return ModalityLengthSampler(dataset, rows_per_step(args), data_seed(args))


def rows_per_step(args: VlmTrainingArguments) -> int:
    """Return the rows of one optimizer step over all ranks."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def write_provenance(recipe: Recipe, weighting: TokenWeighting | None) -> None:
    """Write the resolved recipe, versions, commit, seed and weighting into the run folder, before step 1."""
    facts = {"token_weighting": None if weighting is None else dataclasses.asdict(weighting)}
    write_record(recipe.training, [recipe.model, recipe.data, recipe.cal], facts)


def announce(recipe: Recipe, weighting: TokenWeighting | None, dataset: VlmDataset, counts: list[PartCount]) -> None:
    """Log what is about to happen, one line per fact."""
    args = recipe.training
    logger.info(
        "%d rows; %d per step = %d per device x %d accumulated x %d ranks",
        len(dataset),
        rows_per_step(args),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    for count in counts:
        logger.info("%s", count)
    logger.info("CAL: %s", "off" if weighting is None or weighting.ablation is None else weighting)


def report_end(trainer: VlmTrainer, recipe: Recipe) -> None:
    """Log where the result is, what was dropped, and the command to run next."""
    folder = output_folder(recipe.training)
    if trainer.dropped.count:
        logger.warning("%d bad rows were dropped on rank %d:", trainer.dropped.count, recipe.training.process_index)
        for problem in trainer.dropped.problems[:10]:
            logger.warning("  %s", problem)
    if recipe.model.lora_enable:
        logger.info("adapters saved. Next: cal-train merge --adapter %s --output %s-merged", folder, folder)
    elif recipe.model.stage == "pretrain":
        logger.info("saved. Next: cal-train train FINETUNE.yaml --model_name_or_path %s", folder)
    else:
        source = training_sources(recipe.data)[0]
        command = f"cal-train score --model {folder} --data {source.path} --image_root {source.root}"
        if recipe.data.image_position != "keep":
            command += f" --image_position {recipe.data.image_position}"
        logger.info("saved. Next: %s --output scores.jsonl", command)
