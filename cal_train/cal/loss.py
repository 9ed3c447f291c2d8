"""Weighted cross-entropy of label rows through the head, in chunks, with exact gradients.

N label rows, V vocabulary, D width, C rows of a chunk.

No (N, V) tensor is ever held: each chunk's logits turn into its loss and its gradients before the next chunk starts.
The gradients can be formed in the forward pass because the loss is a weighted *sum*: what multiplies it afterwards is
one scalar. Source of the idea: Liger kernel, arXiv:2410.10989, section 3.2; ours takes weights per token, bias and soft
cap, and never runs the product for frozen heads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cal_train.types import IGNORE_INDEX

CHUNK_ELEMENTS = 2**24
"""Logits held at a time when ``chunk_size`` is not given: 64 MiB in float32."""


def weighted_linear_cross_entropy(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor,
    head_bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return ``sum_n w_n * CE_n`` with exact gradients for hidden states, head weight and bias.

    Args:
        hidden_ND: Hidden states that predict the labels.
        head_weight_VD: Weight of the output head.
        labels_N: Target ids; rows with ``IGNORE_INDEX`` count as zero.
        token_weights_N: Weight of each row; no gradient is taken.
        head_bias_V: Bias of the head.
        softcap: Cap c of a head that returns ``c * tanh(logits / c)`` (Gemma-2).
        chunk_size: Rows whose logits are held at a time. Default: `CHUNK_ELEMENTS` logits.

    Returns:
        A float32 scalar (float64 for float64 inputs). It supports one backward pass.

    Raises:
        ValueError: If the shapes do not fit together or the chunk size is not positive.
    """
    num_rows, width = hidden_ND.shape
    if head_weight_VD.shape[1] != width or labels_N.shape != (num_rows,) or token_weights_N.shape != (num_rows,):
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, head weight {tuple(head_weight_VD.shape)}, labels "
            f"{tuple(labels_N.shape)} and token weights {tuple(token_weights_N.shape)} do not fit together"
        )
    if chunk_size is None:
        chunk_size = max(CHUNK_ELEMENTS // head_weight_VD.shape[0], 1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 row")
    if not torch.is_grad_enabled():  # a Function is told what its inputs require, not whether anyone will ask
        hidden_ND, head_weight_VD = hidden_ND.detach(), head_weight_VD.detach()
        head_bias_V = None if head_bias_V is None else head_bias_V.detach()
    return _WeightedLinearCrossEntropy.apply(
        hidden_ND, head_weight_VD, head_bias_V, labels_N, token_weights_N.detach(), softcap, chunk_size
    )


def target_logits(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    head_bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the logit of each row's target (N,), float32 or wider: one dot product per row, no vocabulary product."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_N = (hidden_ND.to(dtype) * head_weight_VD[labels_N].to(dtype)).sum(-1)
    if head_bias_V is not None:
        logits_N = logits_N + head_bias_V[labels_N].to(dtype)
    return _capped(logits_N, softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Under autocast the head multiplies in autocast's dtype, as ``nn.Linear`` would."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _loss_and_gradient(
    logits_CV: Tensor, target_C1: Tensor, weights_C1: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss sum of a chunk and its gradient for the logits, which takes over their memory."""
    logits_CV = _capped(logits_CV, softcap)
    slope_CV = 1 - (logits_CV / softcap) ** 2 if softcap is not None else None
    target_logit_C1 = logits_CV.gather(1, target_C1)
    # softmax by hand and in place: `logsumexp` would hold a second chunk and take exp a second time
    max_C1 = logits_CV.amax(-1, keepdim=True)
    exp_CV = logits_CV.sub_(max_C1).exp_()
    sum_C1 = exp_CV.sum(-1, keepdim=True)
    loss = (weights_C1 * (max_C1 + sum_C1.log() - target_logit_C1)).sum()
    grad_CV = exp_CV.mul_(weights_C1 / sum_C1)
    grad_CV.scatter_add_(1, target_C1, -weights_C1)
    if slope_CV is not None:
        grad_CV *= slope_CV
    return loss, grad_CV


class _WeightedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, token_weights_N, softcap, chunk_size):
        matmul_dtype = _matmul_dtype(hidden_ND)
        accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head_VD = weight_VD.to(matmul_dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accumulate) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=accumulate) if needs_bias else None
        total = torch.zeros((), dtype=accumulate, device=hidden_ND.device)

        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), chunk_size):
                rows = slice(start, start + chunk_size)
                hidden_CD, labels_C = hidden_ND[rows].to(matmul_dtype), labels_N[rows]
                weights_C1 = (token_weights_N[rows].to(accumulate) * (labels_C != IGNORE_INDEX))[:, None]
                target_C1 = labels_C.clamp_min(0)[:, None]

                logits_CV = (hidden_CD @ head_VD.T).to(accumulate)
                if bias_V is not None:
                    logits_CV += bias_V
                loss, grad_CV = _loss_and_gradient(logits_CV, target_C1, weights_C1, softcap)
                total += loss
                if grad_bias_V is not None:
                    grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(matmul_dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[rows] = (grad_CV @ head_VD).to(hidden_ND.dtype)
                if grad_weight_VD is not None:
                    if matmul_dtype == accumulate:
                        grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
                    else:
                        grad_weight_VD += grad_CV.T @ hidden_CD
                del logits_CV, grad_CV  # else this chunk would still be held while the next one is made
        ctx.gradients = (grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        if ctx.gradients is None:
            raise RuntimeError("weighted_linear_cross_entropy supports one backward pass; its gradients are used up")
        # in place: a second copy of the head's gradient would be the largest tensor of the step
        gradients = tuple(
            None if gradient is None else gradient.mul_(grad_total).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return (*gradients, None, None, None, None)
