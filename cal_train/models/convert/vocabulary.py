"""The vocabulary of a converted checkpoint: tokenizer, chat template, and rows for the tokens that are new."""

import importlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cal_train.data.conversation import TURN_MARKS, missing_marks
from cal_train.models.convert.keys import EMBEDDING, HEAD
from cal_train.models.vocabulary import choose_template, load_tokenizer

SENTENCEPIECE = "tokenizer.model"
"""Copied too: the slow tokenizers of the original code read nothing else."""
_TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")
_TEMPLATES = {"llama": "vicuna_v1", "mistral": "mistral", "mixtral": "mistral", "qwen2": "chatml", "gemma": "gemma"}
"""Language model -> the template that the original repositories train it with."""
_MARKED = ("llama3", "chatml_direct")
"""Templates of other models of LLaMA's class (Llama-3, Yi), told by the special tokens of the tokenizer."""
_OF_FAMILY = {
    ("mgm", "gemma"): "mgm_gemma",
    ("llava_next", "chatml"): "qwen_1_5",
    ("llava_next", "llama3"): "llava_llama_3",
}
"""Where a repository has a form of its own of a template."""


def find_tokenizer(folders: list[Path]) -> tuple[PreTrainedTokenizerBase, Path]:
    """Return the tokenizer of the first folder that has one, and that folder.

    Raises:
        ValueError: If none has.
    """
    for folder in folders:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            if not (folder / "tokenizer.json").is_file() and (folder / SENTENCEPIECE).is_file():
                _require_sentencepiece(folder / SENTENCEPIECE)
            return load_tokenizer(folder), folder
    raise ValueError(f"no tokenizer in {' or '.join(map(str, folders))}: copy its files there")


def find_template(tokenizer: PreTrainedTokenizerBase, family: str, text_type: str, name: str | None) -> tuple[str, str]:
    """Return the name and the source of the chat template that the checkpoint was trained with.

    Args:
        tokenizer: Of the checkpoint.
        family: ``llava``, ``llava_next`` or ``mgm``.
        text_type: ``model_type`` of the language model.
        name: A template of ours, ``chat`` (the tokenizer's own), or None to decide by language model and tokenizer.

    Raises:
        ValueError: If the template is unknown, does not fit the tokenizer, or cannot be decided.
    """
    if name is None:
        marked = [other for other in _MARKED if not missing_marks(other, tokenizer)]
        common = marked[0] if text_type == "llama" and len(marked) == 1 else _TEMPLATES.get(text_type, "")
        name = _OF_FAMILY.get((family, common), common)
        if name not in TURN_MARKS:
            raise ValueError(
                f"which chat template a language model of type {text_type!r} was trained with is not known here: "
                f"choose one with --template: {', '.join(TURN_MARKS)}, or chat (the tokenizer's own)"
            )
    return name, choose_template(tokenizer, name)


def grow_rows(tensors: dict[str, Tensor], num_tokens: int, multiple_of: int) -> int:
    """Give every token a row in the embedding and the head, in place; new rows are the mean of the old ones.

    Returns:
        The number of rows that were added.
    """
    num_old = len(tensors[EMBEDDING])
    num_new = -(-max(num_tokens, num_old) // multiple_of) * multiple_of
    if num_new > num_old:
        for name in {EMBEDDING, HEAD} & tensors.keys():  # a head that lacks is found when all names are checked
            rows = tensors[name]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            tensors[name] = torch.cat([rows, mean.expand(num_new - num_old, -1)])
    return num_new - num_old


def _require_sentencepiece(file: Path) -> None:
    """Check that transformers can read the file: otherwise it takes it for one of another kind, and says so."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception as error:  # a missing package, or protobuf's own error for generated code that is newer than it
        raise ValueError(
            f"{file} is to become a fast tokenizer, for which the packages sentencepiece and protobuf are needed, in "
            f"versions that fit each other: pip install -U sentencepiece protobuf ({error})"
        ) from error
