import pytest
import torch

from cal_train.objectives.base import Term, total_loss
from cal_train.objectives.families import OBJECTIVES, build_objective
from cal_train.objectives.gather import ONE_RANK
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.train.grad_cache import RngState, grad_cache_step, split_batch
from cal_train.train.tower_model import TowerModel, encode_pairs, objective_of, whole_step

OPTIONS = {
    "coca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4},
    "sycoca": {"num_queries": 4, "decoder_layers": 1, "num_heads": 4, "image_decoder_layers": 1},
    "llip": {"num_heads": 2},
}
RANDOM = {"sycoca": {"mask_selection": "random"}}
"""SyCoCa draws the patches that it drops itself; all others are given patch dropout."""
BATCH_SIZE = 8


def tiny_model(name, patch_dropout=0.0, **options):
    towers = tiny_two_tower(
        text_pooling="cls_appended" if name in ("coca", "sycoca") else "eos",
        num_mixture_tokens=4 if name == "llip" else 0,
        patch_dropout=patch_dropout,
        dtype=torch.float64,
    )
    torch.manual_seed(1)
    objective = build_objective(name, towers.shape, {"embed_dim": 16} | OPTIONS.get(name, {}) | options)
    return TowerModel(towers, objective.double()).train()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    model.zero_grad()
    return found


def cached(model, batch, chunk_size, ranks=ONE_RANK):
    torch.manual_seed(7)
    outputs = grad_cache_step(
        model, batch, chunk_size, ranks, run=model, backward=torch.Tensor.backward, no_sync=torch.enable_grad
    )
    return outputs, gradients(model)


def plain(model, batch, chunk_size):
    """One graph over all chunks, encoded one after the other so that random numbers are drawn in the same order."""
    torch.manual_seed(7)
    images, texts, sums, weights = [], [], {}, {}
    for chunk in split_batch(batch, chunk_size):
        image, text, terms, _ = encode_pairs(model, chunk)
        images.append(image)
        texts.append(text)
        for term_name, term in terms.items():
            sums[term_name] = sums.get(term_name, 0) + term.sum
            weights[term_name] = weights.get(term_name, 0) + term.weight
    joined = [{key: torch.cat([part[key] for part in side]) for key in side[0]} for side in (images, texts)]
    terms = objective_of(model).contrast(*joined, ONE_RANK) | {key: Term(sums[key], weights[key]) for key in sums}
    loss, _ = total_loss(terms, objective_of(model).loss_weights)
    loss.backward()
    return loss, gradients(model)


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_cached_gradients_are_those_of_the_whole_batch_with_random_patches(name, num_chunks):
    model = tiny_model(name, patch_dropout=0.0 if name in RANDOM else 0.5, **RANDOM.get(name, {}))
    batch = tiny_pairs(model.towers.shape, BATCH_SIZE, dtype=torch.float64)
    outputs, grads = cached(model, batch, BATCH_SIZE // num_chunks)
    loss, expected = plain(model, batch, BATCH_SIZE // num_chunks)
    torch.manual_seed(8)
    assert whole_step(model, batch, ONE_RANK)["loss"].item() != loss.item(), "no random number in this step"
    assert outputs["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    assert largest_difference(grads, expected) < 1e-12
    (scale,) = (grad for name, grad in grads.items() if name.endswith("log_scale"))
    assert scale.abs() > 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_random_numbers_any_chunk_size_equals_the_ordinary_step(name):
    model = tiny_model(name)
    batch = tiny_pairs(model.towers.shape, BATCH_SIZE, dtype=torch.float64)
    outputs = whole_step(model, batch, ONE_RANK)
    outputs["loss"].backward()
    expected = gradients(model)
    for chunk_size in (1, 3, 8, 100):
        step, grads = cached(model, batch, chunk_size)
        assert step["loss"].item() == pytest.approx(outputs["loss"].item(), rel=1e-12)
        assert largest_difference(grads, expected) < 1e-12, chunk_size
        for part, value in outputs["parts"].items():
            assert step["parts"][part].item() == pytest.approx(value.item(), rel=1e-6)


def test_rows_with_equal_images_stay_positives_of_each_other():
    model = tiny_model("clip")
    batch = tiny_pairs(model.towers.shape, BATCH_SIZE, dtype=torch.float64)
    without, _ = cached(model, batch, 2)
    batch["image_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    outputs = whole_step(model, batch, ONE_RANK)
    outputs["loss"].backward()
    expected = gradients(model)
    step, grads = cached(model, batch, 2)
    assert step["loss"].item() == pytest.approx(outputs["loss"].item(), rel=1e-12)
    assert abs(step["loss"] - without["loss"]) > 1e-6
    assert largest_difference(grads, expected) < 1e-12


def test_the_scale_of_accumulation_multiplies_every_gradient():
    model = tiny_model("sparc")
    batch = tiny_pairs(model.towers.shape, BATCH_SIZE, dtype=torch.float64)
    _, whole = cached(model, batch, 4)
    grad_cache_step(
        model, batch, 4, ONE_RANK, run=model, backward=torch.Tensor.backward, no_sync=torch.enable_grad, scale=0.25
    )
    quarter = gradients(model)
    assert largest_difference({name: 0.25 * grad for name, grad in whole.items()}, quarter) < 1e-13


def test_locked_towers_get_no_gradient_and_the_rest_gets_the_same():
    model = tiny_model("clip")
    model.towers.vision.requires_grad_(False)
    batch = tiny_pairs(model.towers.shape, BATCH_SIZE, dtype=torch.float64)
    whole_step(model, batch, ONE_RANK)["loss"].backward()
    expected = gradients(model)
    _, grads = cached(model, batch, 2)
    assert not any(name.startswith("towers.vision") for name in grads)
    assert largest_difference(grads, expected) < 1e-12


def test_random_numbers_go_on_behind_a_replay_as_if_it_had_not_been():
    state = RngState.now(torch.device("cpu"))
    first = torch.rand(3)
    with state.replayed():
        assert torch.equal(torch.rand(3), first)
    following = torch.rand(3)
    torch.set_rng_state(state.cpu)
    assert torch.equal(torch.rand(6)[3:], following)
