"""Llip: goldens, limits, invariances; both norms and tiles against dense; work; shortlist; the objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cal_train.objectives import mixing
from cal_train.objectives.base import total_loss
from cal_train.objectives.gather import ONE_RANK
from cal_train.objectives.llip import Llip, llip_loss, llip_term
from cal_train.objectives.siglip import siglip_loss
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.towers.outputs import TowerOutputs, TowerShape

SHAPE = TowerShape(12, 10, 28, 14, 50, 8, 0, num_mixture_tokens=3)


def fx(shape, a, phase):
    """The fixture values of the golden numbers: no random generator."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * (k + 1) + phase + 0.1 * (k % 7) ** 2).view(shape)


def golden_inputs():
    return (
        fx((4, 2, 3, 3), 0.31, 0.2),
        fx((4, 2, 3, 3), 0.47, 0.5),
        fx((4, 2, 3), 0.61, 0.1),
        fx((4, 6), 0.23, 0.9),
        fx((6, 6), 0.19, 0.3),
    )


def drawn_inputs(num_pairs, num_heads, num_tokens, head_width, dtype=torch.float64):
    """Return keys, values, queries, text embeddings and output projection."""
    generator = torch.Generator().manual_seed(4)
    width = num_heads * head_width
    shapes = [(num_pairs, num_heads, num_tokens, head_width)] * 2
    shapes += [(num_pairs, num_heads, head_width), (num_pairs, width), (width, width)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def tiled_loss(keys, values, queries, text, out_proj, temperature, scale, bias, ids=None, chunk_size=None):
    images = {"keys": keys, "values": values} | ({} if ids is None else {"image_ids": ids})
    texts = {"queries": queries, "text_embeds": text}
    term = llip_term(images, texts, out_proj, temperature, scale, bias, chunk_size=chunk_size)
    return term.sum / term.weight


def loss_and_gradients(loss, inputs, **options):
    scalars = [torch.tensor(value, dtype=inputs[0].dtype) for value in (9.0, -3.0)]
    leaves = [x.clone().requires_grad_() for x in (*inputs, *scalars)]
    value = loss(*leaves[:5], 2.0, *leaves[5:], **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# heads, tokens, head width: the first takes the Gram form, the second W_o per pair
FORMS = pytest.mark.parametrize("sizes", [(2, 2, 9), (2, 5, 3)], ids=["gram", "per pair"])
BOTH = pytest.mark.parametrize("loss", [llip_loss, tiled_loss])


def has_gram(sizes, num_texts):
    heads, tokens, head_width = sizes
    return mixing.gram_is_cheaper(num_texts, heads, tokens, heads * head_width)


@BOTH
def test_llip_loss_has_the_golden_values(loss):
    keys, values, *rest = golden_inputs()
    assert loss(keys, values, *rest, 5.0, 10.0, -10.0).item() == pytest.approx(7.816157240898063, abs=1e-13)
    first = loss(keys[:, :, :1], values[:, :, :1], *rest, 5.0, 10.0, -10.0).item()
    assert first == pytest.approx(7.316855349817812, abs=1e-13)


@BOTH
def test_one_mixture_token_is_siglip_and_gives_keys_and_queries_no_gradient(loss):
    inputs = drawn_inputs(6, 2, 1, 4)
    found = loss_and_gradients(loss, inputs)
    expected = siglip_loss(inputs[1].flatten(1) @ inputs[4], inputs[3], 9.0, -3.0)
    assert found[0].item() == pytest.approx(expected.item(), abs=1e-13)
    assert found[1].abs().max() < 1e-15 and found[3].abs().max() < 1e-15
    assert found[2].abs().max() > 1e-4


@BOTH
@FORMS
def test_no_query_or_a_large_temperature_is_siglip_of_the_mean_value(loss, sizes):
    keys, values, queries, text, out_proj = drawn_inputs(6, *sizes)
    expected = siglip_loss(values.mean(2).flatten(1) @ out_proj, text, 9.0, -3.0).item()
    for asked, temperature in ((0 * queries, 1.0), (queries, 1e12)):
        found = loss(keys, values, asked, text, out_proj, temperature, 9.0, -3.0).item()
        assert found == pytest.approx(expected, abs=1e-10)


@BOTH
@FORMS
def test_order_of_tokens_and_a_shift_of_all_keys_do_not_matter(loss, sizes):
    keys, values, queries, text, out_proj = drawn_inputs(6, *sizes)
    expected = loss(keys, values, queries, text, out_proj, 2.0, 9.0, -3.0).item()
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(1))
    shift = 3 * torch.randn(6, sizes[0], 1, sizes[2], dtype=torch.float64)
    pairs = torch.tensor([3, 0, 5, 1, 4, 2])
    for variant in (
        (keys[:, :, order], values[:, :, order], queries, text),
        (keys + shift, values, queries, text),
        (keys, 7 * values, queries, 0.1 * text),
        (keys[pairs], values[pairs], queries[pairs], text[pairs]),
    ):
        assert loss(*variant, out_proj, 2.0, 9.0, -3.0).item() == pytest.approx(expected, abs=1e-12)


def make_objective(**options):
    torch.manual_seed(3)
    return Llip(SHAPE, embed_dim=6, num_heads=2, **options).double()


def make_outputs(num_pairs=5, num_tokens=3):
    torch.manual_seed(4)
    mixture, pooled = torch.randn(num_pairs, num_tokens, 12).double(), torch.randn(num_pairs, 10).double()
    return TowerOutputs(mixture_tokens=mixture, text_pooled=pooled)


def test_a_text_changes_its_own_column_of_the_logits_only():
    objective, outputs = make_objective(), make_outputs()
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    before = objective.score(images, texts)
    texts["queries"][2] += 1
    texts["text_embeds"][2] -= 1
    changed = (objective.score(images, texts) - before).abs() > 1e-12
    assert changed[:, 2].all() and changed.sum() == len(changed)


@FORMS
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("ids", [None, [0, 1, 1, 2, 3, 0, 4, 5, 1, 6]], ids=["pairs", "shared images"])
def test_tiles_are_dense_in_value_and_all_gradients(sizes, chunk_size, ids):
    assert has_gram((2, 2, 9), 10) and not has_gram((2, 5, 3), 10)
    inputs = drawn_inputs(10, *sizes)
    ids = None if ids is None else torch.tensor(ids)
    dense = loss_and_gradients(lambda *x: llip_loss(*x, image_ids_B=ids), inputs)
    tiled = loss_and_gradients(lambda *x: tiled_loss(*x, ids, chunk_size), inputs)
    for a, b in zip(dense, tiled, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_gram_norms_keep_the_digits_of_float32():
    inputs = drawn_inputs(32, 4, 4, 16, dtype=torch.float32)
    assert has_gram((4, 4, 16), 32)
    found = loss_and_gradients(tiled_loss, inputs)
    expected = loss_and_gradients(llip_loss, [x.double() for x in inputs])
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_every_pair_of_a_shared_image_is_a_positive():
    inputs, ids = drawn_inputs(4, 2, 3, 2), [7, 3, 7, 7]
    keys, values, queries, text, out_proj = inputs
    expected = 0.0
    for i in range(4):
        for j in range(4):
            mixing_weights = ((keys[i] * queries[j][:, None]).sum(-1) / 5).softmax(-1)
            mixed = (mixing_weights[..., None] * values[i]).sum(1).flatten() @ out_proj
            logit = 9 * F.cosine_similarity(mixed, text[j], dim=0).item() - 3
            expected += math.log1p(math.exp(-logit if ids[i] == ids[j] else logit)) / 4
    for loss in (llip_loss, tiled_loss):
        assert loss(*inputs, 5.0, 9.0, -3.0, torch.tensor(ids)).item() == pytest.approx(expected, abs=1e-12)


def counted(inputs, chunk_size):
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as forward:
        loss = tiled_loss(*leaves, 5.0, 10.0, -10.0, chunk_size=chunk_size)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("sizes", [(2, 8, 8), (4, 2, 8), (8, 4, 8)], ids=["N=D", "N=D/4", "N=D/2"])
def test_pair_head_stays_within_its_budget(sizes):
    """Per pair 4KD + 2D^2 forward, and four times that with the second forward pass and the backward pass."""
    (heads, tokens, head_width), num_pairs = sizes, 64
    width, size = heads * head_width, heads * tokens
    forward, backward = counted(drawn_inputs(num_pairs, *sizes), chunk_size=16)
    budget = num_pairs**2 * (4 * tokens * width + 2 * width**2)
    print(sizes, forward / budget, (forward + backward) / (4 * budget))
    assert forward <= budget and forward + backward <= 4 * budget
    if has_gram(sizes, num_pairs):  # W_o has left the pairs: 2 N^2 in place of 2 D^2, the rest per image or text
        per_pair = 4 * tokens * width + 2 * size**2
        once = 2 * width**3 + num_pairs * (2 * tokens * width**2 + 2 * size**2 * head_width + 2 * width**2 * 4)
        assert forward <= num_pairs**2 * per_pair + once < budget
    else:
        assert forward == budget, "nothing but what the equations ask for"


def test_tiles_bound_what_is_held():
    class LargestTensor(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    inputs = [x.requires_grad_() for x in drawn_inputs(48, 2, 4, 4)]
    with LargestTensor() as tiled:
        tiled_loss(*inputs, 5.0, 10.0, -10.0, chunk_size=4).backward()
    with LargestTensor() as whole:
        tiled_loss(*inputs, 5.0, 10.0, -10.0, chunk_size=48).backward()
    assert tiled.largest == 48 * 2 * 4 * 4 and whole.largest == 48 * 48 * 8  # the keys; every pair's mixed image


@FORMS
@pytest.mark.parametrize("num_candidates", [1, 2])
def test_shortlist_scores_likely_pairs_exactly_and_no_others(sizes, num_candidates):
    heads, tokens, head_width = sizes
    keys, values, queries, text, out_proj = drawn_inputs(7, *sizes)
    shape = TowerShape(12, 10, 28, 14, 50, 8, 0, num_mixture_tokens=tokens)
    objective = Llip(shape, embed_dim=heads * head_width, num_heads=heads, temperature=2.0).double()
    objective.out_proj.data.copy_(out_proj)
    images, texts = {"keys": keys[:5], "values": values[:5]}, {"queries": queries, "text_embeds": text}
    with torch.no_grad():
        exact, found = objective.score(images, texts), objective.shortlist_score(images, texts, num_candidates)
        everything = objective.shortlist_score(images, texts, 7)
    even = F.normalize(values[:5].mean(2).flatten(1) @ out_proj, dim=1) @ F.normalize(text, dim=1).T
    likely = torch.zeros(5, 7, dtype=torch.bool)
    for i in range(5):
        likely[i, even[i].argsort(descending=True)[:num_candidates]] = True
    for j in range(7):
        likely[even[:, j].argsort(descending=True)[:num_candidates], j] = True
    assert torch.equal(found.isfinite(), likely) and (found[~likely] == -math.inf).all()
    assert torch.allclose(found[likely], exact[likely], atol=1e-12) and torch.allclose(everything, exact, atol=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        objective.shortlist_score(images, texts, 0)


@pytest.mark.parametrize("has_layer_norm", [False, True])
@pytest.mark.parametrize("exchange", ["ring", "ring_bidirectional", "gather"])
def test_objective_is_the_loss_of_its_projections(has_layer_norm, exchange):
    objective = make_objective(bias_init=-3, has_layer_norm=has_layer_norm, exchange=exchange)
    outputs = make_outputs()
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    loss, parts = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    loss.backward()
    norm = (lambda x: F.layer_norm(x, (6,))) if has_layer_norm else (lambda x: x)
    keys, values = (
        norm(torch.stack([outputs.mixture_tokens[:, k] @ weight[k] for k in range(3)], 1)).view(5, 3, 2, 3)
        for weight in (objective.key_weight, objective.value_weight)
    )
    queries = norm(outputs.text_pooled @ objective.query_projection.weight.T).view(5, 2, 3)
    text = outputs.text_pooled @ objective.text_projection.weight.T
    expected = llip_loss(
        keys.transpose(1, 2), values.transpose(1, 2), queries, text, objective.out_proj, 5.0, 1 / 0.07, -3.0
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7), "the initial scale is stored in float32"
    assert parts.keys() == objective.loss_weights.keys() == {"contrastive"}
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    y = 2 * torch.eye(5) - 1
    by_hand = F.softplus(-y * objective.score(images, texts)).sum() / 5
    assert by_hand.item() == pytest.approx(loss.item()), "scores are the logits"


def test_layer_norm_is_the_default_of_wide_towers_only():
    assert isinstance(make_objective().key_norm, torch.nn.Identity)
    wide = Llip(TowerShape(1280, 10, 28, 14, 50, 8, 0, num_mixture_tokens=2), embed_dim=8)
    assert isinstance(wide.query_norm, torch.nn.LayerNorm)


def test_entropy_of_even_mixing_is_the_log_of_the_tokens():
    objective, outputs = make_objective(), make_outputs()
    objective.query_projection.weight.data.zero_()
    terms, metrics = objective.local_terms(None, None, outputs)
    assert terms == {} and list(metrics) == ["mixing_entropy/head_0", "mixing_entropy/head_1"]
    assert all(entropy.item() == pytest.approx(math.log(3)) for entropy in metrics.values())


def test_objective_runs_on_towers_with_mixture_tokens():
    towers = tiny_two_tower(num_mixture_tokens=3)
    batch = tiny_pairs(towers.shape)
    outputs = towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"].bool())
    objective = Llip(towers.shape, embed_dim=8, num_heads=2)
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    loss, _ = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    loss.backward()
    assert objective.score(images, texts).shape == (4, 4)
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())


def test_a_batch_of_one_pair_has_one_question():
    objective, outputs = make_objective(), make_outputs(num_pairs=1)
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    loss, _ = total_loss(objective.contrast(images, texts, ONE_RANK), objective.loss_weights)
    assert loss.item() == pytest.approx(F.softplus(-objective.score(images, texts)).item())


def test_scale_is_clamped():
    objective = make_objective()
    objective.log_scale.data.fill_(9.0)
    objective.clamp_()
    assert objective.log_scale.exp().item() == pytest.approx(100, rel=1e-6)


def test_towers_without_mixture_tokens_are_refused_with_the_cure():
    with pytest.raises(ValueError, match="set num_mixture_tokens"):
        Llip(TowerShape(12, 10, 28, 14, 50, 8, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 7, "num_heads": 2}, "cannot be split"),
        ({"temperature": 0.0}, "positive"),
        ({"exchange": "star"}, "ring, ring_bidirectional, gather"),
        ({"chunk_size": 0}, "at least 1"),
        ({"bias_init": "auto"}, "global_batch_size is None"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Llip(SHAPE, **options)


def test_keys_and_projection_that_do_not_fit_are_named():
    keys, values, queries, text, _ = golden_inputs()
    with pytest.raises(ValueError, match="do not fit together"):
        tiled_loss(keys, values, queries, text, torch.eye(5).double(), 5.0, 10.0, -10.0)
