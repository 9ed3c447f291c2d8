"""`compose` for LLaVA-NeXT and MGM: every weight comes from its part, and the folder is a model of its family."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cal_train.cli.main import main
from cal_train.models.compose import compose
from cal_train.testing import tiny_configs, tiny_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a language model, of a CLIP, a SigLIP and a ConvNeXt tower."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text, vision = tiny_configs(tokenizer)
    tokenizer.save_pretrained(root / "llm")
    LlamaForCausalLM(text).save_pretrained(root / "llm")
    CLIPVisionModel(vision).save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        root / "clip"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(root / "siglip")
    SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5] * 3).save_pretrained(root / "siglip")
    aux = ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_scale_init_value=0.5)
    ConvNextModel(aux).save_pretrained(root / "convnext")
    aux.hidden_act = "relu"
    ConvNextModel(aux).save_pretrained(root / "convnext_relu")
    return root


def assert_part(whole, prefix, part, ignored=()):
    """Every weight of the part stands in the whole model; of the vocabulary the rows that the part has."""
    state = dict(whole.state_dict())
    for name, weight in part.state_dict().items():
        if name.startswith(ignored or ("\0",)):
            assert f"{prefix}.{name}" not in state
            continue
        assert torch.equal(state[f"{prefix}.{name}"][: len(weight)], weight), name


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_next_holds_its_parts_and_the_originals_grids(parts, tmp_path, tower):
    folder = compose(parts / "llm", parts / tower, tmp_path / "vlm", family="llava_next", seed=3)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.model_type == "llava_next"
    tower_class = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[tower]
    assert_part(model, "model.vision_tower", tower_class.from_pretrained(parts / tower))
    llm = LlamaForCausalLM.from_pretrained(parts / "llm")
    assert_part(model, "model.language_model", llm.model)
    assert_part(model, "lm_head", llm.lm_head)
    grids = [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]
    assert model.config.image_grid_pinpoints == grids
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert processor.image_processor.image_grid_pinpoints == grids
    if tower == "siglip":
        assert list(processor.image_processor.image_mean) == [0.5] * 3
        assert processor.vision_feature_select_strategy == "full"
    newline = model.model.image_newline
    assert 0.1 < float(newline.detach().std(correction=0)) * 32**0.5 < 2  # N(0, 1 / 32)
    again = compose(parts / "llm", parts / tower, tmp_path / "again", family="llava_next", seed=3)
    other = compose(parts / "llm", parts / tower, tmp_path / "other", family="llava_next", seed=4)
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(again).model.image_newline, newline)
    assert not torch.equal(AutoModelForImageTextToText.from_pretrained(other).model.image_newline, newline)


@pytest.mark.parametrize(("grid", "size", "num_tokens"), [(1, 64, 4), (2, 128, 20)])
def test_mgm_holds_its_parts(parts, tmp_path, grid, size, num_tokens):
    folder = compose(
        parts / "llm", parts / "clip", tmp_path / "vlm", family="mgm", aux_tower=parts / "convnext", image_grid=grid
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert_part(model, "model.vision_tower", CLIPVisionModel.from_pretrained(parts / "clip"))
    assert_part(model, "model.vision_tower_aux", ConvNextModel.from_pretrained(parts / "convnext"), ("layernorm.",))
    assert_part(model, "model.language_model", LlamaForCausalLM.from_pretrained(parts / "llm").model)
    assert (model.config.high_res_size, model.config.image_global) == (size, grid > 1)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert processor._get_num_multimodal_tokens([(50, 70)]).num_image_tokens == [num_tokens]


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_mgm_takes_the_second_tower_as_open_clip_publishes_it(parts, tmp_path, file):
    """The oracle is timm, whose ConvNeXt open_clip wraps."""
    timm = pytest.importorskip("timm", reason="comes with the bench extra")
    torch.manual_seed(1)
    theirs = timm.models.convnext.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 12, 16, 20), ls_init_value=0.5).eval()
    state = {f"visual.trunk.{name}": weight for name, weight in theirs.state_dict().items()}
    state["logit_scale"] = torch.ones(())
    (tmp_path / "aux").mkdir()
    (torch.save if file.endswith(".bin") else save_file)(state, tmp_path / "aux" / file)
    folder = compose(parts / "llm", parts / "clip", tmp_path / "vlm", family="mgm", aux_tower=tmp_path / "aux")
    ours = AutoModelForImageTextToText.from_pretrained(folder).model.vision_tower_aux.eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.stem(pixels)
        found = ours(pixels, output_hidden_states=True).hidden_states[1:]
        for stage, hidden in zip(theirs.stages, found, strict=True):
            expected = stage(expected)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "warns"),
    [
        ("preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, True),
        ("preprocessor_config.json", {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}, False),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, True),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}}, False),
        ("open_clip_config.json", {"model_cfg": {}}, False),
    ],
)
def test_towers_that_want_other_pixels_are_warned_of(parts, tmp_path, caplog, file, content, warns):
    aux = shutil.copytree(parts / "convnext", tmp_path / "aux")
    (aux / file).write_text(json.dumps(content))
    compose(parts / "llm", parts / "clip", tmp_path / "vlm", family="mgm", aux_tower=aux)
    warned = [record.getMessage() for record in caplog.records if "take two towers that agree" in record.getMessage()]
    assert len(warned) == warns


def test_a_tower_folder_that_does_not_exist_is_named(parts, tmp_path):
    with pytest.raises(ValueError, match=r"vision tower .*nowhere is not a folder"):
        compose(parts / "llm", parts / "nowhere", tmp_path / "vlm")


def test_the_command_line_takes_family_and_grids(parts, tmp_path):
    grids = [[28, 56], [56, 56]]
    arguments = ["--llm", parts / "llm", "--vision_tower", parts / "clip", "--output", tmp_path / "vlm"]
    arguments += ["--family", "llava_next", "--grid_pinpoints", json.dumps(grids)]
    assert main(["compose", *map(str, arguments)]) == 0
    assert json.loads((tmp_path / "vlm" / "config.json").read_text())["image_grid_pinpoints"] == grids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "mgm"}, "needs an auxiliary tower"),
        ({"family": "llava", "aux_tower": "convnext"}, "aux_tower does not apply to family 'llava'"),
        ({"family": "llava", "grid_pinpoints": [[56, 28]]}, "grid_pinpoints does not apply"),
        ({"family": "llava_next", "image_grid": 2}, "image_grid does not apply"),
        ({"family": "llava_next", "image_aspect_ratio": "pad"}, "image_aspect_ratio=pad does not apply"),
        ({"family": "llava_next", "grid_pinpoints": [[50, 28]]}, r"grid pinpoint \[50, 28\]"),
        ({"family": "mgm", "aux_tower": "clip"}, "'clip_vision_model': MGM reads a ConvNeXt"),
        ({"family": "mgm", "aux_tower": "convnext_relu"}, "hidden_act 'relu'"),
        ({"family": "llava_next", "vision_feature_layer": 5}, "vision_feature_layer 5 does not exist"),
    ],
)
def test_options_that_a_family_does_not_read_are_refused(parts, tmp_path, options, message):
    if "aux_tower" in options:
        options = options | {"aux_tower": parts / options["aux_tower"]}
    with pytest.raises(ValueError, match=message):
        compose(parts / "llm", parts / "clip", tmp_path / "vlm", **options)
    assert not (tmp_path / "vlm").exists()
