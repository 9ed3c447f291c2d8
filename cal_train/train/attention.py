"""Attention over rows that hold several samples: every token sees its own sample and nothing else.

transformers finds packed rows by itself only where no attention mask is given, and takes a gap in the position ids for
a border, which the pass without images has inside its samples. So the borders are always given: as a mask, or to
FlashAttention as lengths, which also skips the padding.

B rows, S positions, D width, M tokens of the batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cal_train.cal.strategies import TokenWeighting

MASKED = ("sdpa", "eager")
VARLEN = ("flash_attention_2", "flash_attention_3")


def decode_packed(
    language_model: nn.Module,
    embeds_BSD: Tensor,
    attention_mask_BS: Tensor,
    position_ids_BS: Tensor,
    segment_ids_BS: Tensor,
) -> Tensor:
    """Run a language model over rows of several samples; return the last hidden states (B, S, D).

    Args:
        language_model: The decoder without its head.
        embeds_BSD: Input embeddings.
        attention_mask_BS: 1 for tokens that may be attended to. FlashAttention goes by ``segment_ids_BS`` alone.
        position_ids_BS: Places in the samples.
        segment_ids_BS: Sample of each token, 1 and up, a sample in one piece; 0 at padding.

    Raises:
        ValueError: If packed rows are not supported by the model's attention.
    """
    implementation = attention_of(language_model.config)
    if implementation in VARLEN:
        is_token_BS = segment_ids_BS > 0
        hidden_MD = language_model(
            inputs_embeds=embeds_BSD[is_token_BS][None],
            attention_mask=None,
            position_ids=position_ids_BS[is_token_BS][None],
            use_cache=False,
            **varlen_arguments(segment_ids_BS[is_token_BS]),
        ).last_hidden_state[0]
        return hidden_MD.new_zeros(*is_token_BS.shape, hidden_MD.shape[-1]).index_put((is_token_BS,), hidden_MD)
    is_within_BSS, is_visible_BSS = block_causal(segment_ids_BS, attention_mask_BS)
    mask_BSS = is_visible_BSS
    if implementation == "eager":  # adds its mask; a token that sees nothing must still not look into other samples
        least = torch.finfo(embeds_BSD.dtype).min
        mask_BSS = torch.zeros_like(is_within_BSS, dtype=embeds_BSD.dtype)
        mask_BSS = mask_BSS.masked_fill(~is_visible_BSS, least).masked_fill(~is_within_BSS, -torch.inf)
    return language_model(
        inputs_embeds=embeds_BSD, attention_mask=mask_BSS[:, None], position_ids=position_ids_BS, use_cache=False
    ).last_hidden_state


def attention_of(config: Any) -> str:
    """Return the name of a language model's attention.

    Raises:
        ValueError: If it cannot be told where samples end.
    """
    name = config._attn_implementation
    if name not in MASKED + VARLEN:
        raise ValueError(
            f"packing is not possible with attn_implementation {name!r}: use {', '.join(MASKED + VARLEN)}, or leave "
            "packing out"
        )
    return name


def block_causal(segment_ids_BS: Tensor, attention_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return which keys lie at or before each query in the same sample, and which of them it may see, both (B, S, S).

    Padding sees padding: no query is left without a key, except behind hidden keys alone.
    """
    size = segment_ids_BS.shape[1]
    is_before_SS = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).tril()
    is_within_BSS = (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]) & is_before_SS
    is_key_BS = attention_mask_BS.bool() | (segment_ids_BS == 0)
    return is_within_BSS, is_within_BSS & is_key_BS[:, None, :]


def varlen_arguments(segment_ids_M: Tensor) -> dict[str, Any]:
    """Return what FlashAttention needs to know of samples that lie end to end: borders (int32) and the longest."""
    lengths = torch.unique_consecutive(segment_ids_M, return_counts=True)[1]
    borders = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def check_packing(config: Any, weighting: TokenWeighting | None, max_length: int) -> None:
    """Check that packed rows train as unpacked rows do.

    Args:
        config: Of the language model.
        weighting: Of the run.
        max_length: Most tokens of a sample.

    Raises:
        ValueError: If layers see less than the whole sample before a token, or the weighting needs what packed rows do
            not have.
    """
    implementation = attention_of(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(f"packing is not possible: layers of {config.model_type!r} use {', '.join(others)}")
    has_window = not kinds or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if has_window else None
    if window is not None and window < max_length:
        raise ValueError(
            f"packing is not possible: attention of {config.model_type!r} reaches back {window} tokens and "
            f"model_max_length is {max_length}. Set model_max_length to {window}, or leave packing out"
        )
    if weighting is None or weighting.ablation is None:
        return
    if weighting.scope == "flat" and weighting.window > 3:
        raise ValueError(
            f"packing is not possible with cal_scope flat and cal_window {weighting.window}: it would smooth over "
            "padding, which packed rows do not compute. Use cal_window 3 or cal_scope labels"
        )
    if weighting.ablation == "mask" and implementation in VARLEN:
        raise ValueError(
            f"packing is not possible with cal_ablation mask and {implementation}, which cannot hide keys "
            "inside a sample. Use cal_ablation remove, whose logits are the same, or attn_implementation sdpa"
        )
