"""How the samples of a batch lie in its rows, and which of their tokens are predicted.

B rows, S positions, N targets, P samples (B, if nothing is packed).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cal_train.types import IGNORE_INDEX


class Layout(NamedTuple):
    """One sample per row, padded on the right; or several, where ``segment_ids`` tell them apart."""

    attention_mask: Tensor
    """(B, S): 1 for tokens, 0 for padding."""
    position_ids: Tensor | None = None
    """(B, S): the place of each token in its sample. None: the position in the row."""
    segment_ids: Tensor | None = None
    """(B, S): 1 + the index of each token's sample, 0 at padding. None: one sample per row."""

    def take(self, rows_R: Tensor) -> "Layout":
        """Return the layout of some rows."""
        if self.segment_ids is None or self.position_ids is None:
            return Layout(self.attention_mask[rows_R])
        return Layout(self.attention_mask[rows_R], self.position_ids[rows_R], self.segment_ids[rows_R])

    def grid(self) -> tuple[int, int]:
        """Return the number of samples and the length of the longest; padding to the common width counts as length."""
        if self.segment_ids is None or self.position_ids is None:
            return (len(self.attention_mask), self.attention_mask.shape[1])
        return int(self.segment_ids.max()), int(self.position_ids.max()) + 1

    def has_any(self, mask_BS: Tensor) -> Tensor:
        """Return for each sample whether the mask is True at any of its tokens, (P,) bool."""
        if self.segment_ids is None:
            return mask_BS.any(1)
        has_any = torch.zeros(self.grid()[0], dtype=torch.bool, device=mask_BS.device)
        has_any[self.segment_ids[mask_BS] - 1] = True
        return has_any


class Targets(NamedTuple):
    """Tokens to predict, sample by sample in reading order; each entry (N,) int64.

    A target is predicted from ``positions - 1`` of its row. Without packing, samples are rows and places positions.
    """

    rows: Tensor
    positions: Tensor
    ids: Tensor
    samples: Tensor
    places: Tensor
    """Place in the sample, from 1 on."""


def layout_of(batch: Mapping[str, Tensor]) -> Layout:
    """Return how the samples of a batch of `cal_train.data.collate` lie."""
    return Layout(batch["attention_mask"], batch.get("position_ids"), batch.get("segment_ids"))


def label_tokens(labels_BS: Tensor, layout: Layout | None = None) -> Targets:
    """Return the label tokens. A label at the first place of a sample has no token before it and is never predicted."""
    rows, shifted = (labels_BS[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    ids = labels_BS[rows, shifted + 1]
    if layout is None or layout.segment_ids is None or layout.position_ids is None:
        return Targets(rows, shifted + 1, ids, rows, shifted + 1)
    places = layout.position_ids[rows, shifted + 1]
    samples = layout.segment_ids[rows, shifted + 1] - 1
    return _in_order(Targets(rows, shifted + 1, ids, samples, places), places > 0)


def every_position(labels_BS: Tensor, layout: Layout) -> Targets:
    """Return all positions from 1 on; where there is no label the target is id 0, as in the reference code.

    Of packed samples, these are the places up to the first one behind the last token: smoothing over three places
    reaches no other of the padding that unpacked rows have, except from a label at place 1.

    Raises:
        ValueError: If packed samples have a label at place 1.
    """
    if layout.segment_ids is None or layout.position_ids is None:
        rows, shifted = torch.ones_like(labels_BS[:, 1:]).nonzero(as_tuple=True)
        ids = labels_BS[rows, shifted + 1]
        return Targets(rows, shifted + 1, ids.masked_fill_(ids < 0, 0), rows, shifted + 1)
    if bool(((labels_BS != IGNORE_INDEX) & (layout.position_ids == 1)).any()):
        raise ValueError(
            "a label follows the first token of a sample: with packing, cal_scope flat cannot smooth it with the "
            "padding before it. Use cal_scope labels, or leave packing out"
        )
    rows, sources = (layout.segment_ids > 0).nonzero(as_tuple=True)
    samples, places = layout.segment_ids[rows, sources] - 1, layout.position_ids[rows, sources] + 1
    following_N = torch.clamp(sources + 1, max=labels_BS.shape[1] - 1)
    ids = labels_BS[rows, following_N]
    is_label_N = (layout.position_ids[rows, following_N] == places) & (ids != IGNORE_INDEX)
    targets = Targets(rows, sources + 1, ids.where(is_label_N, 0), samples, places)
    return _in_order(targets, places < layout.grid()[1])


def _in_order(targets: Targets, is_kept_N: Tensor) -> Targets:
    """Return some of the targets, sorted by sample; those of a sample keep their order."""
    order = torch.argsort(targets.samples[is_kept_N], stable=True)
    return Targets(*(values[is_kept_N][order] for values in targets))
