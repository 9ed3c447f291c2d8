"""The step against an oracle: plain `LlavaForConditionalGeneration` in float64, full logits, image keys masked."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cal_train.cal.strategies import STRATEGIES, TokenWeighting, resolve_weighting
from cal_train.cal.weights import cal_weights
from cal_train.models.head import find_head
from cal_train.testing import tiny_llava, tiny_tokenizer
from cal_train.train.step import StepOptions, attach_step, run_step

PAD, BOS, IMG = 0, 1, 4


def build():
    """A tiny VLM whose deltas reach both clamp limits, and its untouched float64 twin."""
    model = tiny_llava(tiny_tokenizer())
    with torch.no_grad():
        model.lm_head.weight *= 8
        model.model.multi_modal_projector.linear_2.weight *= 4
    oracle = copy.deepcopy(model).double()
    attach_step(model)
    return model, oracle


@pytest.fixture(scope="module")
def models():
    return build()


def row(spec, generator):
    """``spec``: pieces of 't5' (5 prompt tokens), 'l3' (3 label tokens), 'i' (an image of 4 tokens)."""
    ids, labels = [BOS], [-100]
    for piece in spec.split():
        count = 4 if piece == "i" else int(piece[1:])
        new = [IMG] * 4 if piece == "i" else torch.randint(20, 390, (count,), generator=generator).tolist()
        ids += new
        labels += new if piece[0] == "l" else [-100] * count
    return ids, labels


def make_batch(*specs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [row(spec, generator) for spec in specs]
    length = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }
    num_images = int((batch["input_ids"] == IMG).sum()) // 4
    if num_images:
        batch["pixel_values"] = torch.randn(num_images, 3, 28, 28, generator=generator)
    return batch


def oracle_logits(oracle, batch):
    """Full logits with and without the image, (B, S, V) float64: the image keys are masked, positions kept."""
    pixels = batch["pixel_values"].double() if "pixel_values" in batch else None
    inputs = {"input_ids": batch["input_ids"], "pixel_values": pixels}
    with torch.no_grad():
        with_image = oracle(**inputs, attention_mask=batch["attention_mask"]).logits
        hidden_keys = batch["attention_mask"] * (batch["input_ids"] != IMG)
        without_image = oracle(**inputs, attention_mask=hidden_keys).logits
    return with_image, without_image


def oracle_deltas(oracle, batch):
    """Target logit with minus without at shifted positions (B, S - 1)."""
    with_image, without_image = oracle_logits(oracle, batch)
    target = batch["labels"][:, 1:].clamp_min(0)[..., None]
    return (with_image - without_image)[:, :-1].gather(-1, target)[..., 0]


def losses(oracle, batch):
    pixels = batch["pixel_values"].double() if "pixel_values" in batch else None
    logits = oracle(input_ids=batch["input_ids"], pixel_values=pixels, attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")


MIXED = ("t3 i t4 l6", "i t2 l3 t3 l4 t1", "t4 l5", "t2 i t1 i t3 l2 t9 l7")


def options(model, weighting, **kwargs):
    return StepOptions(find_head(model), weighting, **kwargs)


@pytest.mark.parametrize("ablation", ["remove", "mask"])
def test_deltas_and_weights_equal_the_float64_oracle(models, ablation):
    model, oracle = models
    batch = make_batch(*MIXED)
    out = run_step(model, batch, options(model, resolve_weighting("cal", ablation=ablation)))
    mask = batch["labels"][:, 1:] != -100
    expected_delta = oracle_deltas(oracle, batch)
    expected_weight = cal_weights(expected_delta, mask)
    with_image, without_image = oracle_logits(oracle, batch)
    target = batch["labels"][:, 1:].clamp_min(0)[..., None]
    for name, expected in (
        ("logit_with", with_image[:, :-1].gather(-1, target)[..., 0]),
        ("logit_without", without_image[:, :-1].gather(-1, target)[..., 0]),
        ("delta", expected_delta),
        ("weight", expected_weight),
    ):
        assert (out[name].double() - expected[mask]).abs().max() < 1e-4, name
    assert expected_delta[mask].min() < 1 < 5 < expected_delta[mask].max()  # both limits are really exercised


def test_text_only_rows_have_delta_zero_and_weight_low(models):
    model, _ = models
    batch = make_batch("t4 l5", "t2 l3")
    out = run_step(model, batch, options(model, TokenWeighting(low=0.5)))
    assert out["delta"].abs().max() == 0
    assert (out["weight"] == 0.5).all()
    mixed = make_batch(*MIXED)
    out = run_step(model, mixed, options(model, TokenWeighting()))
    row_of_label = (mixed["labels"][:, 1:] != -100).nonzero()[:, 0]
    assert out["delta"][row_of_label == 2].abs().max() == 0


def test_remove_predicts_the_first_caption_token_from_the_last_text_token_before_the_image(models):
    model, oracle = models
    batch = make_batch("i l5")  # stage 1: BOS, image, caption
    out = run_step(model, batch, options(model, TokenWeighting()))
    with torch.no_grad():
        bos_logits = oracle(input_ids=torch.tensor([[BOS]])).logits[0, 0]
    assert out["logit_without"][0].item() == pytest.approx(bos_logits[batch["labels"][0, 5]].item(), abs=1e-4)
    masked = run_step(model, batch, options(model, resolve_weighting("cal", ablation="mask")))
    assert abs(masked["logit_without"][0] - out["logit_without"][0]) > 1e-3  # there the two modes differ
    assert torch.allclose(masked["logit_without"][1:], out["logit_without"][1:], atol=1e-4)


@pytest.mark.parametrize("ablation", ["remove", "mask"])
def test_without_any_text_before_the_image_the_first_label_has_delta_zero_and_nothing_is_nan(models, ablation):
    model, _ = models
    batch = {name: value[:, 1:] if value.ndim == 2 else value for name, value in make_batch("i l5").items()}
    out = run_step(model, batch, options(model, resolve_weighting("cal", ablation=ablation)))
    assert all(value.isfinite().all() for value in out.values())
    if ablation == "remove":
        assert out["delta"][0] == 0


def test_logits_without_the_image_do_not_depend_on_its_pixels(models):
    model, _ = models
    batch = make_batch("t3 i t4 l6")
    other = batch | {"pixel_values": torch.randn(1, 3, 28, 28)}
    for ablation in ("remove", "mask"):
        step = options(model, resolve_weighting("cal", ablation=ablation))
        first, second = run_step(model, batch, step), run_step(model, other, step)
        assert torch.allclose(first["logit_without"], second["logit_without"], atol=1e-5)
        assert not torch.allclose(first["logit_with"], second["logit_with"], atol=1e-2)


def reference_loss(oracle, batch):
    """CAL at 9d99569 in words: delta of id 0 at unlabelled places, one flat vector, divided by the weight sum."""
    with_image, without_image = oracle_logits(oracle, batch)
    labels = batch["labels"][:, 1:].reshape(-1)
    mask = labels != -100
    target = labels.masked_fill(~mask, 0)[:, None]
    flat = [logits[:, :-1].reshape(len(labels), -1).gather(1, target)[:, 0] for logits in (with_image, without_image)]
    weights = (flat[0] - flat[1]).clamp(1, 5)
    weights = F.avg_pool1d(weights[None, None], 3, 1, padding=1, count_include_pad=False)[0, 0]
    nll = losses(oracle, batch).reshape(-1)
    return (nll * weights)[mask].sum() / (weights[mask].sum() + 1e-6)


def test_cal_reference_reproduces_the_loss_of_the_reference_code(models):
    model, oracle = models
    for seed in range(3):
        batch = make_batch(*MIXED, seed=seed)
        out = run_step(model, batch, options(model, STRATEGIES["cal_reference"]))
        assert (out["loss_sum"] / out["weight_sum"]).item() == pytest.approx(
            reference_loss(oracle, batch).item(), rel=1e-5
        )


def test_sample_normaliser_is_the_papers_equation_per_sample(models):
    model, oracle = models
    batch = make_batch(*MIXED)
    out = run_step(model, batch, options(model, TokenWeighting()))
    mask = batch["labels"][:, 1:] != -100
    weights = cal_weights(oracle_deltas(oracle, batch), mask).double()
    per_sample = (weights * losses(oracle, batch)).sum(1) / weights.sum(1)  # paper, eq. 5
    expected = (per_sample * mask.sum(1)).sum()
    assert out["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["weight_sum"].item() == pytest.approx(mask.sum().item(), rel=1e-6)


@pytest.mark.parametrize("weighting", [None, STRATEGIES["uniform"]], ids=["off", "uniform"])
def test_without_cal_loss_and_gradients_equal_stock_hugging_face(weighting):
    ours, stock = tiny_llava(tiny_tokenizer()).double(), tiny_llava(tiny_tokenizer()).double()
    attach_step(ours)
    batch = make_batch(*MIXED)
    batch["pixel_values"] = batch["pixel_values"].double()
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    loss = ours(step=options(ours, weighting), **batch)["loss_sum"] / num_labels
    expected = stock(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # HF's own loss is float32
    loss.backward()
    expected.backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-6 * q.grad.abs().max() + 1e-9, name


def test_with_cal_gradients_equal_the_oracles_with_fixed_weights():
    model, oracle = build()
    batch = make_batch(*MIXED)
    run_step(model, batch, options(model, TokenWeighting()))["loss_sum"].backward()
    mask = batch["labels"][:, 1:] != -100
    weights = cal_weights(oracle_deltas(oracle, batch), mask).double()
    weights = weights * mask.sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    (weights * losses(oracle, batch)).sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert (p.grad.double() - q.grad).abs().max() <= 1e-4 * max(q.grad.abs().max(), 1), name


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model = build()[0].train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        out = model(step=options(model, TokenWeighting()), **make_batch(*MIXED))
        out["loss_sum"].backward()
        results.append((out["loss_sum"].item(), out["delta"], [p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    for p, q in zip(results[0][2], results[1][2], strict=True):
        assert (p is None and q is None) or torch.equal(p, q)


def test_a_batch_without_labels_gives_exactly_zero_loss_and_finite_gradients():
    model, _ = build()
    out = model(step=options(model, TokenWeighting()), **make_batch("t3 i t4", "t5"))
    assert out["loss_sum"] == 0
    out["loss_sum"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_text_only_batch_still_gives_every_trainable_parameter_a_gradient():
    model = tiny_llava(tiny_tokenizer())
    attach_step(model)
    model.model.vision_tower.requires_grad_(False)
    batch = make_batch("t4 l5", "t2 l3")
    out = model(step=options(model, TokenWeighting()), **batch)
    out["loss_sum"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    projector = model.model.multi_modal_projector.linear_1.weight.grad
    assert projector.abs().max() == 0
    plain = tiny_llava(tiny_tokenizer())(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
    assert out["loss_sum"].item() == pytest.approx(plain.item(), rel=1e-6)


def test_scores_ignore_dropout_and_the_loss_keeps_it():
    model = tiny_llava(tiny_tokenizer(), attention_dropout=0.5).train()
    attach_step(model)
    batch = make_batch(*MIXED)
    step = options(model, TokenWeighting())
    first, second = run_step(model, batch, step), run_step(model, batch, step)
    assert torch.equal(first["delta"], second["delta"])
    assert first["loss_sum"] != second["loss_sum"]
    quiet = run_step(model.eval(), batch, step)
    assert torch.allclose(first["delta"], quiet["delta"], atol=1e-5)


def test_cached_features_equal_pixels(models):
    from cal_train.models.llava import vision_features

    model, _ = models
    batch = make_batch(*MIXED)
    features = vision_features(model, batch)
    cached = {name: value for name, value in batch.items() if name != "pixel_values"} | {"vision_features": features}
    step = options(model, TokenWeighting())
    assert torch.equal(run_step(model, batch, step)["loss_sum"], run_step(model, cached, step)["loss_sum"])


def test_plain_calls_of_an_attached_model_are_untouched(models):
    model, oracle = models
    batch = make_batch(*MIXED)
    expected = oracle(**(batch | {"pixel_values": batch["pixel_values"].double()})).loss
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_that_do_not_match_the_image_tokens_are_an_error(models):
    model, _ = models
    batch = make_batch("t3 i t4 l6")
    batch["pixel_values"] = torch.randn(2, 3, 28, 28)
    with pytest.raises(ValueError, match="the images make 8 embeddings but the batch has 4"):
        run_step(model, batch, options(model, None))


def test_under_autocast_the_pass_without_gradients_takes_none_from_the_one_with():
    """Autocast caches cast weights; those of a pass without gradients must not serve the pass with them."""
    gradients = []
    for enabled in (False, True):
        model, _ = build()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(step=options(model, TokenWeighting(low=1, high=1)), **make_batch(*MIXED))
        out["loss_sum"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    exact, cast = gradients
    assert exact.keys() == cast.keys()
    for name, gradient in exact.items():
        cosine = F.cosine_similarity(gradient.flatten(), cast[name].flatten(), dim=0)
        assert cosine > 0.98 or gradient.abs().max() < 1e-4, name
