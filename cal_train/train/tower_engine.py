"""What DeepSpeed and FSDP2 need to know of two towers and an objective, which are no Hugging Face model.

Under DeepSpeed the parameters in the model are copies: the optimizer works on parameters of its own, split over ranks,
and writes them back after each step. Under ZeRO-3 the copies are split as well, and whole only inside the forward of
the module that owns them.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from cal_train.train.tower_model import TowerModel, objective_of


def fill_batch_size(args: TrainingArguments) -> None:
    """Write the batch size into DeepSpeed's settings, which took it before ``global_batch_size`` was looked at."""
    settings = getattr(args, "hf_deepspeed_config", None)
    if settings is not None:
        per_device = args.per_device_train_batch_size
        settings.config["train_micro_batch_size_per_gpu"] = per_device
        settings.config["train_batch_size"] = per_device * args.gradient_accumulation_steps * args.world_size


def check_tower_engine(accelerator: Accelerator, grad_cache_chunk: int | None, is_best_loaded: bool) -> None:
    """Refuse what would be wrong or lost under DeepSpeed or FSDP.

    Raises:
        ValueError: Naming the option and what to set.
    """
    plugin, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.zero_stage == 0:
        raise ValueError("DeepSpeed without ZeRO (stage 0) is not for towers: take zero_configs/ddp.yaml")
    if plugin is not None and plugin.zero_stage == 3:
        gather = plugin.hf_ds_config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
        if gather is not True:
            raise ValueError(
                "stage3_gather_16bit_weights_on_model_save is off, with which no towers would be saved: set it to true "
                "in DeepSpeed's file, as in zero_configs/zero3.json"
            )
    if fsdp is None:
        return
    if grad_cache_chunk is not None:
        raise ValueError(
            f"grad_cache_chunk={grad_cache_chunk} is not possible under FSDP, whose parameters are split between the "
            "two passes: use zero_configs/zero3.yaml, zero2.yaml or ddp.yaml"
        )
    if fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading would leave the towers of all ranks but one empty while they are set up: "
            "add --fsdp_cpu_ram_efficient_loading false to the command"
        )
    if is_best_loaded:
        raise ValueError("load_best_model_at_end is not possible for towers under FSDP: leave it out")


def fill_settings(model: TowerModel, accelerator: Accelerator) -> None:
    """Fill in the engine's settings what the Trainer cannot: precision, and sizes that depend on the model."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        fsdp.mixed_precision_policy = MixedPrecisionPolicy()  # float32 where they are whole too, under autocast
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        _fill_bucket_sizes(model, plugin.hf_ds_config.config["zero_optimization"])
        if plugin.hf_ds_config.is_true("bf16.enabled"):
            _use_float32_weights(plugin)


def _use_float32_weights(plugin: DeepSpeedPlugin) -> None:
    """Let DeepSpeed train float32 weights under autocast for ``bf16``, as every other engine does.

    It would cast the model to bf16, in which a logit scale near 100 moves in steps of 3. Its optimizer keeps float32
    weights either way, so that memory differs little.
    """
    hf_config: Any = plugin.hf_ds_config
    for settings in (plugin.deepspeed_config, hf_config.config):
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    hf_config._dtype = torch.float32  # that of the batches


def _fill_bucket_sizes(model: TowerModel, zero: dict[str, Any]) -> None:
    """Say what ``auto`` means for buckets, which the Trainer computes from a configuration that towers lack."""
    width = max(model.towers.shape.vision_width, model.towers.shape.text_width)
    automatic = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for name, value in automatic.items():
        if zero.get(name) == "auto":
            zero[name] = value


def gather_with_root(model: TowerModel) -> None:
    """Let ZeRO-3 hold the objective's own parameters whole during each step, as the root's own.

    They are read by methods of the objective, around which it does not look; those of PyTorch's layers are read inside
    these layers.
    """
    own = (module for module in model.objective.modules() if not type(module).__module__.startswith("torch."))
    split = [p for module in own for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    if split:
        import deepspeed

        for parameter in split:
            deepspeed.zero.register_external_parameter(model, parameter)


@torch.no_grad()
def clamp_objective(model: TowerModel, is_deepspeed: bool) -> None:
    """Call the objective's ``clamp_``, and tell DeepSpeed's optimizer of what it changed.

    Numbers are all that objectives clamp; any other change would be lost at the next step.
    """
    if not is_deepspeed:
        objective_of(model).clamp_()
        return
    import deepspeed

    numbers = [p for p in model.objective.parameters() if p.requires_grad and getattr(p, "ds_numel", p.numel()) == 1]
    with deepspeed.zero.GatheredParameters(numbers, modifier_rank=0):
        before = [number.detach().clone() for number in numbers]
        objective_of(model).clamp_()
        changed = [(p, p.detach().clone()) for p, old in zip(numbers, before, strict=True) if not torch.equal(p, old)]
    for parameter, value in changed:
        _set_optimizers_copy(parameter, value)


def _set_optimizers_copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):  # of a single number each rank's part is the number, or padding
        safe_set_local_fp32_param(parameter, value.float())
    else:
        safe_set_full_fp32_param(parameter, value.float())


def chunk_by_chunk(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """Return ``backward`` and ``no_sync`` of `grad_cache_step` for a model as its engine has wrapped it."""
    if accelerator.state.deepspeed_plugin is None:
        return {"backward": accelerator.backward, "no_sync": functools.partial(accelerator.no_sync, model=model)}
    backward = functools.partial(accelerator.backward, scale_wrt_gas=False)
    return {"backward": backward, "no_sync": functools.partial(_step_held, accelerator)}


@contextlib.contextmanager
def _step_held(accelerator: Accelerator) -> Iterator[None]:
    """Let DeepSpeed's ``backward`` add up gradients inside ``with`` without taking the optimizer step."""
    before = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(before)
