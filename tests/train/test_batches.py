"""Which rows each rank takes."""

from types import SimpleNamespace

import pytest
import torch

from cal_train.data.sampling import RankBatches
from cal_train.train import batches as batches_module
from cal_train.train.batches import check_same_rows, train_batches
from cal_train.train.stream import epoch_loader
from cal_train.train.trainer import VlmTrainer


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 6, 7, 12])
def test_ranks_take_each_row_once_in_equally_many_batches(num_rows, world_size):
    order = torch.randperm(num_rows).tolist()
    ranks = [RankBatches(order, 2, rank, world_size) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(r) for r in ranks} == {-(-num_rows // (2 * world_size))}
    in_turn = [row for step in zip(*batches, strict=True) for batch in step for row in batch]
    assert in_turn == order
    assert all(len(batch) == 2 for own in batches for batch in own[:-1])


def test_what_is_left_over_goes_with_drop_last():
    batches = RankBatches(list(range(7)), 2, 1, 2, drop_last=True)
    assert list(batches) == [[2, 3]] and len(batches) == 1


def test_an_empty_batch_gives_every_trained_weight_a_gradient_of_zero(tiny_run, trained_models, monkeypatch):
    """DDP would wait for ever for a weight without one."""
    taken, compute = [], VlmTrainer.compute_loss

    def on_nothing(self, model, inputs, **options):
        empty = {**self.data_collator([]), "sample_ids": []}
        for name in ("dropped", "num_truncated"):
            empty.pop(name)
        loss = compute(self, model, empty, **options)
        loss.backward()
        taken.append([None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad])
        return compute(self, model, inputs, **options)

    monkeypatch.setattr(VlmTrainer, "compute_loss", on_nothing)
    tiny_run("--max_steps", "1", "--cal", "true")
    (gradients,) = taken
    assert len(gradients) > 10
    assert all(grad is not None and not grad.any() for grad in gradients)


@pytest.mark.parametrize("option", ["split_batches", "dispatch_batches"])
def test_options_of_accelerate_that_would_deal_rows_again_are_refused(option):
    config = SimpleNamespace(**{"split_batches": False, "dispatch_batches": None, option: True})
    with pytest.raises(ValueError, match="leave out split_batches and dispatch_batches"):
        train_batches([], [], list, SimpleNamespace(accelerator_config=config))


def test_the_rows_of_a_streamed_epoch_are_those_of_all_ranks():
    """The Trainer logs rows per second of the whole run by this number."""
    trainer = VlmTrainer.__new__(VlmTrainer)
    trainer.args = SimpleNamespace(per_device_train_batch_size=4, world_size=3)
    batches = RankBatches(list(range(60)), 4, 0, 3)
    assert trainer.num_examples(epoch_loader(batches, dict)) == 60
    assert trainer.num_examples(torch.utils.data.DataLoader(list(range(7)), batch_sampler=batches)) == 7


@pytest.mark.parametrize(("num_rows", "files"), [(8, {"a": 5}), (9, {"a": 4}), (8, {"b": 5, "a": 5})])
def test_ranks_that_have_found_other_data_are_refused(monkeypatch, num_rows, files):
    check_same_rows(9, {"a": 5})  # one process
    others = []
    monkeypatch.setattr(batches_module, "gather_object", lambda own: others.append(own[0]) or own)
    check_same_rows(num_rows, files)
    check_same_rows(9, {"a": 5})
    monkeypatch.setattr(batches_module, "gather_object", lambda own: [own[0], others[1], others[0]])
    with pytest.raises(ValueError, match=rf"1 ranks .* rank 0, which has 9 rows, first rank 2 with {num_rows}: give"):
        check_same_rows(9, {"a": 5})
