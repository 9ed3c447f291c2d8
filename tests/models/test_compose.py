"""Compose tiny real parts and compare with what the parts compute on their own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from cal_train.models.compose import compose

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
LLMS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama_tied": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}),
    "phi": (PhiConfig, {}),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_HALF = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class RunsOnLoading:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def bare_tokenizer(**special):
    """A byte-level tokenizer without image and padding token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["USER: what is in the image? ASSISTANT: a red square"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def write_llm(folder, kind="llama", tokenizer=None, spare_rows=0, **options):
    config_class, extra = LLMS[kind]
    tokenizer = tokenizer or bare_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer) + spare_rows, **SIZES, **{**ids, **extra, **options})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tower(folder, kind="clip", size=28):
    torch.manual_seed(1)
    clip = CLIPImageProcessorPil(size={"shortest_edge": size + 4}, crop_size={"height": size, "width": size})
    siglip = SiglipImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    text = TEXT_HALF | {"vocab_size": 20, "max_position_embeddings": 8}
    make = {
        "clip": lambda: (CLIPVisionModel(CLIPVisionConfig(**VISION_SIZES)), clip),
        "clip_dual": lambda: (CLIPModel(CLIPConfig(vision_config=VISION_SIZES, text_config=text)), clip),
        "siglip": lambda: (SiglipVisionModel(SiglipVisionConfig(**VISION_SIZES)), siglip),
        "siglip_dual": lambda: (SiglipModel(SiglipConfig(vision_config=VISION_SIZES, text_config=text)), siglip),
        "dinov2": lambda: (Dinov2Model(Dinov2Config(**VISION_SIZES | {"initializer_range": 0.1})), clip),
    }
    model, processor = make[kind]()
    with torch.no_grad():  # CLIP's positions start so small that losing them would go unseen
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def vision_half(folder, kind):
    """Load the tower by its own class; of a dual encoder as one whole, then take its vision half."""
    classes = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}
    if kind.endswith("_dual"):
        return (CLIPModel if kind == "clip_dual" else SiglipModel).from_pretrained(folder).vision_model.eval()
    return classes[kind].from_pretrained(folder).eval()


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(
        folder, backend="pil"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of parts, written once per kind."""
    root, made = tmp_path_factory.mktemp("parts"), {}

    def get(kind):
        if kind not in made:
            made[kind] = (write_llm if kind in LLMS else write_tower)(root / kind, kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def composed(parts, tmp_path_factory):
    """VLM folders with all options at their defaults, composed once per pair of parts."""
    root, made = tmp_path_factory.mktemp("composed"), {}

    def get(llm, tower="clip"):
        if (llm, tower) not in made:
            made[llm, tower] = compose(parts(llm), parts(tower), root / f"{llm}-{tower}")
        return made[llm, tower]

    return get


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "granite", "cohere"])
@torch.no_grad()
def test_text_logits_equal_those_of_the_language_model(parts, composed, kind):
    model, processor = load(composed(kind))
    llm = AutoModelForCausalLM.from_pretrained(parts(kind)).eval()
    ids = processor.tokenizer("what is in the image? a red square", return_tensors="pt").input_ids
    theirs = llm(ids).logits
    assert theirs.std() > 0.01
    difference = (model(input_ids=ids).logits[..., : theirs.shape[-1]] - theirs).abs().max()
    assert difference <= 1e-5, difference


@torch.no_grad()
def test_a_soft_cap_is_left_out_and_announced(parts, tmp_path, caplog):
    model, _ = load(compose(parts("gemma2"), parts("clip"), tmp_path / "vlm"))
    llm = AutoModelForCausalLM.from_pretrained(parts("gemma2")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = llm(ids).logits
    ours = model(input_ids=ids).logits[..., : theirs.shape[-1]]
    assert (ours - theirs).abs().max() > 0.01
    torch.testing.assert_close(2.0 * torch.tanh(ours / 2.0), theirs, atol=1e-5, rtol=0)
    assert "caps its logits at 2" in caplog.text


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama_tied", True), ("cohere", False)])
def test_embeddings_stay_tied_unless_a_logit_scale_forbids_it(composed, kind, tied):
    model, _ = load(composed(kind))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == tied
    if kind == "cohere":
        assert model.config.text_config.logit_scale == 1.0


@pytest.mark.parametrize(
    ("kind", "image_size"),
    [("clip", None), ("clip", 56), ("siglip_dual", None), ("siglip", 56), ("dinov2", 56), ("clip_dual", None)],
)
@torch.no_grad()
def test_image_features_equal_those_of_the_tower(parts, tmp_path, kind, image_size):
    model, processor = load(compose(parts("llama"), parts(kind), tmp_path / "vlm", image_size=image_size))
    size, tower = image_size or 28, vision_half(parts(kind), kind)
    has_class_token = "siglip" not in kind
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    inputs = processor(images=image, text="<image>what?", return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, size, size)
    assert (inputs.input_ids == model.config.image_token_id).sum() == (size // 14) ** 2
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    features = tower(inputs.pixel_values, output_hidden_states=True, **options).hidden_states[-2]
    expected = model.model.multi_modal_projector(features[:, int(has_class_token) :])
    ours = model.model.get_image_features(inputs.pixel_values).pooler_output[0][None]
    assert ours.shape == expected.shape == (1, (size // 14) ** 2, 32)
    assert (ours - expected).abs().max() <= 1e-5
    assert model(**inputs).logits.isfinite().all()
    assert model.config.vision_config.image_size == size


def test_image_processor_takes_the_towers_own_numbers(parts, tmp_path):
    _, processor = load(compose(parts("llama"), parts("siglip"), tmp_path / "vlm", image_aspect_ratio="pad"))
    images = processor.image_processor
    assert (list(images.image_mean), list(images.image_std)) == ([0.5] * 3, [0.25] * 3)
    assert images.do_pad
    assert images.resample == SiglipImageProcessorPil.resample
    red = Image.new("RGB", (28, 14), (255, 0, 0))
    pixels = images(red, return_tensors="pt").pixel_values[0]
    # padded above and below with int(255 * 0.5): (127 / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels[:, 0, 14], torch.full((3,), (127 / 255 - 0.5) / 0.25), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels[:, 14, 14], torch.tensor([2.0, -2.0, -2.0]), atol=1e-4, rtol=0)


def test_projector_is_as_the_seed_and_as_linear_layers_start(parts, composed, tmp_path):
    again, other = (compose(parts("llama"), parts("clip"), tmp_path / str(seed), seed=seed) for seed in (0, 1))
    folders = [composed("llama"), again, other]
    first, same, other = (load(folder)[0].model.multi_modal_projector.linear_1 for folder in folders)
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    limit = 32**-0.5  # nn.Linear: uniform in +-1/sqrt(inputs), bias too
    assert 0.9 * limit < first.weight.abs().max() <= limit
    assert 0.5 * limit < first.bias.abs().max() <= limit


@torch.no_grad()
def test_new_rows_are_the_mean_and_old_rows_are_kept(parts, tmp_path):
    model, processor = load(compose(parts("llama"), parts("clip"), tmp_path / "vlm", pad_vocabulary_to=64))
    llm = AutoModelForCausalLM.from_pretrained(parts("llama"))
    old = llm.get_input_embeddings().weight
    for ours, theirs in (
        (model.get_input_embeddings().weight, old),
        (model.lm_head.weight, llm.lm_head.weight),
    ):
        assert ours.shape[0] % 64 == 0 and ours.shape[0] >= len(processor.tokenizer)
        assert torch.equal(ours[: len(old)], theirs)
        torch.testing.assert_close(ours[-1], theirs.mean(0))
    assert model.config.text_config.vocab_size == len(model.lm_head.weight)


def test_rows_beyond_the_tokenizer_are_used_first(tmp_path, parts):
    llm = write_llm(tmp_path / "llm", spare_rows=10)
    model, processor = load(compose(llm, parts("clip"), tmp_path / "vlm"))
    assert len(model.lm_head.weight) == len(bare_tokenizer()) + 10
    assert len(processor.tokenizer) == len(bare_tokenizer()) + 2


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, "<pad>"),
        ({"pad_token": "</s>"}, "<pad>"),
        ({"pad_token": "<unk>"}, "<pad>"),
        ({"pad_token": "<|im_end|>"}, "<|im_end|>"),
    ],
)
def test_padding_is_never_a_token_of_the_content(tmp_path, parts, special, expected):
    llm = write_llm(tmp_path / "llm", tokenizer=bare_tokenizer(**special))
    model, processor = load(compose(llm, parts("clip"), tmp_path / "vlm"))
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token == expected
    assert tokenizer.padding_side == "right"
    assert model.config.text_config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert len(tokenizer("<image>", add_special_tokens=False).input_ids) == 1


def test_without_a_template_of_its_own_the_vlm_speaks_vicuna(composed):
    model, processor = load(composed("llama"))
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nq"}], add_generation_prompt=True)
    assert text.startswith("<s>A chat between") and text.endswith("USER: <image>\nq ASSISTANT:")
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]


def test_own_template_is_kept_takes_parts_and_ends_generation(tmp_path, parts):
    tokenizer = bare_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model, processor = load(compose(write_llm(tmp_path / "llm", tokenizer=tokenizer), parts("clip"), tmp_path / "vlm"))
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    for messages in ([{"role": "user", "content": content}], [{"role": "user", "content": "<image>\nwhat?"}]):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n"
    ends = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")]
    assert model.generation_config.eos_token_id == ends


def test_half_precision_is_kept_as_stored(tmp_path, parts):
    llm = write_llm(tmp_path / "llm")
    AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).save_pretrained(llm)
    model = AutoModelForImageTextToText.from_pretrained(compose(llm, parts("clip"), tmp_path / "vlm"), dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def broken_parts(case, folder):
    """Return (llm, tower, options) with one fault, and what the error must name."""
    llm, tower, options = write_llm(folder / "llm"), write_tower(folder / "tower"), {}
    if case == "head_bias":
        llm = write_llm(folder / "phi", "phi")
    elif case == "llm_is_a_tower":
        llm = tower
        bare_tokenizer().save_pretrained(llm)
    elif case == "llm_is_nothing":
        (llm / "config.json").unlink()
    elif case == "llm_quantised":
        edit_json(llm / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    elif case == "llm_pickled":
        (llm / "model.safetensors").unlink()
        torch.save({"lm_head.weight": RunsOnLoading(folder / "ran")}, llm / "pytorch_model.bin")
    elif case == "no_tokenizer":
        (llm / "tokenizer.json").unlink()
    elif case == "no_gguf":
        options["gguf_file"] = "weights.gguf"
    elif case == "tower_is_an_llm":
        tower = llm
        CLIPImageProcessorPil().save_pretrained(tower)
    elif case == "tower_quantised":
        edit_json(tower / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    elif case == "tower_without_preprocessor":
        (tower / "preprocessor_config.json").unlink()
    elif case == "tower_lacks_weights":
        edit_json(tower / "config.json", num_hidden_layers=4)
    elif case == "image_size":
        options["image_size"] = 30
    elif case == "layer":
        options["vision_feature_layer"] = -5
    elif case == "template":
        options["template"] = "gemma"
    elif case == "output_not_empty":
        (folder / "vlm").mkdir()
        (folder / "vlm" / "notes.txt").write_text("mine")
    return llm, tower, options


REFUSALS = {
    "head_bias": "head of PhiForCausalLM has a bias",
    "llm_is_a_tower": "cannot be loaded as a causal language model",
    "llm_is_nothing": "config.json is missing",
    "llm_quantised": "language model .* is quantised",
    "llm_pickled": "cannot be loaded",
    "no_tokenizer": "has no tokenizer",
    "no_gguf": "weights.gguf does not exist",
    "tower_is_an_llm": "model_type 'llama', which is not supported: use one of clip_vision_model",
    "tower_quantised": "vision tower .* is quantised",
    "tower_without_preprocessor": "has no preprocessor_config.json",
    "tower_lacks_weights": "lacks 16 weights",
    "image_size": "image_size 30 is not a multiple of the tower's patch size 14: use 28 or 42",
    "layer": "vision_feature_layer -5",
    "template": "template 'gemma' does not fit",
    "output_not_empty": "not an empty folder",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_parts_are_refused_and_nothing_is_left(tmp_path, case):
    llm, tower, options = broken_parts(case, tmp_path)
    with pytest.raises(ValueError, match=REFUSALS[case]):
        compose(llm, tower, tmp_path / "vlm", **options)
    left = [file.name for file in (tmp_path / "vlm").glob("*")]
    assert left == (["notes.txt"] if case == "output_not_empty" else [])
    assert not (tmp_path / "ran").exists()  # nothing of a pickle was executed


def test_a_model_that_computes_something_else_is_refused(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("cal_train.models.compose.fold_logit_scale", lambda llm: 1.0)
    with pytest.raises(ValueError, match="text logits of the composed model differ"):
        compose(parts("cohere"), parts("clip"), tmp_path / "vlm")
    assert not (tmp_path / "vlm").exists()


def write_gguf(file, llm_folder):
    """Write a Llama in GGUF, float32, by the names that llama.cpp gives."""
    gguf = pytest.importorskip("gguf")
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    tokenizer, config = AutoTokenizer.from_pretrained(llm_folder), llm.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in core["added_tokens"]}
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in llm.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the halves of rotary heads
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_gives_the_same_model(parts, tmp_path):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", parts("llama"))
    folder = compose(tmp_path / "gguf", parts("clip"), tmp_path / "vlm", gguf_file="tiny.gguf", template="vicuna_v1")
    assert "quantization_config" not in (folder / "config.json").read_text()
    model, processor = load(folder)
    llm = AutoModelForCausalLM.from_pretrained(parts("llama")).eval()
    ids = AutoTokenizer.from_pretrained(parts("llama"))("what is in the image?", return_tensors="pt").input_ids
    assert torch.equal(processor.tokenizer("what is in the image?", return_tensors="pt").input_ids, ids)
    theirs = llm(ids).logits
    assert (model(input_ids=ids).logits[..., : theirs.shape[-1]] - theirs).abs().max() <= 1e-5


FRESH_PROCESS = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], backend="pil")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (30, 20), "red"), text=text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    torch.save({"inputs": dict(inputs), "logits": model(**inputs).logits}, sys.argv[2])
model.generate(**inputs, max_new_tokens=2, do_sample=False)
assert not any(name.startswith("cal_train") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_folder_without_this_package(composed, tmp_path):
    folder = composed("llama_tied", "siglip")
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        ours = load(folder)[0](**result["inputs"]).logits
    assert (ours - result["logits"]).abs().max() <= 1e-5


def test_parts_with_bin_files_as_vicuna_and_clip_are_published_give_the_same_model(tmp_path):
    for kind in ("safetensors", "bin"):
        llm, tower = write_llm(tmp_path / kind / "llm"), write_tower(tmp_path / kind / "tower")
        if kind == "bin":
            for part in (llm, tower):
                torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
                (part / "model.safetensors").unlink()
        compose(llm, tower, tmp_path / kind / "vlm")
    one, other = (load_file(tmp_path / kind / "vlm" / "model.safetensors") for kind in ("safetensors", "bin"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
