import itertools

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from cal_train.models.lora import add_lora
from cal_train.models.parts import count_parameters, freeze, num_tower_layers_used, parameter_groups, part_of
from cal_train.testing import tiny_llava

TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}


def vlm_with(tower, layer):
    vision = TOWERS[tower](
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        initializer_range=0.1,
    )
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=63,
            vision_feature_layer=layer,
            vision_feature_select_strategy="full" if tower == "siglip" else "default",
        )
    )


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_with_gradient(model):
    """Run a step on one image and some text; return the parameters that received a gradient."""
    image_token = model.config.image_token_id
    input_ids = torch.tensor([[1, *[image_token] * 4, 20, 21, 22, 23]])
    model.train()
    model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=torch.randn(1, 3, 28, 28),
        labels=torch.where(input_ids == image_token, -100, input_ids),
    ).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def decay_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize("name", ["", "base_model.model.", "module."])
def test_parts_are_told_by_name_with_and_without_wrapper(name):
    assert part_of(f"{name}model.vision_tower.encoder.layers.0.self_attn.q_proj.weight") == "vision_tower"
    assert part_of(f"{name}model.multi_modal_projector.modules_to_save.default.linear_1.weight") == "projector"
    assert part_of(f"{name}model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight") == "language_model"
    assert part_of(f"{name}lm_head.weight") == "language_model"
    assert part_of(f"{name}model.image_newline") == "image_newline"
    assert part_of(f"{name}model.vision_tower_aux.encoder.stages.0.layers.1.dwconv.weight") == "vision_tower"
    assert part_of(f"{name}model.patch_info_mining.query.norm.weight") == "projector"
    with pytest.raises(ValueError, match="no known part"):
        part_of(f"{name}model.audio_tower.weight")


def test_pretrain_trains_the_projector_alone():
    model = tiny_llava()
    counts = freeze(model, "pretrain")
    assert trained_names(model) == {n for n, _ in model.named_parameters() if "multi_modal_projector" in n}
    assert [c.num_trainable for c in counts] == [0, 32 * 32 + 32 + 32 * 32 + 32, 0]


def test_finetune_trains_everything_but_the_tower():
    model = tiny_llava()
    freeze(model, "finetune")
    assert trained_names(model) == {n for n, _ in model.named_parameters() if "vision_tower" not in n}


@pytest.mark.parametrize("layer", [-2, -1, 1, [0, -3]])
@pytest.mark.parametrize("tower", ["clip", "dinov2", "siglip"])
def test_exactly_the_trained_parameters_receive_a_gradient(layer, tower):
    model = vlm_with(tower, layer)
    freeze(model, "finetune", {"vision_tower": True})
    trained = trained_names(model)
    assert any("vision_tower" in name for name in trained)
    assert names_with_gradient(model) == trained


def test_overrides_win_over_the_stage_and_none_follows_it():
    model = tiny_llava()
    freeze(model, "finetune", {"language_model": False, "projector": None, "vision_tower": None})
    assert trained_names(model) == {n for n, _ in model.named_parameters() if "multi_modal_projector" in n}


def test_freezing_again_undoes_the_stage_before():
    model = tiny_llava()
    freeze(model, "finetune", {"vision_tower": True})
    freeze(model, "pretrain")
    assert all("multi_modal_projector" in name for name in trained_names(model))


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("tune", {}, "stage 'tune'"),
        ("finetune", {"head": True}, "part 'head'"),
        ("pretrain", {"projector": False}, "nothing to train"),
    ],
)
def test_wrong_requests_are_refused(stage, overrides, message):
    with pytest.raises(ValueError, match=message):
        freeze(tiny_llava(), stage, overrides)


def test_layers_used_follow_the_selected_hidden_state():
    model = tiny_llava()  # 3 layers: hidden states 0 (embeddings) to 3
    for layer, used in ((-2, 2), (-1, 3), (0, 0), (2, 2), ([1, -1], 3)):
        model.config.vision_feature_layer = layer
        assert num_tower_layers_used(model) == used


def test_counts_are_those_of_the_modules():
    model = tiny_llava()
    counts = {c.part: c.num_parameters for c in count_parameters(model)}
    assert counts["vision_tower"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tower", [False, True])
def test_groups_hold_every_trained_parameter_once(tied, tower):
    model = tiny_llava(tie_word_embeddings=tied)
    freeze(model, "finetune", {"vision_tower": tower})
    groups = parameter_groups(model, 1e-3, 0.1, 1e-4, 1e-5 if tower else None, decay_names(model))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_groups_carry_rate_and_decay_of_their_part():
    model = tiny_llava()
    freeze(model, "finetune", {"vision_tower": True})
    groups = {g["name"]: g for g in parameter_groups(model, 1e-3, 0.1, 1e-4, 1e-5, decay_names(model))}
    rates = {"language_model": 1e-3, "projector": 1e-4, "vision_tower": 1e-5}
    assert set(groups) == {f"{p}/{d}" for p, d in itertools.product(rates, ("decay", "no_decay"))}
    for name, group in groups.items():
        part, decay = name.split("/")
        assert group["lr"] == rates[part]
        assert group["weight_decay"] == (0.1 if decay == "decay" else 0.0)
        assert all((parameter.ndim > 1) == (decay == "decay") for parameter in group["params"])
    projector = model.model.multi_modal_projector
    assert {id(p) for p in groups["projector/no_decay"]["params"]} == {
        id(projector.linear_1.bias),
        id(projector.linear_2.bias),
    }
    torch.optim.AdamW(list(groups.values()))


@pytest.mark.parametrize(
    ("stage", "overrides", "rates", "option"),
    [
        ("finetune", {}, (None, 1e-5), "vision_tower_lr"),
        ("finetune", {"projector": False}, (1e-5, None), "mm_projector_lr"),
    ],
)
def test_a_rate_for_a_frozen_part_is_refused(stage, overrides, rates, option):
    model = tiny_llava()
    freeze(model, stage, overrides)
    with pytest.raises(ValueError, match=option):
        parameter_groups(model, 1e-3, 0.0, *rates, decay_names(model))


def test_behind_peft_the_adapters_and_the_projector_copy_are_trained():
    model = add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0)
    bare = {c.part: c.num_parameters for c in count_parameters(tiny_llava())}
    counts = {c.part: c for c in freeze(model, "finetune")}
    trained = trained_names(model)
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n}
    assert counts["projector"].num_parameters == counts["projector"].num_trainable == bare["projector"]
    assert names_with_gradient(model) == trained
    groups = parameter_groups(model, 1e-3, 0.0, 1e-4, None, decay_names(model))
    assert {g["name"].split("/")[0] for g in groups} == {"language_model", "projector"}
    assert sum(len(g["params"]) for g in groups) == len(trained)


def test_a_tower_beside_lora_is_refused():
    model = add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0)
    with pytest.raises(ValueError, match="LoRA"):
        freeze(model, "finetune", {"vision_tower": True})
