"""The SLURM script, with stand-ins for the programs that it calls."""

import os
import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sh"
STAND_INS = {
    "scontrol": "echo first-node; echo other-node",
    "srun": 'shift; SLURM_NODEID=1 "$@"',
    "accelerate": 'echo "waits $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"; printf "%s " "$@"',
}


def test_the_launcher_waits_for_a_checkpoint_longer_than_by_default_and_ends_before_slurm_does(tmp_path):
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "zero3.yaml", "recipe.yaml", "--cal"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    waits, command = done.stdout.splitlines()
    signalled = re.search(r"^#SBATCH --signal=TERM@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert signalled and 30 < int(waits.removeprefix("waits ")) < int(signalled[1])
    assert "--num_processes 16 --machine_rank 1 --main_process_ip first-node" in command
    assert command.strip().endswith("-m cal_train train recipe.yaml --cal")
