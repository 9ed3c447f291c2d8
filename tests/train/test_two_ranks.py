"""Two gloo ranks against one process: same losses, same weights, CAL on and off, whichever engine."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def launch(recipe, output, *options, deepspeed=None):
    """Train on two ranks of this machine; assert that there really were two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command += ["-m", "cal_train", "train", str(recipe), "--output_dir", str(output), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if deepspeed:
        command += ["--deepspeed", str(deepspeed)]
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((output / "environment.json").read_text())["world_size"] == 2
    return output


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if "loss" in line]


@pytest.mark.parametrize("grouped", ["true", "false"], ids=["grouped", "shuffled"])
@pytest.mark.parametrize("cal", ["true", "false"], ids=["cal", "plain"])
def test_ddp_on_two_ranks_equals_one_process(tiny_run, max_difference, tmp_path, cal, grouped):
    options = ("--cal", cal, "--group_by_modality_length", grouped, "--max_steps", "4")
    two = launch(tiny_run.recipe, tmp_path / "two", *options, "--per_device_train_batch_size", "2")
    one = tiny_run(*options, "--per_device_train_batch_size", "4")
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert max_difference(one, tiny_run.root / "vlm") > 1e-3
    assert max_difference(one, two) < 5e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_two_ranks_follows_one_process(tiny_run, tmp_path, stage):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    options = ("--cal", "--max_steps", "4", "--optim", "adamw_torch", "--learning_rate", "1e-3")
    two = launch(tiny_run.recipe, tmp_path / "two", *options, "--per_device_train_batch_size", "2", deepspeed=path)
    one = tiny_run(*options, "--per_device_train_batch_size", "4")
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    # Adam does not see a wrong factor on all gradients; their norm does
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3)
