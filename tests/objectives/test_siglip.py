"""SigLIP: golden, closed forms, invariances; chunks against dense; bias; positives; the objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cal_train.objectives.base import total_loss
from cal_train.objectives.gather import ONE_RANK
from cal_train.objectives.siglip import SigLip, siglip_loss, siglip_term, softplus_sum
from cal_train.towers.outputs import TowerOutputs, TowerShape

SHAPE = TowerShape(12, 10, 28, 14, 50, 8, 0)


def fx(shape, a, phase):
    """The fixture values of the golden numbers: no random generator."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phase + 0.1 * (k % 7) ** 2).view(shape)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chunked_loss(images, texts, scale, bias, ids=None, chunk_size=3):
    features = {"image_embeds": images} | ({} if ids is None else {"image_ids": ids})
    term = siglip_term(features, {"text_embeds": texts}, scale, bias, chunk_size=chunk_size)
    return term.sum / term.weight


def value_and_gradients(loss, *inputs):
    value = loss(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


BOTH = pytest.mark.parametrize("loss", [siglip_loss, chunked_loss])


@BOTH
def test_siglip_loss_has_the_golden_value(loss):
    images, texts = fx((4, 6), 0.37, 0.1), fx((4, 6), 0.53, 0.4)
    assert loss(images, texts, 10.0, -10.0).item() == pytest.approx(12.541259649358869, abs=1e-13)


@BOTH
@pytest.mark.parametrize(("size", "bias"), [(4, -10.0), (3, 0.5), (1, -2.0)])
def test_orthogonal_pairs_have_the_loss_of_the_bias_alone(loss, size, bias):
    images, texts = torch.eye(2 * size, dtype=torch.float64).split(size)
    expected = math.log1p(math.exp(-bias)) + (size - 1) * math.log1p(math.exp(bias))
    assert loss(images, texts, 10.0, bias).item() == pytest.approx(expected, abs=1e-13)
    if (size, bias) == (4, -10.0):
        assert expected == pytest.approx(10.00018159559687, abs=1e-13)


@BOTH
def test_gradients_are_minus_y_times_a_sigmoid(loss):
    images, texts = F.normalize(drawn(6, 5), dim=1), F.normalize(drawn(6, 5, seed=1), dim=1)
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (7.0, -2.0))
    inputs = [x.clone().requires_grad_() for x in (images, texts, scale, bias)]
    _, grad_images, grad_texts, grad_scale, grad_bias = value_and_gradients(loss, *inputs)
    cosines = images @ texts.T
    y = 2 * torch.eye(6, dtype=torch.float64) - 1
    by_logit = -y * torch.sigmoid(-y * (scale * cosines + bias)) / 6
    tangent = scale * by_logit @ texts
    tangent -= (tangent * images).sum(1, keepdim=True) * images
    assert torch.allclose(grad_images, tangent, atol=1e-13)
    assert (grad_images * images).sum(1).abs().max() < 1e-14, "normalisation leaves no gradient along an embedding"
    assert (grad_texts * texts).sum(1).abs().max() < 1e-14
    assert grad_scale.item() == pytest.approx((by_logit * cosines).sum().item(), abs=1e-13)
    assert grad_bias.item() == pytest.approx(by_logit.sum().item(), abs=1e-13)


@BOTH
def test_order_of_pairs_rotation_and_lengths_do_not_matter(loss):
    images, texts = drawn(7, 5), drawn(7, 5, seed=1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    rotation = torch.linalg.qr(drawn(5, 5, seed=2)).Q
    expected = loss(images, texts, 10.0, -4.0).item()
    assert loss(images[order], texts[order], 10.0, -4.0).item() == pytest.approx(expected, abs=1e-13)
    assert loss(images @ rotation, texts @ rotation, 10.0, -4.0).item() == pytest.approx(expected, abs=1e-13)
    assert loss(images * 9, texts * 0.2, 10.0, -4.0).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("ids", [None, [0, 1, 1, 2, 3, 0, 4, 5, 1, 6]], ids=["pairs", "shared images"])
def test_chunked_is_dense_in_value_and_all_gradients(chunk_size, ids):
    inputs = [drawn(10, 6), drawn(10, 6, seed=1), *(torch.tensor(x, dtype=torch.float64) for x in (12.0, -3.0))]
    inputs = [x.requires_grad_() for x in inputs]
    ids = None if ids is None else torch.tensor(ids)
    dense = value_and_gradients(lambda *x: siglip_loss(*x, ids), *inputs)
    chunked = value_and_gradients(lambda *x: chunked_loss(*x, ids, chunk_size), *inputs)
    for a, b in zip(dense, chunked, strict=True):
        assert (a - b).abs().max() < 1e-13


def test_softplus_sum_scales_its_gradients_by_what_comes_from_above():
    inputs = [drawn(5, 3), drawn(8, 3, seed=1), *(torch.tensor(x, dtype=torch.float64) for x in (4.0, -1.0))]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: softplus_sum(*x, 3) * 2.5, inputs)
    with torch.no_grad():
        expected = F.softplus(4 * inputs[0] @ inputs[1].T - 1).sum()
        assert softplus_sum(*inputs, 3).item() == pytest.approx(expected.item())


def test_chunks_never_hold_a_matrix_of_all_pairs():
    images, texts = (drawn(256, 8, seed=seed).requires_grad_() for seed in (0, 1))
    with LargestTensor() as chunked:
        chunked_loss(images, texts, 10.0, -10.0, chunk_size=32).backward()
    with LargestTensor() as dense:
        siglip_loss(images, texts, 10.0, -10.0).backward()
    assert chunked.largest == 256 * 8 and dense.largest == 256 * 256


@BOTH
def test_every_pair_of_a_shared_image_is_a_positive(loss):
    images, texts, ids = drawn(6, 4), drawn(6, 4, seed=1), [7, 3, 7, 1, 3, 7]
    logits = 5 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T - 2
    expected = sum(
        math.log1p(math.exp(-logits[i, j].item() if ids[i] == ids[j] else logits[i, j].item()))
        for i in range(6)
        for j in range(6)
    )
    assert loss(images, texts, 5.0, -2.0, torch.tensor(ids)).item() == pytest.approx(expected / 6, abs=1e-13)


def test_autocast_does_not_touch_the_loss():
    images, texts = drawn(8, 16).bfloat16(), drawn(8, 16, seed=1).bfloat16()
    expected = siglip_loss(images.double(), texts.double(), 80.0, -10.0).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_loss(images, texts, torch.tensor(80.0), torch.tensor(-10.0))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [2, 64])
def test_automatic_bias_has_the_least_loss_of_uninformative_logits(size):
    bias = SigLip(SHAPE, bias_init="auto", global_batch_size=size).logit_bias.item()
    images, texts = torch.eye(2 * size, dtype=torch.float64).split(size)
    losses = [siglip_loss(images, texts, 10.0, bias + step).item() for step in (-0.01, 0.0, 0.01)]
    assert losses[1] < min(losses[0], losses[2])
    if size == 64:  # the figures of the design: -10 starts at 10.003, the best bias at 5.151
        assert losses[1] == pytest.approx(5.151, abs=5e-4)
        assert siglip_loss(images, texts, 10.0, -10.0).item() == pytest.approx(10.003, abs=5e-4)


def make_features(objective, num_pairs=5):
    outputs = TowerOutputs(image_pooled=drawn(num_pairs, 12), text_pooled=drawn(num_pairs, 10, seed=1))
    return objective.image_features(outputs), objective.text_features(outputs)


@pytest.mark.parametrize("exchange", ["ring", "ring_bidirectional", "gather"])
def test_objective_is_the_loss_of_its_projections(exchange):
    objective = SigLip(SHAPE, embed_dim=6, bias_init=-3, exchange=exchange, chunk_size=2).double()
    images, texts = make_features(objective)
    loss, parts = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    loss.backward()
    expected = siglip_loss(images["image_embeds"], texts["text_embeds"], 10.0, -3.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7), "the initial scale is stored in float32"
    assert parts.keys() == objective.loss_weights.keys() == {"contrastive"}
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    y = 2 * torch.eye(5) - 1
    by_hand = F.softplus(-y * objective.score(images, texts)).sum() / 5
    assert by_hand.item() == pytest.approx(loss.item()), "scores are the logits"


def test_a_batch_of_one_pair_has_one_question():
    objective = SigLip(SHAPE, embed_dim=6).double()
    images, texts = make_features(objective, num_pairs=1)
    loss, _ = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    assert loss.item() == pytest.approx(F.softplus(-objective.score(images, texts)).item())


def test_scale_is_clamped_and_bias_is_free():
    objective = SigLip(SHAPE)
    objective.log_scale.data.fill_(9.0)
    objective.logit_bias.data.fill_(-300.0)
    objective.clamp_()
    assert objective.log_scale.exp().item() == pytest.approx(100, rel=1e-6)
    assert objective.logit_bias.item() == -300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "star"}, "ring, ring_bidirectional, gather"),
        ({"chunk_size": 0}, "at least 1"),
        ({"bias_init": "auto"}, "global_batch_size is None"),
        ({"bias_init": "auto", "global_batch_size": 1}, "at least 2"),
        ({"bias_init": "best"}, "'best' must be a number or 'auto'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SigLip(SHAPE, **options)
