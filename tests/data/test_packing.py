"""What shares a row, and how it lies there."""

import itertools
import random

import pytest
import torch

from cal_train.data.collate import Collator
from cal_train.data.packing import first_fit_decreasing, packs_of
from cal_train.types import Problem


def test_every_sample_is_in_one_pack_and_no_pack_of_several_is_too_long():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.choice([rng.randint(1, 40), rng.randint(1, 120)]) for _ in range(rng.randint(1, 24))]
        packs = packs_of(lengths, 100)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= 100 for pack in packs)
        assert packs == packs_of(lengths, 100)
        assert packs == sorted(sorted(pack) for pack in packs)


def positions(lengths, packs):
    return len(packs) * max(sum(lengths[i] for i in pack) for pack in packs)


def fewest_positions(lengths, pack_tokens):
    """By trying every assignment; for a few samples."""
    best = len(lengths) * max(lengths)
    for rows in itertools.product(range(len(lengths)), repeat=len(lengths)):
        sums = [sum(n for n, row in zip(lengths, rows, strict=True) if row == k) for k in set(rows)]
        if max(sums) <= pack_tokens:
            best = min(best, len(sums) * max(sums))
    return best


def test_packs_have_hardly_more_positions_than_the_best_of_all_assignments():
    rng = random.Random(1)
    excess = []
    for _ in range(60):
        lengths = [rng.randint(1, 60) for _ in range(5)]
        excess.append(positions(lengths, packs_of(lengths, 100)) / fewest_positions(lengths, 100))
    assert max(excess) <= 4 / 3 and sum(excess) / len(excess) < 1.03


def test_packing_never_pads_more_than_rows_of_one_sample_do():
    rng = random.Random(2)
    for _ in range(300):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 16))]
        assert positions(lengths, packs_of(lengths, 120)) <= len(lengths) * max(lengths)
    assert packs_of([60, 60, 58], 150) == [[0], [1], [2]]  # two rows of 120 would hold more padding


def test_packs_are_of_even_length_so_that_the_last_one_is_not_mostly_padding():
    lengths = [60, 20, 20, 20, 20, 10]
    assert [sum(lengths[i] for i in pack) for pack in first_fit_decreasing(lengths, 120)] == [120, 30]
    assert [sum(lengths[i] for i in pack) for pack in packs_of(lengths, 120)] == [80, 70]
    assert packs_of([40, 40, 20, 20], 60) == [[0, 2], [1, 3]]


def test_an_even_deal_that_would_be_too_long_is_not_taken():
    # dealt out to the shortest row, 5 5 4 3 3 makes 8 and 12; first-fit-decreasing makes 10 and 10
    assert packs_of([5, 5, 4, 3, 3], 10) == [[0, 1], [2, 3, 4]]


def test_a_sample_longer_than_a_pack_has_a_row_of_its_own_and_a_size_below_one_is_refused():
    assert packs_of([150, 10, 120, 20], 100) == [[0], [1, 3], [2]]
    with pytest.raises(ValueError, match="pack_tokens=0 must be at least 1"):
        packs_of([1], 0)


def item(name, ids, labels, images=()):
    made = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "num_cut": 0, "sample_id": name}
    return made | ({"pixel_values": torch.tensor(images)[:, None].float()} if images else {})


ITEMS = [
    item("a", [1, 4, 11, 12], [-100, -100, 11, 12], [0.1]),
    item("b", [1, 4, 4, 21, 22, 23], [-100, -100, -100, 21, 22, 23], [0.2, 0.3]),
    item("c", [1, 31], [1, 31]),
    item("d", [1, 4, 41, 42], [-100, -100, -100, 42], [0.4]),
]


def test_a_packed_batch_token_by_token():
    batch = Collator(pad_token_id=9, pack_tokens=8)(ITEMS)
    assert batch["input_ids"].tolist() == [[1, 4, 11, 12, 1, 4, 41, 42], [1, 4, 4, 21, 22, 23, 1, 31]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 4, 4, 4, 4], [2, 2, 2, 2, 2, 2, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1]]
    # the label of c's first token is gone: only the last token of b stands before it
    assert batch["labels"].tolist() == [
        [-100, -100, 11, 12, -100, -100, -100, 42],
        [-100, -100, -100, 21, 22, 23, -100, 31],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 8]
    assert batch["sample_ids"] == ["a", "b", "c", "d"]
    # images in the order of their placeholders: those of d stand before those of b
    assert torch.equal(batch["pixel_values"], torch.tensor([[0.1], [0.4], [0.2], [0.3]]))


def test_padding_of_a_pack_belongs_to_no_sample():
    batch = Collator(pad_token_id=9, pack_tokens=12)(ITEMS[:3])
    assert batch["input_ids"].tolist() == [[1, 4, 11, 12, 1, 4, 4, 21, 22, 23, 1, 31]]
    batch = Collator(pad_token_id=9, pack_tokens=7)([ITEMS[1], ITEMS[2], ITEMS[0]])
    assert batch["input_ids"].tolist() == [[1, 4, 4, 21, 22, 23], [1, 31, 1, 4, 11, 12]]
    batch = Collator(pad_token_id=9, pack_tokens=7)([ITEMS[1], ITEMS[2], ITEMS[2]])
    padding = [name for name in ("attention_mask", "segment_ids", "position_ids") if batch[name][1, 4:].any()]
    assert padding == []
    assert batch["input_ids"][1, 4:].tolist() == [9, 9] and batch["labels"][1, 4:].tolist() == [-100, -100]


def test_samples_that_do_not_fit_together_make_the_padded_batch():
    padded, packed = Collator(9)(ITEMS), Collator(9, 5)(ITEMS)
    assert packed.keys() == padded.keys() and "segment_ids" not in packed
    assert all(torch.equal(packed[name], value) for name, value in padded.items() if isinstance(value, torch.Tensor))


def test_dropped_rows_are_reported_and_a_batch_without_samples_still_makes_a_row():
    problem = Problem("data.json", 3, "x", "broken", "fix it")
    batch = Collator(9, 100)([ITEMS[0], problem, ITEMS[2]])
    assert batch["dropped"] == [problem] and batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2]]
    assert Collator(9, 100)([problem, problem])["input_ids"].tolist() == [[9]]
