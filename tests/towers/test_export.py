"""The exported folder in a fresh process of plain transformers, and in `compose`."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from cal_train.models.compose import compose
from cal_train.testing import TINY_VISION_TOWERS, tiny_pairs, tiny_tokenizer, tiny_two_tower
from cal_train.towers.export import export_tower, exported_encoder, square_image_processor
from cal_train.towers.loading import load_tower
from cal_train.towers.two_tower import TwoTower
from cal_train.towers.vision import VisionTower, vision_encoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
KINDS = ["clip", "siglip", "dinov2"]
FRESH_PROCESS = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
torch.set_num_threads(1)
pixels, found = torch.load(sys.argv[1], weights_only=True), {}
for folder in sys.argv[3:]:
    AutoImageProcessor.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found[type(model).__name__] = model.eval()(pixels, output_hidden_states=True).hidden_states
torch.save(found, sys.argv[2])
assert "cal_train" not in sys.modules
"""


def trained(kind="clip", **options):
    """Towers whose weights are far enough from their start that a lost one would show."""
    towers = tiny_two_tower(kind, **options)
    with torch.no_grad():
        for parameter in towers.vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return towers.eval()


def processor():
    return square_image_processor(16, MEAN, STD)


@pytest.fixture
def checkpoint(tmp_path):
    def write(towers):
        folder = tmp_path / "checkpoint"
        towers.save_pretrained(folder)
        processor().save_pretrained(folder / "vision")
        return folder

    return write


def test_a_fresh_process_of_plain_transformers_computes_the_same_tokens(tmp_path):
    towers = {
        "CLIPVisionModel": trained("clip"),
        "SiglipVisionModel": trained("siglip"),
        "Dinov2Model": trained("dinov2"),
    }
    pixels = tiny_pairs(towers["Dinov2Model"].shape)["pixel_values"]
    torch.save(pixels, tmp_path / "pixels.pt")
    folders = [export_tower(tower, tmp_path / name, processor()) for name, tower in towers.items()]
    arguments = [tmp_path / "pixels.pt", tmp_path / "found.pt", *folders]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == towers.keys()
    for name, tower in towers.items():
        encoder = tower.vision.encoder
        with torch.no_grad():
            expected = encoder(pixels, output_hidden_states=True).hidden_states
            for ours, theirs in zip(found[name], expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            norm = encoder.layernorm if name == "Dinov2Model" else encoder.post_layernorm
            patches = norm(found[name][-1])[:, 0 if name == "SiglipVisionModel" else 1 :]
            torch.testing.assert_close(patches, tower(pixels).patch_tokens, rtol=0, atol=1e-5)


def test_towers_in_memory_export_as_their_folder_does(checkpoint, tmp_path):
    towers = trained()
    export_tower(checkpoint(towers), tmp_path / "from_folder")
    export_tower(towers.train(), tmp_path / "from_memory", processor())
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "from_folder" / name).read_bytes() == (tmp_path / "from_memory" / name).read_bytes(), name
    assert towers.training, "the towers of a running training stay as they were"


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_the_first_mixture_token_stays_and_the_log_says_that_the_others_do_not(kind, checkpoint, tmp_path, caplog):
    towers = trained(kind, num_mixture_tokens=4)
    with caplog.at_level(logging.WARNING):
        exported = load_tower(export_tower(checkpoint(towers), tmp_path / "out"))
    for name, value in towers.vision.encoder.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name
    assert "3 of 4 mixture tokens dropped" in caplog.text
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm = exported.layernorm if kind == "dinov2" else exported.post_layernorm
        patches = norm(exported(pixels, output_hidden_states=True).hidden_states[-1])[:, 1:]
        trained_patches = towers(pixels).patch_tokens
    share = float((patches - trained_patches).norm() / trained_patches.norm())
    assert share > 0.001
    assert f"by {100 * share:.1f} % of their norm" in caplog.text


def test_exporting_leaves_the_towers_as_they_are():
    towers = trained(num_mixture_tokens=4)
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    exported_encoder(towers.vision)
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())


def test_one_mixture_token_exports_without_a_difference(checkpoint, tmp_path, caplog):
    towers = trained(num_mixture_tokens=1)
    exported = load_tower(export_tower(checkpoint(towers), tmp_path / "out"))
    assert "dropped" not in caplog.text
    for name, value in towers.vision.encoder.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_activation_travels(act, tmp_path):
    encoder = vision_encoder({**TINY_VISION_TOWERS["clip"], "hidden_act": act})
    towers = TwoTower(VisionTower(encoder), tiny_two_tower().text)
    exported = load_tower(export_tower(towers, tmp_path / "out", processor()))
    assert exported.config.hidden_act == act
    assert type(exported.encoder.layers[0].mlp.activation_fn) is type(encoder.encoder.layers[0].mlp.activation_fn)


def test_the_image_processor_travels(checkpoint, tmp_path):
    folder = export_tower(checkpoint(trained()), tmp_path / "out")
    image = Image.fromarray(np.full((20, 30, 3), 255, dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 16, 16)
    expected = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(pixels[0, :, 3, 5], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compose_takes_the_exported_tower(kind, checkpoint, tmp_path):
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    towers = trained(kind)
    tower = export_tower(checkpoint(towers), tmp_path / "tower")
    vlm = compose(tmp_path / "llm", tower, tmp_path / "vlm", template="vicuna_v1")
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    pixels = tiny_pairs(towers.shape)["pixel_values"]
    with torch.no_grad():
        ours = model.model.vision_tower.eval().float()(pixels, output_hidden_states=True).hidden_states[-2]
        theirs = towers.vision.encoder(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_refuses_an_output_that_is_not_empty(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export_tower(trained(), tmp_path, processor())


def test_refuses_to_guess_the_image_processor(tmp_path):
    towers = trained()
    towers.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        export_tower(tmp_path / "checkpoint", tmp_path / "out")
    with pytest.raises(ValueError, match="pass image_processor"):
        export_tower(towers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_an_image_processor_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="the tower takes 16 pixels"):
        export_tower(trained(), tmp_path / "out", square_image_processor(32, MEAN, STD))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_computes_something_else_is_not_kept(tmp_path):
    towers = trained()
    towers.vision.encoder.config.hidden_act = "relu"  # built with quick_gelu
    with pytest.raises(ValueError, match="patch tokens differ"):
        export_tower(towers, tmp_path / "out", processor())
    assert not (tmp_path / "out").exists()
