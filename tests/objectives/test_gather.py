"""Two, three and four gloo ranks against one process: loss parts and parameter gradients of every contrastive loss."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cal_train.objectives.clip import clip_loss
from cal_train.objectives.gather import ONE_RANK, current_ranks
from cal_train.objectives.llip import llip_loss
from cal_train.objectives.siglip import siglip_loss

SCRIPT = Path(__file__).with_name("on_ranks.py")
WORLD_SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def on_ranks():
    spec = importlib.util.spec_from_file_location("on_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every rank of every world size found: ``results[world_size][rank]``."""
    out = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SCRIPT), str(out), *map(str, WORLD_SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {size: [torch.load(out / f"{size}-{rank}.pt") for rank in range(size)] for size in WORLD_SIZES}
    assert all(rank["world_size"] == size for size, ranks in found.items() for rank in ranks)
    return found


def one_process_loss(on_ranks, case, ids):
    """The loss by its dense form and the model it belongs to; FILIP has but one form, tested on its own."""
    model = on_ranks.Model(case)
    data = on_ranks.make_data()
    images, texts = model.features(*data)
    objective = model.objective
    scale = objective.log_scale.exp()
    if case.startswith("clip"):
        return clip_loss(images["image_embeds"], texts["text_embeds"], scale, ids), model
    if case.startswith("siglip"):
        return siglip_loss(images["image_embeds"], texts["text_embeds"], scale, objective.logit_bias, ids), model
    if case.startswith("llip"):
        mixed = images["keys"], images["values"], texts["queries"], texts["text_embeds"], objective.out_proj
        return llip_loss(*mixed, objective.temperature, scale, objective.logit_bias, ids), model
    return model(*data, ids)[0], model


def test_every_case_ran(results, on_ranks):
    num_cases = len(on_ranks.CASES) + len(on_ranks.WITH_IDS)
    assert [len(results[size][0]["cases"]) for size in WORLD_SIZES] == [num_cases, num_cases, 3]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_have_loss_and_gradients_of_one_process(results, on_ranks, world_size):
    """Scale and bias are among the parameters; DDP averages the gradients of the ranks."""
    for case, ids in on_ranks.cases_for(world_size):
        expected, model = one_process_loss(on_ranks, case, ids)
        expected.backward()
        case += " ids" * (ids is not None)
        found = [rank["cases"][case] for rank in results[world_size]]
        for rank in found:
            assert rank["parts"]["contrastive"].item() == pytest.approx(expected.item(), rel=1e-6), case  # float32 sums
        assert sum(rank["loss"].item() for rank in found) / world_size == pytest.approx(expected.item(), rel=1e-12), (
            case
        )
        for name, parameter in model.named_parameters():
            largest = parameter.grad.abs().max()
            assert largest > 1e-8, f"{case}: {name} has no gradient to compare"
            for rank in found:
                difference = (rank["gradients"][name] - parameter.grad).abs().max()
                assert difference < 1e-11 * largest, f"{case}: {name} differs by {difference} of {largest}"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_unequal_rows_are_refused_on_all_ranks_without_a_hang(results, world_size):
    for rank in results[world_size]:
        assert len(rank["refused"]) == 5
        for case, said in rank["refused"].items():
            assert "2 to 3 pairs" in said and "dataloader_drop_last" in said, (case, said)


def test_one_rank_exchanges_nothing():
    tensor = torch.arange(3.0, requires_grad=True)
    assert current_ranks() == ONE_RANK
    assert ONE_RANK.all_gather(tensor) is tensor and ONE_RANK.all_to_all(tensor) is tensor
    assert list(ONE_RANK.ring((tensor,))) == [(tensor,)]
    assert ONE_RANK.all_reduce_sum(tensor) is tensor and ONE_RANK.all_reduce_max(tensor) is tensor
