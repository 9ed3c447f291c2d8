"""A tower run from recipe to result folder, as a table of contents."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed

from cal_train.conf_towers import TowerArguments, TowerEvalArguments, TowerTrainingArguments
from cal_train.data.images import ImageLimits
from cal_train.data.pair_batches import BatchMaker, CaptionEncoder, pair_stream
from cal_train.data.pair_images import training_transform
from cal_train.data.pairs import PairOptions, pair_sources
from cal_train.data.stream_files import source_files
from cal_train.data.stream_loader import StreamLoader
from cal_train.data.stream_plan import Share
from cal_train.objectives.families import build_objective
from cal_train.train.engines import NOTHING_ASKED, Asked, check_engine, check_ranks, whole_weights
from cal_train.train.resume_check import check_same_run, facts_to_compare
from cal_train.train.run_folder import (
    checkpoint_to_resume,
    data_seed,
    output_folder,
    resolved,
    set_up_logging,
    train_until_stopped,
    write_record,
)
from cal_train.train.tower_engine import fill_batch_size
from cal_train.train.tower_groups import part_of
from cal_train.train.tower_model import TowerModel
from cal_train.train.tower_parts import Processors, build_towers, image_processor_of, load_tokenizer, objective_options
from cal_train.train.tower_trainer import Evaluate, TowerTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerRecipe:
    """All options of one tower run."""

    towers: TowerArguments
    data: PairOptions
    evaluation: TowerEvalArguments
    training: TowerTrainingArguments


MakeEvaluation = Callable[[Processors, int], Evaluate]
"""Returns how a model is measured during training, given processors and context length."""


def train_towers(
    recipe: TowerRecipe,
    make_evaluation: MakeEvaluation | None = None,
    asked: Asked = NOTHING_ASKED,
) -> Path:
    """Run a recipe and return the folder with the trained towers and objective.

    Args:
        recipe: All options.
        make_evaluation: What to measure every ``eval_steps``; None for nothing.
        asked: Engine and ranks that the launcher asks for; a run with others is refused.
    """
    args = recipe.training
    set_up_logging(args)
    check_ranks(asked, args)
    resume = checkpoint_to_resume(args)
    set_batch_size(args, recipe.towers)
    set_seed(args.seed)

    tokenizer = load_tokenizer(recipe.towers)
    with whole_weights():
        towers = build_towers(recipe.towers, tokenizer)
    processors = Processors(image_processor_of(recipe.towers, towers), tokenizer)
    options = objective_options(recipe.towers, batch_of_all_ranks(args))
    groups, facts = [recipe.towers, recipe.data, recipe.evaluation], facts_of(recipe, options)
    if resume is not None:
        now = resolved(args, groups) | facts
        check_same_run(resume, now, args.resume_changes, (TowerArguments, PairOptions))
    objective = build_objective(recipe.towers.objective, towers.shape, options)
    model = TowerModel(towers, cast(Any, objective))
    loader = build_loader(recipe.data, args, processors, towers.shape.context_length)
    evaluation = make_evaluation(processors, towers.shape.context_length) if make_evaluation is not None else None
    write_record(args, groups, facts)

    trainer = TowerTrainer(
        model=model,
        args=args,
        objective_name=recipe.towers.objective,
        objective_options=options,
        loader=loader,
        save_processors=processors.save,
        evaluate_model=evaluation,
        group_options=group_options(recipe.towers),
        grad_cache_chunk=recipe.towers.grad_cache_chunk,
    )
    check_engine(asked, trainer)
    announce(recipe, model, loader)
    train_until_stopped(trainer, resume)
    trainer.save_model()
    trainer.save_state()
    report_end(trainer, recipe)
    return output_folder(args)


def facts_of(recipe: TowerRecipe, objective_options: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded, and compared on resume, besides the options as they are given."""
    files = [file for source in pair_sources(recipe.data) for file in source_files(source.path)]
    return facts_to_compare(recipe.training, files) | {"objective_options": objective_options}


def set_batch_size(args: TowerTrainingArguments, towers: TowerArguments) -> None:
    """Give every rank its share of ``global_batch_size``, and check what depends on it.

    Raises:
        ValueError: If the number of ranks does not divide the batch, or an option is out of range.
    """
    total, chunk = towers.global_batch_size, towers.grad_cache_chunk
    if chunk is not None and chunk < 1:
        raise ValueError(f"grad_cache_chunk={chunk} must be at least 1; null turns it off")
    if total is None:
        return
    share, rest = divmod(total, args.world_size)
    if rest or share < 1:
        nearest = max(round(total / args.world_size), 1) * args.world_size
        raise ValueError(
            f"global_batch_size={total} cannot be dealt evenly to {args.world_size} ranks: use {nearest}, or start "
            "another number of processes"
        )
    args.per_device_train_batch_size = share
    fill_batch_size(args)


def batch_of_all_ranks(args: TowerTrainingArguments) -> int:
    """Return the pairs that are contrasted with each other."""
    return args.per_device_train_batch_size * args.world_size


def build_loader(
    data: PairOptions, args: TowerTrainingArguments, processors: Processors, context_length: int
) -> StreamLoader:
    """Return this rank's batches."""
    maker = BatchMaker(
        training_transform(processors.image_processor, data.min_crop_scale),
        CaptionEncoder(processors.tokenizer, context_length),
        data.captions_per_image,
        data.multiple_positives,
        ImageLimits(data.max_image_pixels, data.min_image_side),
    )
    stream = pair_stream(
        pair_sources(data),
        maker,
        args.per_device_train_batch_size,
        Share(args.process_index, args.world_size),
        data.shuffle_pool,
        data_seed(args),
    )
    return StreamLoader(
        stream,
        args.dataloader_num_workers,
        data.max_bad_samples,
        data.batch_timeout_s,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
    )


def group_options(towers: TowerArguments) -> dict[str, Any]:
    """Return the keyword arguments of `tower_groups` that a recipe decides."""
    sources = {"vision": towers.vision_tower, "text": towers.text_tower}
    return {
        "vision_tower_lr": towers.vision_tower_lr,
        "text_tower_lr": towers.text_tower_lr,
        "pretrained": [part for part, source in sources.items() if isinstance(source, str)],
        "pretrained_weight_decay": towers.pretrained_weight_decay,
    }


def announce(recipe: TowerRecipe, model: TowerModel, loader: StreamLoader) -> None:
    """Log what is about to happen, one line per fact."""
    args, plan = recipe.training, loader.stream.plan
    logger.info(
        "%s; %d pairs contrasted = %d per device x %d ranks; %d batches per epoch, %d rows left out of each",
        recipe.towers.objective,
        batch_of_all_ranks(args),
        args.per_device_train_batch_size,
        args.world_size,
        len(loader),
        plan.left_out(args.world_size),
    )
    if args.gradient_accumulation_steps > 1:
        logger.info(
            "gradients of %d batches are averaged per step; a pair meets only those of its own batch: use "
            "global_batch_size with grad_cache_chunk for more of them",
            args.gradient_accumulation_steps,
        )
    totals: dict[str, list[int]] = {"vision": [0, 0], "text": [0, 0], "objective": [0, 0]}
    for name, parameter in model.named_parameters():
        totals[part_of(name)][0] += parameter.numel() if parameter.requires_grad else 0
        totals[part_of(name)][1] += parameter.numel()
    for part, (trained, total) in totals.items():
        logger.info("%s: %s of %s parameters trained", part, f"{trained:,}", f"{total:,}")


def report_end(trainer: TowerTrainer, recipe: TowerRecipe) -> None:
    """Log where the result is, what was left out, and the command to run next."""
    folder, report = output_folder(recipe.training), trainer.loader.report
    if report.bad.count:
        logger.warning("%d bad rows were left out on rank %d", report.bad.count, recipe.training.process_index)
    logger.info("saved. Next: cal-train export_tower --checkpoint %s --output %s-vision", folder, folder)
    logger.info("or measure it: cal-train eval_tower --checkpoint %s --data PAIRS", folder)
