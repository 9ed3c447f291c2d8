"""The root module of a tower run, and the step that trains it.

Towers and objective sit under one root, and every step runs inside the root's forward: that is what makes one piece of
code right under DDP and FSDP2, which act around that forward, and under autocast, which accelerate puts there too.

B pairs of a batch on this rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cal_train.objectives.attention import DecoderBlock
from cal_train.objectives.base import Features, Objective, Term, Towers, total_loss
from cal_train.objectives.gather import Ranks
from cal_train.towers.outputs import TowerOutputs
from cal_train.towers.two_tower import TwoTower, freeze_unread

Batch = dict[str, Any]
"""``pixel_values`` (B, 3, H, W), ``input_ids`` and ``attention_mask`` (B, L), and ``image_ids`` (B,) int64 when rows
with the same image are each other's positives."""

T = TypeVar("T")


class TowerModel(nn.Module):
    """Towers and objective. The forward runs a step: ``model(whole_step, batch, ranks)``.

    Args:
        towers: The two encoders. Poolers that the objective does not read are frozen.
        objective: The method, which owns projections, scale, bias and heads.
    """

    def __init__(self, towers: TwoTower, objective: nn.Module):
        super().__init__()
        freeze_unread(towers, cast(Objective, objective).reads)
        self.towers = towers
        self.objective = objective
        self._no_split_modules = layer_classes(self)

    def forward(self, step: Callable[..., T], *arguments: Any) -> T:
        """Return ``step(self, *arguments)``, run inside this forward."""
        return step(self, *arguments)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the layers of both towers in the backward pass; called by the Trainer."""
        cast(Any, self.towers).activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
        )


def layer_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes of layers by which FSDP2 splits a model: those of towers and decoders."""
    named = {DecoderBlock.__name__}
    for module in model.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    return sorted(named & {type(module).__name__ for module in model.modules()})


def objective_of(model: TowerModel) -> Objective:
    """Return the objective under the type of its contract."""
    return cast(Objective, model.objective)


def whole_step(model: TowerModel, batch: Batch, ranks: Ranks) -> dict[str, Any]:
    """Return the loss of a batch and what the log shows of it.

    Returns:
        ``loss`` (to be backpropagated on this rank), ``parts`` (each term's mean over all ranks), ``metrics`` of the
        objective, and ``images`` and ``texts``, the detached features.
    """
    images, texts, local, metrics = encode_pairs(model, batch)
    objective = objective_of(model)
    terms = objective.contrast(images, texts, ranks) | local
    loss, parts = total_loss(terms, objective.loss_weights, ranks)
    return {"loss": loss, "parts": parts, "metrics": metrics, "images": detached(images), "texts": detached(texts)}


def encode_pairs(model: TowerModel, batch: Batch) -> tuple[Features, Features, dict[str, Term], dict[str, Tensor]]:
    """Return image features, text features, the terms within samples, and metrics, of a batch or a chunk of it."""
    objective = objective_of(model)
    outputs = encode(model, batch)
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    if "image_ids" in batch:
        images = images | {"image_ids": batch["image_ids"]}
    local, metrics = objective.local_terms(cast(Towers, model.towers), batch["pixel_values"], outputs)
    return images, texts, local, metrics


def encode(model: TowerModel, batch: Batch) -> TowerOutputs:
    """Return what the towers make of the images and texts of a batch."""
    return model.towers(
        pixel_values=batch["pixel_values"],
        input_ids=batch["input_ids"],
        text_mask=batch["attention_mask"].bool(),
    )


def exactly(model: TowerModel, measure: Callable[[TowerModel], T]) -> T:
    """Return ``measure(model)``, in the precision of the weights."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return measure(model)


def score_step(model: TowerModel, images: Features, texts: Features) -> Tensor:
    """Return how well each image fits each text, (I, T), on the scale of the training logits."""
    return objective_of(model).score(images, texts)


def detached(features: Mapping[str, Tensor]) -> Features:
    """Return the same features outside of the graph."""
    return {name: feature.detach() for name, feature in features.items()}
