"""Is a run that goes on from a checkpoint the run that wrote it? Asked before anything is loaded.

Otherwise the Trainer goes on without a word: with another batch size from another place in the data, with another
``max_steps`` on another learning-rate schedule, with another engine without the optimizer's state.
"""

import dataclasses
import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cal_train.conf import CalArguments, DataArguments, ModelArguments
from cal_train.data.sources import training_sources
from cal_train.data.stream_files import source_files
from cal_train.train.provenance import RECORDS, read_record

logger = logging.getLogger(__name__)

FREE = frozenset(
    "attn_implementation max_bad_samples eval_data_path vision_feature_cache bnb_4bit_compute_dtype "
    "grad_cache_chunk batch_timeout_s".split()
)
"""Options of model and data that change nothing that is computed, save rounding, or only what is evaluated."""

VLM_GROUPS = (ModelArguments, DataArguments, CalArguments)

TRAINING = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay max_grad_norm optim "
    "optim_args adam_beta1 adam_beta2 adam_epsilon seed data_seed bf16 fp16 dataloader_drop_last neftune_noise_alpha "
    "max_steps num_train_epochs"
).split()
"""Arguments of Hugging Face that decide what a step does to the weights. Logging, saving, evaluation, workers and
checkpointing of activations are free."""

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
LENGTH = ("max_steps", "num_train_epochs")
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Learning rates that do not depend on how long the run is to be: it may be made longer or shorter at any time."""


def data_files(data: DataArguments) -> list[Path]:
    """Return the files that a recipe trains on."""
    paths = [str(source.path) for source in training_sources(data)]
    return [file for path in paths for file in (source_files(path) if data.streaming else [Path(path)])]


def facts_to_compare(args: TrainingArguments, files: Sequence[Path]) -> dict[str, Any]:
    """Return what is compared besides options: ranks, engine, and the size in bytes of every data file."""
    plugin = args.deepspeed_plugin
    engine = "FSDP" if args.fsdp_plugin_args else "DDP" if plugin is None else f"DeepSpeed ZeRO-{plugin.zero_stage}"
    return {
        "world_size": args.world_size,
        "engine": engine,
        "data_files": {str(file): file.stat().st_size for file in files if file.is_file()},
    }


def check_same_run(
    checkpoint: str, now: Mapping[str, Any], resume_changes: Sequence[str] | None, groups: Sequence[type] = VLM_GROUPS
) -> None:
    """Compare a checkpoint's record with the options of the run that is to go on from it.

    Args:
        checkpoint: Its folder.
        now: Options of the run (`cal_train.train.run_folder.resolved`) and `facts_to_compare`.
        resume_changes: Options that may differ.
        groups: Dataclasses of the options that are compared besides those of `TRAINING` and `BATCH`.

    Raises:
        ValueError: If others differ, naming all of them, or an option that may differ is none.
    """
    allowed, names = set(resume_changes or ()), compared(now, groups)
    if unknown := sorted(allowed - set(names)):
        raise ValueError(
            f"resume_changes: {', '.join(unknown)} is not compared on resume; these are: {', '.join(names)}"
        )
    before = read_record(Path(checkpoint))
    if not before:
        logger.warning("%s holds no %s: its options are not compared with those of this run", checkpoint, RECORDS[0])
        return
    differing = [name for name in names if name in before and before[name] != now[name]]
    refused, tolerated = [], []
    for name in differing:
        is_fine = name in allowed or _is_harmless(name, before, now)
        (tolerated if is_fine else refused).append(_told(name, before[name], now[name]))
    if refused:
        raise ValueError(
            f"{checkpoint} is of a run with other options: {'; '.join(refused)}. Set them back to go on with it, start "
            "a new run in another output_dir (from its model, with model_name_or_path), or name what may differ: "
            f"resume_changes: [{', '.join(_option(text) for text in refused)}]"
        )
    for text in tolerated:
        logger.warning("resuming with a change: %s; the run will not end as it would have", text)


def compared(now: Mapping[str, Any], groups: Sequence[type]) -> list[str]:
    """Return the names of the options and facts that are compared."""
    own = [field.name for group in groups for field in dataclasses.fields(group) if field.name not in FREE]
    return [name for name in (*own, *TRAINING, *BATCH, "engine", "data_files") if name in now]


def _is_harmless(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name in LENGTH:
        return now["lr_scheduler_type"] in SCHEDULES_WITHOUT_END
    if name in BATCH:  # the same rows per step, dealt out otherwise
        sizes: list[Any] = [before.get(part) for part in BATCH]
        is_known = all(isinstance(size, int) for size in sizes)
        same_rows = is_known and math.prod(sizes) == math.prod(now[part] for part in BATCH)
        is_ddp = now["engine"] == before.get("engine") == "DDP"
        return same_rows and is_ddp and now.get("loss_normalizer") != "micro_batch"
    return False


def _told(name: str, was: Any, now: Any) -> str:
    """Say what has changed, in short: of the files of a data set, a few of those that differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        differing = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        was, now = ({key: side[key] for key in differing if key in side} for side in (was, now))
    short = reprlib.Repr()
    short.maxstring, short.maxother, short.maxdict = 200, 200, 3
    return f"{name} was {short.repr(was)} and is {short.repr(now)}"


def _option(text: str) -> str:
    return text.split(" ", 1)[0]
