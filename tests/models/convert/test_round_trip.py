"""Both directions: nothing is lost, and Hugging Face folders get the names that other programs read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from cal_train.models.convert.run import convert
from cal_train.testing import write_tiny_vlm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:4]
    assert not [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("family", "projector"),
    [("llava", "mlp2x_gelu"), ("llava", "linear"), ("llava", "identity"), ("llava_next", "mlp2x_gelu")],
)
def test_an_original_checkpoint_returns_bit_for_bit(tiny, tmp_path, family, projector):
    original = tiny.make_original(projector, family)
    source = tiny.write_original(tmp_path / "source", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "hf", vision_tower=str(tower), pad_vocabulary_to=64)
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert_equal_bits(weights(source), weights(tmp_path / "back"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == original.config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert tokenizer.special_tokens_map == original.tokenizer.special_tokens_map


def test_a_half_precision_checkpoint_returns_bit_for_bit(tiny, tmp_path):
    original = tiny.make_original()
    state = {name: value.bfloat16() for name, value in original.state().items()}
    original.config["torch_dtype"] = "bfloat16"
    source = tiny.write_original(tmp_path / "source", original, state)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "hf", vision_tower=str(tower))
    convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert_equal_bits(weights(source), weights(tmp_path / "back"))


def test_a_trained_identity_layer_is_not_thrown_away(tiny, tmp_path):
    original = tiny.make_original("linear")
    source = tiny.write_original(tmp_path / "source", original)
    convert(source, tmp_path / "hf", vision_tower=str(tiny.write_tower(tmp_path / "tower", original.tower)))
    state = weights(tmp_path / "hf")
    state["multi_modal_projector.linear_2.weight"][0, 1] = 0.5
    save_file(state, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained since"):
        convert(tmp_path / "hf", tmp_path / "back", to="original")


def tiny_hf(folder: Path, tiny) -> tuple[Path, Path]:
    """Write a model that never was an original one, as `compose` or training leaves it, and its tower."""
    source = write_tiny_vlm(folder / "hf", vocab_size=448)
    model = AutoModelForImageTextToText.from_pretrained(source)
    return source, tiny.write_tower(folder / "tower", model.model.vision_tower)


def test_a_model_of_ours_returns_bit_for_bit_from_the_original_layout(tiny, tmp_path):
    source, tower = tiny_hf(tmp_path, tiny)
    with pytest.raises(ValueError, match="--vision_tower"):
        convert(source, tmp_path / "original", to="original")
    convert(source, tmp_path / "original", to="original", vision_tower="zoo/tower")
    config = json.loads((tmp_path / "original/config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["mm_vision_tower"] == "zoo/tower"
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["image_aspect_ratio"] == "square"
    assert config["num_hidden_layers"] == 2 and config["num_key_value_heads"] == 2 and config["vocab_size"] == 448
    convert(tmp_path / "original", tmp_path / "back", vision_tower=str(tower), template="vicuna_v1")
    ours, back = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (source, tmp_path / "back"))
    assert_equal_bits(ours.state_dict(), back.state_dict())
    assert ours.config.image_token_id == back.config.image_token_id
    before, after = (AutoProcessor.from_pretrained(folder, backend="pil") for folder in (source, tmp_path / "back"))
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert before.chat_template == after.chat_template


ORIGINAL_NAME = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^vision_tower\.(vision_model\.)?": "model.vision_tower.vision_tower.vision_model.",
    r"^multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
}


def test_the_original_layout_has_exactly_the_original_names(tiny, tmp_path):
    source, _ = tiny_hf(tmp_path, tiny)
    convert(source, tmp_path / "original", to="original", vision_tower="zoo/tower")
    expected = {}
    for name, value in weights(source).items():
        new = [re.sub(pattern, start, name) for pattern, start in ORIGINAL_NAME.items() if re.match(pattern, name)]
        assert len(new) == 1, name
        expected[new[0]] = value
    assert_equal_bits(weights(tmp_path / "original"), expected)


SPELLINGS = {
    "saved by transformers 5": {},
    "llava-hf": {r"^vision_tower\.": "vision_tower.vision_model."},
    "doubled under ZeRO-3": {
        r"^language_model\.model\.": "language_model.model.model.",
        r"^vision_tower\.": "vision_tower.vision_model.",
    },
    "names in memory": {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head\.": "lm_head.",
        r"^vision_tower\.": "model.vision_tower.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_names_becomes_llava_hf_names(tiny, tmp_path, spelling):
    source, _ = tiny_hf(tmp_path, tiny)
    plain = weights(source)
    spelled = {}
    for name, value in plain.items():
        for pattern, start in SPELLINGS[spelling].items():
            if re.match(pattern, name):
                name = re.sub(pattern, start, name)
                break
        spelled[name] = value
    save_file(spelled, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    canonical = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): v for name, v in plain.items()}
    assert_equal_bits(weights(tmp_path / "out"), canonical)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    embedding = model.model.vision_tower.embeddings.class_embedding
    assert torch.equal(embedding, plain["vision_tower.embeddings.class_embedding"])
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")


def test_two_spellings_of_one_weight_are_refused(tiny, tmp_path):
    source, _ = tiny_hf(tmp_path, tiny)
    state = weights(source)
    state["model.language_model.norm.weight"] = state["language_model.model.norm.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="second weight"):
        convert(source, tmp_path / "out")


def test_another_dtype_is_written_into_weights_and_configuration(tiny, tmp_path):
    source, _ = tiny_hf(tmp_path, tiny)
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_options_of_the_other_direction_are_refused(tiny, tmp_path):
    source, _ = tiny_hf(tmp_path, tiny)
    with pytest.raises(ValueError, match="--template"):
        convert(source, tmp_path / "out", template="chatml")
