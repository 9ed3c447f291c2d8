"""Writing aside and renaming: killed at any point, what is left is a whole checkpoint or model, or is known as none."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from cal_train.train import safe_save
from cal_train.train.safe_save import (
    Ranks,
    complete_checkpoints,
    incomplete_because,
    is_write_error,
    mark_complete,
    rotate,
    settle_partials,
    write_checkpoint,
    write_output,
)


@pytest.fixture
def ranks():
    return Ranks(Accelerator(cpu=True), is_writer=True, may_agree=True)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing may catch it."""


@pytest.fixture
def killed_at(monkeypatch):
    """``killed_at(k, action)``: run an action that dies before its k-th change to the disk; False if it had fewer."""
    changes = [
        *((Path, name) for name in ("rename", "replace", "unlink", "mkdir", "write_text")),
        *((shutil, "rmtree"), (os, "fsync")),
    ]

    def run(k, action):
        left = [k]

        def dying(original):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    if original.__name__ == "rmtree":  # half-way: some files are gone
                        for path in sorted(Path(args[0]).rglob("*"))[::2]:
                            if path.is_file():
                                os.remove(path)
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in changes:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                action()
            except Killed:
                return True
        return False

    return run


def write_version(run_folder, step, version):
    """Return what writes a checkpoint whose files all say the same version."""

    def write(aside):
        folder = aside / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        for name in ("model.safetensors", "trainer_state.json", "global_step/rank_0.pt"):
            (folder / name).write_text(f"{version}" * 10)

    return write


def versions(checkpoint):
    return {path.read_text()[:1] for path in checkpoint.rglob("*") if path.is_file() and path.name != "complete.json"}


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step-again"])
def test_killed_at_any_change_to_the_disk_a_run_keeps_a_whole_checkpoint(tmp_path, killed_at, ranks, again):
    num_kills = 0
    for k in range(1, 200):
        run_folder = tmp_path / f"{k}"
        run_folder.mkdir()
        write_checkpoint(run_folder, 2, write_version(run_folder, 2, "a"), ranks)
        step = 2 if again else 4

        def save(run_folder=run_folder, step=step):
            final = write_checkpoint(run_folder, step, write_version(run_folder, step, "b"), ranks)
            rotate(run_folder, 1, keep={final})

        killed = killed_at(k, save)
        settle_partials(run_folder)
        whole = complete_checkpoints(run_folder)
        assert whole, k
        for checkpoint in whole:
            assert len(versions(checkpoint)) == 1, k
        assert not list(run_folder.glob("*.partial")), k
        num_kills += killed
        if not killed:
            assert [path.name for path in whole] == [f"checkpoint-{step}"]
            assert versions(whole[0]) == {"b"}
            break
    assert num_kills > 10


def write_model(aside, version, shards):
    for name in ["config.json", "tokenizer.json", *shards]:
        (aside / name).write_text(version * 10)


def test_killed_at_any_change_to_the_disk_a_folder_with_a_configuration_holds_one_whole_model(
    tmp_path, killed_at, ranks
):
    old, new = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["model.safetensors"]
    num_kills, num_old, num_new = 0, 0, 0
    for k in range(1, 200):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text("mine")
        write_output(folder, lambda aside: write_model(aside, "a", old), ranks)
        killed = killed_at(
            k, lambda folder=folder: write_output(folder, lambda aside: write_model(aside, "b", new), ranks)
        )
        settle_partials(folder)
        assert (folder / "recipe.yaml").read_text() == "mine"
        if (folder / "config.json").is_file():
            version = (folder / "config.json").read_text()[0]
            files = {path.name: path.read_text()[0] for path in folder.iterdir() if path.name != "recipe.yaml"}
            shards = old if version == "a" else new
            assert files == dict.fromkeys(["config.json", "tokenizer.json", *shards], version), k
            num_old, num_new = num_old + (version == "a"), num_new + (version == "b")
        num_kills += killed
        if not killed:
            break
    assert num_kills > 5 and num_old > 1 and num_new > 0


def test_a_marker_lists_every_file_and_a_changed_checkpoint_is_incomplete(tmp_path):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "a.bin").write_bytes(b"123")
    (tmp_path / "global_step2" / "b.bin").write_bytes(b"1")
    assert incomplete_because(tmp_path) == "no complete.json"
    mark_complete(tmp_path)
    assert json.loads((tmp_path / "complete.json").read_text()) == {"files": {"a.bin": 3, "global_step2/b.bin": 1}}
    assert incomplete_because(tmp_path) is None
    (tmp_path / "a.bin").write_bytes(b"12")
    assert incomplete_because(tmp_path) == "a.bin has 2 bytes, 3 when it was written"
    (tmp_path / "a.bin").unlink()
    assert incomplete_because(tmp_path) == "a.bin is missing"
    (tmp_path / "complete.json").write_text("{")
    assert incomplete_because(tmp_path) == "complete.json is damaged"


def test_rotation_deletes_the_oldest_and_never_the_new_or_the_best(tmp_path, ranks):
    for step in (2, 4, 10, 12):
        write_checkpoint(tmp_path, step, write_version(tmp_path, step, "a"), ranks)
    rotate(tmp_path, None, keep=set())
    rotate(tmp_path, 2, keep={tmp_path / "checkpoint-12", tmp_path / "checkpoint-2"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-12"}


def test_what_a_killed_run_left_is_named_and_removed_and_other_folders_are_not(tmp_path, caplog, ranks):
    (tmp_path / "checkpoint-8.partial" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "notes.partial").mkdir()
    settle_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.partial"]
    assert "checkpoint-8.partial was left half-written: removed" in caplog.text


@pytest.fixture
def small_files_only():
    """No file of this process may grow beyond 100 kB: the system refuses in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", ["safetensors", "torch", "json"])
def test_whoever_cannot_write_the_failure_is_one_message_and_the_older_checkpoint_stays(
    tmp_path, ranks, small_files_only, writer
):
    write_checkpoint(tmp_path, 2, write_version(tmp_path, 2, "a"), ranks)
    tensors = {"weight": torch.zeros(100_000)}
    write = {
        "safetensors": lambda folder: save_file(tensors, folder / "model.safetensors"),
        "torch": lambda folder: torch.save(tensors, folder / "optimizer.pt"),
        "json": lambda folder: (folder / "trainer_state.json").write_text("a" * 200_000),
    }[writer]

    def write_aside(aside):
        (aside / "checkpoint-4").mkdir()
        write(aside / "checkpoint-4")

    with pytest.raises(OSError, match=r"checkpoint-4 could not be written.*Last complete checkpoint: .*checkpoint-2\."):
        write_checkpoint(tmp_path, 4, write_aside, ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert incomplete_because(tmp_path / "checkpoint-2") is None


def test_an_error_that_is_not_of_writing_stays_itself(tmp_path, ranks):
    def write(aside):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        write_checkpoint(tmp_path, 4, write, ranks)
    assert not list(tmp_path.iterdir())
    assert not is_write_error(KeyError("optimizer"))


def test_another_rank_that_failed_stops_this_one_before_the_rename(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(ranks.accelerator, "reduce", lambda tensor, how: tensor + 1, raising=False)
    with pytest.raises(OSError, match="another rank could not write"):
        write_checkpoint(tmp_path, 4, write_version(tmp_path, 4, "a"), ranks)
    assert not list(tmp_path.iterdir())
    assert safe_save.PARTIAL_SUFFIX == ".partial"
