"""Checkpoint files are data: nothing in them is executed, and no name leads out of the folder."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cal_train.models.convert.reading import read_tensors, read_weights


class Attack:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    if legacy:
        file.write_bytes(pickle.dumps({"weight": Attack(trace)}, protocol=2))
    else:
        torch.save({"weight": Attack(trace)}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        read_weights(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/ABSOLUTE", "link.safetensors", "sub/../../outside.safetensors", 7]
)
def test_an_index_cannot_name_files_outside_the_folder(tmp_path, name):
    folder, outside = tmp_path / "folder", tmp_path / "outside.safetensors"
    (folder / "sub").mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    name = str(outside) if name == "/ABSOLUTE" else name
    index = {"weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder"):
        read_weights(folder)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"weight": 3}, {"model": {"weight": torch.zeros(1)}}])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors by name"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_cut_file_is_refused(tmp_path, name):
    state = {"weight": torch.arange(100.0)}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(ValueError, match="first b"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"two\.safetensors does not exist"):
        read_weights(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="another shard"):
        read_weights(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_old_and_new_files_of_torch_save_are_read(tmp_path, zipped):
    state = {"weight": torch.arange(6.0).view(2, 3).half()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weights(tmp_path)["weight"], state["weight"])
