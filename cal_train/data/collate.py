"""Examples to one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from cal_train.data.packing import pack_text, packs_of
from cal_train.types import IGNORE_INDEX, Problem

DELTA_BITS = "delta_bits"
"""Stored deltas of a row's tokens: float32 as its bits in int32, as engines round every float input to their dtype."""

TEXT_KEYS = ("input_ids", "labels", "num_cut", "sample_id", DELTA_BITS)
"""What is for the text side: what every example holds, and `DELTA_BITS`; the rest is for the vision side."""

DROPPED_ROW_ID = "(dropped)"
"""Sample id of the stand-in row of a batch whose rows were all dropped, or that has none."""


class Collator:
    """Make a batch of what `cal_train.data.dataset.VlmDataset` returns.

    B rows, S longest row, I images, P patches, D tower width. The batch holds ``input_ids``, ``attention_mask`` and
    ``labels`` (B, S) int64, padded on the right; the vision inputs of the family (``pixel_values`` (I, C, H, W) float32
    and others, concatenated) or ``vision_features`` (I, P, D), in the order of the image placeholders, absent when no
    row has an image; ``sample_ids`` (B strings), ``dropped``, the `Problem` of every bad row, and ``num_truncated``,
    how many rows lost text to the length limit. Examples with `DELTA_BITS` give the batch that entry too, (B, S).

    A batch whose rows were all dropped, or that has none, comes out as one row of one pad token without labels, so that
    every rank still takes its step.

    With ``pack_tokens``, several samples share a row wherever that makes fewer rows, each of at most so many tokens:
    `cal_train.data.packing.pack_text` says what ``input_ids`` and the others then are and adds ``segment_ids`` and
    ``position_ids``. ``sample_ids`` stay in the order of the items, which ``segment_ids`` count; the vision inputs
    follow the placeholders as always.
    """

    def __init__(self, pad_token_id: int, pack_tokens: int | None = None):
        self.pad_token_id, self.pack_tokens = pad_token_id, pack_tokens

    def __call__(self, items: Sequence[dict[str, Any] | Problem]) -> dict[str, Any]:
        """Return the batch of the items.

        Raises:
            ValueError: If some rows carry pixels and others cached features: the cache is incomplete.
        """
        dropped = [item for item in items if isinstance(item, Problem)]
        examples = [item for item in items if not isinstance(item, Problem)] or [self._stand_in()]
        text, in_reading_order = self._lay_out(examples)
        batch = {
            **text,
            "sample_ids": [example["sample_id"] for example in examples],
            "dropped": dropped,
            "num_truncated": sum(example["num_cut"] > 0 for example in examples),
        }
        kinds = list(dict.fromkeys(key for example in examples for key in example if key not in TEXT_KEYS))
        if "vision_features" in kinds and len(kinds) > 1:
            missing = [example["sample_id"] for example in examples if "pixel_values" in example]
            raise ValueError(
                f"images of sample {missing[0]!r} are not in the feature cache while those of others are: "
                "fill the cache for this data set again, or unset vision_feature_cache"
            )
        for key in kinds:
            batch[key] = torch.cat([example[key] for example in in_reading_order if key in example])
        return batch

    def _lay_out(self, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the text side of the batch, and the examples in the order in which it reads."""
        if self.pack_tokens is not None:
            packs = packs_of([len(example["input_ids"]) for example in examples], self.pack_tokens)
            if len(packs) < len(examples):  # else packing has nothing to offer over padded rows
                extra = [DELTA_BITS] if DELTA_BITS in examples[0] else []
                in_order = [examples[i] for pack in packs for i in pack]
                return pack_text(examples, packs, self.pad_token_id, extra), in_order
        input_ids = [example["input_ids"] for example in examples]
        labels = [example["labels"] for example in examples]
        text = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if DELTA_BITS in examples[0]:
            text[DELTA_BITS] = pad_sequence([example[DELTA_BITS] for example in examples], batch_first=True)
        return text, examples

    def _stand_in(self) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([self.pad_token_id]),
            "labels": torch.tensor([IGNORE_INDEX]),
            "num_cut": 0,
            "sample_id": DROPPED_ROW_ID,
        }
