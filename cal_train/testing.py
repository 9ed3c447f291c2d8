"""Tiny models, tokenizers and data for tests and benchmarks: real classes, random weights, no downloads."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from cal_train.data.conversation import load_template
from cal_train.models import mgm_family
from cal_train.models.layout import build_config, build_processor
from cal_train.towers.outputs import TowerShape
from cal_train.towers.text import TextPooling
from cal_train.towers.two_tower import TwoTower, build_two_tower

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: what is in the image? ASSISTANT: ",
    "a red square on a blue background. yes no cat dog 0 1 2 3 4 5 6 7 8 9 green circle triangle\n",
]
SPECIAL_TOKENS = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip


def tiny_tokenizer(
    kind: Literal["bytelevel", "metaspace"] = "bytelevel", vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Return a trained-on-nothing tokenizer whose specials fit every template.

    ``bytelevel`` behaves like GPT-2, Llama-3 and Qwen; ``metaspace`` like the SentencePiece tokenizer of Llama-2 and
    Vicuna (a prefix space, byte fallback, BOS added by the tokenizer).
    """
    if kind == "bytelevel":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(CORPUS * 4, trainer)
    else:
        pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
        letters = sorted({c for text in CORPUS for c in text if not c.isspace()})
        core = Tokenizer(
            models.BPE(
                vocab={piece: i for i, piece in enumerate([*pieces, *letters])},
                merges=[],
                byte_fallback=True,
                fuse_unk=True,
                unk_token="<unk>",
            )
        )
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        core.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
    )
    tokenizer.padding_side = "right"
    return tokenizer


def tiny_image_processor(image_size: int = 28) -> LlavaImageProcessorPil:
    """Return LLaVA's image processor for small images."""
    return LlavaImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def tiny_processor(tokenizer: PreTrainedTokenizerFast | None = None, image_size: int = 28) -> LlavaProcessor:
    """Return a LLaVA processor for `tiny_llava`: 28 px images, 14 px patches, 4 image tokens."""
    return LlavaProcessor(
        tiny_image_processor(image_size),
        tokenizer or tiny_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def tiny_configs(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = 28,
    vocab_size: int | None = None,
    num_layers: int = 2,
    hidden_size: int = 32,
    **text_config: object,
) -> tuple[LlamaConfig, CLIPVisionConfig]:
    """Return the configurations of a language model and of a CLIP tower with 14 px patches."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        **{
            "vocab_size": vocab_size or len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "initializer_range": 0.1,  # large enough for logits that differ visibly with and without the image
            **text_config,
        }
    )
    return text, vision


def tiny_llava(
    tokenizer: PreTrainedTokenizerFast | None = None,
    image_size: int = 28,
    vocab_size: int | None = None,
    num_layers: int = 2,
    hidden_size: int = 32,
    seed: int = 0,
    **text_config: object,
) -> LlavaForConditionalGeneration:
    """Return a randomly initialised LLaVA of a few ten thousand parameters; equal for equal arguments."""
    tokenizer = tokenizer or tiny_tokenizer()
    text, vision = tiny_configs(tokenizer, image_size, vocab_size, num_layers, hidden_size, **text_config)
    torch.manual_seed(seed)
    config = build_config("llava", text, vision, tokenizer.get_vocab()["<image>"], vision_feature_layer=-2)
    return LlavaForConditionalGeneration(cast(LlavaConfig, config))


def tiny_vlm(
    family: Literal["llava", "llava_next", "mgm"] = "llava",
    tokenizer: PreTrainedTokenizerFast | None = None,
    image_size: int = 28,
    seed: int = 0,
    family_options: Mapping[str, object] | None = None,
    **text_config: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a randomly initialised VLM of any family with its processor, equal for equal arguments.

    ``llava_next`` has the original's five grids of 28 px tiles; ``mgm`` reads 64 px (``family_options`` of
    `cal_train.models.mgm_family.TINY_HD` make it MGM-HD).
    """
    tokenizer = tokenizer or tiny_tokenizer()
    text, vision = tiny_configs(tokenizer, image_size, **text_config)
    is_mgm = family == "mgm"
    aux = ConvNextConfig(**mgm_family.TINY_AUX) if is_mgm else None
    options = family_options if family_options is not None else mgm_family.TINY if is_mgm else {}
    image_token_id = tokenizer.get_vocab()["<image>"]
    config = build_config(family, text, vision, image_token_id, vision_feature_layer=-2, aux_config=aux, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    template = load_template("vicuna_v1")
    return model, build_processor(family, config, tiny_image_processor(image_size), tokenizer, template)


def tiny_llava_next(seed: int = 0, **options: Any) -> LlavaNextForConditionalGeneration:
    """Return a randomly initialised LLaVA-NeXT, see `tiny_vlm`."""
    return cast(LlavaNextForConditionalGeneration, tiny_vlm("llava_next", seed=seed, **options)[0])


def write_tiny_vlm(
    folder: str | os.PathLike,
    kind: Literal["bytelevel", "metaspace"] = "bytelevel",
    family: Literal["llava", "llava_next", "mgm"] = "llava",
    **model,
) -> Path:
    """Save a tiny model with its processor and the ``vicuna_v1`` chat template; return the folder."""
    for part in tiny_vlm(family, tiny_tokenizer(kind), **model):
        part.save_pretrained(folder)
    return Path(folder)


def write_tiny_data(folder: str | os.PathLike, num_rows: int = 16, text_only_every: int = 4, seed: int = 0) -> Path:
    """Write ``data.json`` (LLaVA layout, one and two turns, some text-only rows) and its images; return its path."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        words = [f"{rng.choice(['red', 'green', 'blue'])} {rng.choice(['square', 'circle', 'dog'])}" for _ in range(3)]
        has_image = not (text_only_every and i % text_only_every == text_only_every - 1)
        turns = [
            {"from": "human", "value": ("<image>\n" if has_image else "") + "what is in the image?"},
            {"from": "gpt", "value": f"a {words[0]} on a {words[1]} background."},
        ]
        if i % 3 == 2:
            turns += [{"from": "human", "value": "and a dog?"}, {"from": "gpt", "value": f"no. a {words[2]}"}]
        row = {"id": f"row-{i}", "conversations": turns}
        if has_image:
            row["image"] = f"{i}.png"
            height, width = rng.integers(20, 60, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / row["image"])
        rows.append(row)
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def write_tiny_image_rows(folder: str | os.PathLike, num_rows: int = 12, seed: int = 0) -> Path:
    """Write ``data.json`` and its images: rows with 0 to 3 images of different sizes, some between texts; return it.

    Row ``i`` has ``i % 4`` images; sides are 20 to 160 px, with ratios up to 5.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        names = [f"{i}-{k}.png" for k in range(i % 4)]
        for name in names:
            height, width = (int(side) for side in rng.integers(20, 100, 2))
            shape = (height, min(width * int(rng.integers(1, 3)), 160), 3)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / "images" / name)
        question = " and ".join(["<image>"] * len(names)) if i % 8 >= 4 else "<image>\n" * len(names)
        answer = f"a {rng.choice(['red', 'green', 'blue'])} {rng.choice(['square', 'circle', 'dog'])}"
        turns = [{"from": "human", "value": f"{question} what is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"row-{i}", "conversations": turns, **({"images": names} if names else {})})
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


_TINY_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_VISION = _TINY_SIZES | {"hidden_size": 32, "image_size": 16, "patch_size": 4}
_TINY_TEXT = _TINY_SIZES | {
    "hidden_size": 24,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}
TINY_VISION_TOWERS = {
    "clip": {**_TINY_VISION, "model_type": "clip_vision_model", "intermediate_size": 48},
    "siglip": {**_TINY_VISION, "model_type": "siglip_vision_model", "intermediate_size": 48},
    "dinov2": {**_TINY_VISION, "model_type": "dinov2", "initializer_range": 0.1},
}
"""Configurations of vision towers: 16 px images, 16 patches, width 32."""
TINY_TEXT_TOWERS = {
    "clip": {**_TINY_TEXT, "model_type": "clip_text_model", "bos_token_id": 1, "eos_token_id": 3},
    "siglip": {**_TINY_TEXT, "model_type": "siglip_text_model", "bos_token_id": 1, "eos_token_id": 3},
    "bert": {**_TINY_TEXT, "model_type": "bert"},
}
"""Configurations of text towers: 64 ids, 12 tokens, width 24."""


def tiny_two_tower(
    vision: Literal["clip", "siglip", "dinov2"] = "clip",
    text: Literal["clip", "siglip", "bert"] = "clip",
    text_pooling: TextPooling = "eos",
    num_mixture_tokens: int = 0,
    patch_dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TwoTower:
    """Return two towers with random weights; equal for equal arguments, and the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = build_two_tower(
            TINY_VISION_TOWERS[vision],
            TINY_TEXT_TOWERS[text],
            text_pooling=text_pooling,
            num_mixture_tokens=num_mixture_tokens,
            patch_dropout=patch_dropout,
        )
    return towers.to(dtype)


def tiny_pairs(
    shape: TowerShape, batch_size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return a batch of random images and texts of 2 tokens up to the whole context, both ends included if B >= 2.

    The keys are those of a training batch: ``pixel_values``, ``input_ids`` and ``attention_mask``. Padding is on the
    right, with the tower's padding id, which no real token has.
    """
    generator = torch.Generator().manual_seed(seed)
    length = shape.context_length
    lengths = torch.randint(2, length + 1, (batch_size,), generator=generator)
    lengths[:2] = torch.tensor([length, 2])[:batch_size]
    mask = torch.arange(length) < lengths.unsqueeze(1)
    ids = torch.randint(shape.vocab_size - 1, (batch_size, length), generator=generator)
    ids = torch.where(ids >= shape.pad_token_id, ids + 1, ids)
    pixels = torch.randn(batch_size, 3, shape.image_size, shape.image_size, generator=generator, dtype=dtype)
    return {
        "pixel_values": pixels,
        "input_ids": ids.masked_fill(~mask, shape.pad_token_id),
        "attention_mask": mask.long(),
    }


def write_tiny_pairs(folder: str | os.PathLike) -> Path:
    """Write ``pairs.jsonl``: 16 images of 16 px whose captions tell them apart, and ``tokenizer/``; return the file."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
    corners = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8)}
    rows = []
    for colour, rgb in colours.items():
        for corner, (y, x) in corners.items():
            pixels = rng.integers(0, 40, (16, 16, 3), dtype=np.uint8)
            pixels[y : y + 8, x : x + 8] = rgb
            name = f"images/{colour} {corner}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append({"image": name, "caption": f"{colour} {corner}"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
