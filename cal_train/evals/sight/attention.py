"""How much each predicted word attends to each image token, without ever holding a whole attention matrix.

The paper's figure 5 (arXiv 2405.17871) shows such maps for a model with and without CAL. The word at position t is
predicted from position t - 1, so that is the query whose attention is read.

H heads, S positions, N queries, M image tokens, D width.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cal_train.models.families import family_of
from cal_train.train.step import decode

QUERIES_AT_ONCE = 256


@torch.no_grad()
def attention_to_image(
    model: PreTrainedModel, embeds_1SD: Tensor, queries_N: Tensor, keys_M: Tensor, layers: Sequence[int] | None = None
) -> Tensor:
    """Return the attention of some positions to the image tokens, averaged over heads and layers, (N, M) float32.

    Each value is a share of all the attention that the query gives, so that a row sums to at most 1. The mean over all
    layers is the default because it has no free choice in it; a few deep or shallow layers may show more.

    The language model's own eager attention runs, 256 queries at a time: H x 256 x S weights exist at once, besides
    the S x S mask.

    Args:
        model: The VLM, in eval mode.
        embeds_1SD: Input embeddings of one sample, image embeddings in their places.
        queries_N: Positions that predict: those of the words, minus one.
        keys_M: Positions of the image tokens.
        layers: Which layers, from 0. Default: all.

    Raises:
        ValueError: If there is no such layer, or a layer has no attention weights to read.
    """
    language_model: Any = family_of(model).language_model(model)
    layers = check_layers(model, layers)
    total_NM = torch.zeros(len(queries_N), len(keys_M), device=embeds_1SD.device)
    seen: set[int] = set()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Run the module's own eager attention block by block and keep what is asked for."""
        eager = _eager_attention(module)
        outputs = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            mask = None if attention_mask is None else attention_mask[:, :, rows]
            output, weights_1HQS = eager(module, query[:, :, rows], key, value, mask, **kwargs)
            outputs.append(output)
            if module.layer_idx in layers:
                is_here_N = (queries_N >= start) & (queries_N < start + QUERIES_AT_ONCE)
                read_HNM = weights_1HQS[0][:, queries_N[is_here_N] - start][:, :, keys_M]
                total_NM[is_here_N] += read_HNM.float().mean(0)
                seen.add(module.layer_idx)
        return torch.cat(outputs, dim=1), None

    with _eager_as(language_model.config, attend):
        decode(model, embeds_1SD, torch.ones(embeds_1SD.shape[:2], dtype=torch.long, device=embeds_1SD.device))
    if unseen := sorted(set(layers) - seen):
        raise ValueError(f"layers {unseen} of {type(language_model).__name__} have no attention weights to read")
    return total_NM / len(layers)


def check_layers(model: PreTrainedModel, layers: Sequence[int] | None) -> Sequence[int]:
    """Return the layers, by default all.

    Raises:
        ValueError: If none are given, or the language model has no such layer.
    """
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if layers is None:
        return range(num_layers)
    if not layers or min(layers) < 0 or max(layers) >= num_layers:
        given = f"{min(layers)} to {max(layers)}" if layers else "none"
        raise ValueError(f"layers {given}: the language model has layers 0 to {num_layers - 1}")
    return layers


def _eager_attention(module: Any) -> Any:
    """Return the plain attention function of a module's architecture, which knows its soft caps and sinks."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ValueError(f"{type(module).__name__} has no eager attention, so its attention weights cannot be read")
    return function


@contextlib.contextmanager
def _eager_as(config: Any, function: Any) -> Iterator[None]:
    """Let a function stand in for eager attention, with the masks that eager attention gets."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    ALL_ATTENTION_FUNCTIONS["eager"] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
        config._attn_implementation = before
