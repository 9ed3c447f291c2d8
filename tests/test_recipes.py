"""Recipes, launcher settings and data notes: they parse, and say what was published."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cal_train.cli.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if "\nobjective:" not in path.read_text(encoding="utf-8")
)
"""Those of VLMs; tests/train/test_tower_recipes.py has the others."""
LAUNCHERS = sorted((ROOT / "zero_configs").glob("*.yaml"))
NUM_GPUS = 8
ON_CPU = ["--use_cpu", "true", "--tf32", "false"]  # bf16 and tf32 are refused on a machine without a GPU

# LLaVA's scripts/v1_5/{pretrain,finetune,finetune_lora}.sh
PUBLISHED = {
    "pretrain": {"batch": 256, "learning_rate": 1e-3, "projector": None, "template": "plain", "aspect": "square"},
    "finetune": {"batch": 128, "learning_rate": 2e-5, "projector": None, "template": "vicuna_v1", "aspect": "pad"},
    "finetune_lora": {"batch": 128, "learning_rate": 2e-4, "projector": 2e-5, "template": "vicuna_v1", "aspect": "pad"},
}
LLAVA15 = [ROOT / "recipes" / size / f"{name}.yaml" for size in ("llava15_7b", "llava15_13b") for name in PUBLISHED]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_search_reaches_the_files():
    assert len(RECIPES) >= 11 and len(LAUNCHERS) >= 5
    assert set(LLAVA15) <= set(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_parses(path):
    recipe = load_recipe(path, ON_CPU)
    assert recipe.cal.cal is False, "recipes are the baseline; --cal turns CAL on"
    assert recipe.model.stage in ("pretrain", "finetune")


@pytest.mark.parametrize("path", LLAVA15, ids=relative)
def test_llava15_has_the_published_hyper_parameters(path):
    recipe, published = load_recipe(path, ON_CPU), PUBLISHED[path.stem]
    training, model, data = recipe.training, recipe.model, recipe.data
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * NUM_GPUS
    assert batch == published["batch"]
    assert training.learning_rate == published["learning_rate"]
    assert model.mm_projector_lr == published["projector"]
    assert model.image_aspect_ratio == published["aspect"]
    assert data.template == published["template"]
    assert data.model_max_length == 2048
    assert data.group_by_modality_length is (path.stem != "pretrain")
    assert model.stage == ("pretrain" if path.stem == "pretrain" else "finetune")
    assert (training.num_train_epochs, training.weight_decay, training.lr_scheduler_type) == (1, 0.0, "cosine")
    assert training.get_warmup_steps(1000) == 30
    assert training.bf16 and training.activation_checkpointing
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["tf32"] is True
    assert model.lora_enable is (path.stem == "finetune_lora")
    if model.lora_enable:
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)


@pytest.mark.parametrize("size", ["llava15_7b", "llava15_13b"])
def test_stage_two_starts_from_the_output_of_stage_one(size):
    first, *second = (load_recipe(ROOT / "recipes" / size / f"{name}.yaml", ON_CPU) for name in PUBLISHED)
    assert {recipe.model.model_name_or_path for recipe in second} == {first.training.output_dir}
    assert len({recipe.training.output_dir for recipe in (first, *second)}) == 3


@pytest.mark.parametrize("path", LLAVA15, ids=relative)
def test_one_flag_turns_cal_on(path):
    cal = load_recipe(path, [*ON_CPU, "--cal"]).cal
    assert (cal.cal, cal.cal_strategy, cal.cal_low, cal.cal_high, cal.cal_window) == (True, "cal", 1.0, 5.0, 3)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_header_says_what_a_reader_needs(path):
    header = path.read_text(encoding="utf-8").split("\nmodel_name_or_path")[0]
    for word in ("Reproduces", "Data", "Hardware", "Launch", "CAL", "Status"):
        assert re.search(rf"^# {word}\b", header, re.MULTILINE), f"{relative(path)} does not say: {word}"
    named = re.findall(r"(?:zero_configs|recipes|data)/[\w/]+\.yaml", header)
    assert relative(path) in named, "the launch line names the file itself"
    for name in named:
        assert (ROOT / name).is_file(), f"{relative(path)} names {name}, which does not exist"


@pytest.mark.parametrize("path", LAUNCHERS, ids=relative)
def test_accelerate_reads_the_launcher_settings(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert config.num_processes == (2 if path.stem == "cpu2" else NUM_GPUS)
    assert config.use_cpu is (path.stem == "cpu2")
    # MULTI_CPU would start one process without a word
    kind = "DEEPSPEED" if path.stem.startswith("zero") else "MULTI_GPU"
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        # accelerate refuses these beside a DeepSpeed file
        assert set(config.deepspeed_config) == {"deepspeed_config_file", "zero3_init_flag"}
        assert config.mixed_precision is None
        settings = Path(config.deepspeed_config["deepspeed_config_file"])
        assert settings.stem == path.stem and settings.is_file()
        assert config.deepspeed_config["zero3_init_flag"] is path.stem.startswith("zero3")


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_settings_leave_to_the_trainer_what_it_knows(name):
    settings = json.loads((ROOT / "zero_configs" / f"{name}.json").read_text(encoding="utf-8"))
    known = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [settings[key] for key in known] == ["auto"] * 4
    assert settings["bf16"]["enabled"] == "auto"
    assert "optimizer" not in settings and "scheduler" not in settings, "would drop the learning rate of each part"
    zero = settings["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) is (zero["stage"] == 3)
    offloaded = {key: zero[key]["device"] for key in ("offload_optimizer", "offload_param") if key in zero}
    assert offloaded == ({"offload_optimizer": "cpu", "offload_param": "cpu"} if name == "zero3_offload" else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_knows_every_zero_setting(name):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads((ROOT / "zero_configs" / f"{name}.json").read_text(encoding="utf-8"))
    zero = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    unknown = set(settings["zero_optimization"]) - {
        known for name, field in DeepSpeedZeroConfig.model_fields.items() for known in (name, field.alias)
    }
    assert not unknown
    assert DeepSpeedZeroConfig(**zero).stage == zero["stage"]


def test_data_notes_add_up():
    notes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "data").glob("*.yaml")}
    assert {"lcs558k", "llava_mix665k"} <= set(notes)
    rows = notes["llava_mix665k"]["rows"]
    assert rows["total"] == sum(rows["by_folder"].values()) == sum(rows["by_source"].values())
    for name, note in notes.items():
        for recipe in note["used_by"]:
            assert f"data/{name}.yaml" in (ROOT / recipe).read_text(encoding="utf-8")


def test_the_smoke_recipe_trains(tmp_path, monkeypatch):
    from cal_train.cli.main import main
    from cal_train.testing import write_tiny_data, write_tiny_vlm

    recipe = ROOT / "recipes" / "smoke" / "llava15_tiny.yaml"
    monkeypatch.chdir(tmp_path)
    write_tiny_vlm("runs/smoke/model")
    write_tiny_data("runs/smoke")
    assert main(["train", str(recipe), "--report_to", "none"]) == 0
    state = json.loads((tmp_path / "runs/smoke/out/checkpoint-4/trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 4 and len(losses) == 4
    assert all(0 < loss < 20 for loss in losses), losses
