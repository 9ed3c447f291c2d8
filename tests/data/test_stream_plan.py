"""The plan alone: nothing lost, nothing twice, every position computable."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cal_train.data.stream_plan import EpochPlan, Share


def lane_rows(plan, share):
    """Rows (source, block, row) of each batch of a lane."""
    lane, batches = plan.lane(share), []
    for pieces, order in lane.windows():
        rows = [(p.source, p.block, i) for p in pieces for i in range(p.start, p.stop)]
        assert sorted(order.tolist()) == list(range(len(rows)))
        batches += [
            [rows[i] for i in order[k : k + plan.rows_per_batch]] for k in range(0, len(order), plan.rows_per_batch)
        ]
    return batches


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    rows_per_batch=st.integers(1, 4),
    window=st.integers(1, 12),
    world_size=st.integers(1, 3),
    num_workers=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_lanes_share_no_row_and_leave_out_less_than_one_global_batch(
    sources, rows_per_batch, window, world_size, num_workers, epoch
):
    plan = EpochPlan([np.array(s) for s in sources], [1.0] * len(sources), rows_per_batch, window, 3, epoch)
    total = sum(map(sum, sources))
    seen = Counter()
    for rank in range(world_size):
        lanes = [lane_rows(plan, Share(rank, world_size, worker, num_workers)) for worker in range(num_workers)]
        assert sum(map(len, lanes)) == plan.num_batches(world_size) == total // (world_size * rows_per_batch)
        # Batch k comes from worker k % num_workers, so the numbers of batches may differ by one, downwards.
        counts = [len(lane) for lane in lanes]
        assert all(0 <= a - b <= 1 for a, b in pairwise(counts)) and counts[0] - counts[-1] <= 1
        assert all(len(batch) == rows_per_batch for lane in lanes for batch in lane)
        seen.update(row for lane in lanes for batch in lane for row in batch)
    assert set(seen.values()) <= {1}
    assert total - len(seen) == plan.left_out(world_size) < world_size * rows_per_batch
    every_row = {(s, b, i) for s, blocks in enumerate(sources) for b, n in enumerate(blocks) for i in range(n)}
    assert set(seen) <= every_row


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 2.5])
def test_a_weight_says_how_often_rows_occur(weight):
    plan = EpochPlan([np.full(10, 4), np.full(3, 2)], [weight, 1.0], 1, 16)
    seen = Counter(row for batch in lane_rows(plan, Share()) for row in batch)
    first = [n for (source, _, _), n in seen.items() if source == 0]
    assert sum(first) == 40 * weight and sum(seen.values()) == 40 * weight + 6
    assert set(first) <= {int(weight), -int(-weight // 1)}


def test_epochs_and_seeds_give_different_orders_and_equal_arguments_the_same():
    def order(seed, epoch):
        plan = EpochPlan([np.full(20, 3)], [1.0], 2, 12, seed, epoch)
        return [row for batch in lane_rows(plan, Share()) for row in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_window_mixes_sources_in_proportion_and_blocks_with_each_other():
    plan = EpochPlan([np.full(30, 30), np.full(10, 30)], [1.0, 1.0], 10, 200)
    batches = lane_rows(plan, Share())
    shares = [np.mean([row[0] == 0 for batch in batches[k : k + 20] for row in batch]) for k in range(0, 120, 20)]
    # 200 draws without replacement of 1,200 with a share of 3/4: standard deviation below 0.031
    assert max(abs(share - 0.75) for share in shares) < 0.12, shares
    assert np.mean([len({row[:2] for row in batch}) for batch in batches]) > 4
