"""Objectives behind a small encoder in DDP, on gloo ranks. Run as a script; `test_gather.py` holds the results against
one process.

    python on_ranks.py OUT WORLD_SIZE...

writes OUT/W-RANK.pt: for every case the loss parts and the gradients after DDP's averaging. The ranks are forked, so
that torch is imported once.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it at first use: seconds that every fork would spend again
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cal_train.objectives.base import total_loss
from cal_train.objectives.clip import Clip
from cal_train.objectives.filip import Filip
from cal_train.objectives.gather import ONE_RANK, Ranks, current_ranks
from cal_train.objectives.llip import Llip
from cal_train.objectives.siglip import SigLip
from cal_train.towers.outputs import TowerOutputs, TowerShape

NUM_PAIRS, NUM_PATCHES, LENGTH, WIDTH = 12, 4, 5, 6
SHAPE = TowerShape(WIDTH, WIDTH, 28, 14, 50, LENGTH, 0, num_mixture_tokens=3)

CASES = {
    "clip": (Clip, {"embed_dim": 6}),
    "clip tiled": (Clip, {"embed_dim": 6, "backend": "tiled", "tile_size": 3}),
    "siglip ring": (SigLip, {"embed_dim": 6, "bias_init": -3, "chunk_size": 2}),
    "siglip ring_bidirectional": (SigLip, {"embed_dim": 6, "bias_init": -3, "exchange": "ring_bidirectional"}),
    "siglip gather": (SigLip, {"embed_dim": 6, "bias_init": -3, "exchange": "gather", "chunk_size": 5}),
    "filip": (Filip, {"embed_dim": 6, "tile_elements": 50}),
    "filip half": (Filip, {"embed_dim": 6, "token_share": 0.5}),
    "llip ring": (Llip, {"embed_dim": 6, "num_heads": 2, "bias_init": -3, "chunk_size": 1}),
    "llip gram": (Llip, {"embed_dim": 24, "num_heads": 1, "bias_init": -3}),
    "llip ring_bidirectional": (
        Llip,
        {"embed_dim": 6, "num_heads": 2, "bias_init": -3, "exchange": "ring_bidirectional"},
    ),
    "llip gather": (Llip, {"embed_dim": 6, "num_heads": 2, "bias_init": -3, "exchange": "gather"}),
}
WITH_IDS = {"clip", "clip tiled", "siglip ring_bidirectional", "siglip gather", "filip", "llip ring"}
IDS = torch.tensor([0, 1, 2, 0, 3, 4, 5, 0, 1, 6, 7, 1])  # the same image on several ranks


def make_data():
    """Return image patches, text tokens and text lengths of the whole batch."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(NUM_PAIRS, NUM_PATCHES, 7, generator=generator, dtype=torch.float64)
    texts = torch.randn(NUM_PAIRS, LENGTH, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([2, 3, 1, 2, 3, 3, 4, 5, 1, 2, 5, 4])
    return images, texts, lengths


class Model(nn.Module):
    """A linear encoder of each modality and an objective: one root forward, as DDP wants it."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(11)
        objective, options = CASES[case]
        self.image_encoder, self.text_encoder = nn.Linear(7, WIDTH), nn.Linear(8, WIDTH)
        self.objective = objective(SHAPE, **options)
        self.double()

    def features(self, images, texts, lengths):
        patches, tokens = torch.tanh(self.image_encoder(images)), torch.tanh(self.text_encoder(texts))
        mask = torch.arange(texts.shape[1]) < lengths[:, None]
        outputs = TowerOutputs(
            image_pooled=patches.mean(1),
            patch_tokens=patches,
            mixture_tokens=patches[:, :3],
            text_pooled=(tokens * mask[..., None]).sum(1) / lengths[:, None],
            text_tokens=tokens,
            text_mask=mask,
        )
        return self.objective.image_features(outputs), self.objective.text_features(outputs)

    def forward(self, images, texts, lengths, ids=None, ranks=ONE_RANK):
        image_features, text_features = self.features(images, texts, lengths)
        if ids is not None:
            image_features["image_ids"] = ids
        terms = self.objective.contrast(image_features, text_features, ranks)
        return total_loss(terms, self.objective.loss_weights, ranks)


def run_case(case, ids, ranks):
    """Return the loss parts of a case and its gradients, averaged over ranks by DDP."""
    model = DistributedDataParallel(Model(case))
    rows = slice(ranks.rank * NUM_PAIRS // ranks.world_size, (ranks.rank + 1) * NUM_PAIRS // ranks.world_size)
    images, texts, lengths = (x[rows] for x in make_data())
    texts = texts[:, : int(lengths.max())]  # as a collator pads: ranks differ in length
    loss, parts = model(images, texts, lengths, None if ids is None else ids[rows], ranks)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    return {"loss": loss.detach(), "parts": parts, "gradients": gradients}


def refusals(ranks):
    """Return what is said where ranks bring different numbers of rows, for every way of exchange."""
    said = {}
    for case in ("clip", "siglip ring", "siglip gather", "llip ring", "filip"):
        images, texts, lengths = (x[: 2 + (ranks.rank == 0)] for x in make_data())
        try:
            Model(case)(images, texts, lengths, None, ranks)
        except ValueError as error:
            said[case] = str(error)
    return said


def cases_for(world_size):
    """Return (case, image ids) to run; four ranks are for the last hop of a two-way ring, which goes one way only."""
    return [
        (case, ids)
        for case in CASES
        for ids in (None, IDS)
        if (ids is None or case in WITH_IDS) and (world_size < 4 or "bidirectional" in case)
    ]


def work(rank, world_size, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/meet-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    ranks = current_ranks()
    assert ranks == Ranks(rank, world_size)
    results = {f"{case}{' ids' * (ids is not None)}": run_case(case, ids, ranks) for case, ids in cases_for(world_size)}
    found = {"world_size": world_size, "cases": results, "refused": refusals(ranks)}
    torch.save(found, out / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for world_size in map(int, sys.argv[2:]):
        torch.multiprocessing.start_processes(work, (world_size, Path(sys.argv[1])), world_size, start_method="fork")
