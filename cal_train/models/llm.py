"""Language models that a VLM can be composed with: loading, and bringing head and embeddings into LLaVA's shape."""

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cal_train.folders import from_folder


def check_folder(folder: Path, gguf_file: str | None = None) -> None:
    """Check by its files alone that a folder can hold a language model; see `load_llm` for arguments and errors."""
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ValueError(f"GGUF file {folder / gguf_file} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"language model {folder} is not a model folder: config.json is missing")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise ValueError(f"language model {folder} is quantised: use the folder with its original weights, or a GGUF")


def load_llm(folder: Path, gguf_file: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model with a plain linear head, in eval mode.

    Args:
        folder: Folder of a language model, or one that holds ``gguf_file``.
        gguf_file: Name of a GGUF file in the folder; its weights are dequantised.
        dtype: ``auto`` (as stored; float32 for GGUF) or the name of a torch dtype.

    Raises:
        ValueError: If the folder is not a causal language model, is quantised (other than GGUF), lacks weights, holds
            more than tensors in its weight files, or has a head that LLaVA's class cannot hold.
    """
    check_folder(folder, gguf_file)
    if gguf_file is not None and dtype == "auto":
        dtype = "float32"
    try:
        loaded = from_folder(
            AutoModelForCausalLM,
            folder,
            gguf_file=gguf_file,
            dtype=dtype,
            weights_only=True,  # of a .bin file, as Vicuna is published, tensors are read and nothing is executed
            output_loading_info=True,
        )
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    llm, info = cast(tuple[PreTrainedModel, dict], loaded)
    if lost := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise ValueError(f"language model {folder} lacks {len(lost)} weights, the first is {lost[0]}: not a causal LM?")
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        kind = "a bias" if isinstance(head, nn.Linear) else f"the type {type(head).__name__}"
        raise ValueError(
            f"the output head of {type(llm).__name__} has {kind}, which LLaVA's plain linear head cannot hold: "
            "choose another language model"
        )
    return llm.eval()


def embedding_of(llm: PreTrainedModel) -> nn.Embedding:
    """Return the embedding of the tokens."""
    return cast(nn.Embedding, llm.get_input_embeddings())


def head_of(llm: PreTrainedModel) -> nn.Linear:
    """Return the output head of a model that `load_llm` accepted."""
    return cast(nn.Linear, llm.get_output_embeddings())


def softcap_of(llm: PreTrainedModel) -> float | None:
    """Return the cap c of models that end in ``c * tanh(logits / c)`` (Gemma-2), which LLaVA's class does not apply."""
    return getattr(llm.config, "final_logit_softcapping", None)


@torch.no_grad()
def fold_logit_scale(llm: PreTrainedModel) -> float:
    """Move a constant factor on the logits (Cohere, Granite) into the head's weight, untying it; return the factor.

    LLaVA's class knows no such factor. The configuration then says 1, so that it still describes the weights.
    """
    config = llm.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale /= float(config.logits_scaling)
    if scale == 1.0:
        return 1.0
    head = head_of(llm)
    head.weight = nn.Parameter(head.weight * scale)
    for name in ("logit_scale", "logits_scaling"):
        if hasattr(config, name):
            setattr(config, name, 1.0)
    config.tie_word_embeddings = False
    return scale


@torch.no_grad()
def grow_embeddings(llm: PreTrainedModel, num_tokens: int, multiple_of: int = 1) -> int:
    """Give every token a row in the embedding and the head; new rows are the mean of the old ones.

    Rows that the model already has beyond its tokenizer are used first.

    Args:
        llm: The language model, changed in place.
        num_tokens: Rows that are needed.
        multiple_of: The number of rows is padded to a multiple of this.

    Returns:
        The number of rows that were added.
    """
    num_old = embedding_of(llm).num_embeddings
    num_new = -(-num_tokens // multiple_of) * multiple_of
    if num_new <= num_old:
        return 0
    tied = head_of(llm).weight is embedding_of(llm).weight
    llm.resize_token_embeddings(num_new, mean_resizing=False)
    for layer in [embedding_of(llm)] if tied else [embedding_of(llm), head_of(llm)]:
        layer.weight[num_old:] = layer.weight[:num_old].float().mean(0).to(layer.weight.dtype)
    return num_new - num_old


@torch.no_grad()
def text_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the logits (1, S, V) of a text, in float32."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits.float()
