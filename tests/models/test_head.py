import copy

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from cal_train.models.head import Head, find_head, open_head
from cal_train.testing import tiny_llava, tiny_tokenizer

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=7.0)), Head(softcap=7.0)),
        (CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), Head(scale=0.25)),
        (GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), Head(scale=0.25)),
    ],
    ids=["gemma2-softcap", "cohere-scale", "granite-scale"],
)
def test_head_reproduces_the_models_own_logits(model, expected):
    head = find_head(model.eval())
    assert head == expected
    open_head(model)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0] * 30  # far into the cap
        logits = model.lm_head(hidden) * expected.scale
        logits = logits if expected.softcap is None else expected.softcap * torch.tanh(logits / expected.softcap)
        labels = torch.randint(64, (10,))
        ours = model.lm_head(hidden, inside=lambda h, w, b: head.target_logits(h, w, b, labels))
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = model.lm_head(hidden, inside=lambda h, w, b: head.loss_sum(h, w, b, labels, torch.ones(10)))
    assert torch.allclose(ours, logits.gather(1, labels[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(loss, losses.sum(), rtol=1e-5)


def test_a_cap_that_the_class_does_not_apply_is_not_believed():
    model = tiny_llava(tiny_tokenizer())
    model.config.text_config.final_logit_softcapping = 5.0
    assert find_head(model) == Head()


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_llava(tiny_tokenizer())
    ids = torch.arange(20, 30)[None]
    before = model(input_ids=ids).logits
    open_head(model)
    find_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.lm_head(torch.zeros(1, 32), inside=lambda hidden, weight, bias: weight.shape) == (397, 32)


def test_an_unknown_treatment_of_logits_is_refused():
    model = tiny_llava(tiny_tokenizer())
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="changes its logits after lm_head"):
        find_head(model)


def test_a_head_that_is_not_a_plain_linear_layer_is_refused():
    model = copy.deepcopy(tiny_llava(tiny_tokenizer()))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"Sequential, not a plain nn\.Linear"):
        open_head(model)
