"""SPARC's fine-grained loss. Golden values come from a float64 numpy program that shares no code with the package."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cal_train.objectives.base import total_loss
from cal_train.objectives.clip import Clip
from cal_train.objectives.gather import ONE_RANK
from cal_train.objectives.sparc import Sparc, fine_term, sparc_fine_loss, word_patch_weights
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.towers.outputs import TowerOutputs, TowerShape
from cal_train.towers.vision import VisionTower, vision_encoder

SHAPE = TowerShape(
    vision_width=6, text_width=5, image_size=8, patch_size=4, vocab_size=9, context_length=4, pad_token_id=0
)


def fx(shape: tuple[int, ...], a: float, phi: float) -> Tensor:
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phi + 0.1 * (k % 7) ** 2).reshape(shape)


PATCHES, TOKENS = fx((4, 5, 6), 0.29, 0.2), fx((4, 3, 6), 0.41, 0.7)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def loss(patches=PATCHES, tokens=TOKENS, mask=MASK, scale=10.0, **options) -> Tensor:
    return sparc_fine_loss(patches, tokens, mask, scale, **options)


@pytest.mark.parametrize(("reduction", "golden"), [("sample", 0.5433669384268882), ("token", 0.6773528371265544)])
def test_golden_values(reduction, golden):
    assert loss(threshold=1 / 5, reduction=reduction).item() == pytest.approx(golden, rel=1e-12)
    assert loss(reduction=reduction).item() == pytest.approx(golden, rel=1e-12)  # 1 / P is the default
    assert loss(threshold=0.7, reduction=reduction).item() != pytest.approx(golden, rel=1e-3)


def test_weights_are_stretched_cut_at_one_over_p_and_scaled():
    patches = torch.tensor([[[1.0, 0], [0.5, 0], [0.2, 0], [0.0, 0]]], dtype=torch.float64)
    weights, kept = word_patch_weights(patches, torch.tensor([[[3.0, 7.0]]], dtype=torch.float64))
    torch.testing.assert_close(weights[0, 0], torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=torch.float64))
    assert kept[0, 0].tolist() == [True, True, False, False]


def test_a_patch_exactly_at_the_threshold_is_kept():
    patches = torch.tensor([[[1.0], [0.25], [0.0], [0.0]]], dtype=torch.float64)
    assert word_patch_weights(patches, torch.ones(1, 1, 1, dtype=torch.float64))[1][0, 0, 1]


def test_two_words_on_two_orthogonal_patches():
    eye = torch.eye(2, dtype=torch.float64)[None]
    value = sparc_fine_loss(eye, eye, torch.ones(1, 2).bool(), 10.0)
    assert value.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-12)


def test_a_caption_of_one_token_or_of_none_adds_zero_with_a_finite_gradient():
    tokens = TOKENS.clone().requires_grad_()
    patches = PATCHES.clone().requires_grad_()
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    for reduction in ("sample", "token"):
        value = loss(patches, tokens, mask, reduction=reduction)
        assert value.item() == 0
        grads = torch.autograd.grad(value, (patches, tokens))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_word_that_fits_all_patches_equally_weighs_them_equally(dtype):
    patches = torch.randn(1, 1, 64).expand(1, 196, 64).to(dtype) * 30
    patches = patches.clone().requires_grad_()
    tokens = torch.randn(1, 7, 64, dtype=dtype, requires_grad=True)
    weights, kept = word_patch_weights(patches, tokens)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 196))
    assert kept.all()
    value = sparc_fine_loss(patches, tokens, torch.ones(1, 7).bool(), 100.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (patches, tokens)))


def test_equal_patches_leave_words_to_guess_their_group():
    patches = PATCHES[:1, :1].expand(1, 5, 6)
    cosine = torch.cosine_similarity(TOKENS[:1], patches[:, :1], dim=-1)[0]
    group_to_word = (10 * cosine).logsumexp(0) - 10 * cosine
    expected = 0.5 * (math.log(3) + group_to_word.mean())
    assert loss(patches, TOKENS[:1], MASK[:1]).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_invariances(reduction):
    base = loss(reduction=reduction)
    rotation = torch.linalg.qr(fx((6, 6), 0.77, 0.3))[0]
    token_order, patch_order, pairs = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 3, 1, 0])
    scaled_token, scaled_image = TOKENS.clone(), PATCHES.clone()
    scaled_token[0, 1] *= 7.0
    scaled_image[1] *= 0.01
    variants = {
        "scaling one token": loss(tokens=scaled_token, reduction=reduction),
        "scaling the patches of one image": loss(patches=scaled_image, reduction=reduction),
        "order of the patches": loss(patches=PATCHES[:, patch_order], reduction=reduction),
        "order of the tokens": loss(tokens=TOKENS[:, token_order], mask=MASK[:, token_order], reduction=reduction),
        "order of the pairs": loss(PATCHES[pairs], TOKENS[pairs], MASK[pairs], reduction=reduction),
        "rotation of the space": loss(PATCHES @ rotation, TOKENS @ rotation, reduction=reduction),
    }
    for name, value in variants.items():
        assert value.item() == pytest.approx(base.item(), rel=1e-12), name


@pytest.mark.parametrize("filler", [1e6, float("nan"), float("inf")])
def test_padding_has_neither_influence_nor_gradient(filler):
    tokens = torch.cat([TOKENS, TOKENS], dim=1)
    mask = torch.cat([MASK, torch.zeros_like(MASK)], dim=1)
    tokens = torch.where(mask[..., None], tokens, torch.full_like(tokens, filler)).requires_grad_()
    patches = PATCHES.clone().requires_grad_()
    value = loss(patches, tokens, mask)
    torch.testing.assert_close(value, loss())
    token_grad, patch_grad = torch.autograd.grad(value, (tokens, patches))
    assert token_grad[~mask].eq(0).all() and patch_grad.isfinite().all()
    assert token_grad[0, :3].ne(0).any()


def test_samples_do_not_meet():
    other = PATCHES.clone()
    other[2] = fx((5, 6), 1.3, 0.9)
    grads = []
    for patches in (PATCHES, other):
        leaf = patches.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(leaf), leaf)[0])
    torch.testing.assert_close(grads[0][[0, 1, 3]], grads[1][[0, 1, 3]], rtol=0, atol=0)
    assert not torch.equal(grads[0][2], grads[1][2])


def test_the_gradient_flows_through_the_weights_and_is_exact():
    leaves = [t.clone().requires_grad_() for t in (PATCHES, TOKENS, torch.tensor(10.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda p, t, s: sparc_fine_loss(p, t, MASK, s), leaves)


def test_kept_fraction_counts_real_tokens_only():
    patches = torch.tensor([[[1.0], [0.5], [0.0], [0.0]]], dtype=torch.float64)
    tokens = torch.tensor([[[1.0], [-1.0], [0.0]]], dtype=torch.float64)  # the third would keep all four
    _, kept = fine_term(patches, tokens, torch.tensor([[1, 1, 0]]), 1.0)
    assert kept.item() == pytest.approx((2 + 3) / 8)  # the second: 0, .5, 1, 1 after stretching


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        loss(mask=MASK[:, :2])
    with pytest.raises(ValueError, match="above 1"):
        loss(threshold=1.01)
    with pytest.raises(ValueError, match="reduction='mean'"):
        loss(reduction="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_special_tokens": False}, "name the ids"),
        ({"special_token_ids": [1]}, "use_special_tokens: false"),
        ({"threshold_factor": 5}, "at most the 4 patches"),
        ({"local_reduction": "mean"}, "local_reduction='mean'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sparc(SHAPE, **options)


def outputs_of(ids: Tensor) -> TowerOutputs:
    return TowerOutputs(
        patch_tokens=fx((2, 4, 6), 0.3, 0.1), text_tokens=fx((2, 4, 5), 0.2, 0.6), text_mask=ids != 0, input_ids=ids
    )


def test_special_tokens_can_be_left_out_of_both_losses():
    ids = torch.tensor([[7, 3, 4, 8], [7, 5, 8, 0]])
    outputs = outputs_of(ids)
    with_specials = Sparc(SHAPE, embed_dim=4).double()
    without = Sparc(SHAPE, embed_dim=4, use_special_tokens=False, special_token_ids=[7, 8]).double()
    without.load_state_dict(with_specials.state_dict())
    assert without.token_mask(outputs).tolist() == [[False, True, True, False], [False, True, False, False]]
    mean = torch.stack([outputs.text_tokens[0, 1:3].mean(0), outputs.text_tokens[1, 1]])
    torch.testing.assert_close(without.text_features(outputs)["text_embeds"], with_specials.token_adapter(mean))
    term = without.local_terms(None, torch.empty(0), outputs)[0]["fine"]
    expected = sparc_fine_loss(
        with_specials.patch_adapter(outputs.patch_tokens[:1]),
        with_specials.token_adapter(outputs.text_tokens[:1, 1:3]),
        torch.ones(1, 2),
        without.log_scale.exp(),
    )
    torch.testing.assert_close(term.sum, expected)  # the second caption has one word left: 0


def test_global_embeddings_are_adapted_means_over_patches_and_real_tokens():
    outputs = outputs_of(torch.tensor([[7, 3, 4, 8], [7, 5, 0, 0]]))
    sparc = Sparc(SHAPE, embed_dim=4).double()
    pooled = torch.nn.functional.gelu(sparc.pooled_head[0](outputs.patch_tokens.mean(1)))
    torch.testing.assert_close(sparc.image_features(outputs)["image_embeds"], sparc.patch_adapter(pooled))
    texts = sparc.text_features(outputs)["text_embeds"]
    torch.testing.assert_close(texts[1], sparc.token_adapter(outputs.text_tokens[1, :2].mean(0)))
    listing = Sparc(SHAPE, embed_dim=4, pooled_head=False).double()
    torch.testing.assert_close(
        listing.image_features(outputs)["image_embeds"], listing.patch_adapter(outputs.patch_tokens.mean(1))
    )


def test_threshold_factor_scales_one_over_p():
    towers = tiny_two_tower(dtype=torch.float64)
    batch = tiny_pairs(towers.shape, dtype=torch.float64)
    with torch.no_grad():
        outputs = towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    sparc = Sparc(towers.shape, embed_dim=8, threshold_factor=8.0).double()
    terms, metrics = sparc.local_terms(towers, batch["pixel_values"], outputs)
    expected, kept = fine_term(
        sparc.patch_adapter(outputs.patch_tokens),
        sparc.token_adapter(outputs.text_tokens),
        outputs.text_mask,
        1 / 0.07,
        0.5,
    )
    torch.testing.assert_close(terms["fine"].sum, expected.sum, rtol=1e-6, atol=0)  # the scale is float32 at the start
    assert metrics["kept_fraction"] == kept
    assert 0 < kept < 0.8


def test_word_maps_sum_to_one_per_word_and_are_zero_for_padding():
    outputs = outputs_of(torch.tensor([[7, 3, 4, 8], [7, 5, 0, 0]]))
    maps = Sparc(SHAPE, embed_dim=4).double().word_maps(outputs)
    torch.testing.assert_close(maps.sum(-1), outputs.text_mask.double())
    assert not maps.requires_grad


def test_under_autocast_the_loss_is_float32_arithmetic():
    patches, tokens = PATCHES.bfloat16(), TOKENS.bfloat16()
    plain = sparc_fine_loss(patches.float(), tokens.float(), MASK, 10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sparc_fine_loss(patches, tokens, MASK, 10.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain)


def test_the_step_costs_at_most_two_per_cent_more_than_that_of_clip_at_b16():
    """In arithmetic. The image tower alone stands for the step, which makes the claim stricter."""
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    }
    shape = TowerShape(768, 512, 224, 16, 32_000, 55, 0)
    with torch.device("meta"):  # counted, not computed
        tower = VisionTower(vision_encoder(config))
        with FlopCounterMode(display=False) as counter:
            tower(torch.empty(2, 3, 224, 224))[1].sum().backward()
    tower_flops, flops = counter.get_total_flops(), {}
    ids = torch.ones(2, 55, dtype=torch.int64)
    for objective in (Sparc(shape), Clip(shape)):
        outputs = TowerOutputs(
            image_pooled=torch.randn(2, 768, requires_grad=True),
            patch_tokens=torch.randn(2, 196, 768, requires_grad=True),
            text_pooled=torch.randn(2, 512, requires_grad=True),
            text_tokens=torch.randn(2, 55, 512, requires_grad=True),
            text_mask=ids.bool(),
            input_ids=ids,
        )
        with FlopCounterMode(display=False) as counter:
            terms = objective.contrast(objective.image_features(outputs), objective.text_features(outputs), ONE_RANK)
            terms |= objective.local_terms(tower, torch.empty(0), outputs)[0]
            total_loss(terms, objective.loss_weights)[0].backward()
        flops[type(objective).__name__] = counter.get_total_flops()
    ratio = (tower_flops + flops["Sparc"]) / (tower_flops + flops["Clip"])
    assert 1 < ratio < 1.02
