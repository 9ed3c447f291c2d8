"""What the log of a tower run shows of a batch: logits of matching and other pairs, who finds whom, geometry.

B pairs of one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cal_train.objectives.base import Features
from cal_train.objectives.geometry import geometry
from cal_train.train.tower_model import TowerModel, score_step

LARGEST_BATCH = 512
"""Pairs of a rank that are looked at: the logits are the square of it."""


@dataclass
class WindowMeans:
    """Means by name over the steps of a log window; nothing waits for the device until they are read."""

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in the values of a step; a name may be missing in some steps."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of every name over the steps that had it."""
        return {name: self._sums[name].item() / self._counts[name] for name in self._sums}


@torch.no_grad()
def batch_metrics(model: TowerModel, images: Features, texts: Features) -> dict[str, float]:
    """Return `pair_metrics` of a rank's batch, and the geometry of its embeddings where a sample has a single one."""
    images, texts = ({name: value[:LARGEST_BATCH] for name, value in side.items()} for side in (images, texts))
    metrics = pair_metrics(model(score_step, images, texts), images.get("image_ids"))
    if "image_embeds" in images and "text_embeds" in texts:
        meters = geometry(images["image_embeds"], texts["text_embeds"])
        metrics |= {f"geometry/{name}": value.item() for name, value in meters.items()}
    return metrics


@torch.no_grad()
def pair_metrics(logits_BB: Tensor, image_ids_B: Tensor | None = None) -> dict[str, float]:
    """Return mean logits of matching and other pairs, and in-batch R@1 in both directions.

    Rows and columns with equal ``image_ids_B`` match. A query is a hit if a matching candidate scores above every
    other one: ties are misses, so that features that have collapsed to a point find nothing.
    """
    logits_BB = logits_BB.double()
    matching_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    if image_ids_B is not None:
        matching_BB = image_ids_B[:, None] == image_ids_B[None, :]
    metrics = {
        "logits/positive": logits_BB[matching_BB].mean().item(),
        "logits/negative": logits_BB[~matching_BB].mean().item(),  # nan where every pair matches
    }
    best_match_BB = logits_BB.masked_fill(~matching_BB, -torch.inf)
    best_other_BB = logits_BB.masked_fill(matching_BB, -torch.inf)
    for name, dim in (("image_to_text", 1), ("text_to_image", 0)):
        hit_B = best_match_BB.amax(dim) > best_other_BB.amax(dim)
        metrics[f"in_batch_r1/{name}"] = hit_B.double().mean().item()
    return metrics


@torch.no_grad()
def scale_metrics(model: TowerModel) -> dict[str, float]:
    """Return ``logit_scale`` and ``logit_bias`` where the objective has them; a step of the model's forward."""
    metrics = {}
    for name, value in model.objective.named_parameters():
        own_name = name.rpartition(".")[2]
        if own_name == "log_scale":
            metrics["logit_scale"] = value.detach().exp().item()
        if own_name == "logit_bias":
            metrics["logit_bias"] = value.detach().item()
    return metrics
