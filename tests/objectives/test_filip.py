"""FILIP: golden, its loops written out, invariances; tiles against one product; chosen tokens; the objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cal_train.objectives.base import total_loss
from cal_train.objectives.clip import clip_loss
from cal_train.objectives.filip import Filip, best_tokens, filip_loss, filip_term, token_similarities
from cal_train.objectives.gather import ONE_RANK
from cal_train.towers.outputs import TowerOutputs, TowerShape

SHAPE = TowerShape(12, 10, 28, 14, 50, 8, 0)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def fx(shape, a, phase):
    """The fixture values of the golden numbers: no random generator."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phase + 0.1 * (k % 7) ** 2).view(shape)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(patches, tokens, mask, scale, ids=None):
    """FILIP as its equations read, pair by pair."""
    num = len(patches)
    ids = range(num) if ids is None else ids
    patches, tokens = F.normalize(patches, dim=-1), F.normalize(tokens, dim=-1)
    to_text, to_image = torch.zeros(num, num, dtype=torch.float64), torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        for j in range(num):
            similarity = patches[i] @ tokens[j][mask[j]].T
            to_text[i, j], to_image[i, j] = similarity.max(1).values.mean(), similarity.max(0).values.mean()
    rows, columns = (scale * to_text).log_softmax(1), (scale * to_image).log_softmax(0)
    loss = 0.0
    for i in range(num):
        mates = [j for j in range(num) if ids[j] == ids[i]]
        loss -= sum(rows[i, j].item() + columns[j, i].item() for j in mates) / len(mates) / num / 2
    return loss


def loss_and_gradients(patches, tokens, mask, **options):
    inputs = [patches.clone().requires_grad_(), tokens.clone().requires_grad_(), torch.tensor(10.0).double()]
    inputs[2].requires_grad_()
    texts = {"token_embeds": inputs[1], "text_mask": mask}
    term = filip_term({"patch_embeds": inputs[0]}, texts, inputs[2], **options)
    return [term.sum.detach() / term.weight, *torch.autograd.grad(term.sum, inputs)]


def test_filip_loss_has_the_golden_value():
    patches, tokens = fx((4, 5, 6), 0.29, 0.2), fx((4, 3, 6), 0.41, 0.7)
    assert filip_loss(patches, tokens, MASK, 10.0).item() == pytest.approx(1.808060868895792, abs=1e-13)
    assert by_loops(patches, tokens, MASK, 10.0) == pytest.approx(1.808060868895792, abs=1e-13)


def test_shared_images_share_the_target():
    patches, tokens, ids = drawn(4, 5, 6), drawn(4, 3, 6, seed=1), torch.tensor([2, 0, 2, 2])
    images = {"patch_embeds": patches, "image_ids": ids}
    term = filip_term(images, {"token_embeds": tokens, "text_mask": MASK}, 7.0)
    assert (term.sum / 4).item() == pytest.approx(by_loops(patches, tokens, MASK, 7.0, ids.tolist()), abs=1e-13)


def test_one_patch_and_one_word_each_are_clip():
    patches, tokens = drawn(6, 1, 5), drawn(6, 1, 5, seed=1)
    found = filip_loss(patches, tokens, torch.ones(6, 1, dtype=torch.bool), 10.0)
    assert found.item() == pytest.approx(clip_loss(patches[:, 0], tokens[:, 0], 10.0).item(), abs=1e-13)


def test_order_rotation_and_lengths_do_not_matter():
    patches, tokens = drawn(4, 5, 6), drawn(4, 3, 6, seed=1)
    expected = filip_loss(patches, tokens, MASK, 10.0).item()
    pairs, within = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 3])
    rotation = torch.linalg.qr(drawn(6, 6, seed=2)).Q
    words = torch.tensor([1, 2, 0])
    for variant in (
        (patches[pairs], tokens[pairs], MASK[pairs]),
        (patches[:, within], tokens, MASK),
        (patches, tokens[:, words], MASK[:, words]),
        (patches @ rotation, tokens @ rotation, MASK),
        (patches * 3, tokens * torch.arange(1, 4.0)[None, :, None], MASK),
    ):
        assert filip_loss(*variant, 10.0).item() == pytest.approx(expected, abs=1e-13)


def test_padding_has_no_influence_and_no_gradient():
    patches, tokens = drawn(4, 5, 6), drawn(4, 3, 6, seed=1)
    expected = filip_loss(patches, tokens, MASK, 10.0).item()
    other = torch.where(MASK[..., None], tokens, 100 * drawn(4, 3, 6, seed=9))
    longer = torch.cat([other, drawn(4, 2, 6, seed=8)], 1), F.pad(MASK, (0, 2))
    assert filip_loss(patches, *longer, 10.0).item() == pytest.approx(expected, abs=1e-13)
    grad_tokens = loss_and_gradients(patches, tokens, MASK)[2]
    assert grad_tokens[~MASK].abs().max() == 0 and grad_tokens[MASK].abs().max(-1).values.min() > 0


@pytest.mark.parametrize("tile_elements", [1, 20, 45, 10_000])
@pytest.mark.parametrize("token_share", [1.0, 0.5])
def test_tiles_do_not_change_value_or_gradients(tile_elements, token_share):
    patches, tokens = drawn(4, 5, 6), drawn(4, 3, 6, seed=1)
    expected = loss_and_gradients(patches, tokens, MASK, token_share=token_share)
    found = loss_and_gradients(patches, tokens, MASK, token_share=token_share, tile_elements=tile_elements)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-13


def test_no_tile_is_larger_than_allowed():
    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    patches, tokens, mask = drawn(12, 9, 2), drawn(12, 7, 2, seed=1), torch.ones(12, 7).bool()
    with LargestTensor() as tiled:
        loss_and_gradients(patches, tokens, mask, tile_elements=9 * 7 * 6)
    with LargestTensor() as whole:
        loss_and_gradients(patches, tokens, mask)
    assert tiled.largest == 9 * 7 * 6 and whole.largest == 9 * 7 * 144


def test_a_text_without_words_stays_finite():
    mask = MASK.clone()
    mask[3] = False
    found = loss_and_gradients(drawn(4, 5, 6), drawn(4, 3, 6, seed=1), mask)
    assert all(x.isfinite().all() for x in found)


def test_best_tokens_are_those_that_match_their_pair():
    patches = F.normalize(drawn(3, 8, 6), dim=-1)
    tokens = F.normalize(drawn(3, 5, 6, seed=1), dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    kept_patches, kept_tokens, kept_mask = best_tokens(patches, tokens, mask, 0.5)
    assert kept_patches.shape == (3, 4, 6) and kept_tokens.shape == (3, 3, 6)
    assert kept_mask.sum(1).tolist() == [3, 2, 1], "half of the real words, rounded up"
    for i in range(3):
        similarity = patches[i] @ tokens[i][mask[i]].T
        expected = similarity.max(1).values.argsort(descending=True)[:4]
        assert torch.equal(kept_patches[i], patches[i][expected])
        expected = similarity.max(0).values.argsort(descending=True)[: kept_mask[i].sum()]
        assert torch.equal(kept_tokens[i][kept_mask[i]], tokens[i][mask[i]][expected])


def test_objective_is_the_loss_of_its_projections():
    objective = Filip(SHAPE, embed_dim=6).double()
    outputs = TowerOutputs(
        patch_tokens=drawn(4, 5, 12), text_tokens=drawn(4, 3, 10, seed=1), text_mask=MASK, image_pooled=drawn(4, 12)
    )
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    loss, parts = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    loss.backward()
    expected = by_loops(
        outputs.patch_tokens @ objective.patch_projection.weight.T,
        outputs.text_tokens @ objective.token_projection.weight.T,
        MASK,
        1 / 0.07,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-7), "the initial scale is stored in float32"
    assert parts.keys() == objective.loss_weights.keys() == {"contrastive"}
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    to_text, to_image = token_similarities(
        *(F.normalize(x, dim=-1) for x in (images["patch_embeds"], texts["token_embeds"])), MASK
    )
    assert torch.allclose(objective.score(images, texts), (to_text + to_image) / 2 / 0.07, rtol=1e-6)


def test_a_single_pair_has_loss_zero():
    found = loss_and_gradients(drawn(1, 5, 6), drawn(1, 3, 6, seed=1), MASK[:1])
    assert all(x.abs().max() < 1e-14 for x in found)


def test_scale_is_clamped():
    objective = Filip(SHAPE)
    objective.log_scale.data.fill_(9.0)
    objective.clamp_()
    assert objective.log_scale.exp().item() == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"token_share": 0.0}, "above 0"), ({"token_share": 1.5}, "at most 1"), ({"tile_elements": 0}, "at least 1")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Filip(SHAPE, **options)
