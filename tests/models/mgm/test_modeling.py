"""MGM and MGM-HD as a model: against a forward written out here from the description, and as transformers expects."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, ConvNextConfig, GemmaConfig, LlamaConfig

from cal_train.cal.strategies import STRATEGIES
from cal_train.conf import LORA_TARGETS
from cal_train.models import mgm_family
from cal_train.models.families import FAMILIES
from cal_train.models.head import Head
from cal_train.models.lora import add_lora
from cal_train.models.mgm.configuration import MGMConfig
from cal_train.models.mgm.modeling import MGMFeatures, MGMForConditionalGeneration
from cal_train.train.step import StepOptions, attach_step

IMAGE = 4
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(is_hd=False, text=None, **options):
    size = mgm_family.TINY_HD if is_hd else mgm_family.TINY
    return MGMConfig(
        text_config=text or LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        aux_config=ConvNextConfig(**mgm_family.TINY_AUX),
        image_token_index=IMAGE,
        **{**size, **options},
    )


def tiny_mgm(is_hd=False, **options):
    torch.manual_seed(0)
    model = MGMForConditionalGeneration(tiny_config(is_hd, **options))
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "language_model" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def pixels(config, num_images=1):
    generator = torch.Generator().manual_seed(1)
    side, high_res = config.vision_config.image_size, config.high_res_size
    return {
        "pixel_values": torch.randn(num_images, config.num_tiles, 3, side, side, generator=generator),
        "high_res_pixel_values": torch.randn(num_images, 3, high_res, high_res, generator=generator),
    }


def text_with_images(config, counts=(1,), words=6):
    rows = [
        [1, *([10 + i, *[IMAGE] * config.num_image_tokens] * n), *range(20, 20 + words)] for i, n in enumerate(counts)
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def described_image_tokens(model, pixel_values, high_res):
    """The forward of one image, from the description: tiles one by one, every key and value made."""
    body, state, config = model.model, model.model.state_dict(), model.config

    def layer(name, x):
        x = F.layer_norm(x, x.shape[-1:], *(state[f"patch_info_mining.{name}_norm.{k}"] for k in ("weight", "bias")))
        return F.linear(x, *(state[f"patch_info_mining.{name}_proj.{k}"] for k in ("weight", "bias")))

    def mined(tile, area_map):
        patches = body.vision_tower(tile[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        side, cells = 2, area_map.shape[-1] // 2
        tokens = []
        for r in range(side):
            for c in range(side):
                area = area_map[:, r * cells : (r + 1) * cells, c * cells : (c + 1) * cells].flatten(1).T
                patch = patches[r * side + c]
                attention = (layer("key", area) @ layer("query", patch) / 16**0.5).softmax(0)
                tokens.append(patch + attention @ layer("value", area))
        return torch.stack(tokens)

    x, stages = body.vision_tower_aux.embeddings(high_res[None]), []
    for stage in body.vision_tower_aux.encoder.stages:
        x = stage(x)
        stages.append(x)
    size = stages[0].shape[-2:]
    whole = torch.cat([F.interpolate(s, size=size, mode="bilinear", align_corners=False) for s in stages], 1)
    if config.image_grid == 1:
        tokens = [mined(pixel_values[0], whole[0])]
    else:
        half = size[0] // 2
        tokens = [mined(pixel_values[4], F.interpolate(whole, scale_factor=0.5, mode="bilinear")[0])]
        for i, (top, left) in enumerate([(0, 0), (0, half), (half, 0), (half, half)]):
            tokens.append(mined(pixel_values[i], whole[0, :, top : top + half, left : left + half]))
    projector = body.multi_modal_projector
    return projector.linear_2(F.gelu(projector.linear_1(torch.cat(tokens))))


@pytest.mark.parametrize("is_hd", [False, True])
@torch.no_grad()
def test_image_tokens_are_those_of_the_description(is_hd):
    model = tiny_mgm(is_hd, mining_chunk_size=2)
    images = pixels(model.config, 2)
    output = model.get_image_features(**images)
    assert isinstance(output.pooler_output, list) and len(output.pooler_output) == 2
    for i in range(2):
        expected = described_image_tokens(model, images["pixel_values"][i], images["high_res_pixel_values"][i])
        assert expected.shape == (20 if is_hd else 4, 32)
        torch.testing.assert_close(output.pooler_output[i], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hd_order_is_global_then_tiles_row_by_row():
    model = tiny_mgm(is_hd=True).model
    # width 16: the first two channels say tile and patch; mining adds nothing and the projector passes them on
    for name in ("value_proj.weight", "value_proj.bias"):
        model.patch_info_mining.get_parameter(name).zero_()
    model.multi_modal_projector = torch.nn.Identity()
    code = torch.zeros(1, 5, 4, 16)
    code[..., 0] = torch.arange(5)[:, None]  # tiles 00, 01, 10, 11, then the global image
    code[..., 1] = torch.arange(4)
    stages = tuple(torch.randn(1, c, 32 >> k, 32 >> k) for k, c in enumerate([8, 12, 16, 20]))
    tokens = model.embed_images(MGMFeatures(code, stages))[0]
    assert tokens[:, 0].tolist() == [4] * 4 + [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert tokens[:, 1].tolist() == [0, 1, 2, 3] * 5


@pytest.mark.parametrize("is_hd", [False, True])
@torch.no_grad()
def test_forward_splices_image_tokens_into_the_text(is_hd):
    model = tiny_mgm(is_hd)
    text, images = text_with_images(model.config, (1, 2, 0)), pixels(model.config, 3)
    logits = model(**text, **images).logits
    embeds = model.get_input_embeddings()(text["input_ids"])
    tokens = [
        described_image_tokens(model, images["pixel_values"][i], images["high_res_pixel_values"][i]) for i in range(3)
    ]
    embeds[text["input_ids"] == IMAGE] = torch.cat(tokens)
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=text["attention_mask"]).last_hidden_state
    is_real = text["attention_mask"].bool()
    torch.testing.assert_close(logits[is_real], model.lm_head(hidden)[is_real], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_half_precision_takes_float32_pixels_and_stays_close():
    model = tiny_mgm(is_hd=True, mining_chunk_size=4)
    images = pixels(model.config)
    exact = model.get_image_features(**images).pooler_output[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.get_image_features(**images).pooler_output[0]
    half = model.to(torch.bfloat16).get_image_features(**images).pooler_output[0]
    assert half.dtype == torch.bfloat16
    for other in (mixed, half):
        assert (other.float() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_text_only_forward_is_the_language_models():
    model = tiny_mgm()
    text = text_with_images(model.config, (0, 0))
    expected = model.lm_head(model.model.language_model(**text).last_hidden_state)
    torch.testing.assert_close(model(**text).logits, expected)


@torch.no_grad()
def test_encoded_images_and_kept_logits_give_the_same():
    model = tiny_mgm(is_hd=True)
    text, images = text_with_images(model.config), pixels(model.config)
    logits = model(**text, **images).logits
    encoded = {"image": model.get_image_features(**images)}
    torch.testing.assert_close(model(**text, mm_encoder_outputs=encoded).logits, logits)
    torch.testing.assert_close(model(**text, **images, logits_to_keep=2).logits, logits[:, -2:])


@pytest.mark.parametrize("is_hd", [False, True])
@torch.no_grad()
def test_generation_with_a_cache_is_step_by_step(is_hd):
    model = tiny_mgm(is_hd)
    text, images = text_with_images(model.config), pixels(model.config)
    made = model.generate(**text, **images, max_new_tokens=6, do_sample=False, eos_token_id=63)
    ids = text["input_ids"]
    for _ in range(6):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize("text", [LlamaConfig(**TEXT), GemmaConfig(**TEXT, head_dim=8)], ids=["untied", "tied"])
@torch.no_grad()
def test_save_and_load_gives_equal_logits(tmp_path, text):
    model = tiny_mgm(is_hd=True, text=copy.deepcopy(text))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == text.tie_word_embeddings
    scale = model.config.image_feature_scale
    text, images = text_with_images(model.config), pixels(model.config)
    model.save_pretrained(tmp_path)
    loaded, info = MGMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**text, **images).logits, model(**text, **images).logits)
    assert loaded.config.image_feature_scale == scale


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_attention_of_the_whole_model_can_be_chosen_though_one_tower_has_none(tmp_path, attention):
    model = tiny_mgm()
    text, images = text_with_images(model.config), pixels(model.config)
    model.save_pretrained(tmp_path)
    loaded = MGMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention).eval()
    chosen = [part.config._attn_implementation for part in (loaded.model.language_model, loaded.model.vision_tower)]
    assert chosen == [attention] * 2
    torch.testing.assert_close(loaded(**text, **images).logits, model(**text, **images).logits)


def loss_and_gradients(model, text, images):
    model.zero_grad()
    loss = model(**text, **images, labels=text["input_ids"].masked_fill(text["input_ids"] == IMAGE, -100)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_size", [2, 192])
def test_checkpointing_gives_equal_gradients(chunk_size):
    model = tiny_mgm(is_hd=True, aux_drop_path=0.0, mining_chunk_size=chunk_size).train()
    text, images = text_with_images(model.config, (1, 1)), pixels(model.config, 2)
    loss, plain = loss_and_gradients(model, text, images)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.model.patch_info_mining.gradient_checkpointing
    again, recomputed = loss_and_gradients(model, text, images)
    assert again == pytest.approx(loss, rel=1e-6)
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_parameter_before_the_selected_layer_gets_a_gradient():
    model = tiny_mgm(is_hd=True).train()
    _, gradients = loss_and_gradients(model, text_with_images(model.config), pixels(model.config))
    without = {name for name, _ in model.named_parameters()} - gradients.keys()
    assert all(re.search(r"vision_tower\.(\S+\.layers\.2\.|\S*post_layernorm|layers\.2)", name) for name in without), (
        without
    )
    assert without


def test_frozen_towers_record_no_graph():
    model = tiny_mgm().train()
    for parameter in mgm_family.tower_parameters(model):
        parameter.requires_grad_(False)
    model.model.vision_tower_aux.embeddings.register_forward_hook(lambda *args: args[-1].requires_grad_(True))
    features = mgm_family.vision_features(model, pixels(model.config))
    assert not features.patches.requires_grad and not any(stage.requires_grad for stage in features.stages)
    assert mgm_family.image_embeds(model, features).requires_grad


def test_gemma_scales_image_features_like_its_words():
    gemma = GemmaConfig(**TEXT, head_dim=8)
    model = tiny_mgm(text=gemma)
    assert model.config.image_feature_scale == 32**0.5
    text, images = text_with_images(model.config), pixels(model.config)
    with torch.no_grad():
        # as Gemma was first published: one factor for everything that goes into the decoder
        rows = model.get_input_embeddings().weight[text["input_ids"]].clone()
        rows[text["input_ids"] == IMAGE] = described_image_tokens(
            model, images["pixel_values"][0], images["high_res_pixel_values"][0]
        )
        hidden = model.model.language_model(inputs_embeds=rows * 32**0.5).last_hidden_state
        torch.testing.assert_close(model(**text, **images).logits, model.lm_head(hidden), rtol=1e-4, atol=1e-3)
        assert tiny_mgm(text=gemma, image_feature_scale=1.0).config.image_feature_scale == 1.0


@pytest.mark.parametrize("drop", [0.0, 0.9])
@torch.no_grad()
def test_paths_are_dropped_in_training_mode_only_and_only_if_asked(drop):
    model = tiny_mgm(aux_drop_path=drop)
    images = pixels(model.config, 4)
    first, second = (mgm_family.vision_features(model, images).stages[-1] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (mgm_family.vision_features(model, images).stages[-1] for _ in range(2))
    assert torch.equal(first, second) == (drop == 0)


@pytest.mark.parametrize(
    ("count", "message"), [(0, "the text has 0 image tokens, the images make 4"), (2, "has 8 image tokens")]
)
def test_other_numbers_of_placeholders_are_refused_with_both_counts(count, message):
    model = tiny_mgm()
    with pytest.raises(ValueError, match=message):
        model(**text_with_images(model.config, (count,)), **pixels(model.config))


def test_wrong_inputs_are_refused():
    model = tiny_mgm()
    text, images = text_with_images(model.config), pixels(model.config)
    with pytest.raises(ValueError, match="belong together"):
        model(**text, pixel_values=images["pixel_values"])
    with pytest.raises(ValueError, match=r"pixel_values has shape \(1, 3, 28, 28\)"):
        model(**text, **{**images, "pixel_values": images["pixel_values"][0]})
    with pytest.raises(ValueError, match=r"high_res_pixel_values has shape \(1, 3, 32, 64\)"):
        model(**text, **{**images, "high_res_pixel_values": images["high_res_pixel_values"][:, :, :32]})
    full = tiny_mgm(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="5 patches of an image, not 2 squared"):
        full.get_image_features(**images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high_res_size": 96}, None),
        ({"high_res_size": 72}, "multiple of 32"),
        ({"high_res_size": 32, "image_grid": 8}, "multiple of 64"),
        ({"image_global": True}, "image_grid=1 with image_global=True"),
        ({"vision_config": {"image_size": 30}}, "image_size 30, patch_size 14.*multiple of patch_size"),
        ({"vision_config": {"image_size": 42}}, "image_size 42.*high_res_size 64.*multiple of 12"),
    ],
)
def test_towers_that_do_not_fit_are_refused(options, message):
    vision = CLIPVisionConfig(**VISION | options.pop("vision_config", {}))
    aux = ConvNextConfig(**mgm_family.TINY_AUX)

    def build():
        return MGMConfig(
            text_config=LlamaConfig(**TEXT), vision_config=vision, aux_config=aux, **{"high_res_size": 64, **options}
        )

    if message is None:
        assert build().num_image_tokens == 4
    else:
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize(("is_hd", "num_tokens", "map_side"), [(False, 576, 192), (True, 2880, 384)])
@torch.no_grad()
def test_released_sizes_fit_together(is_hd, num_tokens, map_side):
    options = {"image_grid": 2, "image_global": True, "high_res_size": 1536} if is_hd else {}
    config = MGMConfig(text_config=LlamaConfig(**TEXT), mining_chunk_size=10**6, **options)
    with torch.device("meta"):
        model = MGMForConditionalGeneration(config).eval()
        high_res = 1536 if is_hd else 768
        features = model.model.encode_images(
            torch.empty(1, 5 if is_hd else 1, 3, 336, 336), torch.empty(1, 3, high_res, high_res)
        )
        embeds = model.model.embed_images(features)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert features.patches.shape == (1, 5 if is_hd else 1, 576, 1024)
    assert [tuple(stage.shape[1:]) for stage in features.stages] == [
        (c, map_side >> k, map_side >> k) for k, c in enumerate([192, 384, 768, 1536])
    ]
    assert embeds.shape == (1, num_tokens, 32) and config.num_image_tokens == num_tokens
    mining = {name: tuple(p.shape) for name, p in model.model.patch_info_mining.named_parameters()}
    assert mining["query_proj.weight"] == (1024, 1024)
    assert mining["key_proj.weight"] == mining["value_proj.weight"] == (1024, 2880)
    assert mining["key_norm.weight"] == mining["value_norm.bias"] == (2880,)
    assert model.model.vision_tower_aux.encoder.stages[2].layers[26].pwconv1.weight.shape == (3072, 768)


def test_lora_targets_hit_the_language_model_only():
    model = tiny_mgm()
    hit = [name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    assert len(hit) == 2 * 7 and all(name.startswith("model.language_model.") for name in hit)


def test_an_adapter_holds_projector_and_mining(tmp_path):
    model = tiny_mgm()
    add_lora(model, r=2, alpha=4, dropout=0.0).save_pretrained(tmp_path)
    saved = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name}
    assert {name.removeprefix("base_model.model.model.").split(".")[0] for name in saved} == {
        "multi_modal_projector",
        "patch_info_mining",
    }
    assert len(saved) == 4 + 12


def test_a_step_runs_the_towers_once_for_both_passes():
    assert FAMILIES["mgm"] is mgm_family
    model = tiny_mgm(aux_drop_path=0.9).train()
    attach_step(model)
    calls = []
    for tower in (model.model.vision_tower, model.model.vision_tower_aux):
        tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    text = text_with_images(model.config, (1, 2))
    labels = text["input_ids"].clone()
    labels[:, :-6] = -100
    batch = {**text, "labels": labels, **pixels(model.config, 3)}
    result = model(step=StepOptions(head=Head(), weighting=STRATEGIES["cal"]), **batch)
    assert sorted(calls) == ["CLIPVisionModel", "ConvNextModel"]
    assert result["delta"].abs().max() > 0
    result["loss_sum"].backward()
    assert model.model.patch_info_mining.key_proj.weight.grad.abs().max() > 0


def test_blank_images_go_through():
    model = tiny_mgm(is_hd=True)
    features = mgm_family.vision_features(model, mgm_family.blank_images(model))
    assert mgm_family.image_embeds(model, features).shape == (20, 32)
