"""What stands beside a score file: ``FILE.about.json``, which says what was scored with what, by digests."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MODEL_FILES = ("*.safetensors", "config.json", "processor_config.json", "preprocessor_config.json", "chat_template*")


def note_path(scores: str | Path) -> Path:
    """Return the path of the note beside a score file."""
    return Path(f"{scores}.about.json")


def read_about(scores: str | Path) -> dict[str, Any]:
    """Return what ``FILE.about.json`` says of a score file, or an empty dict if there is none.

    Raises:
        ValueError: If the file is there, but is not the JSON object it should be.
    """
    path = note_path(scores)
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, or score again") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not a JSON object: delete it, or score again")
    return about


def model_digest(folder: str | Path) -> str:
    """Return the SHA-256 digest of a model folder's weights and settings, file names included."""
    return _digest(folder, _MODEL_FILES)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 digest of all that decides which ids a text becomes.

    Of the tokenizer itself, not of its files, which are written anew, and differently, each time a model is saved.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a SentencePiece model in Python
        told: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        told = json.loads(backend.to_str())
        for transient in ("padding", "truncation"):  # set by whoever called it last
            told.pop(transient, None)
    told["special_tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def template_digest(processor: Any) -> str:
    """Return the SHA-256 digest of a processor's chat template."""
    return hashlib.sha256(str(processor.chat_template).encode()).hexdigest()


def image_processing_digest(processor: Any) -> str:
    """Return the SHA-256 digest of how a processor makes model inputs of an image: sizes, cropping, padding, colours.

    The class's name is left out: the same processing comes under two of them (PIL and torchvision).
    """
    told = processor.image_processor.to_dict()
    told.pop("image_processor_type", None)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(folder: str | Path, patterns: Iterable[str]) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}):
        total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()
