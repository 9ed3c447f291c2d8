"""Tiny checkpoints in the layouts of the original repositories, written from plain modules and lists of names."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, WIDTH, VISION_WIDTH = 28, 14, 32, 24
LLM_FIELDS = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def vicuna_like_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with begin, end and unknown token only; it pads with the unknown token, as Vicuna's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["what is in the image? a red square"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@dataclass
class Original:
    """The parts of a tiny original model: they are the oracle, and `state` writes their names down."""

    tokenizer: PreTrainedTokenizerFast
    llm: nn.Module
    tower: CLIPVisionModel
    projector: nn.Module
    newline: torch.Tensor
    config: dict

    def state(self, with_tower: bool = True) -> dict[str, torch.Tensor]:
        """Return all weights by the names of the original repository."""
        state = {name: value.clone() for name, value in self.llm.state_dict().items()}
        state |= {f"model.mm_projector.{name}": value for name, value in self.projector.state_dict().items()}
        if self.config["mm_patch_merge_type"] == "spatial_unpad":
            state["model.image_newline"] = self.newline
        if with_tower:
            inner = self.tower.state_dict()
            state |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in inner.items()}
        return {name: value.detach().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projected patches of each image, (I, P, D)."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return self.projector(hidden[:, 1:])

    @torch.no_grad()
    def logits(self, before: list[int], image: torch.Tensor, after: list[int]) -> torch.Tensor:
        """Return the logits of a sequence with the embeddings of an image (tokens, D) spliced in."""
        embed = self.llm.get_input_embeddings()
        pieces = [embed(torch.tensor(before)), image, embed(torch.tensor(after))]
        return self.llm(inputs_embeds=torch.cat(pieces)[None]).logits[0]


def make_projector(kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(VISION_WIDTH, WIDTH)
    if kind == "identity":
        return nn.Identity()
    return nn.Sequential(nn.Linear(VISION_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def make_original(projector: str = "mlp2x_gelu", family: str = "llava", llm: str = "llama", **fields) -> Original:
    torch.manual_seed(0)
    tokenizer = vicuna_like_tokenizer()
    vision_width = WIDTH if projector == "identity" else VISION_WIDTH
    sizes = {"hidden_size": vision_width, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=16)).eval()
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[llm]
    llm_fields = LLM_FIELDS | {"vocab_size": len(tokenizer)}
    language_model = model_class(
        config_class(
            **llm_fields, initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
        )
    ).eval()
    is_next = family == "llava_next"
    config = llm_fields | {
        "model_type": {"llama": "llava_llama", "mistral": "llava_mistral"}[llm],
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": 5000.0,
        "torch_dtype": "float32",
        "mm_vision_tower": "openai/clip-vit-tiny-for-tests",
        "mm_projector_type": projector,
        "mm_hidden_size": vision_width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad" if is_next else "flat",
        "image_aspect_ratio": "anyres" if is_next else "pad",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]] if is_next else None,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
    } | fields  # fmt: skip
    newline = torch.randn(WIDTH) / WIDTH**0.5
    return Original(tokenizer, language_model, tower, make_projector(projector), newline, config)


def write_tower(folder: Path, tower: CLIPVisionModel) -> Path:
    tower.save_pretrained(folder)
    side = tower.config.image_size
    recipe = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    return folder


def write_original(folder: Path, original: Original, state: dict | None = None, shards: int = 0) -> Path:
    """Write a whole checkpoint: one safetensors file, or ``shards`` files of ``torch.save`` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = original.state() if state is None else state
    (folder / "config.json").write_text(json.dumps(original.config))
    original.tokenizer.save_pretrained(folder)
    if not shards:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(state.items())[i::shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The functions of this file: tests cannot import a conftest."""
    return SimpleNamespace(
        make_original=make_original,
        write_original=write_original,
        write_tower=write_tower,
        vicuna_like_tokenizer=vicuna_like_tokenizer,
        side=SIDE,
        width=WIDTH,
        vision_width=VISION_WIDTH,
    )
