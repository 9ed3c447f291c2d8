"""Several samples in one row: which go together, and how their tokens lie.

A row that holds several samples is a pack. Packing rearranges the samples of one micro-batch and nothing else: the
sampler, the samples of an optimizer step and resuming stay as they are.

B samples, R packs, S positions of the longest pack.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cal_train.types import IGNORE_INDEX


def packs_of(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return which samples share a row, so that rows padded to the longest have few positions.

    First-fit-decreasing says how few rows the samples fit into. But those are of uneven length, and few long rows can
    hold more padding than many short ones: so the samples are also dealt out evenly, to every number of rows from there
    up to a row for each, and what has the fewest positions is taken. There is never more padding than without packing.

    Args:
        lengths: Tokens of each sample, (B,).
        pack_tokens: Most tokens of a row; a sample with more has a row of its own.

    Returns:
        Indices of the samples of each row, ascending; rows by their first sample. Equal arguments, equal rows.

    Raises:
        ValueError: If ``pack_tokens`` is not positive.
    """
    if pack_tokens < 1:
        raise ValueError(f"pack_tokens={pack_tokens} must be at least 1; leave it out for model_max_length")
    fitted = first_fit_decreasing(lengths, pack_tokens)
    candidates = [fitted, *(deal_out(lengths, count) for count in range(len(fitted), len(lengths) + 1))]

    def cost(packs: list[list[int]]) -> tuple[bool, int, int]:
        totals = [sum(lengths[i] for i in pack) for pack in packs]
        is_too_long = any(total > pack_tokens and len(pack) > 1 for total, pack in zip(totals, packs, strict=True))
        return is_too_long, len(packs) * max(totals, default=0), len(packs)

    return sorted(sorted(pack) for pack in min(candidates, key=cost))


def first_fit_decreasing(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return packs made by putting each sample, longest first, into the first pack that has room for it."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = next((k for k, free in enumerate(room) if free >= lengths[i]), len(packs))
        if k == len(packs):
            packs.append([])
            room.append(pack_tokens)
        packs[k].append(i)
        room[k] -= lengths[i]
    return packs


def deal_out(lengths: Sequence[int], num_packs: int) -> list[list[int]]:
    """Return packs made by putting each sample, longest first, into the shortest of ``num_packs`` packs."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    totals = [(0, k) for k in range(num_packs)]  # a heap
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, k = totals[0]
        packs[k].append(i)
        heapq.heapreplace(totals, (total + lengths[i], k))
    return packs


def pack_text(
    examples: Sequence[Mapping[str, Any]],
    packs: Sequence[Sequence[int]],
    pad_token_id: int,
    extra_keys: Sequence[str] = (),
) -> dict:
    """Return the text side of a packed batch, each entry (R, S) int64, padded on the right.

    Args:
        examples: With ``input_ids`` and ``labels``, (length,) each.
        packs: From `packs_of`.
        pad_token_id: Fills ``input_ids``.
        extra_keys: Further entries of the examples with one integer per token, laid out as they are.

    Returns:
        ``input_ids``; ``attention_mask``; ``labels``, without those of first tokens, before which nothing of their
        sample stands; ``segment_ids``, 1 + the index of the sample, 0 at padding; ``position_ids``, the place of each
        token in its sample, 0 at padding.
    """

    def lay_out(pieces: Sequence[Tensor], fill: int) -> Tensor:
        rows = [torch.cat([pieces[i] for i in pack]) for pack in packs]
        return pad_sequence(rows, batch_first=True, padding_value=fill)

    input_ids = [example["input_ids"] for example in examples]
    segment_ids_RS = lay_out([torch.full_like(ids, i + 1) for i, ids in enumerate(input_ids)], 0)
    position_ids_RS = lay_out([torch.arange(len(ids)) for ids in input_ids], 0)
    labels_RS = lay_out([example["labels"] for example in examples], IGNORE_INDEX)
    return {
        "input_ids": lay_out(input_ids, pad_token_id),
        "attention_mask": (segment_ids_RS > 0).long(),
        "labels": labels_RS.masked_fill(position_ids_RS == 0, IGNORE_INDEX),
        "segment_ids": segment_ids_RS,
        "position_ids": position_ids_RS,
        **{key: lay_out([example[key] for example in examples], 0) for key in extra_keys},
    }
