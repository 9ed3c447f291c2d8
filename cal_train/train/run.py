"""A training run from recipe to result folder, as a table of contents."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from cal_train.cal.strategies import TokenWeighting, resolve_weighting
from cal_train.conf import CalArguments, ModelArguments, Recipe, VlmTrainingArguments
from cal_train.data.collate import Collator
from cal_train.data.dataset import build_eval_dataset
from cal_train.data.processor import load_processor
from cal_train.data.sources import training_sources
from cal_train.folders import from_folder
from cal_train.models.anyres import check_grids
from cal_train.models.families import FAMILIES
from cal_train.models.lora import add_lora
from cal_train.models.mgm_hd import for_grid, with_grid
from cal_train.models.parts import Part, PartCount, freeze
from cal_train.models.quantize import check_quantized, keep_layout, quantization_settings
from cal_train.models.tower import require_hidden_state
from cal_train.models.vocabulary import stop_token_ids
from cal_train.train.batches import check_same_rows
from cal_train.train.engines import NOTHING_ASKED, Asked, check_engine, check_ranks, keep_layer_names, keep_names
from cal_train.train.resume_check import check_same_run, data_files, facts_to_compare
from cal_train.train.run_data import TrainingRows, cache_features, go_on, pack_tokens, rows_per_step, training_rows
from cal_train.train.run_folder import (
    checkpoint_to_resume,
    output_folder,
    resolved,
    set_up_logging,
    train_until_stopped,
    write_record,
)
from cal_train.train.stored_scores import read_deltas
from cal_train.train.suite_evaluation import EvaluateCheckpoint, SuiteEvaluation
from cal_train.train.trainer import VlmTrainer

logger = logging.getLogger(__name__)

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation options that only sampling reads."""


def train(recipe: Recipe, asked: Asked = NOTHING_ASKED, evaluate_checkpoint: EvaluateCheckpoint | None = None) -> Path:
    """Run a recipe and return the folder with the trained model, in plain Hugging Face layout.

    Args:
        recipe: All options.
        asked: Engine and ranks that the launcher asks for; a run with others is refused.
        evaluate_checkpoint: What is done with each checkpoint by ``eval_suite``.
    """
    set_up_logging(recipe.training)
    check_ranks(asked, recipe.training)
    resume = checkpoint_to_resume(recipe.training)
    facts = facts_to_compare(recipe.training, data_files(recipe.data))
    if resume is not None:
        now = resolved(recipe.training, option_groups(recipe)) | facts
        check_same_run(resume, now, recipe.training.resume_changes)
    weighting = weighting_of(recipe.cal)
    set_seed(recipe.training.seed)
    if not torch.cuda.is_available():
        recipe.training.dataloader_pin_memory = False  # it warns where there is nothing to pin for

    processor = load_processor(recipe.model.model_name_or_path, recipe.data.template, recipe.model.image_aspect_ratio)
    model = load_model(recipe.model, recipe.training)
    if recipe.model.image_grid is not None:
        processor = for_grid(model.config, processor)
    check_grids(model.config, processor, recipe.model.model_name_or_path)
    model.generation_config.eos_token_id = stop_token_ids(processor.tokenizer, cast(str, processor.chat_template))
    drop_idle_sampling_options(model)
    trainable = wrap_lora(model, recipe.model)
    counts = freeze(trainable, recipe.model.stage, part_overrides(recipe.model))
    collate = Collator(processor.tokenizer.pad_token_id, pack_tokens(recipe, model, weighting))
    rows = training_rows(recipe, processor, collate)
    check_same_rows(rows.num_rows, facts["data_files"])
    eval_dataset = build_eval_dataset(recipe.data, processor)
    datasets = [dataset for dataset in (rows.dataset, eval_dataset) if dataset is not None]
    features = cache_features(recipe, model, processor, datasets)
    has_stored_deltas = rows.dataset is not None and read_deltas(recipe, weighting, rows.dataset)
    go_on(rows, resume, recipe.training)
    write_provenance(recipe, weighting, facts)

    trainer = VlmTrainer(
        model=trainable,
        args=recipe.training,
        processor=processor,
        weighting=weighting,
        train_dataset=rows.dataset,
        data_collator=collate,
        train_sampler=rows.sampler,
        train_loader=rows.loader,
        eval_dataset=eval_dataset,
        mm_projector_lr=recipe.model.mm_projector_lr,
        vision_tower_lr=recipe.model.vision_tower_lr,
        max_bad_samples=recipe.data.max_bad_samples,
        has_cached_features=features is not None,
        has_stored_deltas=has_stored_deltas,
    )
    if evaluate_checkpoint is not None:
        trainer.add_callback(SuiteEvaluation(trainer, evaluate_checkpoint))
    check_engine(asked, trainer)
    announce(recipe, weighting, rows, counts)
    train_until_stopped(trainer, resume)
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
    config = from_folder(AutoConfig, folder)
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
        require_hidden_state(config.vision_config, model_args.mm_vision_select_layer)
        config.vision_feature_layer = model_args.mm_vision_select_layer
    if model_args.image_grid is not None:
        config = with_grid(config, model_args.image_grid, folder)
    dtype = model_args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if args.deepspeed_plugin is not None and args.bf16 else "float32"
    attention = model_args.attn_implementation or (
        "flash_attention_2" if is_flash_attn_2_available() and (args.bf16 or dtype == "bfloat16") else "sdpa"
    )
    model = from_folder(
        AutoModelForImageTextToText,
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=attention_per_part(attention),
        **quantized_loading(config, model_args, args),
    )
    keep_names(model)
    keep_layer_names(model)
    if model_args.quantization is not None:
        keep_layout(model)
        logger.info("%d linear layers in %s", check_quantized(model), model_args.quantization)
    return model


def quantized_loading(
    config: PreTrainedConfig, model_args: ModelArguments, args: VlmTrainingArguments
) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs besides to quantise the language model; nothing if it is not to.

    Raises:
        ValueError: If an option of LoRA or of quantization stands alone, or the weights are to be split over ranks.
    """
    kind = model_args.quantization
    if model_args.use_dora and not model_args.lora_enable:
        raise ValueError("use_dora is a form of LoRA: add lora_enable: true, or leave it out")
    if kind is None:
        return {}
    if not model_args.lora_enable:
        raise ValueError(
            f"quantization={kind} without lora_enable: quantised weights cannot be trained, only adapters on them. "
            "Add lora_enable: true, or leave out quantization"
        )
    deepspeed = args.deepspeed_plugin
    if args.fsdp_plugin_args or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ValueError(
            f"quantization={kind} is not possible with weights split over ranks: use DDP, ZeRO-1 or ZeRO-2"
        )
    compute = model_args.bnb_4bit_compute_dtype
    if compute == "auto":
        compute = "bfloat16" if args.bf16 else "float32"
    settings = quantization_settings(config, kind, getattr(torch, compute), model_args.bnb_4bit_use_double_quant)
    return {"quantization_config": settings, "device_map": {"": str(args.device)}}


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
        model,
        model_args.lora_r,
        model_args.lora_alpha,
        model_args.lora_dropout,
        model_args.lora_target_modules,
        model_args.use_dora,
    )


def option_groups(recipe: Recipe) -> list[Any]:
    """Return the dataclasses of a recipe besides Hugging Face's."""
    return [recipe.model, recipe.data, recipe.cal]


def write_provenance(recipe: Recipe, weighting: TokenWeighting | None, facts: Mapping[str, Any]) -> None:
    """Write the resolved recipe, versions, commit, seed, weighting and facts into the run folder, before step 1."""
    weights = {"token_weighting": None if weighting is None else dataclasses.asdict(weighting)}
    write_record(recipe.training, option_groups(recipe), {**weights, **facts})


def announce(recipe: Recipe, weighting: TokenWeighting | None, rows: TrainingRows, counts: list[PartCount]) -> None:
    """Log what is about to happen, one line per fact."""
    args = recipe.training
    logger.info(
        "%d rows; %d per step = %d per device x %d accumulated x %d ranks",
        rows.num_rows,
        rows_per_step(args),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    if left_out := rows.left_out(args.world_size):
        logger.info("%d rows of each epoch, others each time, do not fill a batch of every rank: left out", left_out)
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
    elif recipe.data.streaming:  # `score` reads single files
        logger.info("saved in %s", folder)
    else:
        source = training_sources(recipe.data)[0]
        command = f"cal-train score --model {folder} --data {source.path} --image_root {source.root}"
        if recipe.data.image_position != "keep":
            command += f" --image_position {recipe.data.image_position}"
        logger.info("saved. Next: %s --output scores.jsonl", command)
