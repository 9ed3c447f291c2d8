"""Training steps of towers under FSDP2 on gloo ranks. `test_tower_engines.py` holds them against one process.

    torchrun towers_fsdp2_on_ranks.py OUT

accelerate does not run FSDP on a CPU, so `fully_shard` is called here, on the layers that accelerate would take.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cal_train.objectives.families import build_objective
from cal_train.objectives.gather import ONE_RANK, current_ranks
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.train.tower_checkpoint import load_tower_weights, save_tower_model
from cal_train.train.tower_engine import clamp_objective
from cal_train.train.tower_metrics import batch_metrics, scale_metrics
from cal_train.train.tower_model import TowerModel, whole_step

OBJECTIVES = {
    "clip": {"init_scale": 1.0},  # at its limit, which the first steps push it over
    "siglip": {},
    "coca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4},
    "sycoca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4, "image_decoder_layers": 1},
    "llip": {"num_heads": 2},
}
NUM_STEPS = 4
BATCH_SIZE = 4


def build(name):
    captioning = name in ("coca", "sycoca")
    towers = tiny_two_tower(
        text_pooling="cls_appended" if captioning else "eos", num_mixture_tokens=4 if name == "llip" else 0
    )
    torch.manual_seed(1)
    return TowerModel(towers, build_objective(name, towers.shape, {"embed_dim": 16} | OBJECTIVES[name])).train()


def train(name, shard=None, ranks=ONE_RANK):
    """Take SGD steps; return the losses, the last log line, and the model. Each rank takes its share of a batch."""
    model = build(name)
    if shard is not None:
        shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    share = BATCH_SIZE // ranks.world_size
    mine, losses = slice(ranks.rank * share, (ranks.rank + 1) * share), []
    for step in range(NUM_STEPS):
        batch = {key: value[mine] for key, value in tiny_pairs(model.towers.shape, BATCH_SIZE, seed=step).items()}
        optimizer.zero_grad()
        outputs = model(whole_step, batch, ranks)
        outputs["loss"].backward()
        losses.append(outputs["loss"].item())
        optimizer.step()
        clamp_objective(model, is_deepspeed=False)
    metrics = model(scale_metrics) | batch_metrics(model, outputs["images"], outputs["texts"])
    return losses, metrics, model


def shard_layers(model, mesh):
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(model):
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, out = current_ranks(), Path(sys.argv[1])
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    for name in OBJECTIVES:
        losses, metrics, model = train(name, lambda m: shard_layers(m, mesh), ranks)
        weights = whole(model)
        if ranks.rank == 0:
            save_tower_model(model, name, {"embed_dim": 16} | OBJECTIVES[name], out / name, weights)
        dist.barrier()
        again = build(name)
        shard_layers(again, mesh)
        load_tower_weights(again, name, out / name)
        restored = whole(again)
        facts = {
            "losses": losses,
            "metrics": metrics,
            "world_size": ranks.world_size,
            "unsharded": [key for key, parameter in model.named_parameters() if not isinstance(parameter, DTensor)],
            "lost": [key for key in weights if not torch.equal(weights[key], restored[key])],
        }
        (out / f"{name}-{ranks.rank}.json").write_text(json.dumps(facts))
        if ranks.rank == 0:
            save_file({key: value.contiguous() for key, value in weights.items()}, out / f"{name}.safetensors")
    dist.destroy_process_group()
