import math

import pytest
import torch
import torch.nn.functional as F

from cal_train.objectives.attention import Attention
from cal_train.objectives.base import total_loss
from cal_train.objectives.coca import Coca
from cal_train.objectives.gather import ONE_RANK
from cal_train.objectives.image_decoder import grid_positions, normalize_patches, patchify
from cal_train.objectives.sycoca import ABLATIONS, SyCoca, attentive_masks, num_masked, reconstruction_term
from cal_train.testing import tiny_pairs, tiny_two_tower

OPTIONS = {"num_queries": 5, "decoder_layers": 2, "image_decoder_layers": 2, "num_heads": 4, "embed_dim": 16}
COCA_OPTIONS = {k: v for k, v in OPTIONS.items() if k != "image_decoder_layers"}


def fx(shape, a, phi):
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phi + 0.1 * (k % 7) ** 2).reshape(shape)


PATCHES, TOKENS, MASK = fx((1, 8, 6), 0.29, 0.2), fx((1, 3, 6), 0.41, 0.7), torch.tensor([[1, 1, 0]])


@pytest.fixture
def towers():
    return tiny_two_tower(text_pooling="cls_appended", dtype=torch.float64)


@pytest.fixture
def batch(towers):
    return tiny_pairs(towers.shape, batch_size=4, dtype=torch.float64)


def sycoca_for(towers, **options) -> SyCoca:
    torch.manual_seed(1)
    return SyCoca(towers.shape, **{**OPTIONS, **options}).double()


def run(towers, batch):
    return towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def loss_of(objective, towers, batch):
    outputs = run(towers, batch)
    terms = objective.contrast(objective.image_features(outputs), objective.text_features(outputs), ONE_RANK)
    terms |= objective.local_terms(towers, batch["pixel_values"], outputs)[0]
    return total_loss(terms, objective.loss_weights)


class Watched:
    """The towers, with a record of which patches were asked for."""

    def __init__(self, towers):
        self.towers, self.visible = towers, []

    def __call__(self, **inputs):
        self.visible.append(inputs.get("visible_patches"))
        return self.towers(**inputs)


def bits(mask):
    return "".join(str(int(b)) for b in mask[0])


def test_golden_masks():
    low, high = attentive_masks(PATCHES, TOKENS, MASK, 0.5, 0.5)
    assert (bits(high), bits(low)) == ("11001001", "00110110")


def test_padded_tokens_never_decide_a_score():
    for filler in (torch.tensor(1e9), torch.tensor(float("nan")), PATCHES[0, 2]):
        tokens = TOKENS.clone()
        tokens[0, 2] = filler
        low, high = attentive_masks(PATCHES, tokens, MASK, 0.5, 0.5)
        assert (bits(high), bits(low)) == ("11001001", "00110110")
    assert bits(attentive_masks(PATCHES, tokens, torch.ones(1, 3), 0.5, 0.5)[1])[2] == "1"  # as a word it would


@pytest.mark.parametrize(("ratio", "expected"), [(0, 0), (0.3, 2), (0.5, 4), (0.99, 7), (1, 8)])
def test_masks_hold_whole_patches_rounded_down(ratio, expected):
    low, high = attentive_masks(PATCHES, TOKENS, MASK, ratio, ratio)
    assert low.sum() == high.sum() == expected


def test_a_share_that_is_whole_in_decimals_is_not_rounded_down():
    assert num_masked(100, 0.29) == 29
    with pytest.raises(ValueError, match=r"1\.2"):
        num_masked(100, 1.2)


def test_halves_are_complements_even_with_equal_scores():
    patches = torch.ones(3, 6, 4)
    low, high = attentive_masks(patches, torch.ones(3, 2, 4), torch.ones(3, 2), 0.5, 0.5)
    assert torch.equal(low, ~high)


def test_masks_take_no_gradient():
    low, high = attentive_masks(PATCHES.clone().requires_grad_(), TOKENS, MASK, 0.5, 0.5)
    assert low.grad_fn is None and high.grad_fn is None


def test_without_masks_and_image_decoder_it_is_coca_bit_for_bit(towers, batch):
    sycoca = sycoca_for(towers, **ABLATIONS["coca"])
    torch.manual_seed(1)
    coca = Coca(towers.shape, **COCA_OPTIONS).double()
    results = []
    for objective in (coca, sycoca):
        towers.zero_grad()
        loss, parts = loss_of(objective, towers, batch)
        loss.backward()
        results.append([loss, *parts.values(), *(p.grad.clone() for p in towers.parameters())])
    assert len(results[0]) == len(results[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ours = {name.removeprefix("coca."): p.grad for name, p in sycoca.named_parameters()}
    assert ours.keys() == {name for name, _ in coca.named_parameters()}
    assert all(torch.equal(p.grad, ours[name]) for name, p in coca.named_parameters())


def test_each_decoder_sees_its_half_of_the_patches(towers, batch):
    sycoca, watched = sycoca_for(towers), Watched(towers)
    outputs = run(towers, batch)
    scores = sycoca.patch_scores(outputs)
    with torch.no_grad():
        patches = torch.stack([sycoca.coca.patch_features(outputs.patch_tokens[:, p : p + 1])[:, 0] for p in range(16)])
        words = sycoca.coca.clip.text_projection(outputs.text_tokens)
    for row in range(4):  # the score by its definition
        real = words[row][batch["attention_mask"][row].bool()]
        best = F.cosine_similarity(patches[:, row, None], real[None], dim=-1).amax(-1)
        torch.testing.assert_close(scores[row], best)
    sycoca.local_terms(watched, batch["pixel_values"], outputs)
    caption, painting = watched.visible
    for row in range(4):
        order = scores[row].argsort().tolist()
        assert caption[row].tolist() == sorted(order[8:])
        assert painting[row].tolist() == sorted(order[:8])


def test_the_caption_sees_the_visible_patches_only(towers, batch):
    """Pixels of patches that are masked for captioning cannot change the caption term, at fixed masks."""
    sycoca = sycoca_for(towers, tg_mim_weight=0.0)
    outputs = run(towers, batch)
    low, _ = attentive_masks_of(sycoca, outputs)
    term = sycoca.local_terms(towers, batch["pixel_values"], outputs)[0]["caption"].sum
    for mask, changes in ((low, False), (~low, True)):
        pixels = with_noise(batch["pixel_values"], mask)
        other = sycoca.local_terms(towers, pixels, outputs)[0]["caption"].sum
        assert (abs(other - term) > 1e-6) == changes


def attentive_masks_of(sycoca, outputs):
    scores = sycoca.patch_scores(outputs)
    order = scores.argsort(1)
    low = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :8], True)
    return low, ~low


def with_noise(pixels, mask_BP):
    blocks = mask_BP.view(-1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    return torch.where(blocks, pixels + 1, pixels)


def test_the_prediction_does_not_know_what_it_has_to_paint(towers, batch):
    sycoca = sycoca_for(towers)
    outputs = run(towers, batch)
    _, high = attentive_masks_of(sycoca, outputs)
    hidden = high.nonzero()[:, 1].view(4, 8)
    visible = (~high).nonzero()[:, 1].view(4, 8)

    def predict(pixels, text_tokens=outputs.text_tokens):
        tokens = towers(pixel_values=pixels, visible_patches=visible).patch_tokens
        return sycoca.image_decoder(tokens, visible, hidden, text_tokens, outputs.text_mask)

    before = predict(batch["pixel_values"])
    assert before.shape == (4, 8, 48)
    assert (before[:, 0] - before[:, 1]).abs().amax() > 1e-6  # each place is painted as such
    target = patchify(batch["pixel_values"], 4).gather(1, hidden[..., None].expand(-1, -1, 48))
    terms, _ = sycoca.local_terms(towers, batch["pixel_values"], outputs)
    torch.testing.assert_close(terms["tg_mim"].sum, reconstruction_term(before, target, normalize_target=True).sum)
    torch.testing.assert_close(predict(with_noise(batch["pixel_values"], high)), before)
    assert (predict(with_noise(batch["pixel_values"], ~high)) - before).abs().amax() > 1e-6
    padded = outputs.text_tokens + (~outputs.text_mask[..., None]) * 100
    torch.testing.assert_close(predict(batch["pixel_values"], padded), before)
    assert (predict(batch["pixel_values"], outputs.text_tokens.flip(0)) - before).abs().amax() > 1e-7
    permuted = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    tokens = towers(pixel_values=batch["pixel_values"], visible_patches=visible).patch_tokens
    shuffled = sycoca.image_decoder(
        tokens[:, permuted], visible[:, permuted], hidden, outputs.text_tokens, outputs.text_mask
    )
    torch.testing.assert_close(shuffled, before)  # indices, not order, say where a patch belongs


def test_predicting_zeros_costs_one(towers, batch):
    sycoca = sycoca_for(towers)
    torch.nn.init.zeros_(sycoca.image_decoder.to_pixels.weight)
    terms, _ = sycoca.local_terms(towers, batch["pixel_values"], run(towers, batch))
    assert terms["tg_mim"].weight == 4 * 8
    assert (terms["tg_mim"].sum / terms["tg_mim"].weight).item() == pytest.approx(1.0, abs=1e-5)


def test_the_target_is_the_hidden_pixels(towers, batch):
    """A decoder that always answers with one bias is off by exactly the distance to the hidden patches."""
    sycoca = sycoca_for(towers, normalize_target=False)
    torch.nn.init.zeros_(sycoca.image_decoder.to_pixels.weight)
    torch.nn.init.constant_(sycoca.image_decoder.to_pixels.bias, 0.3)
    outputs = run(towers, batch)
    _, high = attentive_masks_of(sycoca, outputs)
    blocks = high.view(4, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels = batch["pixel_values"].permute(0, 2, 3, 1)[blocks]
    terms, _ = sycoca.local_terms(towers, batch["pixel_values"], outputs)
    torch.testing.assert_close(terms["tg_mim"].sum / terms["tg_mim"].weight, (pixels - 0.3).square().mean())


def test_patches_are_cut_in_raster_order():
    image = torch.randn(1, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (1, 6, 48)
    torch.testing.assert_close(patches[0, 4], image[0, :, 4:8, 4:8].flatten())


def test_a_patch_of_one_colour_is_normalised_to_zeros():
    assert normalize_patches(torch.full((1, 1, 12), 0.7)).abs().max() < 1e-3


def test_the_error_of_a_patch_is_a_mean_over_its_values():
    term = reconstruction_term(torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2, 3], [0, 0, 6]]]), normalize_target=False)
    assert term.sum.item() == pytest.approx(14 / 3 + 12) and term.weight == 2


def test_grid_positions_tell_rows_from_columns():
    grid = grid_positions(3, 8).view(3, 3, 8)
    assert torch.equal(grid[1, :, :4], grid[1, :1, :4].expand(3, 4))  # one row, one code
    assert torch.equal(grid[:, 2, 4:], grid[:1, 2, 4:].expand(3, 4))
    assert len(grid.view(9, 8).unique(dim=0)) == 9


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_rows_compute_the_terms_of_their_name(towers, batch, name):
    sycoca = sycoca_for(towers, **ABLATIONS[name])
    watched = Watched(towers)
    terms, _ = sycoca.local_terms(watched, batch["pixel_values"], run(towers, batch))
    expected = {
        "itc": (set(), 0),
        "coca": ({"caption"}, 0),
        "caption_mask_only": ({"caption"}, 1),
        "sycoca": ({"caption", "tg_mim"}, 2),
    }.get(name, ({"caption", "tg_mim"}, 1))
    assert (set(terms), len(watched.visible)) == expected
    names = [n for n, _ in sycoca.named_parameters()]
    assert any("image_decoder" in n for n in names) == ("tg_mim" in terms)
    assert any("image_decoder" in n and "cross" in n for n in names) == (name in ("tg_mim_random", "sycoca"))


def test_masks_are_random_in_the_warmup_and_attentive_behind_it(towers, batch):
    sycoca, watched = sycoca_for(towers, mask_warmup_steps=2), Watched(towers)
    outputs = run(towers, batch)
    for _ in range(4):
        sycoca.local_terms(watched, batch["pixel_values"], outputs)
        sycoca.clamp_()
    first, second, third, fourth = watched.visible[::2]
    assert not torch.equal(first, second)
    assert torch.equal(third, fourth) and not torch.equal(second, third)
    assert sycoca.state_dict()["num_steps"] == 4
    both = torch.cat(watched.visible[:2], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(16).expand(4, -1))  # complements, random or not


def test_random_masks_are_replayed_with_the_random_state(towers, batch):
    sycoca, watched = sycoca_for(towers, mask_selection="random"), Watched(towers)
    outputs, state = run(towers, batch), torch.get_rng_state()
    sycoca.local_terms(watched, batch["pixel_values"], outputs)
    torch.set_rng_state(state)
    sycoca.local_terms(watched, batch["pixel_values"], outputs)
    assert torch.equal(watched.visible[0], watched.visible[2])


def test_masking_behind_the_tower_needs_no_further_pass(towers, batch):
    sycoca, watched = sycoca_for(towers, mask_at="tokens"), Watched(towers)
    terms, metrics = sycoca.local_terms(watched, batch["pixel_values"], run(towers, batch))
    assert watched.visible == [] and set(terms) == {"caption", "tg_mim"}
    assert metrics["mask_score_low"] < metrics["mask_score_high"]


def test_a_caption_of_one_token_or_none_is_defined(towers, batch):
    sycoca = sycoca_for(towers)
    outputs = run(towers, {**batch, "attention_mask": (torch.arange(12) < 1).long().expand(4, -1)})
    terms, _ = sycoca.local_terms(towers, batch["pixel_values"], outputs)
    assert terms["caption"].sum == 0 and terms["tg_mim"].sum.isfinite()


def test_attention_over_nothing_is_the_output_bias():
    attention = Attention(8, 6, 2)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    context = torch.randn(2, 3, 6, requires_grad=True)
    out = attention(torch.randn(2, 4, 8), context, mask)
    torch.testing.assert_close(out[1], attention.out_proj.bias.expand(4, 8))
    out.sum().backward()
    assert context.grad.isfinite().all() and context.grad[~mask].eq(0).all()


def test_patch_dropout_in_the_tower_is_refused(towers, batch):
    dropping = tiny_two_tower(text_pooling="cls_appended", patch_dropout=0.5, dtype=torch.float64).train()
    with pytest.raises(ValueError, match="set patch_dropout to 0"):
        sycoca_for(towers).local_terms(dropping, batch["pixel_values"], run(dropping, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_low": 1.0}, "nothing is left to caption"),
        ({"ratio_high": 0.0}, "tg_mim_weight: 0"),
        ({"ratio_high": 1.0}, "none or all"),
        ({"ratio_low": -0.1}, "between 0 and 1"),
        ({"mask_at": "output"}, "mask_at='output'"),
        ({"mask_selection": "best"}, "mask_selection='best'"),
    ],
)
def test_options_that_do_not_fit_are_refused(towers, options, message):
    with pytest.raises(ValueError, match=message):
        sycoca_for(towers, **options)
