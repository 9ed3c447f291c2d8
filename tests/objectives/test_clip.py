"""CLIP: goldens, closed forms, invariances; tiled against dense; positives; the objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cal_train.objectives.base import total_loss
from cal_train.objectives.clip import Clip, clip_loss, clip_term, tiled_clip_loss, tiled_logsumexps
from cal_train.objectives.gather import ONE_RANK
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.towers.outputs import TowerOutputs, TowerShape

SHAPE = TowerShape(12, 10, 28, 14, 50, 8, 0)


def fx(shape, a, phase):
    """The fixture values of the golden numbers: no random generator."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phase + 0.1 * (k % 7) ** 2).view(shape)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@pytest.mark.parametrize(("scale", "golden"), [(10.0, 8.255135862544211), (1 / 0.07, 11.711293547984852)])
def test_clip_loss_has_the_golden_value(scale, golden):
    images, texts = fx((4, 6), 0.37, 0.1), fx((4, 6), 0.53, 0.4)
    assert clip_loss(images, texts, scale).item() == pytest.approx(golden, abs=1e-13)
    assert tiled_clip_loss(images, texts, scale, tile_size=3).item() == pytest.approx(golden, abs=1e-13)


@pytest.mark.parametrize("loss", [clip_loss, tiled_clip_loss])
class TestClosedForms:
    @pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
    def test_aligned_orthonormal_pairs(self, loss, scale):
        embeds = torch.eye(5, dtype=torch.float64)
        expected = math.log(1 + 4 * math.exp(-scale))
        assert loss(3 * embeds, embeds, scale).item() == pytest.approx(expected, abs=1e-13)

    def test_equal_embeddings_give_log_of_the_batch(self, loss):
        embeds = torch.ones(6, 3, dtype=torch.float64)
        assert loss(embeds, embeds, 50.0).item() == pytest.approx(math.log(6), abs=1e-12)

    def test_a_single_pair_has_loss_and_gradient_zero(self, loss):
        image, text = drawn(1, 4).requires_grad_(), drawn(1, 4, seed=1).requires_grad_()
        value = loss(image, text, 10.0)
        assert value.abs() < 1e-14
        value.backward()
        assert image.grad.abs().max() < 1e-14 and text.grad.abs().max() < 1e-14

    def test_gradients_are_those_of_the_softmaxes(self, loss):
        images, texts = F.normalize(drawn(6, 5), dim=1), F.normalize(drawn(6, 5, seed=1), dim=1)
        scale = torch.tensor(7.0, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for x in (images, texts, scale)]
        _, grad_images, grad_texts, grad_scale = value_and_gradients(loss, *inputs)
        cosines = images @ texts.T
        eye = torch.eye(6, dtype=torch.float64)
        by_logit = ((scale * cosines).softmax(1) - eye + (scale * cosines).softmax(0) - eye) / 12
        tangent = scale * by_logit @ texts
        tangent -= (tangent * images).sum(1, keepdim=True) * images
        assert torch.allclose(grad_images, tangent, atol=1e-13)
        assert (grad_images * images).sum(1).abs().max() < 1e-14, "normalisation leaves no gradient along an embedding"
        assert (grad_texts * texts).sum(1).abs().max() < 1e-14
        assert grad_scale.item() == pytest.approx((by_logit * cosines).sum().item(), abs=1e-13)

    def test_order_of_pairs_rotation_and_lengths_do_not_matter(self, loss):
        images, texts = drawn(7, 5), drawn(7, 5, seed=1)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
        rotation = torch.linalg.qr(drawn(5, 5, seed=2)).Q
        expected = loss(images, texts, 10.0).item()
        assert loss(images[order], texts[order], 10.0).item() == pytest.approx(expected, abs=1e-13)
        assert loss(images @ rotation, texts @ rotation, 10.0).item() == pytest.approx(expected, abs=1e-13)
        assert loss(images * (1 + torch.arange(7.0)[:, None]), texts * 0.2, 10.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("tile_size", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("ids", [None, [0, 1, 1, 2, 3, 0, 4, 5, 1, 6]], ids=["pairs", "shared images"])
def test_tiled_is_dense_in_value_and_all_gradients(tile_size, ids):
    inputs = [drawn(10, 6), drawn(10, 6, seed=1), torch.tensor(12.0, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    ids = None if ids is None else torch.tensor(ids)
    dense = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, ids), *inputs)
    tiled = value_and_gradients(lambda i, t, s: tiled_clip_loss(i, t, s, ids, tile_size), *inputs)
    for a, b in zip(dense, tiled, strict=True):
        assert (a - b).abs().max() < 1e-13


def test_tiled_logsumexps_of_a_wide_matrix_have_exact_gradients():
    rows, columns = drawn(5, 3).requires_grad_(), drawn(8, 3, seed=1).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    by_rows, by_columns = tiled_logsumexps(rows, columns, scale, 3)
    assert torch.allclose(by_rows, (scale * rows @ columns.T).logsumexp(1))
    assert torch.allclose(by_columns, (scale * rows @ columns.T).logsumexp(0))
    assert torch.autograd.gradcheck(lambda *x: tiled_logsumexps(*x, 3), (rows, columns, scale))


@pytest.mark.parametrize("sign", [1, -1])
def test_tiled_stays_finite_and_right_in_float32_at_scale_100(sign):
    """The sum of exp(100) overflows float32, that of exp(-100) vanishes: both need the running maximum."""
    images = F.normalize(drawn(9, 4, dtype=torch.float32), dim=1)
    images[:5] = images[0]
    texts = (sign * images).clone()
    inputs = [images.requires_grad_(), texts.requires_grad_(), torch.tensor(100.0, requires_grad=True)]
    found = value_and_gradients(lambda *x: tiled_clip_loss(*x, tile_size=2), *inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_gradients(clip_loss, *wide)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_tiled_never_holds_a_matrix_of_all_pairs():
    images, texts = (drawn(256, 8, seed=seed).requires_grad_() for seed in (0, 1))
    with LargestTensor() as tiled:
        tiled_clip_loss(images, texts, 10.0, tile_size=32).backward()
    with LargestTensor() as dense:
        clip_loss(images, texts, 10.0).backward()
    assert tiled.largest == 256 * 8 and dense.largest == 256 * 256


def test_positives_share_the_target_evenly():
    images, texts, ids = drawn(6, 4), drawn(6, 4, seed=1), [7, 3, 7, 1, 3, 7]
    logits = 5 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    expected = 0.0
    for i in range(6):
        mates = [j for j in range(6) if ids[j] == ids[i]]
        rows, columns = logits.log_softmax(1), logits.log_softmax(0)
        expected -= sum(rows[i, j].item() + columns[j, i].item() for j in mates) / len(mates) / 12
    assert clip_loss(images, texts, 5.0, torch.tensor(ids)).item() == pytest.approx(expected, abs=1e-13)
    for backend in ("local", "tiled"):
        term = clip_term(
            {"image_embeds": images, "image_ids": torch.tensor(ids)}, {"text_embeds": texts}, 5.0, backend=backend
        )
        assert (term.sum / term.weight).item() == pytest.approx(expected, abs=1e-13)


def test_distinct_image_ids_change_nothing():
    images, texts = drawn(5, 4), drawn(5, 4, seed=1)
    ids = torch.tensor([9, 2, 5, 4, 0])
    assert clip_loss(images, texts, 9.0, ids).item() == pytest.approx(clip_loss(images, texts, 9.0).item(), abs=1e-14)


@pytest.mark.parametrize("backend", ["local", "tiled"])
def test_autocast_does_not_touch_the_loss(backend):
    images, texts = drawn(8, 16).bfloat16(), drawn(8, 16, seed=1).bfloat16()
    features = {"image_embeds": images}, {"text_embeds": texts}
    expected = clip_loss(images.double(), texts.double(), 80.0).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clip_term(*features, torch.tensor(80.0), backend=backend).sum / 8
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)


def make_outputs(num_pairs=5):
    return TowerOutputs(image_pooled=drawn(num_pairs, 12), text_pooled=drawn(num_pairs, 10, seed=1))


@pytest.mark.parametrize("options", [{}, {"backend": "tiled", "tile_size": 2}])
def test_objective_is_the_loss_of_its_projections(options):
    objective = Clip(SHAPE, embed_dim=6, **options).double()
    outputs = make_outputs()
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    loss, parts = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    loss.backward()
    expected = clip_loss(
        outputs.image_pooled @ objective.image_projection.weight.T,
        outputs.text_pooled @ objective.text_projection.weight.T,
        1 / 0.07,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7), "the initial scale is stored in float32"
    assert parts.keys() == objective.loss_weights.keys() == {"contrastive"}
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    diagonal = objective.score(images, texts)
    by_hand = (diagonal.logsumexp(0) + diagonal.logsumexp(1) - 2 * diagonal.diagonal()).mean() / 2
    assert by_hand.item() == pytest.approx(loss.item()), "scores are on the scale of the logits"


def test_objective_runs_on_the_towers():
    towers = tiny_two_tower()
    batch = tiny_pairs(towers.shape)
    outputs = towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"].bool())
    objective = Clip(towers.shape, embed_dim=8)
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    assert objective.score(images, texts).shape == (4, 4)
    assert objective.local_terms(towers, batch["pixel_values"], outputs) == ({}, {})


def test_scale_is_clamped_to_100_and_1():
    objective = Clip(SHAPE)
    for start, kept in ((9.0, 100.0), (-1.0, 1.0), (3.0, math.exp(3))):
        objective.log_scale.data.fill_(start)
        objective.clamp_()
        assert objective.log_scale.exp().item() == pytest.approx(kept, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "local, tiled"),
        ({"tile_size": 8}, "'tiled' alone"),
        ({"backend": "tiled", "tile_size": 0}, ">= 1"),
        ({"init_scale": 200.0}, r"\[1, 100\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Clip(SHAPE, **options)


def test_a_pass_over_texts_alone_has_no_image_features():
    with pytest.raises(ValueError, match="no image_pooled"):
        Clip(SHAPE).image_features(TowerOutputs(text_pooled=drawn(2, 10)))
