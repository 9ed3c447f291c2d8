"""The engine that splits a run over ranks: is it the one that was asked for, and does its checkpoint read like others.

accelerate and the Trainer change to another engine, or to one process, without a word: FSDP on a CPU becomes DDP,
DeepSpeed with a CPU flag becomes DDP, ``--cpu --num_processes 2`` is one process. A run that was sized for sharded
parameters or for eight ranks is then another run. What a launcher asks for is in its environment variables.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import DistributedType
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import deepspeed as deepspeed_settings

STARTS = "start it with `accelerate launch --config_file zero_configs/NAME.yaml -m cal_train ...`"


@dataclass(frozen=True)
class Asked:
    """What the launcher of a process asks for."""

    deepspeed: bool = False
    fsdp: bool = False
    num_ranks: int = 1
    """Smallest number of ranks that the launch can mean."""


NOTHING_ASKED = Asked()


def asked_by(environment: Mapping[str, str]) -> Asked:
    """Return what a launcher's environment variables ask for (accelerate, torchrun, DeepSpeed, SLURM's ``srun``)."""
    num_ranks = int(environment.get("WORLD_SIZE", 1))
    if "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        num_ranks = 2  # accelerate sets the port alone when it starts one process in the place of several
    return Asked(
        deepspeed=environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"),
        fsdp=environment.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"),
        num_ranks=max(num_ranks, int(environment.get("SLURM_STEP_NUM_TASKS", 1))),
    )


def check_ranks(asked: Asked, args: TrainingArguments) -> None:
    """Refuse a run on fewer ranks than were started: each would train on its own and write the same files.

    Raises:
        ValueError: If there are fewer.
    """
    if args.world_size < asked.num_ranks:
        raise ValueError(
            f"the launcher asks for {asked.num_ranks} ranks or more, this run has {args.world_size}. With `accelerate "
            "launch` take zero_configs/cpu2.yaml for several processes on a CPU, instead of --cpu; under `srun` start "
            "one launcher per node (recipes/slurm.sh), not the program itself"
        )


def check_engine(asked: Asked, trainer: Trainer) -> None:
    """Refuse a run whose engine is not the one that recipe and launcher ask for, or would not save a model.

    Raises:
        ValueError: If DeepSpeed or FSDP was asked for and something else runs; if FSDP is the old version or keeps
            the state dict in shards; if DeepSpeed's file names an optimizer while parts have learning rates.
    """
    args, state = trainer.args, trainer.accelerator.state
    running = state.distributed_type
    for name, is_asked, kind in (
        ("DeepSpeed", asked.deepspeed or bool(args.deepspeed), DistributedType.DEEPSPEED),
        ("FSDP", asked.fsdp or bool(args.fsdp), DistributedType.FSDP),
    ):
        if is_asked and running != kind:
            on_cpu = " on a CPU" if args.device.type == "cpu" else ""
            raise ValueError(
                f"{name} was asked for, but the engine that runs is {running.value}{on_cpu}: accelerate falls back "
                f"without a word. {_cure(name, args)}"
            )
    if running == DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin)


def _cure(name: str, args: TrainingArguments) -> str:
    if name == "FSDP" and args.device.type == "cpu":
        return "FSDP needs GPUs here: take zero_configs/cpu2.yaml or DeepSpeed (zero2.yaml, zero3.yaml) on a CPU"
    if name == "DeepSpeed" and args.device.type == "cpu":
        return "Leave out --cpu and use_cpu of the launcher and ACCELERATE_USE_CPU: they switch DeepSpeed off"
    return STARTS.capitalize()


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("this is FSDP 1, under which the CAL step was never tried: set fsdp_version: 2")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type is {plugin.state_dict_type}, with which the Trainer writes no model at the end: set "
            "fsdp_state_dict_type: FULL_STATE_DICT (zero_configs/fsdp2.yaml)"
        )


def keep_names(model: PreTrainedModel) -> None:
    """Let a model that was loaded under ZeRO-3 be saved under the names that its folder had.

    transformers remembers which renamings a load went through and turns them round when it saves. Without ZeRO-3 it
    remembers those that fitted a weight; with ZeRO-3 all that exist for the class, so that prefixes would be doubled
    (``language_model.model.model.``).
    """
    renamings = vars(model).get("_weight_conversions")
    if renamings is not None:
        vars(model)["_weight_conversions"] = [renaming for renaming in renamings if renaming.was_used()]


def keep_layer_names(model: PreTrainedModel) -> None:
    """Leave in the model's list of layer classes those that it has, for FSDP2 to split by.

    CLIP's list names classes of its text half, which a vision tower lacks, and accelerate stops at the first of them.
    """
    present = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = sorted(present.intersection(model._no_split_modules or ()))


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Build models inside ``with`` as if ZeRO-3 were not on, where transformers would split them while they are built.

    For models that are needed for their shapes alone; and for towers, which are small, and are measured and resized
    before each rank splits its own.
    """
    reference = deepspeed_settings._hf_deepspeed_config_weak_ref
    settings = None if reference is None else reference()
    deepspeed_settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            deepspeed_settings.set_hf_deepspeed_config(settings)
