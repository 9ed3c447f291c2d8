"""Token weights from logit differences: clamp, smooth, normalise.

B rows, T shifted positions (S - 1: position t predicts label t + 1), N label tokens of the batch in reading order.

Source: Xiao et al. 2024, arXiv:2405.17871, section 3.2 (clamp, eq. 4 smoothing, eq. 5 normaliser); reference code
foundation-multimodal-models/CAL at 9d99569, ``llava_llama.py``. The reference smooths over the flattened batch,
unlabelled positions included (``scope="flat"``) and divides by the weight sum of the micro-batch; the paper smooths
over the label tokens of a sample (``scope="labels"``) and divides per sample.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scope = Literal["labels", "flat"]


@torch.no_grad()
def cal_weights(
    delta_BT: Tensor,
    label_mask_BT: Tensor,
    low: float = 1.0,
    high: float = 5.0,
    window: int = 3,
    scope: Scope = "labels",
) -> Tensor:
    """Return the weight of every label token: its clamped logit difference, averaged over its neighbours.

    Worked example (``labels``): deltas 0.2, 9, 3 of one sample clamp to 1, 5, 3 and smooth to
    (1+5)/2 = 3, (1+5+3)/3 = 3, (5+3)/2 = 4.

    Args:
        delta_BT: Target logit with the image minus without it, at shifted positions, any float dtype. With
            ``scope="flat"`` the caller supplies it at every position (the reference code: of token id 0 where there
            is no label).
        label_mask_BT: True where a label is predicted.
        low: Lower clamp in logits (paper: 1).
        high: Upper clamp in logits (paper: 5).
        window: Neighbours averaged, an odd number of tokens; 1 turns smoothing off. At the edges the average runs
            over what exists.
        scope: "labels" smooths over the label tokens of one sample, in order; "flat" over the flattened batch.

    Returns:
        Weights (B, T), float32, without gradient; 0 at positions without a label.

    Raises:
        ValueError: If the shapes differ, the window is not odd and positive, the limits are crossed, or the scope is
            unknown.
    """
    if delta_BT.shape != label_mask_BT.shape or delta_BT.ndim != 2:
        raise ValueError(
            f"delta {tuple(delta_BT.shape)} and label_mask {tuple(label_mask_BT.shape)} must be equal (B, T) shapes"
        )
    check_limits(low, high, window)
    label_mask_BT = label_mask_BT.bool()
    clamped_BT = delta_BT.float().clamp(low, high)
    weights_BT = torch.zeros_like(clamped_BT)
    if scope == "labels":
        rows_N = label_mask_BT.nonzero()[:, 0]
        weights_BT[label_mask_BT] = smooth_within_rows(clamped_BT[label_mask_BT], rows_N, window)
    elif scope == "flat":
        weights_BT = smooth_flat(clamped_BT, window) * label_mask_BT
    else:
        raise ValueError(f"unknown scope {scope!r}: use 'labels' or 'flat'")
    return weights_BT


def check_limits(low: float, high: float, window: int) -> None:
    """Raise ``ValueError`` unless 0 <= low <= high and the window is an odd number of at least 1."""
    if not 0 <= low <= high:
        raise ValueError(f"cal_low={low} and cal_high={high} must satisfy 0 <= low <= high")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"cal_window={window} must be an odd number of tokens, at least 1 (1 turns smoothing off)")


def smooth_within_rows(values_N: Tensor, rows_N: Tensor, window: int) -> Tensor:
    """Average each value with its neighbours of the same row; ``rows_N`` is the row of each value, ascending."""
    total_N, count_N = torch.zeros_like(values_N), torch.zeros_like(values_N)
    for shift in range(-(window // 2), window // 2 + 1):
        neighbour_N = torch.arange(len(values_N), device=values_N.device) + shift
        exists_N = (neighbour_N >= 0) & (neighbour_N < len(values_N))
        neighbour_N = neighbour_N.clamp(0, max(len(values_N) - 1, 0))
        exists_N = exists_N & (rows_N[neighbour_N] == rows_N)
        total_N += torch.where(exists_N, values_N[neighbour_N], 0)
        count_N += exists_N
    return total_N / count_N


def smooth_flat(values_BT: Tensor, window: int) -> Tensor:
    """Average each value with its neighbours in the flattened batch, across rows and unlabelled positions."""
    if values_BT.numel() == 0:
        return values_BT
    flat = F.avg_pool1d(values_BT.reshape(1, 1, -1), window, stride=1, padding=window // 2, count_include_pad=False)
    return flat.reshape(values_BT.shape)


def mean_one_per_row(weights_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Scale the weights of each row to mean 1 (the ``sample`` normaliser); a row whose weights sum to 0 stays 0.

    With it, the loss sum of a sample weighs as many tokens as the sample has, so that the sum over an optimizer step
    divided by its label count neither depends on how the samples are cut into micro-batches nor on the rank count.
    """
    weight_sum_B = weights_N.new_zeros(num_rows).index_add_(0, rows_N, weights_N)
    count_B = weights_N.new_zeros(num_rows).index_add_(0, rows_N, torch.ones_like(weights_N))
    scale_B = torch.where(weight_sum_B > 0, count_B / weight_sum_B.clamp_min(torch.finfo(torch.float32).tiny), 0)
    return weights_N * scale_B[rows_N]


def shuffle_within_rows(weights_N: Tensor, rows_N: Tensor) -> Tensor:
    """Permute the weights inside each row at random: the control with exactly the same histogram per sample."""
    keys_N = torch.rand(len(weights_N)).to(weights_N.device)  # CPU generator: its state is in every checkpoint
    by_key_N = torch.argsort(keys_N)
    by_row_N = by_key_N[torch.argsort(rows_N[by_key_N], stable=True)]
    return weights_N[by_row_N]
