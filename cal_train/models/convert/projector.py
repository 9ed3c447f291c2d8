"""LLaVA's simpler projectors in Hugging Face's class, which always is linear, activation, linear.

``linear`` (W x + b) becomes that layer, no activation, and an identity behind it; ``identity`` two identities. A sum of
one value and zeros is that value, so nothing is rounded.
"""

import torch
from torch import Tensor

from cal_train.models.convert.keys import EMBEDDING, PROJECTOR

ACTIVATION = {"mlp2x_gelu": "gelu", "linear": "linear", "identity": "linear"}
"""``projector_hidden_act`` by ``mm_projector_type``; transformers' ``linear`` is no activation."""

_IDENTITIES = {"mlp2x_gelu": (), "linear": ("linear_2",), "identity": ("linear_1", "linear_2")}


def add_identities(tensors: dict[str, Tensor], projector_type: str) -> list[str]:
    """Add the layers that a simpler projector does not have, in place; return the names of the added weights."""
    width, dtype = tensors[EMBEDDING].shape[1], tensors[EMBEDDING].dtype
    added = {}
    for layer in _IDENTITIES[projector_type]:
        added[f"{PROJECTOR}{layer}.weight"] = torch.eye(width, dtype=dtype)
        added[f"{PROJECTOR}{layer}.bias"] = torch.zeros(width, dtype=dtype)
    tensors.update(added)
    return list(added)


def remove_identities(tensors: dict[str, Tensor], projector_type: str, where: str) -> list[str]:
    """Remove those layers again, in place; return the names of the removed weights.

    Raises:
        ValueError: If they have been trained since.
    """
    removed = []
    for layer in _IDENTITIES[projector_type]:
        weight, bias = (tensors.pop(f"{PROJECTOR}{layer}.{name}") for name in ("weight", "bias"))
        if not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) or bias.any():
            raise ValueError(
                f"{where}: the projector was converted from mm_projector_type {projector_type!r} and has been trained "
                "since. It has two layers without activation now, for which the original repository has no type"
            )
        removed += [f"{PROJECTOR}{layer}.weight", f"{PROJECTOR}{layer}.bias"]
    return removed
