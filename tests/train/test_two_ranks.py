"""Several gloo ranks against one process: same losses, same weights, CAL on and off, whichever engine."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cal_train.cli.main import main
from cal_train.data.sampling import ShuffledSampler
from cal_train.models.mgm_family import TINY
from cal_train.testing import write_tiny_vlm

pytestmark = pytest.mark.slow

CAL = ("--cal", "true")
PLAIN = ("--cal", "false")
FOUR_STEPS = ("--max_steps", "4")
SEED = 42  # the Trainer's default
HERE = Path(__file__).parent
CPU = HERE.parents[1] / "zero_configs" / "cpu2.yaml"
SLURM = HERE.parents[1] / "recipes" / "slurm.sh"
RUNS_ON_RANKS = HERE / "runs_on_ranks.py"
FSDP2_ON_RANKS = HERE / "fsdp2_on_ranks.py"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(processes, timeout=500):
    """Wait for launchers; a process group that hangs is ended whole and fails the test."""
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def start(command, program=(sys.executable, "-m"), **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    return subprocess.Popen(
        [*program, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(root, runs, world_size=2, deepspeed=False):
    """Train every run of ``{name: arguments}`` on the ranks of one launch; return ``{name: folder}``."""
    folders = {name: root / name for name in runs}
    spec = root / "spec.json"
    spec.write_text(json.dumps([[list(map(str, runs[name])), str(folders[name])] for name in runs]))
    command = ["torch.distributed.run", "--nproc_per_node", world_size, "--master_port", free_port()]
    finish([start([*command, RUNS_ON_RANKS, spec], **({} if deepspeed else {"ACCELERATE_USE_CPU": "true"}))])
    for folder in folders.values():
        assert world_size_of(folder) == world_size
    return folders


def world_size_of(folder):
    return json.loads((folder / "environment.json").read_text())["world_size"]


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if "loss" in line]


def assert_same_run(several, one, start, max_difference):
    assert logged(several, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert logged(several, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)
    assert max_difference(one, start) > 1e-3  # it did move
    assert max_difference(one, several) < 5e-6


PAIRS = tuple(product("tim", repeat=2))  # what two ranks have in a micro-step: text, an image, several images
MICRO_STEPS = tuple(pair for shift in (1, 4) for k in range(9) for pair in (PAIRS[k], PAIRS[(k + shift) % 9]))
SPLIT = ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1", "--max_steps", "18")
SAME_IN_ONE = ("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "1", "--max_steps", "18")
TOWER_TOO = ("--tune_vision_tower", "true", "--vision_tower_lr", "1e-3")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows that the sampler deals out so that the two ranks see `MICRO_STEPS`, with two micro-steps per step."""
    root = tmp_path_factory.mktemp("mixed")
    wanted = [kind for pair in MICRO_STEPS for kind in pair]
    rows = [None] * len(wanted)
    rng = np.random.default_rng(0)
    for kind, place in zip(wanted, ShuffledSampler(NoEpochs(rows), SEED), strict=True):
        names = [f"{place}-{k}.png" for k in range({"t": 0, "i": 1, "m": int(rng.integers(2, 4))}[kind])]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
        answer = f"a {rng.choice(['red', 'green', 'blue'])} {rng.choice(['dog', 'circle'])}" * int(rng.integers(1, 4))
        turns = [{"from": "human", "value": "<image>\n" * len(names) + "what?"}, {"from": "gpt", "value": answer}]
        rows[place] = {"id": f"{kind}-{place}", "conversations": turns, **({"images": names} if names else {})}
    (root / "data.json").write_text(json.dumps(rows))
    return ("--data_path", str(root / "data.json"), "--image_folder", str(root))


class NoEpochs(list):
    def set_epoch(self, epoch):
        pass


@pytest.fixture(scope="module")
def ddp(tiny_run, mixed, tmp_path_factory):
    two = ("--per_device_train_batch_size", "2", *FOUR_STEPS)
    runs = {
        f"{name} {grouped}": ("train", tiny_run.recipe, *cal, *two, "--group_by_modality_length", grouped)
        for (name, cal), grouped in product((("cal", CAL), ("plain", PLAIN)), ("true", "false"))
    }
    runs["mixed cal"] = ("train", tiny_run.recipe, *CAL, *mixed, *SPLIT, *TOWER_TOO)
    runs["mixed plain"] = ("train", tiny_run.recipe, *PLAIN, *mixed, *SPLIT, *TOWER_TOO)
    return launch(tmp_path_factory.mktemp("ddp"), runs)


@pytest.mark.parametrize("grouped", ["true", "false"], ids=["grouped", "shuffled"])
@pytest.mark.parametrize("cal", ["cal", "plain"])
def test_ddp_on_two_ranks_equals_one_process(ddp, tiny_run, max_difference, cal, grouped):
    options = (*(CAL if cal == "cal" else PLAIN), *FOUR_STEPS, "--group_by_modality_length", grouped)
    one = tiny_run(*options, "--per_device_train_batch_size", "4")
    assert_same_run(ddp[f"{cal} {grouped}"], one, tiny_run.root / "vlm", max_difference)


def assert_every_split_was_seen(folder):
    images = [json.loads((folder / f"images-{rank}.json").read_text()) for rank in range(2)]
    kinds = [tuple("tim"[min(count, 2)] for count in counts) for counts in zip(*images, strict=True)]
    assert kinds == list(MICRO_STEPS)


@pytest.mark.parametrize("cal", ["cal", "plain"])
def test_ddp_with_any_split_of_modalities_equals_one_process(ddp, tiny_run, mixed, max_difference, cal):
    assert_every_split_was_seen(ddp[f"mixed {cal}"])
    one = tiny_run(*(CAL if cal == "cal" else PLAIN), *mixed, *SAME_IN_ONE, *TOWER_TOO)
    assert_same_run(ddp[f"mixed {cal}"], one, tiny_run.root / "vlm", max_difference)


ENGINES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def write_deepspeed(path, zero, gather=True):
    """DeepSpeed's settings with every weight really split, and with the Trainer's own optimizer."""
    split = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": gather}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {name: "auto" for name in auto} | {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | (split if zero["stage"] == 3 else {}),
    }
    path.write_text(json.dumps(settings))
    return path


FAMILIES = {"llava_next": {}, "mgm": TINY | {"aux_drop_path": 0.0}}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Folders of tiny models of the families other than LLaVA."""
    root = tmp_path_factory.mktemp("families")
    return {name: write_tiny_vlm(root / name, family=name, family_options=FAMILIES[name]) for name in FAMILIES}


@pytest.fixture(scope="module")
def zero(tiny_run, mixed, families, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    root = tmp_path_factory.mktemp("zero")
    two = ("--per_device_train_batch_size", "2", *FOUR_STEPS)
    runs = {}
    for engine, settings in ENGINES.items():
        file = ("--deepspeed", write_deepspeed(root / f"{engine}.json", settings))
        for name, cal in (("cal", CAL), ("plain", PLAIN)):
            runs[f"{engine} {name}"] = ("train", tiny_run.recipe, *cal, *two, *file)
    file = ("--deepspeed", root / "zero3.json")
    runs["zero3 mixed cal"] = ("train", tiny_run.recipe, *CAL, *mixed, *SPLIT, *TOWER_TOO, *file)
    for family in FAMILIES:
        start = ("--model_name_or_path", families[family])
        runs[f"zero3 mixed {family}"] = ("train", tiny_run.recipe, *CAL, *mixed, *SPLIT, *TOWER_TOO, *start, *file)
    runs["zero3 mixed plain"] = ("train", tiny_run.recipe, *PLAIN, *mixed, *SPLIT, *TOWER_TOO, *file)
    parts = ("--deepspeed", write_deepspeed(root / "in_parts.json", ENGINES["zero3"], gather=False))
    runs["zero3 in parts"] = ("train", tiny_run.recipe, *CAL, *two, *parts)
    return launch(root, runs, deepspeed=True)


@pytest.mark.parametrize("cal", ["cal", "plain"])
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_on_two_ranks_equals_one_process(zero, tiny_run, max_difference, engine, cal):
    one = tiny_run(*(CAL if cal == "cal" else PLAIN), *FOUR_STEPS, "--per_device_train_batch_size", "4")
    assert_same_run(zero[f"{engine} {cal}"], one, tiny_run.root / "vlm", max_difference)


@pytest.mark.parametrize("cal", ["cal", "plain"])
def test_zero3_with_any_split_of_modalities_equals_one_process(zero, tiny_run, mixed, max_difference, cal):
    assert_every_split_was_seen(zero[f"zero3 mixed {cal}"])
    one = tiny_run(*(CAL if cal == "cal" else PLAIN), *mixed, *SAME_IN_ONE, *TOWER_TOO)
    assert_same_run(zero[f"zero3 mixed {cal}"], one, tiny_run.root / "vlm", max_difference)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_trains_every_family_with_any_split_of_modalities(
    zero, tiny_run, families, mixed, max_difference, family
):
    start = ("--model_name_or_path", str(families[family]))
    one = tiny_run(*CAL, *mixed, *SAME_IN_ONE, *TOWER_TOO, *start)
    assert_same_run(zero[f"zero3 mixed {family}"], one, families[family], max_difference)


def test_zero3_saves_the_names_of_its_start_folder(zero, tiny_run):
    start = load_file(tiny_run.root / "vlm" / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in start
    assert load_file(zero["zero3 cal"] / "model.safetensors").keys() == start.keys()


def test_weights_that_zero3_saved_in_parts_read_like_any_model_once_joined(zero, max_difference, tmp_path):
    folder = zero["zero3 in parts"]
    assert not list(folder.glob("*.safetensors"))
    joined = tmp_path / "joined"
    command = [folder / "zero_to_fp32.py", folder, joined, "--safe_serialization"]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    for file in (*folder.glob("*.json"), folder / "chat_template.jinja"):
        shutil.copy(file, joined)
    _, info = AutoModelForImageTextToText.from_pretrained(joined, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for source, name in ((joined, "one"), (zero["zero3 cal"], "other")):
        assert main(["convert", "--from", str(source), "--output", str(tmp_path / name)]) == 0
    assert max_difference(tmp_path / "one", tmp_path / "other") == 0  # compares the names too


def test_fsdp2_on_two_ranks_equals_one_process_with_any_split_of_modalities(tiny_run, tmp_path):
    folder = tiny_run.root / "vlm"
    command = ["torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    finish([start([*command, FSDP2_ON_RANKS, folder, tmp_path])])
    spec = importlib.util.spec_from_file_location("fsdp2_on_ranks", FSDP2_ON_RANKS)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    for name, weighting in script.WEIGHTINGS.items():
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert all(rank["world_size"] == 2 and rank["sharded"] == rank["all"] for rank in ranks)
        losses, model = script.train(folder, weighting)
        assert [sum(pair) for pair in zip(*(rank["losses"] for rank in ranks), strict=True)] == pytest.approx(losses)
        expected, trained = model.state_dict(), load_file(tmp_path / f"{name}.safetensors")
        assert trained.keys() == expected.keys()
        assert max((trained[key] - expected[key]).abs().max() for key in expected) < 5e-6
        assert max((before[key] - expected[key]).abs().max() for key in expected) > 1e-3


@pytest.fixture(scope="module")
def seven_rows(tiny_run, tmp_path_factory):
    """Seven rows, twice: three ranks with two rows each have one for the last step, two ranks three."""
    rows = json.loads((tiny_run.root / "data" / "data.json").read_text())[:7]
    file = tmp_path_factory.mktemp("seven") / "rows.json"
    file.write_text(json.dumps(rows))
    images = ("--image_folder", str(tiny_run.root / "data" / "images"))
    return (*images, "--data_path", str(file), "--max_steps", "-1", "--num_train_epochs", "2")


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_uneven_last_step_trains_each_row_once_and_equals_one_process(
    tiny_run, seven_rows, max_difference, tmp_path, world_size
):
    kinds = {
        "cal": CAL,
        "plain": (*PLAIN, "--group_by_modality_length", "true"),
        "packed": (*CAL, "--packing", "true"),
        # three ranks: the one row of the last step is the only micro-batch, as it is on one process
        "mean of means": (*CAL, "--loss_normalizer", "micro_batch", "--per_device_train_batch_size", "1"),
    }
    two = (*seven_rows, "--per_device_train_batch_size", "2")
    runs = {name: ("train", tiny_run.recipe, *two, *options) for name, options in kinds.items()}
    several = launch(tmp_path, runs, world_size)
    for name, options in kinds.items():
        size = 1 if name == "mean of means" else 2 * world_size
        batch = ("--per_device_train_batch_size", str(size))
        if name == "mean of means":
            batch = (*batch, "--gradient_accumulation_steps", str(world_size))
        one = tiny_run(*seven_rows, *options, *batch)
        assert len(logged(one, "loss")) == 2 * -(-7 // (world_size * (1 if name == "mean of means" else 2)))
        assert_same_run(several[name], one, tiny_run.root / "vlm", max_difference)


SRUN = """#!/bin/bash
export SLURM_STEP_NUM_TASKS=$SLURM_NNODES
[ "$1" = --kill-on-bad-exit=1 ] && shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" && wait $first
"""


def stand_in(folder, name, script):
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def two_launchers(recipe, options):
    """Start a launcher per machine, both of them on this one."""
    port = free_port()
    for machine in range(2):
        launcher = ("accelerate.commands.launch", "--config_file", CPU, "--num_machines", 2, "--num_processes", 2)
        place = ("--machine_rank", machine, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
        yield start([*launcher, *place, "-m", "cal_train", "train", recipe, *options])


def slurm(recipe, options, folder):
    """Start the SLURM script with a stand-in for `srun` that starts both tasks here."""
    stand_in(folder, "srun", SRUN)
    stand_in(folder, "scontrol", "#!/bin/bash\necho 127.0.0.1\necho other-node\n")
    job = {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "two",
        "SLURM_JOB_ID": str(free_port()),
    }
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield start([SLURM, CPU, recipe, *options], program=("bash",), PATH=path, **job)


@pytest.mark.parametrize("by", ["hand", "slurm"])
def test_two_nodes_with_one_rendezvous_equal_one_process(tiny_run, max_difference, tmp_path, by):
    options = (*CAL, *FOUR_STEPS)
    split = (*options, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "two")
    nodes = two_launchers(tiny_run.recipe, split) if by == "hand" else slurm(tiny_run.recipe, split, tmp_path)
    finish(list(nodes))
    assert world_size_of(tmp_path / "two") == 2
    one = tiny_run(*options, "--per_device_train_batch_size", "4")
    assert_same_run(tmp_path / "two", one, tiny_run.root / "vlm", max_difference)


def test_a_launch_that_would_run_something_else_is_refused_by_every_rank(tiny_run, tmp_path):
    one_process = ("accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1)
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "cal_train", "train", tiny_run.recipe)
    fsdp = ("torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), "-m", "cal_train", "train")
    on_cpu = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
    launches = {
        "asks for 2 ranks or more, this run has 1": start([*one_process, *more, "--output_dir", tmp_path / "one"]),
        "FSDP was asked for, but the engine that runs is MULTI_CPU": start(
            [*fsdp, tiny_run.recipe, "--output_dir", tmp_path / "fsdp"], **on_cpu
        ),
    }
    for message, process in launches.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0 and message in " ".join(output.split()), output[-3000:]
    assert not list(tmp_path.rglob("*.safetensors"))
