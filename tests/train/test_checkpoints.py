"""Checkpoints of whole runs: what is resumed, what is refused, signals, full disks, steps that are not finite."""

import json
import os
import pickle
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cal_train.cli.main import main
from cal_train.folders import check_shards
from cal_train.train.checkpoint import check_pickles, resolve_resume
from cal_train.train.run_folder import clear_or_refuse
from cal_train.train.safe_save import incomplete_because, mark_complete
from cal_train.train.signals import StoppedBySignal, stop_requests
from cal_train.train.trainer import VlmTrainer

SAVING = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "10")
ADAM = ("--optim", "adamw_torch", "--learning_rate", "1e-3")


def state_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())


def loss_lines(folder):
    return [line for line in state_of(folder)["log_history"] if "loss" in line]


@pytest.fixture
def at_step(monkeypatch):
    """``at_step(n, action)``: call ``action(trainer)`` when the loss of step n is computed."""

    def plan(step, action):
        original = VlmTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            loss = original(self, *args, **kwargs)
            return loss if self.state.global_step + 1 != step else action(self, loss)

        monkeypatch.setattr(VlmTrainer, "compute_loss", compute_loss)

    return plan


# --- which checkpoint is resumed


def complete(folder):
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    mark_complete(folder)
    return folder


def test_latest_is_the_complete_checkpoint_of_the_highest_step_and_others_are_named(tmp_path, caplog):
    for step in (2, 10, 9):
        complete(tmp_path / f"checkpoint-{step}")
    assert resolve_resume("latest", tmp_path, True).endswith("checkpoint-10")
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").touch()
    (complete(tmp_path / "checkpoint-12") / "trainer_state.json").write_text("{}, cut off")
    (tmp_path / "checkpoint-13.partial" / "checkpoint-13").mkdir(parents=True)
    assert resolve_resume("latest", tmp_path, True).endswith("checkpoint-10")
    assert "checkpoint-11 is incomplete (no complete.json)" in caplog.text
    assert "checkpoint-12 is incomplete (trainer_state.json has 11 bytes, 2 when it was written)" in caplog.text
    assert "checkpoint-13.partial was left half-written: removed" in caplog.text
    assert resolve_resume(None, tmp_path, True) is None


def test_without_a_complete_checkpoint_latest_is_refused_and_auto_begins_anew(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint-N"):
        resolve_resume("latest", tmp_path, True)
    with pytest.raises(ValueError, match=r"not a complete checkpoint folder: no complete\.json"):
        resolve_resume(str(tmp_path / "checkpoint-3"), tmp_path, True)
    assert resolve_resume("auto", tmp_path, True) is None
    complete(tmp_path / "checkpoint-1")
    assert resolve_resume("auto", tmp_path, True).endswith("checkpoint-1")


# --- what a checkpoint may hold


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
def test_a_pickle_that_runs_code_does_not_run_in_any_file_of_a_checkpoint(trained, tmp_path, tiny_run, name, form):
    checkpoint = tmp_path / "checkpoint-1"
    subprocess.run(["cp", "-r", trained / "checkpoint-1", checkpoint], check=True)
    bomb = Bomb(tmp_path / "boom")
    if form == "torch":
        torch.save({"state": bomb}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps({"state": bomb}))
    mark_complete(checkpoint)  # as whoever put it there would
    resume = ("--resume_from_checkpoint", str(checkpoint), "--max_steps", "2")
    if name == "training_args.bin":  # never read
        tiny_run(*ADAM, *resume)
    else:
        with pytest.raises(ValueError, match=name):
            tiny_run(*ADAM, *resume)
    assert not (tmp_path / "boom").exists()
    with pytest.raises(FileExistsError):  # the bomb works
        (tmp_path / "boom").mkdir()
        torch.load(checkpoint / name, weights_only=False) if form == "torch" else pickle.loads(pickle.dumps(bomb))


@pytest.fixture(scope="session")
def trained(tiny_run):
    return tiny_run(*ADAM, *SAVING, "--max_steps", "2")


def test_a_pickle_of_deepspeed_is_checked_too_and_an_ordinary_checkpoint_passes(trained, tmp_path):
    check_pickles(trained / "checkpoint-1")
    (tmp_path / "global_step1").mkdir()
    file = tmp_path / "global_step1" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.zeros(2)}, "ds_version": "0.19"}, file)
    check_pickles(tmp_path)
    torch.save({"module": Bomb(tmp_path / "boom")}, file)
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt asks for posix\.mkdir"):
        check_pickles(tmp_path)


def test_a_deepspeed_checkpoint_that_points_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("global_step1")
    check_pickles(tmp_path)
    for tag in ("../other", "/elsewhere", ".."):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(ValueError, match="which lies elsewhere"):
            check_pickles(tmp_path)


def write_index(folder, name):
    index = {"metadata": {}, "weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_shard_outside_the_folder_or_one_that_is_no_file_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "secret.safetensors")
    save_file({"weight": torch.zeros(1)}, folder / "shard.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "directory").mkdir()
    write_index(folder, "shard.safetensors")
    check_shards(folder)
    absolute = str(tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", absolute, "..", "", "a/../../secret.safetensors", "a\\b", 3):
        write_index(folder, name)
        with pytest.raises(ValueError, match="is not the name of a file beside it"):
            check_shards(folder)
    for name in ("pipe.safetensors", "directory", "gone.safetensors"):
        write_index(folder, name)
        with pytest.raises(ValueError, match="missing or not a regular file"):
            check_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="is not a weight index"):
        check_shards(folder)


def test_a_run_refuses_a_model_and_a_checkpoint_with_a_shard_outside(trained, tiny_run, tmp_path):
    subprocess.run(["cp", "-r", trained / "checkpoint-1", tmp_path / "checkpoint-1"], check=True)
    (tmp_path / "checkpoint-1" / "model.safetensors").rename(tmp_path / "model.safetensors")
    write_index(tmp_path / "checkpoint-1", "../model.safetensors")
    mark_complete(tmp_path / "checkpoint-1")
    for option in ("--resume_from_checkpoint", "--model_name_or_path"):
        with pytest.raises(ValueError, match=r"shard '\.\./model\.safetensors'"):
            tiny_run(option, str(tmp_path / "checkpoint-1"))


# --- what a run leaves


def test_a_run_leaves_whole_checkpoints_that_name_all_their_files_and_nothing_aside(trained):
    assert not list(trained.rglob("*.partial"))
    for step in (1, 2):
        checkpoint = trained / f"checkpoint-{step}"
        listed = json.loads((checkpoint / "complete.json").read_text())["files"]
        on_disk = {name: os.path.getsize(checkpoint / name) for name in os.listdir(checkpoint)}
        del on_disk["complete.json"]
        assert listed == on_disk
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
            listed
        )


def test_a_run_that_is_resumed_at_its_very_end_takes_no_step_more(trained, tiny_run, max_difference):
    again = tiny_run(*ADAM, "--max_steps", "2", "--resume_from_checkpoint", str(trained / "checkpoint-2"))
    assert state_of(again)["global_step"] == 2
    assert max_difference(again, trained) == 0


def test_the_best_checkpoint_is_named_by_where_it_is_found_and_survives_rotation(tiny_run):
    evaluation = ("--eval_data_path", str(tiny_run.root / "data" / "data.json"), "--eval_strategy", "steps")
    options = ("--eval_steps", "1", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true")
    folder = tiny_run(*evaluation, *options, *SAVING[:-1], "2", "--max_steps", "4", "--load_best_model_at_end", "true")
    for state in (state_of(folder), state_of(folder / "checkpoint-4")):
        assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{state['best_global_step']}")
        assert Path(state["best_model_checkpoint"]).is_dir()
    left = {path.name for path in folder.glob("checkpoint-*")}
    assert left == {"checkpoint-4", f"checkpoint-{state_of(folder)['best_global_step']}"}


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_code_2_and_leaves_the_last_checkpoint_whole(small_disk, tiny_run, capsys):
    output = small_disk / "run"
    options = ["--max_steps", "8", *ADAM, *SAVING, "--output_dir", str(output)]
    assert main(["train", str(tiny_run.recipe), *options]) == 2
    message = capsys.readouterr().err
    whole = sorted(output.glob("checkpoint-*"))
    assert whole and all(incomplete_because(path) is None for path in whole)
    assert f"Last complete checkpoint: {whole[-1]}" in message
    assert f"checkpoint-{len(whole) + 1} could not be written" in message and "MiB are free there" in message
    assert not list(output.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert main(["train", str(tiny_run.recipe), *options, "--resume_from_checkpoint", "latest"]) == 0
    assert [line["step"] for line in loss_lines(output)] == list(range(1, 9))


def test_a_final_model_that_cannot_be_written_leaves_the_one_that_was_there(
    tiny_run, monkeypatch, weights_of, trained, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    before, files = weights_of(folder), sorted(path.name for path in folder.iterdir())

    def no_space(self, output_dir, state_dict=None):
        Path(output_dir, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VlmTrainer, "_save", no_space)
    with pytest.raises(OSError, match=r"could not be written: .*No space left on device"):
        tiny_run(*ADAM, "--max_steps", "1", "--overwrite_output_dir", "true", "--output_dir", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == files
    assert all(torch.equal(before[name], value) for name, value in weights_of(folder).items())


def test_a_run_from_the_beginning_does_not_overwrite_another_one_unasked(tmp_path, caplog):
    for name in ("checkpoint-3", "checkpoint-12"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds checkpoint-\d+ of an earlier run.*--resume_from_checkpoint latest"):
        clear_or_refuse(tmp_path, may_overwrite=False, is_main_process=True)
    clear_or_refuse(tmp_path, may_overwrite=True, is_main_process=False)
    assert (tmp_path / "checkpoint-3").is_dir(), "one process removes"
    clear_or_refuse(tmp_path, may_overwrite=True, is_main_process=True)
    assert not list(tmp_path.iterdir())
    clear_or_refuse(tmp_path, may_overwrite=False, is_main_process=True)
    for weights in ("model-00001-of-00002.safetensors", "adapter_model.safetensors", "objective.safetensors"):
        (tmp_path / weights).touch()
        with pytest.raises(ValueError, match=f"holds {weights} of an earlier run"):
            clear_or_refuse(tmp_path, may_overwrite=False, is_main_process=True)
        (tmp_path / weights).unlink()


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits_and_the_resumed_run_ends_the_same(
    tiny_run, at_step, trained, tmp_path, max_difference, capfd, number, code
):
    def raise_signal(trainer, loss):
        signal.raise_signal(number)
        return loss

    at_step(1, raise_signal)
    command = ["train", str(tiny_run.recipe), *ADAM, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == code
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: saving after this step" in said
    assert f"cal-train {' '.join(command)} --resume_from_checkpoint latest" in said
    assert incomplete_because(tmp_path / "run" / "checkpoint-1") is None
    assert not (tmp_path / "run" / "model.safetensors").exists()  # an unfinished model must not pass for the result
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0
    assert max_difference(tmp_path / "run", trained) == 0


def test_a_stop_in_an_epoch_saves_once_where_checkpoints_come_at_its_end(tiny_run, at_step, monkeypatch):
    saved = []
    original = VlmTrainer._save_checkpoint
    monkeypatch.setattr(VlmTrainer, "_save_checkpoint", lambda self, *rest: (saved.append(1), original(self, *rest)))
    at_step(2, lambda trainer, loss: (signal.raise_signal(signal.SIGTERM), loss)[1])
    with pytest.raises(StoppedBySignal):
        tiny_run("--max_steps", "6", "--save_strategy", "epoch", "--per_device_train_batch_size", "2")
    assert saved == [1]


def exit_code_of(action):
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_signal_ends_at_once_but_not_one_that_a_launcher_repeats(monkeypatch):
    def twice():
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            os._exit(0 if request.number == signal.SIGTERM else 1)

    assert exit_code_of(twice) == 0
    monkeypatch.setattr("cal_train.train.signals.SAME_REQUEST_S", 0.0)
    assert exit_code_of(twice) == 130


# --- steps that are not finite


def spoil_loss(trainer, loss):
    return loss * float("nan")


def spoil_gradient(trainer, loss):
    loss.register_hook(lambda grad: grad * float("inf"))
    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_weights_optimizer_and_schedule_as_they_were(
    tiny_run, monkeypatch, kind, tmp_path, caplog
):
    guard_saw = []
    from cal_train.train.step_guard import StepGuard

    note = StepGuard.note_loss

    def note_loss(self, loss, sample_ids):
        if self.trainer.state.global_step + 1 == 2:
            guard_saw.extend(sample_ids)
            with torch.no_grad():
                if kind == "loss":
                    loss.mul_(float("nan"))
            if kind == "gradient":
                loss.register_hook(lambda grad: grad * float("inf"))
        return note(self, loss, sample_ids)

    monkeypatch.setattr(StepGuard, "note_loss", note_loss)
    schedule = ("--lr_scheduler_type", "linear", "--max_grad_norm", "1", "--gradient_accumulation_steps", "2")
    options = (*ADAM, *schedule, *SAVING, "--max_steps", "3", "--per_device_train_batch_size", "2", "--cal")
    folder = tiny_run(*options, "--max_nonfinite_steps", "1", "--logging_steps", "3")
    one, two, three = (folder / f"checkpoint-{step}" for step in (1, 2, 3))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert (three / name).read_bytes() != (two / name).read_bytes(), name
    steps = [entry["step"] for entry in torch.load(three / "optimizer.pt")["state"].values()]
    assert {float(step) for step in steps} == {2.0}
    (line,) = [line for line in state_of(folder)["log_history"] if "nonfinite" in line]
    assert line == {"step": 2, "nonfinite": kind, "skipped_samples": guard_saw}
    assert len(guard_saw) == 4
    assert f"samples {guard_saw[0]}, {guard_saw[1]}" in caplog.text and "1 of max_nonfinite_steps=1" in caplog.text

    losses = [line["loss"] for line in loss_lines(folder)]
    alone = tiny_run(*options, "--max_nonfinite_steps", "1", "--logging_steps", "1")
    each = [line["loss"] for line in loss_lines(alone)]
    assert losses == pytest.approx([(each[0] + each[2]) / 2]) and each[1] != each[1]

    with pytest.raises(FloatingPointError, match=rf"{kind}.* at step 2.*1 such steps, max_nonfinite_steps is 0"):
        tiny_run(*options)
    with pytest.raises(FloatingPointError, match="2 such steps, max_nonfinite_steps is 1"):  # counted across a resume
        monkeypatch.setattr(StepGuard, "note_loss", lambda self, loss, ids: note(self, loss * float("nan"), ids))
        tiny_run(*options, "--max_nonfinite_steps", "1", "--resume_from_checkpoint", str(two))
