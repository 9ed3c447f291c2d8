from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from cal_train.cli.estimate import largest_image
from cal_train.cli.main import main
from cal_train.models.flops import Work, count_vision_flops, meta_model, model_flops, peak_flops
from cal_train.models.parts import freeze
from cal_train.testing import tiny_llava, write_tiny_data, write_tiny_vlm
from cal_train.train.estimate import Setting, _static_bytes


@pytest.fixture(scope="module")
def llava_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    return LlavaConfig(vision_config=vision, text_config=text)


@pytest.fixture
def recipe(tmp_path):
    vlm, data = write_tiny_vlm(tmp_path / "vlm"), write_tiny_data(tmp_path / "data")
    (vlm / "model.safetensors").unlink()  # only the configuration is needed
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: {vlm}\ndata_path: {data}\nimage_folder: {data.parent / 'images'}\n")
    path.write_text(path.read_text() + f"output_dir: {tmp_path / 'run'}\ncal: true\nbf16: true\n")
    return path


def test_operations_of_llava_15_are_those_known(llava_7b):
    """ViT-L/14 at 336 px: 191 G multiply-adds. CAL over plain at 576 + 150 tokens: about 1 + 150 / 726 / 3 = 1.069."""
    vision = count_vision_flops(llava_7b)
    assert vision == pytest.approx(2 * 191e9, rel=0.01)
    model = meta_model(llava_7b)
    freeze(model, "finetune")
    flops = model_flops(model, Work([726], [150], 1, 100), vision, "remove")
    assert flops["language_model"] == pytest.approx(3 * 2 * 6.476e9 * 726, rel=0.03)  # without embedding and head
    assert sum(flops.values()) / (sum(flops.values()) - flops["cal"]) == pytest.approx(1.069, abs=0.004)
    assert model_flops(model, Work([726], [150], 1, 100), vision)["cal"] == 0


def test_the_peak_of_an_unknown_device_is_not_made_up():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("Intel Xeon") is None


@pytest.mark.parametrize(
    ("engine", "per_weight"),
    [
        ("ddp", (2.0, 4.0, 8.0)),
        ("zero1", (2.0, 2.0, 12 / 4)),
        ("zero2", (2.0, 2 / 4, 12 / 4)),
        ("zero3", (2 / 4, 2 / 4, 12 / 4)),
        ("zero3_offload", (0.0, 0.0, 0.0)),
    ],
)
def test_weights_gradients_and_states_are_split_as_zero_says(engine, per_weight):
    """Bytes per weight in bfloat16 on 4 devices: Rajbhandari et al. 2020, arXiv:1910.02054, section 3; DDP by hand."""
    from cal_train.conf import ModelArguments
    from cal_train.models.parts import count_parameters

    model = tiny_llava()
    freeze(model, "finetune", {"vision_tower": True})
    model.requires_grad_(True)
    setting = Setting(engine, 4, torch.bfloat16, True, False, "adamw_torch", 1, 8, Work([8], [4], 1, 2), None)
    parts = _static_bytes(model, count_parameters(model), 0, ModelArguments(model_name_or_path=""), setting)
    total = sum(parameter.numel() for parameter in model.parameters())
    found = [parts[name] / total for name in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx(per_weight)


def test_a_recipe_is_estimated_without_weights_and_its_data_is_measured(recipe, capsys):
    assert main(["estimate", str(recipe), "--gpus", "2", "--gpu_memory_gib", "80", "--rows", "16"]) == 0
    printed = capsys.readouterr().out
    assert "3 image +" in printed or "4 image +" in printed  # 12 of 16 rows have one image of 4 tokens
    for words in ("measured on 16 rows", "activations with activation_checkpointing", "stock Trainer", "CAL (remove)"):
        assert words in printed, words
    assert main(["estimate", str(recipe), "--gpus", "2", "--gpu_memory_gib", "0.00001"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_without_data_an_image_is_assumed_to_have_all_its_tiles(tmp_path, llava_7b, capsys):
    """Published counts: 576 (LLaVA-1.5), at most 2,928 (LLaVA-NeXT), 2,880 (Mini-Gemini-HD)."""
    llava_next = LlavaNextConfig(vision_config=llava_7b.vision_config, text_config=llava_7b.text_config)
    mgm = SimpleNamespace(vision_config=llava_7b.vision_config, image_grid=1)
    assert [largest_image(llava_7b), largest_image(llava_next)] == [576, 2928]
    assert [largest_image(mgm), largest_image(mgm, 2)] == [576, 2880]
    vlm, path = write_tiny_vlm(tmp_path / "vlm", family="mgm"), tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: {vlm}\ndata_path: nowhere.json\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["estimate", str(path)]) == 0
    assert "assumed" in capsys.readouterr().out


def test_wrong_arguments_are_refused(recipe, capsys):
    for more, message in (
        (("--model_name_or_path", "nowhere"), "holds no config.json"),
        (("--gpus", "0"), "at least 1"),
        (("--config_file", "nowhere.yaml"), "no launcher settings"),
    ):
        assert main(["estimate", str(recipe), *more]) == 2
        assert message in capsys.readouterr().err
