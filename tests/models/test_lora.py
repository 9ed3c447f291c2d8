import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from cal_train.models.lora import add_lora, load_adapter_strictly, merge
from cal_train.models.parts import freeze
from cal_train.testing import tiny_llava, write_tiny_vlm


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("lora") / "base")


def batch(model):
    image_token = model.config.image_token_id
    input_ids = torch.tensor([[1, *[image_token] * 4, 20, 21, 22, 23]])
    pixel_values = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values}


def write_adapter(base, folder, **options):
    """Save an adapter whose matrices and projector are far from their start; return it with the model's logits."""
    model = add_lora(AutoModelForImageTextToText.from_pretrained(base), r=4, alpha=8, dropout=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model.eval()(**batch(model)).logits


def test_adapters_sit_on_every_linear_layer_of_the_language_model_and_nowhere_else():
    model = tiny_llava(num_layers=2)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name and "lm_head" not in name
    }
    assert len(linear) == 2 * 7
    assert set(add_lora(model, r=2, alpha=4, dropout=0.0).targeted_module_names) == linear


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (r".*\.q_proj", "vision_tower"),
        (r".*language_model.*\.query", "matches no module"),
        (r".*language_model.*mlp", "not a linear layer"),
        (r".*(lm_head|language_model.*q_proj)", "lm_head"),
        (r".*(multi_modal_projector\.linear_1|language_model.*q_proj)", "multi_modal_projector"),
    ],
)
def test_expressions_that_miss_the_language_model_are_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0, target_modules=expression)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_llava(), r=2, alpha=4, dropout=0.0)
        freeze(model, "finetune", {"projector": False})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.normal_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(**batch(model)).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".lora_" in name})
    plain, checkpointed = gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_merged_folder_computes_what_the_adapter_computed(base, tmp_path):
    adapter, expected = write_adapter(base, tmp_path / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(merge(adapter, tmp_path / "merged")).eval()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "modules_to_save" in name]
    with torch.no_grad():
        logits = merged(**batch(merged)).logits
        plain = AutoModelForImageTextToText.from_pretrained(base).eval()
        untrained = plain(**batch(merged)).logits
    for ours, theirs in zip(
        merged.model.multi_modal_projector.parameters(), plain.model.multi_modal_projector.parameters(), strict=True
    ):
        assert not torch.allclose(ours, theirs)  # the projector travels inside the adapter
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - untrained).abs().max() > 0.1 * expected.abs().max()


def test_merged_dora_computes_what_the_adapter_computed_and_is_not_lora(base, tmp_path):
    adapter, expected = write_adapter(base, tmp_path / "adapter", use_dora=True)
    assert any("magnitude" in name for name in load_file(adapter / "adapter_model.safetensors"))
    merged = AutoModelForImageTextToText.from_pretrained(merge(adapter, tmp_path / "merged"))
    _, lora = write_adapter(base, tmp_path / "lora")
    assert (logits_of(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (lora - expected).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def logits_of(model):
    return model.eval()(**batch(model)).logits


def test_an_adapter_is_loaded_whole_or_not_at_all(base, tmp_path):
    adapter, expected = write_adapter(base, tmp_path / "adapter")
    model = add_lora(AutoModelForImageTextToText.from_pretrained(base), r=4, alpha=8, dropout=0.1)
    load_adapter_strictly(model, adapter)
    assert torch.equal(logits_of(model), expected)

    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    broken = {
        rf"lacks 1 of .*{name}": {key: value for key, value in weights.items() if key != name},
        r"holds 1 weights .*extra": weights | {"extra": torch.zeros(1)},
        "does not fit the adapter": weights | {name: torch.zeros(3, 3)},
    }
    for message, content in broken.items():
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_adapter_strictly(model, adapter)
        if "lacks" in message:
            with pytest.raises(ValueError, match=message):
                merge(adapter, tmp_path / "merged")
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_adapter_strictly(model, adapter)


def test_tied_embeddings_stay_tied_through_a_merge(tmp_path):
    base = write_tiny_vlm(tmp_path / "base", tie_word_embeddings=True)
    adapter, expected = write_adapter(base, tmp_path / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(merge(adapter, tmp_path / "merged")).eval()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    with torch.no_grad():
        assert (merged(**batch(merged)).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_merged_folder_has_the_processor_and_stop_tokens_that_were_trained(base, tmp_path):
    adapter, _ = write_adapter(base, tmp_path / "adapter")
    plain = AutoProcessor.from_pretrained(merge(adapter, tmp_path / "plain"))
    assert "USER: " in plain.chat_template
    processor = AutoProcessor.from_pretrained(base, backend="pil")
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.image_processor.do_pad = True
    processor.save_pretrained(adapter)
    GenerationConfig(eos_token_id=[2, 6]).save_pretrained(adapter)
    folder = merge(adapter, tmp_path / "trained")
    trained = AutoProcessor.from_pretrained(folder)
    assert trained.chat_template == "{{ messages[0]['content'] }}"
    assert trained.image_processor.do_pad
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 6]


def test_a_moved_base_is_named_and_can_be_given(base, tmp_path):
    adapter, _ = write_adapter(base, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match=r"gone .*--base"):
        merge(adapter, tmp_path / "merged")
    assert (merge(adapter, tmp_path / "merged", base) / "model.safetensors").is_file()


def test_wrong_folders_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json is missing"):
        merge(base, tmp_path / "merged")
    adapter, _ = write_adapter(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="not an empty folder"):
        merge(adapter, base)


@pytest.mark.slow
def test_a_fresh_process_needs_neither_peft_nor_this_package(base, tmp_path, fresh_logits):
    adapter, expected = write_adapter(base, tmp_path / "adapter")
    logits = fresh_logits(merge(adapter, tmp_path / "merged"), batch(tiny_llava()))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
