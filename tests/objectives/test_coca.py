import math

import pytest
import torch
import torch.nn.functional as F

from cal_train.objectives.base import Term
from cal_train.objectives.clip import clip_loss
from cal_train.objectives.coca import Coca
from cal_train.objectives.gather import ONE_RANK
from cal_train.testing import tiny_pairs, tiny_two_tower
from cal_train.towers.outputs import TowerOutputs

OPTIONS = {"num_queries": 5, "decoder_layers": 2, "num_heads": 4, "embed_dim": 16}


@pytest.fixture
def towers():
    return tiny_two_tower(text_pooling="cls_appended", dtype=torch.float64)


@pytest.fixture
def batch(towers):
    return tiny_pairs(towers.shape, batch_size=4, dtype=torch.float64)


def coca_for(towers, **options) -> Coca:
    torch.manual_seed(1)
    return Coca(towers.shape, **{**OPTIONS, **options}).double()


def run(towers, batch) -> TowerOutputs:
    return towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def caption_of(coca: Coca, towers, batch) -> Term:
    return coca.local_terms(towers, batch["pixel_values"], run(towers, batch))[0]["caption"]


def full_logits(coca: Coca, outputs: TowerOutputs) -> torch.Tensor:
    return coca.captioner.logits(coca.captioner(outputs.text_tokens, coca.generative_pooler(outputs.patch_tokens)))


def test_the_caption_term_is_the_cross_entropy_of_the_next_real_token(towers, batch):
    coca = coca_for(towers, caption_chunk_size=3)
    term = caption_of(coca, towers, batch)
    logits, labels = full_logits(coca, run(towers, batch)), batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    assert term.weight == int(batch["attention_mask"][:, 1:].sum())
    for parameter in (coca.captioner.head_weight, coca.generative_pooler.queries):
        torch.testing.assert_close(
            torch.autograd.grad(caption_of(coca, towers, batch).sum, parameter)[0],
            torch.autograd.grad(expected, parameter, retain_graph=True)[0],
        )


def test_seq_sum_divides_by_captions_and_token_mean_by_tokens(towers, batch):
    by_token = caption_of(coca_for(towers), towers, batch)
    by_caption = caption_of(coca_for(towers, caption_reduction="seq_sum"), towers, batch)
    torch.testing.assert_close(by_token.sum, by_caption.sum)
    assert by_caption.weight == 4 and by_token.weight > 4


def test_uniform_logits_cost_ln_v_per_token(towers, batch):
    coca = coca_for(towers)
    torch.nn.init.zeros_(coca.captioner.head_weight)
    term = caption_of(coca, towers, batch)
    assert (term.sum / term.weight).item() == pytest.approx(math.log(towers.shape.vocab_size), rel=1e-12)


def test_a_new_head_starts_near_ln_v(towers, batch):
    term = caption_of(coca_for(towers), towers, batch)
    assert (term.sum / term.weight).item() == pytest.approx(math.log(towers.shape.vocab_size), abs=0.05)


def test_a_position_knows_nothing_of_the_tokens_behind_it(towers, batch):
    coca, changed = coca_for(towers), batch["input_ids"].clone()
    changed[0, 5] = (changed[0, 5] % 60) + 1  # row 0 fills the whole context
    before = full_logits(coca, run(towers, batch))[0]
    after = full_logits(coca, run(towers, {**batch, "input_ids": changed}))[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert (before[5:] - after[5:]).abs().amax(-1).gt(1e-4).all()


def test_padding_ids_change_nothing(towers, batch):
    coca, changed = coca_for(towers), batch["input_ids"].clone()
    changed[batch["attention_mask"] == 0] = 17
    outputs, other = run(towers, batch), run(towers, {**batch, "input_ids": changed})
    torch.testing.assert_close(coca.text_features(outputs), coca.text_features(other))
    torch.testing.assert_close(
        caption_of(coca, towers, batch).sum, caption_of(coca, towers, {**batch, "input_ids": changed}).sum
    )


def test_the_caption_depends_on_the_image(towers, batch):
    coca = coca_for(towers)
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert abs(caption_of(coca, towers, batch).sum - caption_of(coca, towers, other).sum) > 1e-6


def test_without_captioning_it_is_clip_on_pooled_patches(towers, batch):
    coca = coca_for(towers, caption_weight=0.0)
    outputs = run(towers, batch)
    images, texts = coca.image_features(outputs), coca.text_features(outputs)
    term = coca.contrast(images, texts, ONE_RANK)["contrastive"]
    expected = clip_loss(images["image_embeds"], texts["text_embeds"], 1 / 0.07)
    torch.testing.assert_close(term.sum / term.weight, expected, rtol=1e-6, atol=0)
    assert coca.local_terms(towers, batch["pixel_values"], outputs) == ({}, {})
    assert coca.captioner is None


def test_image_embeddings_do_not_depend_on_the_order_of_patches(towers, batch):
    coca, outputs = coca_for(towers), run(towers, batch)
    shuffled = TowerOutputs(patch_tokens=outputs.patch_tokens[:, torch.randperm(16)])
    torch.testing.assert_close(coca.image_features(outputs), coca.image_features(shuffled))


def test_the_contrastive_pooler_reads_the_generative_queries(towers, batch):
    """Cascade: the image embedding is unchanged by anything that leaves the generative tokens as they are."""
    coca, outputs = coca_for(towers), run(towers, batch)
    pooled = coca.generative_pooler(outputs.patch_tokens)
    assert pooled.shape == (4, 5, 32)
    vector = coca.contrastive_pooler(pooled)
    assert vector.shape == (4, 1, 32)
    expected = coca.clip.image_projection(coca.image_norm(vector[:, 0]))
    torch.testing.assert_close(coca.image_features(outputs)["image_embeds"], expected)


def test_a_patch_feature_is_the_embedding_of_an_image_of_that_patch(towers, batch):
    coca, outputs = coca_for(towers), run(towers, batch)
    alone = TowerOutputs(patch_tokens=outputs.patch_tokens[1:2, 7:8])
    torch.testing.assert_close(
        coca.patch_features(outputs.patch_tokens)[1, 7], coca.image_features(alone)["image_embeds"][0]
    )


def test_a_pooler_is_attention_computed_by_hand(towers, batch):
    pooler = coca_for(towers).generative_pooler
    context = run(towers, batch).patch_tokens
    attention = pooler.attention
    query = attention.q_proj(pooler.norm_queries(pooler.queries)).view(5, 4, 8)
    key, value = (proj(pooler.norm_context(context)).view(4, 16, 4, 8) for proj in (attention.k_proj, attention.v_proj))
    weights = torch.einsum("qhd,bmhd->bhqm", query, key).div(8**0.5).softmax(-1)
    read = torch.einsum("bhqm,bmhd->bqhd", weights, value).flatten(2)
    torch.testing.assert_close(pooler(context), attention.out_proj(read))


def test_greedy_captions_are_what_teacher_forcing_would_pick(towers, batch):
    coca = coca_for(towers)
    torch.nn.init.normal_(coca.captioner.head_weight)
    ids = coca.generate(towers, batch["pixel_values"], start_token_id=1, end_token_id=63)
    assert ids.shape == (4, towers.shape.context_length) and ids[:, 0].eq(1).all()
    with torch.no_grad():
        picked = full_logits(coca, towers(batch["pixel_values"], ids)).argmax(-1)
    assert torch.equal(ids[:, 1:], picked[:, :-1])
    end = int(ids[0, 3])
    first_end = ids[0].tolist().index(end)
    stopped = coca.generate(towers, batch["pixel_values"], start_token_id=1, end_token_id=end)
    assert stopped[0, first_end] == end and stopped[0, first_end + 1 :].eq(towers.shape.pad_token_id).all()


def test_a_batch_without_any_target_gives_zero_with_gradients(towers, batch):
    coca = coca_for(towers)
    one_token = {k: v[:, :1] if k != "pixel_values" else v for k, v in batch.items()}
    for short in (one_token, {**batch, "attention_mask": (torch.arange(12) < 1).long().expand(4, -1)}):
        term = caption_of(coca, towers, short)
        assert term.sum == 0 and term.weight == 0
        term.sum.backward()
    assert coca.captioner.head_weight.grad.eq(0).all()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("bert", {}, "causal text tower"),
        ("clip", {"contrastive_weight": 0}, "untrained"),
        ("clip", {"num_queries": 0}, "num_queries=0"),
        ("clip", {"num_heads": 5}, "num_heads=5 does not divide"),
        ("clip", {"decoder_layers": 0}, "at least 1"),
        ("clip", {"caption_reduction": "mean"}, "caption_reduction='mean'"),
    ],
)
def test_options_that_do_not_fit_are_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        Coca(tiny_two_tower(text=text).shape, **{**OPTIONS, **options})


def test_a_bidirectional_text_tower_is_fine_without_captioning():
    assert Coca(tiny_two_tower(text="bert").shape, **{**OPTIONS, "caption_weight": 0.0}).captioner is None
