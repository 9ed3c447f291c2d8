"""Take the image away from a sequence of embeddings: remove its tokens, or mask them as attention keys.

B rows, S positions, K positions that are kept, D width. A row holds one sample, or several where ``segment_ids`` tell
them apart (1 and up, 0 at padding).

Source: arXiv:2405.17871, section 3.1 (logits "without image inputs"). The reference code masks image keys and still
computes the image rows (`mask_images`). Removing the tokens while every text token keeps its position gives the same
hidden states at text positions, for the price of the text alone (`remove_images`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TextOnly(NamedTuple):
    """A batch without its image tokens."""

    inputs_embeds: Tensor
    """(B, K, D), right-padded."""
    attention_mask: Tensor
    """(B, K) int64. Always passed on: without a mask, gapped positions would be taken for packed sequences."""
    position_ids: Tensor
    """(B, K) int64: the positions that the tokens have in the full sequence."""
    last_kept: Tensor
    """(B, S) int64: index into K of the sample's last kept token at or before each position; -1 where it has none."""
    segment_ids: Tensor | None = None
    """(B, K) int64, of rows with several samples."""


def remove_images(
    inputs_embeds_BSD: Tensor,
    attention_mask_BS: Tensor,
    image_mask_BS: Tensor,
    position_ids_BS: Tensor | None = None,
    segment_ids_BS: Tensor | None = None,
) -> TextOnly:
    """Delete the image tokens of every row and keep the position ids of the rest.

    Args:
        inputs_embeds_BSD: Embeddings of the full sequence, right-padded.
        attention_mask_BS: 1 for tokens, 0 for padding and for what else is to be deleted.
        image_mask_BS: True at image tokens.
        position_ids_BS: Places in the samples; needed with ``segment_ids_BS``.
        segment_ids_BS: Of rows with several samples.

    Returns:
        The text-only batch, see `TextOnly`.
    """
    keep_BS = attention_mask_BS.bool() & ~image_mask_BS
    num_kept_B = keep_BS.sum(1)
    width = max(int(num_kept_B.max()), 1)
    # a stable sort moves kept positions to the front without changing their order
    position_BK = torch.argsort((~keep_BS).to(torch.int8), dim=1, stable=True)[:, :width]
    attention_mask_BK = (torch.arange(width, device=keep_BS.device) < num_kept_B[:, None]).long()
    rows_B1 = torch.arange(len(keep_BS), device=keep_BS.device)[:, None]
    text = TextOnly(
        inputs_embeds=inputs_embeds_BSD[rows_B1, position_BK],
        attention_mask=attention_mask_BK,
        position_ids=position_BK,
        last_kept=keep_BS.long().cumsum(1) - 1,
    )
    if segment_ids_BS is None or position_ids_BS is None:
        return text
    segment_ids_BK = segment_ids_BS[rows_B1, position_BK] * attention_mask_BK
    of_last_BS = segment_ids_BK[rows_B1, text.last_kept.clamp_min(0)]
    return text._replace(
        position_ids=position_ids_BS[rows_B1, position_BK] * attention_mask_BK,
        last_kept=text.last_kept.masked_fill(of_last_BS != segment_ids_BS, -1),
        segment_ids=segment_ids_BK,
    )


def mask_images(attention_mask_BS: Tensor, image_mask_BS: Tensor) -> Tensor:
    """Return the attention mask with the image tokens hidden as keys; positions and image rows stay."""
    return attention_mask_BS * (~image_mask_BS).to(attention_mask_BS.dtype)
