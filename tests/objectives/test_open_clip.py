"""Equal losses on the same weights: ours beside those of open_clip, the code that most people train with."""

import pytest
import torch
import torch.nn.functional as F

from cal_train.objectives.base import total_loss
from cal_train.objectives.families import build_objective
from cal_train.objectives.gather import ONE_RANK
from cal_train.testing import tiny_pairs, tiny_two_tower

losses = pytest.importorskip("open_clip.loss", reason="the bench extra is not installed")


def our_step(name, text_pooling, **options):
    """Return towers' outputs, objective, features and loss parts of one step in float64."""
    towers = tiny_two_tower(text_pooling=text_pooling, dtype=torch.float64)
    torch.manual_seed(1)
    objective = build_objective(name, towers.shape, {"embed_dim": 16, **options}).double()
    batch = tiny_pairs(towers.shape, batch_size=6, dtype=torch.float64)
    outputs = towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    images, texts = objective.image_features(outputs), objective.text_features(outputs)
    local, _ = objective.local_terms(towers, batch["pixel_values"], outputs)
    loss, parts = total_loss(objective.contrast(images, texts, ONE_RANK) | local, objective.loss_weights)
    embeds = [
        F.normalize(features[key], dim=-1) for features, key in ((images, "image_embeds"), (texts, "text_embeds"))
    ]
    return outputs, objective, embeds, loss, parts


def test_clip_equals_open_clip():
    _, objective, embeds, loss, _ = our_step("clip", "eos")
    theirs = losses.ClipLoss()(*embeds, objective.log_scale.exp())
    assert abs(loss - theirs) < 1e-6, (loss, theirs)


def test_siglip_equals_open_clip():
    _, objective, embeds, loss, _ = our_step("siglip", "eos", bias_init=-10.0)
    theirs = losses.SigLipLoss()(*embeds, objective.log_scale.exp(), objective.logit_bias)
    assert abs(loss - theirs) < 1e-5, (loss, theirs)


def test_coca_equals_open_clip():
    options = {"num_queries": 4, "decoder_layers": 2, "num_heads": 2}
    outputs, objective, embeds, loss, parts = our_step("coca", "cls_appended", **options)
    image_tokens = objective.generative_pooler(outputs.patch_tokens)
    logits = objective.captioner.logits(objective.captioner(outputs.text_tokens[:, :-1], image_tokens))
    labels = outputs.input_ids[:, 1:].masked_fill(~outputs.text_mask[:, 1:].bool(), 0)  # their padding id is 0
    assert (outputs.input_ids[:, 1:][outputs.text_mask[:, 1:].bool()] != 0).all(), "a real token would be left out"
    theirs = losses.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        *embeds, logits, labels, objective.clip.log_scale.exp()
    )
    assert abs(loss - sum(theirs)) < 1e-5, (loss, theirs)
    assert abs(2 * parts["caption"] - theirs[1]) < 1e-5
