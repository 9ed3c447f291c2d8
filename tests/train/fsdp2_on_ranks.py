"""Training steps of a VLM under FSDP2 on gloo ranks. `test_two_ranks.py` holds them against one process.

    torchrun fsdp2_on_ranks.py MODEL_FOLDER OUT

accelerate does not run FSDP on a CPU, so `fully_shard` is called here, on the layers that accelerate would take.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

from cal_train.cal.strategies import resolve_weighting
from cal_train.models.head import find_head
from cal_train.models.parts import freeze
from cal_train.train.step import StepOptions, attach_step

WEIGHTINGS = {"cal": resolve_weighting("cal", low=0.1, high=1.0), "plain": None}
TOKENS_PER_IMAGE = 4
ROWS = {"t": [0, 0], "i": [1, 1], "m": [2, 0, 3]}  # images in each row of a micro-batch
STEPS = tuple(product(ROWS, repeat=2))  # one kind of micro-batch per rank


def make_batch(config, kind, seed):
    """Return a micro-batch of a kind with random tokens and pixels; the labels are the last tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts = ROWS[kind]
    length = 2 + TOKENS_PER_IMAGE * max(counts) + 8
    ids = torch.randint(20, 390, (len(counts), length), generator=generator)
    labels = ids.clone()
    labels[:, :-5] = -100
    for row, count in enumerate(counts):
        ids[row, 2 : 2 + TOKENS_PER_IMAGE * count] = config.image_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if sum(counts):
        batch["pixel_values"] = torch.randn(sum(counts), 3, 28, 28, generator=generator)
    return batch


def train(folder, weighting, shard=None, mine=slice(None), scale=1):
    """Take one SGD step per entry of `STEPS`; return this rank's loss of each, and the trained model.

    ``mine`` says which of a step's micro-batches are run here, ``scale`` how often gradients are divided.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder)
    options = StepOptions(find_head(model), weighting, is_sharded=shard is not None)
    attach_step(model)
    freeze(model, "finetune", {"vision_tower": True})
    if shard is not None:
        shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step, kinds in enumerate(STEPS):
        batches = [make_batch(model.config, kind, seed=2 * step + k) for k, kind in enumerate(kinds)]
        num_labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches[mine]:
            loss = model(step=options, **batch)["loss_sum"] / num_labels
            (scale * loss).backward()
            losses[-1] += loss.item()
        optimizer.step()
    return losses, model


def shard_layers(model, mesh):
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    for name, weighting in WEIGHTINGS.items():
        losses, model = train(
            sys.argv[1], weighting, lambda m: shard_layers(m, mesh), slice(rank, rank + 1), scale=world_size
        )
        sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        weights = {key: value.full_tensor().contiguous() for key, value in model.state_dict().items()}
        facts = {"losses": losses, "world_size": world_size, "sharded": sharded, "all": len(list(model.parameters()))}
        (Path(sys.argv[2]) / f"{name}-{rank}.json").write_text(json.dumps(facts))
        if rank == 0:
            save_file(weights, Path(sys.argv[2]) / f"{name}.safetensors")
    dist.destroy_process_group()
