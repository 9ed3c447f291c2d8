"""Original checkpoint folders become models that compute the same."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig

from cal_train.models.convert.run import convert
from cal_train.models.convert.towers import KNOWN_TOWERS, known_name
from cal_train.models.convert.vocabulary import find_template

BEFORE, AFTER = [1, 20, 30, 40], [50, 60, 70, 80, 90]


def load(folder: Path):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.no_grad()
def converted_logits(folder: Path, num_tokens: int, **vision) -> torch.Tensor:
    """Return the logits of the converted model for the sequence of the oracle."""
    model = load(folder)
    ids = torch.tensor([[*BEFORE, *[model.config.image_token_id] * num_tokens, *AFTER]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).logits[0]


def assert_same(ours: torch.Tensor, oracle: torch.Tensor) -> None:
    difference = float((ours[:, : oracle.shape[1]] - oracle).abs().max())
    assert difference < 2e-5 * float(oracle.abs().max()), difference


def one_image(tiny, side: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, side or tiny.side, side or tiny.side, generator=generator)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "identity"])
@pytest.mark.parametrize("shards", [0, 3])
def test_llava_computes_what_its_parts_compute(tiny, tmp_path, projector, shards):
    original = tiny.make_original(projector)
    source = tiny.write_original(tmp_path / "source", original, shards=shards)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "out", vision_tower=str(tower))
    pixels = one_image(tiny)
    oracle = original.logits(BEFORE, original.features(pixels)[0], AFTER)
    assert_same(converted_logits(tmp_path / "out", 4, pixel_values=pixels), oracle)


def test_the_processor_carries_image_recipe_template_and_new_tokens(tiny, tmp_path):
    original = tiny.make_original()
    source = tiny.write_original(tmp_path / "source", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    report = convert(source, tmp_path / "out", vision_tower=str(tower), pad_vocabulary_to=64)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert processor.image_processor.do_pad and list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    messages = [{"role": "user", "content": "<image>\nhello"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nhello ASSISTANT:")
    picture = Image.fromarray(np.full((20, 40, 3), 90, np.uint8))
    batch = processor(text=text, images=picture, return_tensors="pt")
    num_stored = len(original.tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [num_stored, num_stored + 1]
    assert int((batch["input_ids"] == num_stored).sum()) == 4
    assert processor.tokenizer.pad_token == "<pad>"
    model = load(tmp_path / "out")
    rows = model.get_input_embeddings().weight
    assert len(rows) % 64 == 0 and len(rows) >= num_stored + 2 and report.added_rows == len(rows) - num_stored
    stored = original.llm.get_input_embeddings().weight
    torch.testing.assert_close(rows[num_stored:], stored.mean(0, keepdim=True).expand(len(rows) - num_stored, -1))
    assert model.generation_config.pad_token_id == num_stored + 1
    assert model.generation_config.eos_token_id in (2, [2])


def original_grid(width: int, height: int, pinpoints: list) -> tuple[int, int]:
    """The original rule: (w, h) that keeps most of the resolution, then wastes least, the first one wins."""
    best, best_fit = None, (-1, float("inf"))
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h - effective
        if effective > best_fit[0] or (effective == best_fit[0] and waste < best_fit[1]):
            best, best_fit = (w, h), (effective, waste)
    return best


@pytest.mark.parametrize("size", [(28, 28), (40, 20), (19, 50), (70, 30)])
def test_llava_next_computes_the_original_merge_with_newlines(tiny, tmp_path, size):
    original = tiny.make_original(family="llava_next")
    source = tiny.write_original(tmp_path / "source", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "out", vision_tower=str(tower))
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    vision = processor.image_processor(images=[picture], return_tensors="pt")

    grid_w, grid_h = (side // tiny.side for side in original_grid(*size, original.config["image_grid_pinpoints"]))
    tiles = vision["pixel_values"][0]
    assert len(tiles) == 1 + grid_w * grid_h, "another grid than the original's was chosen"
    features = original.features(tiles)
    per_side = tiny.side // 14
    rows = features[1:].view(grid_h, grid_w, per_side, per_side, -1).permute(0, 2, 1, 3, 4)
    rows = rows.reshape(grid_h * per_side, grid_w * per_side, -1)
    height, width = rows.shape[:2]
    if size[0] / size[1] > width / height:
        cut = (height - int(size[1] * (width / size[0]))) // 2
        rows = rows[cut : height - cut]
    else:
        cut = (width - int(size[0] * (height / size[1]))) // 2
        rows = rows[:, cut : width - cut]
    newlines = original.newline.expand(len(rows), 1, -1)
    image = torch.cat([features[0], torch.cat([rows, newlines], dim=1).flatten(0, 1)])

    oracle = original.logits(BEFORE, image, AFTER)
    assert_same(converted_logits(tmp_path / "out", len(image), **vision), oracle)


def test_the_grids_become_height_and_width_in_the_same_order(tiny, tmp_path):
    original = tiny.make_original(family="llava_next")
    source = tiny.write_original(tmp_path / "source", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "out", vision_tower=str(tower))
    expected = [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]
    assert json.loads((tmp_path / "out/config.json").read_text())["image_grid_pinpoints"] == expected
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert [list(pair) for pair in processor.image_processor.image_grid_pinpoints] == expected


def write_base(folder: Path, original) -> Path:
    original.llm.save_pretrained(folder)
    original.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_stage_one_folder_is_completed_from_base_and_tower(tiny, tmp_path, family):
    original = tiny.make_original(family=family, tune_mm_mlp_adapter=True)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(original.config))
    trained = {f"model.mm_projector.{name}": value for name, value in original.projector.state_dict().items()}
    torch.save(trained, source / "mm_projector.bin")
    base = write_base(tmp_path / "base", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    with pytest.raises(ValueError, match="--base"):
        convert(source, tmp_path / "out", vision_tower=str(tower))
    with pytest.raises(ValueError, match="--vision_tower"):
        convert(source, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", base=base, vision_tower=str(tower))
    if family == "llava":
        pixels = one_image(tiny)
        oracle = original.logits(BEFORE, original.features(pixels)[0], AFTER)
        assert_same(converted_logits(tmp_path / "out", 4, pixel_values=pixels), oracle)
    else:  # stage 1 does not save the newline: a new one, and the report says so
        assert "untrained" in report.added["model.image_newline"]
        newline = load_file(tmp_path / "out/model.safetensors")["image_newline"]
        assert 0.5 < float(newline.std()) * tiny.width**0.5 < 1.5


def test_a_checkpoint_of_a_known_tower_needs_no_other_folder(tiny, tmp_path, monkeypatch):
    original = tiny.make_original()
    tower = original.tower.config
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    known = {name: getattr(tower, name) for name in fields}
    source = tiny.write_original(tmp_path / "source", original)
    with pytest.raises(ValueError, match="--vision_tower"):
        convert(source, tmp_path / "out")
    monkeypatch.setitem(KNOWN_TOWERS, "clip-vit-tiny-for-tests", known)
    convert(source, tmp_path / "out")
    pixels = one_image(tiny)
    oracle = original.logits(BEFORE, original.features(pixels)[0], AFTER)
    assert_same(converted_logits(tmp_path / "out", 4, pixel_values=pixels), oracle)
    recipe = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil").image_processor
    assert list(recipe.image_mean) == [0.48145466, 0.4578275, 0.40821073]  # of OpenAI's CLIP
    assert list(recipe.image_std) == [0.26862954, 0.26130258, 0.27577711]
    assert recipe.crop_size["height"] == tiny.side and recipe.do_pad


def test_openais_tower_is_known_in_both_directions():
    published = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    assert known_name(published) == "openai/clip-vit-large-patch14-336"
    ours = CLIPVisionConfig(**KNOWN_TOWERS["clip-vit-large-patch14-336"])
    assert ours.to_dict() == published.to_dict()
    published.num_hidden_layers = 23
    assert known_name(published) is None


def test_a_sentencepiece_tokenizer_becomes_a_fast_one_and_its_file_stays(tiny, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=Exception)  # an older protobuf refuses it
    source = tmp_path / "source"
    source.mkdir()
    corpus = ["what is in the image? a red square on a blue background", "USER: ASSISTANT: yes no 0 1 2 3"] * 20
    with (source / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, vocab_size=330, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    slow = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    recipe = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "pad_token": "<unk>"}
    recipe |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    original = tiny.make_original(vocab_size=len(slow))
    original.llm.resize_token_embeddings(len(slow), mean_resizing=False)
    tiny.write_original(source, SimpleNamespace(config=original.config, tokenizer=_Nothing()), original.state())
    (source / "tokenizer_config.json").write_text(json.dumps(recipe))
    convert(source, tmp_path / "out", vision_tower=str(tiny.write_tower(tmp_path / "tower", original.tower)))
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil").tokenizer
    assert tokenizer.is_fast
    text = "what is in the image? a red square \u00e9"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == slow.encode(text)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [len(slow), len(slow) + 1]
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_sentencepiece_tokenizer_without_its_packages_says_which(tiny, tmp_path, monkeypatch):
    original = tiny.make_original()
    source = tiny.write_original(tmp_path / "source", original)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ValueError, match="sentencepiece and protobuf"):
        convert(source, tmp_path / "out", vision_tower=str(tiny.write_tower(tmp_path / "tower", original.tower)))


class _Nothing:
    def save_pretrained(self, folder: Path) -> None:
        """Leave the folder's own tokenizer files."""


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_folder_becomes_what_peft_merges(tiny, tmp_path, rslora):
    original = tiny.make_original()
    base = write_base(tmp_path / "base", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", use_rslora=rslora)
    torch.manual_seed(3)
    wrapped = get_peft_model(type(original.llm).from_pretrained(base), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "source")
    trained = {f"base_model.model.model.mm_projector.{name}": v for name, v in original.projector.state_dict().items()}
    torch.save(trained, tmp_path / "source/non_lora_trainables.bin")
    (tmp_path / "source/config.json").write_text(json.dumps(original.config))
    convert(tmp_path / "source", tmp_path / "out", base=base, vision_tower=str(tower))

    merged = PeftModel.from_pretrained(type(original.llm).from_pretrained(base), tmp_path / "source")
    pixels = one_image(tiny)
    untouched = original.logits(BEFORE, original.features(pixels)[0], AFTER)
    original.llm = merged.merge_and_unload().eval()
    oracle = original.logits(BEFORE, original.features(pixels)[0], AFTER)
    assert float((oracle - untouched).abs().max()) > 0.1, "the adapter changes nothing: the test would prove nothing"
    assert_same(converted_logits(tmp_path / "out", 4, pixel_values=pixels), oracle)


def test_an_adapter_that_plain_folding_cannot_represent_is_refused(tiny, tmp_path):
    original = tiny.make_original()
    base = write_base(tmp_path / "base", original)
    source = tmp_path / "source"
    get_peft_model(original.llm, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(source)
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, source / "non_lora_trainables.bin")
    (source / "config.json").write_text(json.dumps(original.config))
    with pytest.raises(ValueError, match="use_dora"):
        convert(source, tmp_path / "out", base=base)


def test_every_weight_is_in_the_dtype_of_the_language_model(tiny, tmp_path):
    original = tiny.make_original()
    state = original.state(with_tower=False)
    state = {name: value.half() if "mm_projector" not in name else value for name, value in state.items()}
    source = tiny.write_original(tmp_path / "source", original, state)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    report = convert(source, tmp_path / "out", vision_tower=str(tower))
    written = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert report.num_converted == 4 + len(original.tower.state_dict())
    assert load(tmp_path / "out").dtype == torch.float16
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(written[f"language_model.{key}"], state[key])


def test_llava_hf_names_are_written(tiny, tmp_path):
    original = tiny.make_original(family="llava_next")
    source = tiny.write_original(tmp_path / "source", original)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    convert(source, tmp_path / "out", vision_tower=str(tower))
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert names >= {
        "image_newline",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.2.layer_norm1.bias",
        "vision_tower.vision_model.pre_layrnorm.weight",
    }
    first = {name.split(".")[0] for name in names}
    assert first == {"image_newline", "language_model", "multi_modal_projector", "vision_tower"}
    recorded = json.loads((tmp_path / "out/conversion.json").read_text())
    assert sum(entry["weights"] for entry in recorded["moved"]) == len(names)


def test_buffers_that_old_versions_saved_are_left_out_and_reported(tiny, tmp_path):
    original = tiny.make_original()
    state = original.state()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state["model.image_newline"] = original.newline
    source = tiny.write_original(tmp_path / "source", original, state)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    report = convert(source, tmp_path / "out", vision_tower=str(tower))
    assert sorted(report.dropped.values()) == [1, 1, 2]
    assert any("spatial_unpad" in reason for _, reason in report.dropped)


def test_a_mistral_gets_its_own_template(tiny, tmp_path):
    original = tiny.make_original(llm="mistral")
    source = tiny.write_original(tmp_path / "source", original)
    convert(source, tmp_path / "out", vision_tower=str(tiny.write_tower(tmp_path / "tower", original.tower)))
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["model_type"] == "mistral"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert processor.apply_chat_template(messages) == "<s>[INST] hello [/INST] hi </s>"


@pytest.mark.parametrize(
    ("family", "text_type", "marks", "name"),
    [
        ("llava_next", "llama", ["<|im_start|>", "<|im_end|>"], "chatml_direct"),  # --version of 1.6-34B and MGM-34B
        ("mgm", "llama", ["<|im_start|>", "<|im_end|>"], "chatml_direct"),
        ("llava_next", "llama", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llava_llama_3"),
        ("llava_next", "qwen2", ["<|im_start|>", "<|im_end|>"], "qwen_1_5"),
        ("llava", "gemma", ["<start_of_turn>", "<end_of_turn>"], "gemma"),
        ("mgm", "gemma", ["<start_of_turn>", "<end_of_turn>"], "mgm_gemma"),  # its "gemma" ends rounds with <eos>
    ],
)
def test_the_template_is_that_of_the_repository_and_the_language_model(tiny, family, text_type, marks, name):
    tokenizer = tiny.vicuna_like_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    assert find_template(tokenizer, family, text_type, None)[0] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "missing",
            r"lacks 1 weight .*model\.mm_projector\.2\.bias \(here model\.multi_modal_projector\.linear_2\.bias\)",
        ),
        ("missing head", "lacks 1 weight .*lm_head"),
        ("missing layer", "lacks 1 weight .*layers.1.mlp.up_proj"),
        ("extra", "no place for 1 weight .*mm_projector.4.weight"),
        ("extra layer", "no place for 1 weight .*layers.2.mlp.up_proj"),
        ("shape", "has shape"),
        ("rows", "vocab_size"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_written(tiny, tmp_path, change, message):
    original = tiny.make_original()
    state = original.state()
    if change == "missing":
        del state["model.mm_projector.2.bias"]
    elif change == "missing head":
        del state["lm_head.weight"]
    elif change == "missing layer":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif change == "extra":
        state["model.mm_projector.4.weight"] = torch.zeros(2)
    elif change == "extra layer":
        state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, tiny.width)
    elif change == "shape":
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, tiny.width)
    else:
        original.config["vocab_size"] += 1
    source = tiny.write_original(tmp_path / "source", original, state)
    tower = tiny.write_tower(tmp_path / "tower", original.tower)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", vision_tower=str(tower))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tower"], "something was left behind"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "spatial_unpad"),
        ({"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}, "anyres_max_9"),
        ({"mm_vision_select_feature": "cls"}, "cls"),
        ({"quantization_config": {}}, "quantised"),
        ({"mm_vision_select_layer": "last"}, "config.json: mm_vision_select_layer 'last' is not a whole number"),
        ({"num_attention_heads": 3}, "(?s)config.json does not describe a language model.*multiple"),
        ({"num_attention_heads": "x"}, "(?s)config.json does not describe a language model.*num_attention_heads"),
    ],
)
def test_a_configuration_without_counterpart_is_refused(tiny, tmp_path, fields, message):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny.make_original().config | fields))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_vision_select_layer": -9}, "vision_feature_layer -9 does not exist: the tower has 4 hidden states"),
        ({"image_grid_pinpoints": [[50, 60]]}, r"grid pinpoint \[60, 50\]"),
    ],
)
def test_settings_that_do_not_fit_the_tower_are_refused(tiny, tmp_path, fields, message):
    original = tiny.make_original(family="llava_next", **fields)
    source = tiny.write_original(tmp_path / "source", original)
    tower = str(tiny.write_tower(tmp_path / "tower", original.tower))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", vision_tower=tower)
    assert not (tmp_path / "out").exists()


def test_weights_that_share_memory_in_a_file_are_both_kept(tiny, tmp_path):
    original = tiny.make_original()
    state = original.state()
    state["lm_head.weight"] = state[
        "model.embed_tokens.weight"
    ]  # one tensor under two names, in a model that is untied
    state["model.norm.weight"] = torch.cat([state["model.norm.weight"]] * 2)[: tiny.width]  # a part of a larger one
    source = tiny.write_original(tmp_path / "source", original, state, shards=1)
    convert(source, tmp_path / "out", vision_tower=str(tiny.write_tower(tmp_path / "tower", original.tower)))
    written = load_file(tmp_path / "out/model.safetensors")
    num_stored = len(original.tokenizer)
    assert torch.equal(written["language_model.lm_head.weight"][:num_stored], state["model.embed_tokens.weight"])
    assert torch.equal(written["language_model.model.norm.weight"], state["model.norm.weight"])


def test_a_full_output_folder_is_refused(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out/a.safetensors")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(tmp_path, tmp_path / "out")
