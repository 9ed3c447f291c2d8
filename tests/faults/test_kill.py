"""A run that is killed with SIGKILL at random moments, also while it saves, and resumed ends bit for bit the same.

``pytest tests/faults -m slow --kills 20`` kills each run twenty times. Runs are forked from this process, in which
everything is imported already: a run then takes seconds, and its ranks are processes like any other.
"""

import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cal_train.cli.main import main
from cal_train.testing import write_tiny_data, write_tiny_vlm

pytestmark = pytest.mark.slow

MAX_STEPS = 12
SEED = 20


@pytest.fixture(scope="module")
def recipe(recipes):
    return recipes / "recipe.yaml"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Recipes with everything that has a position to lose: Adam, dropout, CAL, accumulation, workers, a schedule.

    ``recipe.yaml`` sorts map-style rows, ``streaming.yaml`` packs what it reads from shards.
    """
    root = tmp_path_factory.mktemp("kill")
    write_tiny_vlm(root / "vlm")
    write_tiny_data(root / "data", num_rows=24)
    values = {
        "model_name_or_path": str(root / "vlm"),
        "data_path": str(root / "data" / "data.json"),
        "image_folder": str(root / "data" / "images"),
        "output_dir": str(root / "unnamed"),
        "template": "chat",
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "group_by_modality_length": True,
        "cal": True,
        "lora_enable": True,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "report_to": "none",
        "dataloader_num_workers": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(values))
    write_shards(root / "data", root / "shards")
    values |= {"data_path": str(root / "shards"), "streaming": True, "shuffle_pool": 6, "packing": True}
    values |= {"group_by_modality_length": False}
    (root / "streaming.yaml").write_text(yaml.safe_dump(values))
    return root


def write_shards(data, folder):
    """Write the tiny data as webdataset shards of five rows."""
    folder.mkdir()
    rows = json.loads((data / "data.json").read_text())
    for first in range(0, len(rows), 5):
        with tarfile.open(folder / f"{first:02}.tar", "w") as tar:
            for row in rows[first : first + 5]:
                members = {f"{row['id']}.json": json.dumps(row).encode()}
                if "image" in row:
                    members[f"{row['id']}.png"] = (data / "images" / row["image"]).read_bytes()
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def start(recipe, output, world_size):
    """Fork the ranks of a run that resumes what there is; return their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.mkdir(exist_ok=True)
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)  # its loader workers die with it
            _be_rank(rank, world_size, port, output / f"rank-{rank}.log")
            arguments = ["train", str(recipe), "--output_dir", str(output / "run"), "--resume_from_checkpoint", "auto"]
            try:
                code = main(arguments)
            except SystemExit as error:  # what a signal ends with
                code = int(error.code or 0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                code = 99
            os._exit(code)
        pids.append(pid)
    return pids


def _be_rank(rank, world_size, port, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip


def wait(pids, timeout_s=300):
    """Return the exit codes; kill what is left after the first failure or the time limit."""
    codes, deadline = {}, time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if any(codes.values()) or time.monotonic() > deadline:
            kill([pid for pid in pids if pid not in codes])
            return [codes.get(pid, "killed") for pid in pids]
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def kill(pids):
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def is_saving(run):
    return any(run.glob("*.partial"))


def exit_code(pid):
    """None while it runs."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if ended is None else ended.si_status


def newest_step(run):
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*[0-9]")), default=0)


def wait_for_a_moment(run, pids, chooser, while_saving):
    """Sleep until it is time to kill: not before the first checkpoint of this start, so that every start gets ahead."""
    known, moment = newest_step(run), chooser.random()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        was_running = exit_code(pids[0]) is None
        if newest_step(run) > known:
            break
        assert was_running, f"it ended before it got ahead of step {known}\n{log(run.parent)}"
        time.sleep(0.001)
    time.sleep(0.3 * moment)
    while while_saving and time.monotonic() < deadline and not is_saving(run) and exit_code(pids[0]) is None:
        time.sleep(0.0005)
    time.sleep(0.02 * chooser.random() if while_saving else 0)


def send_to_all_groups(pids, number):
    for pid in pids:
        os.killpg(pid, number)


def result_of(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return load_file(run / "adapter_model.safetensors"), [line["loss"] for line in history if "loss" in line]


def check_it_ran_on(run, world_size):
    assert json.loads((run / "environment.json").read_text())["world_size"] == world_size


@pytest.mark.parametrize(("name", "world_size"), [("recipe", 1), ("recipe", 2), ("streaming", 2)])
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_and_resumed_a_run_ends_bit_for_bit_the_same(
    recipes, tmp_path, request, name, world_size
):
    recipe = recipes / f"{name}.yaml"
    num_kills = request.config.getoption("--kills")
    assert wait(start(recipe, tmp_path / "straight", world_size)) == [0] * world_size, log(tmp_path / "straight")
    check_it_ran_on(tmp_path / "straight" / "run", world_size)
    expected, losses = result_of(tmp_path / "straight" / "run")
    assert len(losses) == MAX_STEPS

    chooser, run = random.Random(SEED), tmp_path / "killed" / "run"
    num_left_half_written, steps, num_here = 0, [], 0
    while len(steps) < num_kills:
        # a few kills use up all steps (on a busy machine fewer): another run, from the beginning
        if num_here == MAX_STEPS // 3 or newest_step(run) == MAX_STEPS:
            assert wait(start(recipe, tmp_path / "killed", world_size)) == [0] * world_size, log(tmp_path / "killed")
            check_it_ends_the_same(run, expected, losses)
            run.rename(tmp_path / f"finished-{len(steps)}-{num_here}")
            num_here = 0
        pids = start(recipe, tmp_path / "killed", world_size)
        wait_for_a_moment(run, pids, chooser, while_saving=len(steps) % 2 == 1)
        codes = {exit_code(pid) for pid in pids}
        assert codes <= {None, 0}, log(tmp_path / "killed")
        kill(pids if chooser.random() < 0.5 or world_size == 1 else pids[::-1])
        if codes == {None}:  # not too late
            num_here += 1
            num_left_half_written += is_saving(run)
            steps.append(newest_step(run))
    assert wait(start(recipe, tmp_path / "killed", world_size)) == [0] * world_size, log(tmp_path / "killed")
    check_it_ends_the_same(run, expected, losses)
    saves = f"{num_left_half_written} left a half-written save"
    print(f"{name}, {world_size} ranks: {num_kills} kills at steps {steps}, {saves}")
    assert num_left_half_written > 0


@pytest.mark.parametrize(
    ("send", "world_size", "number", "code"),
    [
        pytest.param(
            os.killpg, 1, signal.SIGINT, 130, id="ctrl-c"
        ),  # as a terminal does: the loader workers get it too
        pytest.param(os.killpg, 1, signal.SIGTERM, 143, id="whole-group"),  # as Docker and Kubernetes do
        pytest.param(os.kill, 2, signal.SIGTERM, 143, id="one-rank"),  # as a launcher does
        pytest.param(send_to_all_groups, 2, signal.SIGTERM, 143, id="whole-job"),  # as `scancel --full` does
    ],
)
def test_a_signal_to_one_rank_ends_all_ranks_after_the_same_whole_step(
    recipe, tmp_path, send, world_size, number, code
):
    run = tmp_path / "stopped" / "run"
    pids = start(recipe, tmp_path / "stopped", world_size)
    wait_for_a_moment(run, pids, random.Random(SEED), while_saving=False)
    send(pids if send is send_to_all_groups else pids[-1], number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [code] * world_size, log(tmp_path / "stopped")
    check_it_ran_on(run, world_size)
    assert not list(run.glob("*.partial")) and not (run / "adapter_model.safetensors").exists()
    assert wait(start(recipe, tmp_path / "stopped", world_size)) == [0] * world_size, log(tmp_path / "stopped")
    losses = result_of(run)[1]
    assert len(losses) == MAX_STEPS


def check_it_ends_the_same(run, expected, losses):
    found, found_losses = result_of(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found_losses == losses
    assert not list(run.glob("*.partial"))
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{MAX_STEPS}"]


def log(folder):
    return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(Path(folder).glob("rank-*.log")))
