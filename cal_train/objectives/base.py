"""What every objective offers, and how its terms become one loss.

A term is a sum and the number of things summed, so that several ranks are joined by equations and not by averaging
averages. With S_r and n_r on rank r of W, and gradients averaged over ranks, every rank backpropagates

    loss_r = sum over terms of  lambda * W * S_r / (n_1 + ... + n_W),

whose mean over ranks is  lambda * (S_1 + ... + S_W) / (n_1 + ... + n_W): the loss of one process with the whole batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cal_train.objectives.gather import ONE_RANK, Ranks
from cal_train.towers.outputs import TowerOutputs

Features = dict[str, Tensor]
"""Named tensors whose first dimension is the sample: all that samples need to know of each other."""


@dataclass(frozen=True)
class Term:
    """A part of a loss on one rank: ``sum`` carries the gradient, ``weight`` counts what was summed."""

    sum: Tensor
    weight: Tensor | float


@dataclass(frozen=True)
class LossReport:
    """``loss`` is to be backpropagated; ``parts`` are the means over all ranks by name; ``metrics`` are for the log."""

    loss: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Towers(Protocol):
    """The two encoders as objectives call them (`cal_train.towers.two_tower.TwoTower`)."""

    def __call__(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        visible_patches: Tensor | None = None,
    ) -> TowerOutputs:
        """Encode images, texts or both; ``visible_patches`` (B, P') int64 limits the images to these patches."""
        ...


class Objective(Protocol):
    """A training method: an `nn.Module` in a file of its own, built as ``Class(shape: TowerShape, **options)``."""

    loss_weights: Mapping[str, float]
    """Lambda of every term by name."""

    reads: tuple[str, ...]
    """Fields of `TowerOutputs` that it trains by: what only the others need gets no gradient."""

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return all that other samples, and `score`, need to know of the images."""
        ...

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return all that other samples, and `score`, need to know of the texts."""
        ...

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return the terms that compare samples with each other, across all ranks."""
        ...

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return the terms that stay within a sample, and metrics; may run the towers again on parts of the images."""
        ...

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return how well each image fits each text (I, T), on the scale of the training logits."""
        ...

    def clamp_(self) -> None:
        """Bring scales back into their range; called after every optimizer step."""
        ...


def total_loss(
    terms: Mapping[str, Term], loss_weights: Mapping[str, float], ranks: Ranks = ONE_RANK
) -> tuple[Tensor, dict[str, Tensor]]:
    """Join the terms of a step as the module's equation says.

    Args:
        terms: By name; every rank brings the same names.
        loss_weights: Lambda by name. A term with lambda 0 must not have been computed.
        ranks: The ranks of the run.

    Returns:
        The scalar to backpropagate on this rank, and each term's mean over all ranks, detached.

    Raises:
        ValueError: If a term has no lambda.
    """
    if unknown := sorted(set(terms) - set(loss_weights)):
        raise ValueError(f"terms without a loss weight: {', '.join(unknown)}")
    names = sorted(terms)
    if not names:
        raise ValueError("an objective without any term: every loss weight is 0")
    local = torch.stack(
        [
            torch.stack(
                [terms[name].sum.detach().float(), torch.as_tensor(terms[name].weight).to(terms[name].sum).float()]
            )
            for name in names
        ]
    )
    sums, weights = ranks.all_reduce_sum(local).unbind(1)
    weights = weights.clamp(min=1e-12)  # a term without any target on any rank: 0 / tiny = 0
    scaled = [loss_weights[name] * ranks.world_size * terms[name].sum / weights[i] for i, name in enumerate(names)]
    return torch.stack(scaled).sum(), {name: sums[i] / weights[i] for i, name in enumerate(names)}
