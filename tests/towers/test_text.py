"""The text tower against Hugging Face's own forward pass; who sees whom; padding without influence."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
)

from cal_train.testing import TINY_TEXT_TOWERS, TINY_VISION_TOWERS
from cal_train.towers.text import TextTower, text_encoder

EOS = 3
LENGTHS = (12, 7, 2)
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 12, "vocab_size": 64}


def make_tower(kind="clip", pooling="eos", **options):
    fields = (
        GPT2 | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS} if kind == "gpt2" else TINY_TEXT_TOWERS[kind]
    )
    encoder = text_encoder(fields)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)  # attention that depends visibly on what is attended to
    return TextTower(encoder, pooling=pooling, **options).eval()


def texts(lengths=LENGTHS, length=None):
    """Random ids that end in the end token, padded with id 0, and their mask."""
    length = length or max(lengths)
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(4, 64, mask.shape).masked_fill(~mask, 0)
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    return ids, mask


CASES = [
    ("clip", "eos"), ("clip", "mean"), ("clip", "first"), ("clip", "last"), ("clip", "cls_appended"),
    ("siglip", "eos"), ("siglip", "mean"), ("siglip", "last"),
    ("bert", "eos"), ("bert", "mean"), ("bert", "first"), ("gpt2", "eos"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip", "bert", "gpt2"])
def test_tokens_equal_the_hugging_face_class_on_each_text_alone(kind):
    tower = make_tower(kind, "mean")
    ids, mask = texts()
    pooled, tokens = tower(ids, mask)
    for i, length in enumerate(LENGTHS):
        expected = tower.encoder(input_ids=ids[i : i + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(tokens[i, :length], expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(pooled[i], expected.mean(dim=0), rtol=0, atol=2e-6)


@torch.no_grad()
def test_eos_pooling_is_clip_s_own_pooled_output():
    tower = make_tower("clip", "eos")
    ids, mask = texts()
    expected = tower.encoder(input_ids=ids, attention_mask=mask.long()).pooler_output
    torch.testing.assert_close(tower(ids, mask)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_eos_pooling_takes_the_last_real_token_even_if_other_ids_are_larger_or_padding_is_the_end_token():
    tower = make_tower("clip", "eos", pad_token_id=EOS)
    ids, mask = texts()
    ids = ids.masked_fill(~mask, EOS)
    pooled, tokens = tower(ids, mask)
    for i, length in enumerate(LENGTHS):
        assert torch.equal(pooled[i], tokens[i, length - 1])


@torch.no_grad()
@pytest.mark.parametrize("length", [4, 12])
def test_last_pooling_is_siglip_s_own_pooled_output_of_texts_padded_to_the_context(length):
    tower = make_tower("siglip", "last")
    ids, mask = texts((4, 3, 2), length)
    whole = torch.nn.functional.pad(ids, (0, 12 - length))
    expected = tower.encoder(input_ids=whole)
    pooled, tokens = tower(ids, mask)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, expected.last_hidden_state[:, :length], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_padded_ids_have_no_influence_on_anything(kind, pooling):
    tower = make_tower(kind, pooling)
    ids, mask = texts()
    other = torch.where(mask, ids, torch.randint(0, 64, ids.shape))
    assert not torch.equal(ids, other)
    for ours, theirs in zip(tower(ids, mask), tower(other, mask), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_the_other_texts_of_a_batch_have_no_influence(kind, pooling):
    tower = make_tower(kind, pooling)
    ids, mask = texts()
    pooled, tokens = tower(ids, mask)
    for i, length in enumerate(LENGTHS):
        alone, alone_tokens = tower(ids[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(alone[0], pooled[i], rtol=0, atol=3e-6)
        torch.testing.assert_close(alone_tokens[0], tokens[i, :length], rtol=0, atol=3e-6)


@pytest.mark.parametrize(("kind", "pooling"), [case for case in CASES if case[1] != "last"])
def test_padding_gets_no_gradient(kind, pooling):
    tower = make_tower(kind, pooling)
    ids, mask = texts((5, 2))
    embedding = tower.encoder.get_input_embeddings()
    pooled, tokens = tower(ids, mask)
    (pooled.pow(3).sum() + tokens[mask].pow(3).sum()).backward()
    assert not (ids[mask] == 0).any()
    assert embedding.weight.grad[0].abs().max() == 0, "row 0 is the padding token"
    assert embedding.weight.grad[ids[0, 0]].abs().max() > 0


def sees(tower, ids, mask):
    """(L, L) bool: whether the output at row i changes with the id at column j."""
    base = tower(ids, mask)[1][0]
    rows = []
    for j in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, j] = (ids[0, j] + 7) % 60 + 4
        rows.append((tower(changed, mask)[1][0] - base).abs().amax(dim=1) > 1e-4)
    return torch.stack(rows, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "pooling", "causal"),
    [
        ("clip", "eos", True),
        ("clip", "cls_appended", True),
        ("gpt2", "eos", True),
        ("siglip", "mean", False),
        ("bert", "first", False),
    ],
)
def test_a_token_sees_what_its_class_lets_it_see(kind, pooling, causal):
    tower = make_tower(kind, pooling)
    ids, mask = texts((6,))
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.equal(sees(tower, ids, mask), everything.tril() if causal else everything)
    assert tower.causal is causal


@torch.no_grad()
def test_the_appended_token_sees_the_real_tokens_and_itself_and_is_seen_by_none():
    tower = make_tower("clip", "cls_appended")
    ids, mask = texts((5, 3))
    pooled, tokens = tower(ids, mask)
    assert tokens.shape == (2, 5, 24)
    torch.testing.assert_close(tokens, make_like(tower, "eos")(ids, mask)[1], rtol=0, atol=1e-6)
    for j in range(3):
        changed = ids.clone()
        changed[1, j] = 60
        assert (tower(changed, mask)[0][1] - pooled[1]).abs().max() > 1e-3
    tower.cls_token.mul_(-1)
    flipped, same = tower(ids, mask)
    assert (flipped - pooled).abs().max() > 1e-3 and torch.equal(same, tokens)


def make_like(tower, pooling):
    return TextTower(tower.encoder, pooling=pooling).eval()


@torch.no_grad()
def test_the_appended_token_equals_a_token_put_there_by_hand():
    """A spare id whose embedding, minus the position it lands on, is the appended token."""
    tower = make_tower("clip", "cls_appended")
    ids, mask = texts((5,))
    embeddings = tower.encoder.embeddings
    embeddings.token_embedding.weight[63] = tower.cls_token - embeddings.position_embedding.weight[5]
    ids[ids == 63] = 62
    by_hand = tower.encoder(input_ids=torch.cat([ids, torch.tensor([[63]])], dim=1)).last_hidden_state[:, -1]
    torch.testing.assert_close(tower(ids, mask)[0], by_hand, rtol=0, atol=2e-6)


def test_a_full_context_leaves_room_for_the_appended_token():
    ids, mask = texts((12,))
    assert make_tower("clip", "cls_appended")(ids, mask)[0].shape == (1, 24)


@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_every_trainable_parameter_gets_a_gradient(kind, pooling):
    tower = make_tower(kind, pooling).train()
    ids, mask = texts()
    pooled, tokens = tower(ids, mask)
    (pooled.pow(3).sum() + tokens.pow(3).sum()).backward()
    assert [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {name.split(".")[1] for name, p in tower.named_parameters() if not p.requires_grad}
    unread = {"bert": {"pooler"}, "siglip": set() if pooling == "last" else {"head"}}.get(kind, set())
    assert frozen == unread


@torch.no_grad()
def test_no_mask_means_that_all_tokens_are_real():
    tower = make_tower("clip", "mean")
    ids, _ = texts((5, 5))
    torch.testing.assert_close(tower(ids)[0], tower(ids, torch.ones_like(ids))[0], rtol=0, atol=0)


def test_of_dual_encoders_the_text_half_is_taken(tmp_path):
    clip = CLIPModel(CLIPConfig(vision_config=TINY_VISION_TOWERS["clip"], text_config=TINY_TEXT_TOWERS["clip"]))
    siglip = SiglipModel(
        SiglipConfig(vision_config=TINY_VISION_TOWERS["siglip"], text_config=TINY_TEXT_TOWERS["siglip"])
    )
    ids, mask = texts()
    for name, dual in (("clip", clip.eval()), ("siglip", siglip.eval())):
        dual.save_pretrained(tmp_path / name)
        tower = TextTower(text_encoder(str(tmp_path / name))).eval()
        with torch.no_grad():
            expected = dual.text_model(ids, attention_mask=mask.long()).last_hidden_state
            torch.testing.assert_close(tower(ids, mask)[1], expected)


def test_a_masked_language_model_s_folder_may_lack_the_pooler_but_nothing_else(tmp_path):
    fields = {name: value for name, value in TINY_TEXT_TOWERS["bert"].items() if name != "model_type"}
    model = BertForMaskedLM(BertConfig(**fields))
    model.save_pretrained(tmp_path / "whole")
    tower = TextTower(text_encoder(tmp_path / "whole"), pooling="mean").eval()
    ids, mask = texts()
    with torch.no_grad():
        expected = model.eval().bert(ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(tower(ids, mask)[1], expected)
    state = {name: value for name, value in model.state_dict().items() if "layer.0.intermediate" not in name}
    model.save_pretrained(tmp_path / "broken", state_dict=state)
    with pytest.raises(ValueError, match="lacks 2 weights"):
        text_encoder(tmp_path / "broken")


def test_positions_that_start_behind_the_padding_id_are_not_counted_twice():
    fields = {name: value for name, value in TINY_TEXT_TOWERS["bert"].items() if name != "model_type"}
    encoder = AutoModel.from_config(RobertaConfig(**{**fields, "pad_token_id": 1, "max_position_embeddings": 12}))
    tower = TextTower(encoder).eval()
    assert tower.context_length == 10
    assert tower(torch.randint(4, 64, (1, 10)))[0].shape == (1, 24)


def test_refuses_a_text_longer_than_the_context():
    ids, mask = texts((12,))
    with pytest.raises(ValueError, match="texts of 12 tokens came to a text tower with a context of 8"):
        make_tower("clip", context_length=8)(ids, mask)


def test_refuses_a_mask_of_another_shape():
    ids, mask = texts((5,))
    with pytest.raises(ValueError, match="must agree"):
        make_tower()(ids, mask[:, :4])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clip", {"pooling": "max"}, "does not exist"),
        ("clip", {"context_length": 13}, "1..12"),
        ("clip", {"context_length": 0}, "1..12"),
        ("clip", {"pad_token_id": 64}, "outside the vocabulary"),
        ("bert", {"pooling": "cls_appended"}, "no token sees those behind it"),
        ("siglip", {"pooling": "cls_appended"}, "clip_text_model"),
    ],
)
def test_refuses_options_that_do_not_fit(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_tower(kind, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "clip_txt"}, "not one that transformers knows"),
        ({"model_type": "bert", "num_layers": 2}, "no field 'num_layers'"),
        ({"model_type": "t5", "d_model": 16, "num_layers": 1, "d_ff": 16, "num_heads": 2}, "encoder alone"),
    ],
)
def test_refuses_a_configuration_that_means_something_else(fields, message):
    with pytest.raises(ValueError, match=message):
        TextTower(text_encoder(fields))


def test_a_missing_padding_token_must_be_named():
    encoder = AutoModel.from_config(GPT2Config(**{k: v for k, v in GPT2.items() if k != "model_type"}))
    with pytest.raises(ValueError, match="no pad_token_id: set it"):
        TextTower(encoder)
    assert TextTower(encoder, pad_token_id=5).pad_token_id == 5
