import json

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from cal_train.models.lora import add_lora, merge
from cal_train.models.parts import count_parameters, freeze
from cal_train.models.quantize import check_quantized, keep_layout, quantization_settings, write_quantization
from cal_train.testing import write_tiny_vlm

CLASSES = {"nf4": Linear4bit, "int8": Linear8bitLt}
SCALE = 8 / 4  # alpha / r of `adapted`


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlms")
    folders = {family: write_tiny_vlm(root / family, family=family) for family in ("llava", "llava_next", "mgm")}
    return folders | {"wide": write_tiny_vlm(root / "wide", hidden_size=64)}


def load(folder, kind, skipped=None, **options):
    settings = quantization_settings(AutoConfig.from_pretrained(folder), kind, **options)
    if skipped is not None:
        settings.llm_int8_skip_modules = skipped
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    )
    keep_layout(model)
    return model


def adapted(model, **options):
    """LoRA whose matrices and projector are far from their start."""
    wrapped = add_lora(model, r=4, alpha=8, dropout=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_A" in name or ".lora_B" in name or ".modules_to_save." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def batch_of(model):
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 20, 21, 22, 23]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model):
    return model.eval()(**batch_of(model)).logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "mgm"])
def test_every_linear_layer_of_the_decoder_is_quantised_and_nothing_else(folders, family, kind):
    model, plain = load(folders[family], kind), AutoModelForImageTextToText.from_pretrained(folders[family])
    decoder = model.model.language_model
    linear = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 2 * 7
    for name, module in model.named_modules():
        if id(module) in linear:
            assert type(module) is CLASSES[kind], name
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            assert type(module) is type(plain.get_submodule(name)), name
            assert module.weight.dtype == torch.float32, name
    assert check_quantized(model) == 14


def test_a_skip_list_of_short_names_is_noticed(folders):
    """What makes a list of full names necessary: this one looks right and is not."""
    model = load(folders["llava"], "nf4", skipped=["vision_tower", "multi_modal_projector", "lm_head"])
    assert isinstance(model.model.vision_tower.encoder.layers[0].mlp.fc1, Linear4bit)
    with pytest.raises(ValueError, match="outside the language model were quantised"):
        check_quantized(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_parameters_are_counted_as_if_they_were_whole(folders, kind):
    plain = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    quantized = load(folders["llava"], kind)
    freeze(plain, "pretrain")
    freeze(quantized, "pretrain")
    assert count_parameters(quantized) == count_parameters(plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_pass_without_gradients_in_eval_mode_changes_neither_weights_nor_gradients(folders, kind):
    """As the pass without images is run in every step; see `keep_layout` for what happens to nf4 on some CPUs."""
    model = add_lora(load(folders["wide"], kind), r=4, alpha=8, dropout=0.0)
    freeze(model, "finetune")
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj"

    def gradients():
        model.zero_grad()
        model.train()(**batch_of(model)).logits.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert sum("lora_B" in name and bool(grad.abs().max() > 0) for name, grad in grads.items()) == 14
        return grads

    before, weight = gradients(), model.get_submodule(name).base_layer.weight.data.clone()
    logits_of(model)
    after = gradients()
    assert torch.equal(model.get_submodule(name).base_layer.weight.data, weight)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_double_quantisation_quantises_the_scales(folders):
    for use in (True, False):
        model = load(folders["llava"], "nf4", use_double_quant=use)
        weight = model.model.language_model.layers[0].mlp.up_proj.weight
        assert weight.quant_state.nested is use
        assert weight.quant_state.absmax.dtype == (torch.uint8 if use else torch.float32)


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 0.05)])
def test_merged_into_the_quantised_base_it_computes_what_the_training_computed(folders, tmp_path, kind, tolerance):
    """The products of int8 also round the activations to 8 bits, hence its tolerance."""
    model = adapted(load(folders["llava"], kind))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    write_quantization(model.get_base_model(), tmp_path / "adapter")
    folder = merge(tmp_path / "adapter", tmp_path / "merged", quantized_base=True)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    scale = expected.abs().max()
    assert (logits_of(merged) - expected).abs().max() <= tolerance * scale
    full = AutoModelForImageTextToText.from_pretrained(merge(tmp_path / "adapter", tmp_path / "full"))
    assert (logits_of(full) - expected).abs().max() > 5 * tolerance * scale or kind == "int8"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_both_merged_weights_are_base_plus_update(folders, tmp_path, kind):
    """By hand: B A alpha / r added to the stored weight, or to the weight after a round through bitsandbytes."""
    model = adapted(
        load(folders["llava"], kind, use_double_quant=False) if kind == "nf4" else load(folders["llava"], kind)
    )
    model.save_pretrained(tmp_path / "adapter")
    write_quantization(model.get_base_model(), tmp_path / "adapter")
    stem = "language_model.model.layers.1.mlp.up_proj"
    base = load_file(folders["llava"] / "model.safetensors")[f"{stem}.weight"]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    matrices = {side: next(w for n, w in adapter.items() if f"layers.1.mlp.up_proj.lora_{side}" in n) for side in "AB"}
    update = SCALE * matrices["B"] @ matrices["A"]
    if kind == "nf4":
        rounded = functional.dequantize_4bit(*functional.quantize_4bit(base, quant_type="nf4"))
    else:
        row_scale = base.abs().amax(1, keepdim=True)
        rounded = (base / row_scale * 127).round() * row_scale / 127
    for name, expected in (("full", base + update), ("rounded", rounded + update)):
        folder = merge(tmp_path / "adapter", tmp_path / name, quantized_base=name == "rounded")
        merged = load_file(folder / "model.safetensors")[f"{stem}.weight"]
        tolerance = 2e-3 if kind == "int8" and name == "rounded" else 1e-6  # int8 is rounded from float16
        assert (merged - expected).abs().max() <= tolerance * expected.abs().max()
    assert (rounded - base).abs().max() > 1e-3


def test_an_adapter_of_a_full_base_cannot_be_merged_into_a_quantised_one(folders, tmp_path):
    model = adapted(AutoModelForImageTextToText.from_pretrained(folders["llava"]))
    model.save_pretrained(tmp_path / "adapter")
    write_quantization(model.get_base_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="full precision"):
        merge(tmp_path / "adapter", tmp_path / "merged", quantized_base=True)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dora_on_a_quantised_base_learns_norms_in_full_precision(folders, kind):
    model = adapted(load(folders["llava"], kind), use_dora=True)
    freeze(model, "finetune")
    norms = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
    assert len(norms) == 14
    assert all(norm.requires_grad and norm.dtype == torch.float32 for norm in norms.values())
    model.train()(**batch_of(model)).logits.square().mean().backward()
    assert all(norm.grad is not None and norm.grad.abs().max() > 0 for norm in norms.values())


def test_without_bitsandbytes_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setattr("cal_train.models.quantize.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"cal_train\[qlora\]"):
        quantization_settings(AutoConfig.from_pretrained(folders["llava"]), "nf4")
