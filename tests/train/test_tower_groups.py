import pytest
import torch

from cal_train.objectives.families import build_objective
from cal_train.testing import tiny_two_tower
from cal_train.train.tower_groups import tower_groups
from cal_train.train.tower_metrics import WindowMeans, pair_metrics
from cal_train.train.tower_model import TowerModel


@pytest.fixture
def model():
    towers = tiny_two_tower(vision="siglip")
    return TowerModel(towers, build_objective("siglip", towers.shape, {"embed_dim": 16}))


def names_in(model, group):
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_every_trained_parameter_is_in_one_group_and_vectors_never_decay(model):
    groups = tower_groups(model, 1e-3, 0.2)
    names = [name for group in groups for name in names_in(model, group)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decaying = {name for group in groups if group["weight_decay"] for name in names_in(model, group)}
    assert decaying == {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert not decaying & {"objective.log_scale", "objective.logit_bias"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


def test_pretrained_towers_have_their_own_rate_and_decay(model):
    groups = tower_groups(model, 1e-3, 0.2, vision_tower_lr=1e-4, pretrained=["vision"], pretrained_weight_decay=0.0)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "vision/decay": (1e-4, 0.0),
        "vision/no_decay": (1e-4, 0.0),
        "text/decay": (1e-3, 0.2),
        "text/no_decay": (1e-3, 0.0),
        "objective/decay": (1e-3, 0.2),
        "objective/no_decay": (1e-3, 0.0),
    }


def test_options_for_what_is_not_there_are_refused(model):
    with pytest.raises(ValueError, match="both towers start from random weights"):
        tower_groups(model, 1e-3, 0.2, pretrained_weight_decay=0.0)
    model.towers.text.requires_grad_(False)
    assert not [group for group in tower_groups(model, 1e-3, 0.2) if group["name"].startswith("text")]
    with pytest.raises(ValueError, match=r"text_tower_lr=0\.1 is given, but the text tower is locked"):
        tower_groups(model, 1e-3, 0.2, text_tower_lr=0.1)


def test_pair_metrics_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [4.0, 2.0, 1.0], [0.0, 0.0, 5.0]])
    metrics = pair_metrics(logits)
    assert metrics["logits/positive"] == pytest.approx((3 + 2 + 5) / 3)
    assert metrics["logits/negative"] == pytest.approx((1 + 0 + 4 + 1 + 0 + 0) / 6)
    assert metrics["in_batch_r1/image_to_text"] == pytest.approx(2 / 3)  # image 1 prefers text 0
    assert metrics["in_batch_r1/text_to_image"] == pytest.approx(2 / 3)  # text 0 prefers image 1
    same = pair_metrics(logits, torch.tensor([7, 7, 9]))
    assert same["in_batch_r1/image_to_text"] == same["in_batch_r1/text_to_image"] == 1
    assert same["logits/positive"] == pytest.approx((3 + 1 + 4 + 2 + 5) / 5)


def test_collapsed_features_find_nothing():
    assert pair_metrics(torch.ones(4, 4))["in_batch_r1/image_to_text"] == 0


def test_window_means_count_only_the_steps_that_had_a_name():
    means = WindowMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    means.add({"a": torch.tensor(2.0)})
    assert means.means() == {"a": 1.5, "b": 5.0}
