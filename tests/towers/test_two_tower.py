"""Both towers together: outputs, locking, saving and loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel

from cal_train.testing import TINY_TEXT_TOWERS, TINY_VISION_TOWERS, tiny_pairs, tiny_two_tower
from cal_train.towers.outputs import TowerShape
from cal_train.towers.two_tower import build_two_tower, load_two_tower


def encode(towers, batch, **options):
    return towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"], **options)


def assert_same(ours, theirs):
    for name, value in vars(theirs).items():
        if value is None:
            assert getattr(ours, name) is None, name
        else:
            assert torch.equal(getattr(ours, name), value), name


def test_outputs_are_what_the_contract_says():
    towers = tiny_two_tower(num_mixture_tokens=3).eval()
    assert towers.shape == TowerShape(
        vision_width=32, text_width=24, image_size=16, patch_size=4, vocab_size=64, context_length=12, pad_token_id=0,
        num_mixture_tokens=3, causal_text=True,
    )  # fmt: skip
    batch = tiny_pairs(towers.shape, batch_size=5)
    outputs = encode(towers, batch)
    shapes = {name: tuple(value.shape) for name, value in vars(outputs).items()}
    assert shapes == {
        "image_pooled": (5, 32), "patch_tokens": (5, 16, 32), "mixture_tokens": (5, 3, 32), "text_pooled": (5, 24),
        "text_tokens": (5, 12, 24), "text_mask": (5, 12), "input_ids": (5, 12),
    }  # fmt: skip
    assert outputs.text_mask.dtype == torch.bool
    assert torch.equal(outputs.input_ids, batch["input_ids"])


def test_either_side_alone_gives_the_same_as_both():
    towers = tiny_two_tower().eval()
    batch = tiny_pairs(towers.shape)
    both = encode(towers, batch)
    images = towers(pixel_values=batch["pixel_values"])
    texts = towers(input_ids=batch["input_ids"], text_mask=batch["attention_mask"])
    assert images.text_pooled is None and images.text_mask is None and texts.patch_tokens is None
    assert torch.equal(images.image_pooled, both.image_pooled) and torch.equal(texts.text_pooled, both.text_pooled)
    with pytest.raises(ValueError, match="neither"):
        towers()


def test_a_double_tower_stays_double():
    towers = tiny_two_tower("siglip", "siglip", "last", dtype=torch.float64)
    outputs = encode(towers, tiny_pairs(towers.shape, dtype=torch.float64))
    assert outputs.image_pooled.dtype == outputs.text_pooled.dtype == torch.float64


@pytest.fixture
def folder(tmp_path):
    """Two towers with dropout in their layers, so that training mode shows."""
    vision = {**TINY_VISION_TOWERS["clip"], "attention_dropout": 0.5}
    text = {**TINY_TEXT_TOWERS["clip"], "attention_dropout": 0.5}
    build_two_tower(vision, text).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_locked_tower_has_no_gradient_no_graph_and_no_dropout(folder, side):
    towers = build_two_tower(folder / "vision", folder / "text", **{f"lock_{side}": True}).train()
    batch = tiny_pairs(towers.shape)
    batch["pixel_values"].requires_grad_()  # frozen weights alone would not keep this out of a graph
    outputs = encode(towers, batch)
    pooled = {"image": outputs.image_pooled, "text": outputs.text_pooled}
    locked, free = (towers.vision, towers.text) if side == "image" else (towers.text, towers.vision)
    assert not pooled[side].requires_grad
    assert not locked.training and free.training
    assert not any(module.training for module in locked.modules())
    assert torch.equal(pooled[side], getattr(encode(towers.eval(), batch), f"{side}_pooled"))
    (outputs.image_pooled.pow(3).sum() + outputs.text_pooled.pow(3).sum()).backward()
    assert all(parameter.grad is None for parameter in locked.parameters())
    assert all(parameter.grad is not None for parameter in free.parameters())


def test_an_unlocked_tower_does_have_dropout(folder):
    towers = build_two_tower(folder / "vision", folder / "text").train()
    batch = tiny_pairs(towers.shape)
    assert not torch.equal(encode(towers, batch).image_pooled, encode(towers, batch).image_pooled)


def test_a_locked_tower_is_not_checkpointed_and_the_other_one_is(folder):
    towers = build_two_tower(folder / "vision", folder / "text", lock_image=True).train()
    towers.activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=1, offload=False)
    assert towers.text.encoder.is_activation_checkpointing
    assert not towers.vision.encoder.is_activation_checkpointing


def test_calling_without_gradient_makes_no_graph():
    towers = tiny_two_tower().train()
    with torch.no_grad():
        assert not encode(towers, tiny_pairs(towers.shape)).image_pooled.requires_grad


VARIANTS = [
    {},
    {"vision": "siglip", "text": "siglip", "text_pooling": "last"},
    {"vision": "dinov2", "text": "bert", "text_pooling": "mean", "num_mixture_tokens": 4},
    {"num_mixture_tokens": 3, "patch_dropout": 0.5, "text_pooling": "cls_appended"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_saved_and_loaded_towers_are_the_same(variant, tmp_path):
    towers = tiny_two_tower(**variant).eval()
    towers.save_pretrained(tmp_path)
    loaded = load_two_tower(tmp_path)
    batch = tiny_pairs(towers.shape)
    assert loaded.shape == towers.shape and not loaded.training
    assert loaded.vision.patch_dropout == towers.vision.patch_dropout
    assert_same(encode(loaded, batch), encode(towers, batch))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in towers.named_parameters() if p.requires_grad
    }


def test_the_two_folders_are_plain_hugging_face(tmp_path):
    towers = tiny_two_tower(text="bert", text_pooling="mean").eval()
    towers.save_pretrained(tmp_path)
    batch = tiny_pairs(towers.shape)
    with torch.no_grad():
        vision, info = CLIPVisionModel.from_pretrained(tmp_path / "vision", output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(vision(batch["pixel_values"]).pooler_output, encode(towers, batch).image_pooled)
        text = AutoModel.from_pretrained(tmp_path / "text")
        tokens = text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        torch.testing.assert_close(tokens, encode(towers, batch).text_tokens)


def test_locks_and_context_are_saved_too(folder, tmp_path):
    towers = build_two_tower(folder / "vision", folder / "text", lock_text=True, context_length=8, pad_token_id=5)
    towers.save_pretrained(tmp_path / "again")
    loaded = load_two_tower(tmp_path / "again")
    assert loaded.locked == ("text",) and loaded.shape.context_length == 8 and loaded.shape.pad_token_id == 5


def test_loading_refuses_learned_tokens_that_do_not_fit(tmp_path):
    tiny_two_tower(num_mixture_tokens=3).save_pretrained(tmp_path)
    file = tmp_path / "learned_tokens.safetensors"
    tokens = load_file(file)
    assert set(tokens) == {"vision.extra_tokens", "vision.extra_positions"}
    save_file({"vision.extra_tokens": tokens["vision.extra_tokens"]}, file)
    with pytest.raises(ValueError, match=r"vision\.extra_positions missing or not expected"):
        load_two_tower(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="missing or not expected"):
        load_two_tower(tmp_path)
    save_file({**tokens, "vision.extra_tokens": torch.zeros(5, 32)}, file)
    with pytest.raises(ValueError, match=r"vision\.extra_tokens.*\(5, 32\).*\(2, 32\)"):
        load_two_tower(tmp_path)


def test_loading_refuses_a_folder_that_is_none_and_weights_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"tower\.json is missing"):
        load_two_tower(tmp_path)
    tiny_two_tower().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "text" / "model.safetensors")
    del weights["final_layer_norm.weight"]
    save_file(weights, tmp_path / "text" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is final_layer_norm\.weight"):
        load_two_tower(tmp_path)


def test_no_path_of_this_machine_is_saved(folder, tmp_path):
    build_two_tower(folder / "vision", folder / "text").save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_image": True, "lock_text": True}, "no tower to train"),
        ({"lock_image": True, "num_mixture_tokens": 2}, "stay random"),
        ({"lock_image": True, "patch_dropout": 0.5}, "whole images"),
        ({"lock_text": True, "text_pooling": "cls_appended"}, "stay random"),
    ],
)
def test_refuses_options_that_do_not_fit_together(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build_two_tower(folder / "vision", folder / "text", **options)


@pytest.mark.parametrize("side", ["image", "text"])
def test_refuses_to_lock_a_tower_that_was_never_trained(side):
    with pytest.raises(ValueError, match=f"lock_{side} freezes an untrained"):
        build_two_tower(TINY_VISION_TOWERS["clip"], TINY_TEXT_TOWERS["clip"], **{f"lock_{side}": True})


def test_tiny_towers_are_equal_for_equal_arguments_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = tiny_two_tower(), tiny_two_tower(), tiny_two_tower(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [towers.state_dict()["vision.encoder.embeddings.class_embedding"] for towers in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_settings_are_readable_json(tmp_path):
    tiny_two_tower(num_mixture_tokens=3, patch_dropout=0.5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tower.json").read_text()) == {
        "num_mixture_tokens": 3, "patch_dropout": 0.5, "text_pooling": "eos", "context_length": 12, "pad_token_id": 0,
        "lock_image": False, "lock_text": False,
    }  # fmt: skip
