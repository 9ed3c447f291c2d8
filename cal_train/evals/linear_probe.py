"""Linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on held-out training data.

Source: CLIP, arXiv:2103.00020, section 3.2 and appendix A.3 (L-BFGS, 1,000 iterations, a sweep of the L2 strength on a
validation split, then a fit on everything). Differs: features are standardised, and the sweep is a plain list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier: standardise with ``mean`` and ``std`` (D,), then ``weight`` (C, D) and ``bias`` (C,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Return the logits (N, C), float64."""
        return F.linear((features_ND.double() - self.mean) / self.std, self.weight, self.bias)

    def accuracy(self, features_ND: Tensor, labels_N: Tensor) -> float:
        """Return the share of rows whose largest logit is their class."""
        return (self(features_ND).argmax(1) == labels_N).double().mean().item()


def fit_probe(
    features_ND: Tensor, labels_N: Tensor, num_classes: int, strength: float, max_iterations: int = 1000
) -> LinearProbe:
    """Fit a probe; minimises mean cross-entropy + strength / 2 * |weight|^2, the bias is free.

    Args:
        features_ND: Frozen features, any float type; the fit runs in float64.
        labels_N: Classes, int64.
        num_classes: C.
        strength: L2 strength. scikit-learn's ``C`` is 1 / (strength * N).
        max_iterations: Of L-BFGS.

    Raises:
        ValueError: If rows and labels do not match, or a label is not below ``num_classes``.
    """
    if len(features_ND) != len(labels_N) or not len(labels_N):
        raise ValueError(f"{len(features_ND)} feature rows and {len(labels_N)} labels: give as many, at least one")
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < num_classes:
        raise ValueError(f"labels {int(labels_N.min())} to {int(labels_N.max())} for {num_classes} classes")
    features = features_ND.detach().double()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-12 * mean.abs(), std, 1.0)  # a constant feature says nothing; it becomes 0
    standard = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = weight.new_zeros(num_classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standard, weight, bias), labels_N) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearProbe(mean, std, weight.detach(), bias.detach())


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    validation_share: float = 0.2,
    seed: int = 0,
) -> dict[str, float]:
    """Return ``accuracy`` on the test rows, ``strength`` as chosen, and ``validation_accuracy`` of the choice.

    The strength is chosen on ``validation_share`` of the training rows alone; of equally good ones the larger is taken.

    Raises:
        ValueError: If there are fewer than two training rows, or rows and labels do not match.
    """
    num_classes = int(torch.cat([train_labels_N, test_labels_M]).max()) + 1
    order = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(seed)).to(train_ND.device)
    num_held_out = max(1, round(validation_share * len(order)))
    if num_held_out >= len(order):
        raise ValueError(f"{len(order)} training rows cannot be split into a fitting and a validation part")
    held_out, fitting = order[:num_held_out], order[num_held_out:]
    chosen = best = -1.0
    for strength in sorted(strengths):
        probe = fit_probe(train_ND[fitting], train_labels_N[fitting], num_classes, strength)
        accuracy = probe.accuracy(train_ND[held_out], train_labels_N[held_out])
        if accuracy >= best:
            chosen, best = strength, accuracy
    probe = fit_probe(train_ND, train_labels_N, num_classes, chosen)
    accuracy = probe.accuracy(test_MD, test_labels_M)
    return {"accuracy": accuracy, "strength": chosen, "validation_accuracy": best}
