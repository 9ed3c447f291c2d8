"""Named ways to weigh label tokens, and the settings that a run resolves them to."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cal_train.cal.weights import Scope, cal_weights, check_limits, mean_one_per_row, shuffle_within_rows

Ablation = Literal["remove", "mask"]
Normalizer = Literal["sample", "micro_batch"]


@dataclass(frozen=True)
class TokenWeighting:
    """How label tokens are weighted. ``ablation=None`` needs no second forward pass (all weights 1)."""

    ablation: Ablation | None = "remove"
    scope: Scope = "labels"
    normalizer: Normalizer = "sample"
    low: float = 1.0
    high: float = 5.0
    window: int = 3
    shuffle: bool = False


STRATEGIES = {
    "cal": TokenWeighting(),  # the paper
    "cal_reference": TokenWeighting(ablation="mask", scope="flat", normalizer="micro_batch"),  # CAL at 9d99569
    "uniform": TokenWeighting(ablation=None),  # plain training
    "random": TokenWeighting(shuffle=True),  # control: CAL's weights, given to the wrong tokens of the same sample
}


def resolve_weighting(
    strategy: str,
    low: float = 1.0,
    high: float = 5.0,
    window: int = 3,
    ablation: Ablation | None = None,
    scope: Scope | None = None,
    normalizer: Normalizer | None = None,
) -> TokenWeighting:
    """Return the preset of a strategy with every given option in place of the preset's.

    Raises:
        ValueError: If the strategy or an option is unknown, or the limits do not fit together.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown cal_strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    preset = STRATEGIES[strategy]
    check_limits(low, high, window)
    for name, value, allowed in (
        ("cal_ablation", ablation, ("remove", "mask")),
        ("cal_scope", scope, ("labels", "flat")),
        ("loss_normalizer", normalizer, ("sample", "micro_batch")),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}")
    return TokenWeighting(
        ablation=preset.ablation and (ablation or preset.ablation),
        scope=scope or preset.scope,
        normalizer=normalizer or preset.normalizer,
        low=low,
        high=high,
        window=window,
        shuffle=preset.shuffle,
    )


@torch.no_grad()
def token_weights(weighting: TokenWeighting, delta_BT: Tensor, label_mask_BT: Tensor) -> Tensor:
    """Return the weights (N,) of the label tokens in reading order, before normalisation.

    Args:
        weighting: The resolved settings; ``ablation=None`` gives weights of 1 whatever the deltas are.
        delta_BT: Logit differences at shifted positions.
        label_mask_BT: True where a label is predicted.
    """
    if weighting.ablation is None:
        return torch.ones(int(label_mask_BT.sum()), device=delta_BT.device)
    weights_BT = cal_weights(delta_BT, label_mask_BT, weighting.low, weighting.high, weighting.window, weighting.scope)
    weights_N = weights_BT[label_mask_BT]
    if weighting.shuffle:
        weights_N = shuffle_within_rows(weights_N, label_mask_BT.nonzero()[:, 0])
    return weights_N


def normalize(weighting: TokenWeighting, weights_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Return the weights that multiply the cross-entropies: mean 1 per sample, or as they are (``micro_batch``)."""
    if weighting.normalizer == "sample":
        return mean_one_per_row(weights_N, rows_N, num_rows)
    return weights_N
