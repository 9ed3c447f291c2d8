"""Towers on two gloo ranks under DeepSpeed and FSDP2: the losses and weights of DDP, which has those of one process.

All runs of an engine are done in one launch (`runs_on_ranks.py`): starting it takes longer than they do.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from cal_train.cli.main import main
from cal_train.cli.tower_recipe import load_tower_recipe
from cal_train.testing import write_tiny_pairs
from cal_train.train.tower_checkpoint import load_tower_model
from cal_train.train.tower_engine import check_tower_engine
from cal_train.train.tower_run import train_towers

HERE = Path(__file__).parent
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "model_type": "clip_text_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip
CAPTIONING = {"num_queries": 4, "decoder_layers": 1, "num_heads": 4}
OBJECTIVES = {
    "clip": {},
    "siglip": {"bias_init": "auto"},
    "sparc": {},
    "coca": CAPTIONING,
    "sycoca": CAPTIONING | {"image_decoder_layers": 1},
    "llip": {"num_heads": 2},
    "filip": {},
}
ENGINES = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
CHUNK = ("--grad_cache_chunk", "1")
ADAM = ("--optim", "adamw_torch", "--learning_rate", "0.01")
SAVING = (*ADAM, "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9", "--max_steps", "6")


def write_recipe(root):
    values = {
        "vision_tower": VISION,
        "text_tower": TEXT,
        "tokenizer": str(root / "tokenizer"),
        "data_path": str(write_tiny_pairs(root)),
        "output_dir": str(root / "unnamed"),
        "global_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",  # unlike Adam it tells a gradient from its double
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_deepspeed(path, zero, gather=True):
    """DeepSpeed's settings with every weight really split, and with the Trainer's own optimizer."""
    split = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": gather}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {name: "auto" for name in auto} | {
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"reduce_bucket_size": "auto"} | zero | (split if zero["stage"] == 3 else {}),
    }
    path.write_text(json.dumps(settings))
    return path


def options(objective, *more, **own):
    mixture = ("--num_mixture_tokens", "4") if objective == "llip" else ()
    settings = json.dumps({"embed_dim": 16} | OBJECTIVES[objective] | own)
    return ("--objective", objective, "--objective_options", settings, *mixture, *more)


PAIRS_AGAIN = ("--eval_strategy", "steps", "--eval_steps", "2", "--eval_data_path")
RUNS = {name: options(name) for name in OBJECTIVES} | {
    "accumulated": options("clip", "--gradient_accumulation_steps", "2"),
    "accumulated chunks": options("siglip", "--gradient_accumulation_steps", "2", *CHUNK),
    "clamped": options("clip", *ADAM, "--max_steps", "12", init_scale=1.0),
    "recomputed": options("coca", "--activation_checkpointing", "true"),
    "bf16": options("siglip", "--bf16", "true"),
}
"""Runs by name, under DDP and under ZeRO."""

SPLIT_RUNS = {
    "zero1": ("clip", "siglip", "accumulated chunks"),
    "zero2": ("clip", "siglip", "clamped", "accumulated chunks", "bf16"),
    "zero3": tuple(RUNS),
    "zero3_offload": ("clip", "siglip", "clamped"),
}


def launch(script, *arguments, **environment):
    """Run a script on two gloo ranks; a launch that hangs is ended whole and fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    process = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def launch_runs(root, recipe, runs, **environment):
    """Train every run of ``{name: options}`` in one launch; return ``{name: folder}``."""
    folders = {name: root / name for name in runs}
    spec = root / "spec.json"
    spec.write_text(json.dumps([[["tower", str(recipe), *runs[name]], str(folders[name])] for name in runs]))
    launch(HERE / "runs_on_ranks.py", spec, **environment)
    for folder in folders.values():
        assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    return folders


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def ddp(recipe, tmp_path_factory):
    return launch_runs(tmp_path_factory.mktemp("ddp"), recipe, RUNS, ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def locked(ddp, recipe):
    """Options of a run that starts from trained towers and locks one."""
    start = ("--vision_tower", str(ddp["clip"] / "vision"), "--text_tower", str(ddp["clip"] / "text"))
    return options("clip", *start, *ADAM, "--lock", "image", "--text_tower_lr", "0.02")


@pytest.fixture(scope="module")
def zero(recipe, locked, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    root = tmp_path_factory.mktemp("zero")
    files = {name: ("--deepspeed", str(write_deepspeed(root / f"{name}.json", ENGINES[name]))) for name in ENGINES}
    runs = {f"{engine} {name}": (*RUNS[name], *files[engine]) for engine, names in SPLIT_RUNS.items() for name in names}
    runs |= {f"zero3 chunks {name}": (*options(name), *CHUNK, *files["zero3"]) for name in OBJECTIVES}
    runs["zero3 locked"] = (*locked, *files["zero3"])
    evaluated = (*PAIRS_AGAIN, str(recipe.parent / "pairs.jsonl"))
    for engine in ("zero1", "zero3"):
        straight = (*options("sycoca"), *SAVING, *evaluated, *files[engine])
        checkpoint = str(root / f"{engine} straight" / "checkpoint-2")
        runs[f"{engine} straight"] = straight
        runs[f"{engine} resumed"] = (*straight, "--resume_from_checkpoint", checkpoint)
    return launch_runs(root, recipe, runs)


def log_of(folder, name="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if name in line]


def weights_of(folder):
    files = [folder / "objective.safetensors", *(folder / part / "model.safetensors" for part in ("vision", "text"))]
    files += folder.glob("learned_tokens.safetensors")
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


def max_difference(first, second):
    a, b = weights_of(first), weights_of(second)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and a[name].shape == b[name].shape for name in a)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_run(one, other, tolerance=1e-5):
    assert log_of(one) == pytest.approx(log_of(other), rel=1e-4)
    assert log_of(one, "grad_norm") == pytest.approx(log_of(other, "grad_norm"), rel=1e-4)
    assert log_of(one, "logit_scale") == pytest.approx(log_of(other, "logit_scale"), rel=1e-5)
    assert max_difference(one, other) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_equals_ddp(zero, ddp, engine, name):
    if name not in SPLIT_RUNS[engine]:
        pytest.skip("one engine of a kind is enough")
    adam = name == "clamped"  # which divides rounding errors by small gradients
    assert_same_run(zero[f"{engine} {name}"], ddp[name], tolerance=1e-4 if adam else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_grad_cache_under_zero3_equals_the_ordinary_step_under_ddp(zero, ddp, name):
    assert_same_run(zero[f"zero3 chunks {name}"], ddp[name])


@pytest.mark.slow
def test_bf16_under_zero_is_autocast_over_float32_weights(zero, ddp):
    for engine in ("zero2", "zero3"):
        losses, expected = log_of(zero[f"{engine} bf16"]), log_of(ddp["bf16"])
        assert losses[0] == pytest.approx(expected[0], rel=1e-6)  # the same rounding
        assert losses != pytest.approx(log_of(ddp["siglip"]), rel=1e-4)  # which float32 does not have
        assert max_difference(zero[f"{engine} bf16"], ddp["bf16"]) < 1e-3  # in bf16 a weight near 1 moves by 4e-3


@pytest.mark.slow
def test_the_clamped_scale_is_that_of_the_optimizer_too(ddp):
    scales = log_of(ddp["clamped"], "logit_scale")
    assert scales[0] == 1 and scales[-1] > 1.001  # held at its limit, then let go: a float below it would come later


@pytest.mark.slow
def test_a_locked_tower_stays_under_zero3_and_the_rest_trains_as_in_one_process(zero, locked, ddp, recipe, tmp_path):
    before, after = weights_of(ddp["clip"]), weights_of(zero["zero3 locked"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("vision/") for name in moved) and any(name.startswith("text/") for name in moved)
    together = launch_runs(tmp_path, recipe, {"ddp": locked}, ACCELERATE_USE_CPU="true")["ddp"]
    assert_same_run(zero["zero3 locked"], together, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_a_resumed_run_is_bit_identical_under_zero(zero, engine):
    straight, resumed = zero[f"{engine} straight"], zero[f"{engine} resumed"]
    assert max_difference(straight, resumed) == 0
    assert log_of(straight) == log_of(resumed) and len(log_of(straight)) == 6
    assert weights_of(resumed)["objective.safetensors:num_steps"] == 6  # SyCoCa's own count
    assert max_difference(straight, straight / "checkpoint-2") > 1e-3


@pytest.mark.slow
def test_evaluation_under_zero3_measures_what_the_verb_measures_afterwards(zero, recipe, tmp_path):
    folder, out = zero["zero3 straight"], tmp_path / "found.json"
    data = str(recipe.parent / "pairs.jsonl")
    assert main(["eval_tower", "--checkpoint", str(folder), "--output", str(out), "--data", data]) == 0
    for name, value in json.loads(out.read_text())["retrieval"].items():
        assert log_of(folder, f"eval_retrieval/{name}")[-1] == pytest.approx(value), name


@pytest.mark.slow
def test_a_tower_of_a_zero3_run_exports_like_any_other(zero, ddp, tmp_path):
    exported = []
    for name, folder in (("ddp", ddp["coca"]), ("zero3", zero["zero3 coca"])):
        assert main(["export_tower", "--checkpoint", str(folder), "--output", str(tmp_path / name)]) == 0
        exported.append(CLIPVisionModel.from_pretrained(tmp_path / name).eval())
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours, theirs = (tower(pixels).last_hidden_state for tower in exported)
    assert (ours - theirs).abs().max() < 1e-5
    assert exported[0].state_dict().keys() == exported[1].state_dict().keys()


@pytest.mark.slow
def test_fsdp2_on_two_ranks_equals_one_process(tmp_path):
    script = HERE / "towers_fsdp2_on_ranks.py"
    launch(script, tmp_path)
    spec = importlib.util.spec_from_file_location("towers_fsdp2_on_ranks", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.OBJECTIVES:
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert all(rank["world_size"] == 2 and not rank["unsharded"] and not rank["lost"] for rank in ranks)
        losses, metrics, model = module.train(name)
        means = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
        assert means == pytest.approx(losses, rel=1e-5), name
        assert ranks[0]["metrics"]["logit_scale"] == pytest.approx(metrics["logit_scale"], rel=1e-5)
        expected, trained = model.state_dict(), load_file(tmp_path / f"{name}.safetensors")
        assert trained.keys() == expected.keys()
        assert max((trained[key] - expected[key]).abs().max() for key in expected) < 1e-5, name
        before = module.build(name).state_dict()
        assert (
            max((before[key] - expected[key]).abs().max() for key in expected if before[key].dtype.is_floating_point)
            > 1e-3
        )


def accelerator_of(zero=None, fsdp=None):
    """What is asked of an Accelerator under DeepSpeed or FSDP."""
    plugin = None
    if zero is not None:
        settings = SimpleNamespace(get_value=lambda name: zero.get(name.removeprefix("zero_optimization.")))
        plugin = SimpleNamespace(zero_stage=zero["stage"], hf_ds_config=settings)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=fsdp))


@pytest.mark.parametrize(
    ("engine", "chunk", "is_best_loaded", "message"),
    [
        ({"zero": {"stage": 0}}, None, False, "DeepSpeed without ZeRO .* take zero_configs/ddp.yaml"),
        ({"zero": {"stage": 3}}, None, False, "stage3_gather_16bit_weights_on_model_save is off"),
        ({"fsdp": {"cpu_ram_efficient_loading": False}}, 4, False, "grad_cache_chunk=4 is not possible under FSDP"),
        ({"fsdp": {"cpu_ram_efficient_loading": True}}, None, False, "add --fsdp_cpu_ram_efficient_loading false"),
        ({"fsdp": {"cpu_ram_efficient_loading": False}}, None, True, "load_best_model_at_end is not possible"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_cure(engine, chunk, is_best_loaded, message):
    fsdp = SimpleNamespace(**engine["fsdp"]) if "fsdp" in engine else None
    with pytest.raises(ValueError, match=message):
        check_tower_engine(accelerator_of(engine.get("zero"), fsdp), chunk, is_best_loaded)


def test_every_zero_file_of_the_repository_is_accepted():
    for file in sorted((HERE.parents[1] / "zero_configs").glob("zero*.json")):
        zero = json.loads(file.read_text())["zero_optimization"]
        check_tower_engine(accelerator_of(zero), 4, True)


def test_scales_of_checkpoints_without_a_dimension_load(recipe, tmp_path):
    folder = train_towers(
        load_tower_recipe(recipe, [*options("siglip"), "--max_steps", "1", "--output_dir", str(tmp_path / "run")])
    )
    weights = load_file(folder / "objective.safetensors")
    older = {name: value.reshape(()) if value.shape == (1,) else value for name, value in weights.items()}
    assert sum(value.ndim == 0 for value in older.values()) == 2
    save_file(older, folder / "objective.safetensors")
    loaded = load_tower_model(folder).objective.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
