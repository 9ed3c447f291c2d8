"""Recipes, launcher settings and data notes: they parse, and say what was published."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cal_train.cli import compose
from cal_train.cli.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if "\nobjective:" not in path.read_text(encoding="utf-8")
)
"""Those of VLMs; tests/train/test_tower_recipes.py has the others."""
LAUNCHERS = sorted((ROOT / "zero_configs").glob("*.yaml"))
NUM_GPUS = 8
PUBLISHED_WORDS = ("Time", "Expected", "Before")
ON_CPU = ["--use_cpu", "true", "--tf32", "false"]  # bf16 and tf32 are refused on a machine without a GPU

# LLaVA's scripts/v1_5/{pretrain,finetune,finetune_lora}.sh
PUBLISHED = {
    "pretrain": {"batch": 256, "learning_rate": 1e-3, "projector": None, "template": "plain", "aspect": "square"},
    "finetune": {"batch": 128, "learning_rate": 2e-5, "projector": None, "template": "vicuna_v1", "aspect": "pad"},
    "finetune_lora": {"batch": 128, "learning_rate": 2e-4, "projector": 2e-5, "template": "vicuna_v1", "aspect": "pad"},
}
LLAVA15 = [ROOT / "recipes" / size / f"{name}.yaml" for size in ("llava15_7b", "llava15_13b") for name in PUBLISHED]

# per recipe: template, longest row, aspect ratio, learning rate of the vision tower
# CAL's run_scripts/llava16_*.sh and scripts/general/*.sh; MGM's scripts/{gemma,llama}/train/*.sh
FAMILIES = {
    "llava_next_7b/pretrain": ("plain", 4096, "anyres", None),
    "llava_next_7b/finetune": ("vicuna_v1", 4096, "anyres", 2e-6),
    "llava_next_13b/pretrain": ("plain", 4096, "anyres", None),
    "llava_next_13b/finetune": ("vicuna_v1", 4096, "anyres", 2e-6),
    "mgm_2b/pretrain": ("mgm_gemma", 2048, "square", None),
    "mgm_2b/finetune": ("mgm_gemma", 2048, "pad", None),
    "mgm_7b/pretrain": ("plain", 2048, "square", None),
    "mgm_7b/finetune": ("vicuna_v1", 2048, "pad", None),
    "mgm_13b/pretrain": ("plain", 2048, "square", None),
    "mgm_13b/finetune": ("vicuna_v1", 2048, "pad", None),
    "mgm_7b_hd/finetune": ("vicuna_v1", 4096, "pad", None),
    "mgm_13b_hd/finetune": ("vicuna_v1", 4096, "pad", None),
}
# scores without CAL: CAL's README for LLaVA-NeXT (the first five), MGM's README for MGM
SCORES = {
    "llava_next_7b": ("542", "75.1", "62.2", "64.2", "68.5"),
    "llava_next_13b": ("553", "78.4", "63.8", "67.0", "71.8"),
    "mgm_2b": ("56.2", "59.8", "1341 + 312", "31.1", "31.7", "29.1", "29.4"),
    "mgm_7b": ("65.2", "69.3", "1523 + 316", "40.8", "36.1", "32.8", "31.4"),
    "mgm_13b": ("65.9", "68.5", "1565 + 322", "46.0", "38.1", "33.5", "37.0"),
    "mgm_7b_hd": ("68.4", "65.8", "1546 + 319", "41.3", "36.8", "32.9", "32.2"),
    "mgm_13b_hd": ("70.2", "68.6", "1597 + 320", "50.5", "37.3", "35.1", "37.0"),
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def recipe_path(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def header_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("\nmodel_name_or_path")[0]


def test_the_search_reaches_the_files():
    assert len(RECIPES) >= 26 and len(LAUNCHERS) >= 5
    assert set(LLAVA15) <= set(RECIPES)
    of_families = {path for path in RECIPES if path.parent.name.startswith(("llava_next", "mgm"))}
    assert of_families == {recipe_path(name) for name in FAMILIES}


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


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_have_the_published_hyper_parameters(name):
    template, max_length, aspect, vision_tower_lr = FAMILIES[name]
    recipe = load_recipe(recipe_path(name), ON_CPU)
    training, model, data = recipe.training, recipe.model, recipe.data
    is_first = name.endswith("pretrain")
    assert model.stage == ("pretrain" if is_first else "finetune")
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * NUM_GPUS
    assert (batch, training.learning_rate) == ((256, 1e-3) if is_first else (128, 2e-5))
    assert (data.template, data.model_max_length, model.image_aspect_ratio) == (template, max_length, aspect)
    assert model.vision_tower_lr == vision_tower_lr
    assert model.tune_vision_tower is (True if vision_tower_lr else None), "by default the stage freezes it"
    assert (model.mm_projector_lr, model.tune_projector, model.tune_language_model) == (None, None, None)
    assert data.group_by_modality_length is not is_first
    assert data.image_position == ("keep" if is_first else "front")
    assert (training.num_train_epochs, training.weight_decay, training.lr_scheduler_type) == (1, 0.0, "cosine")
    assert training.get_warmup_steps(1000) == 30
    assert training.bf16 and training.activation_checkpointing and not model.lora_enable
    assert yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))["tf32"] is True


@pytest.mark.parametrize("folder", SCORES)
def test_header_gives_the_published_scores_in_their_order(folder):
    header = header_of(recipe_path(f"{folder}/finetune"))
    expected = header[header.index("# Expected") : header.index("With CAL")]
    numbers = re.findall(r"(?<![\d.])\d+ \+ \d+|\d+\.\d|\b[45]\d\d\b", expected)
    assert tuple(numbers[: len(SCORES[folder])]) == SCORES[folder]


@pytest.mark.parametrize("size", ["llava15_7b", "llava15_13b"])
def test_stage_two_starts_from_the_output_of_stage_one(size):
    first, *second = (load_recipe(ROOT / "recipes" / size / f"{name}.yaml", ON_CPU) for name in PUBLISHED)
    assert {recipe.model.model_name_or_path for recipe in second} == {first.training.output_dir}
    assert len({recipe.training.output_dir for recipe in (first, *second)}) == 3


@pytest.mark.parametrize("folder", [name.split("/")[0] for name in FAMILIES if name.endswith("pretrain")])
def test_the_chain_of_the_other_families_is_closed(folder):
    first, second = (load_recipe(recipe_path(f"{folder}/{stage}"), ON_CPU) for stage in ("pretrain", "finetune"))
    assert second.model.model_name_or_path == first.training.output_dir != second.training.output_dir
    header = header_of(recipe_path(f"{folder}/pretrain"))
    found = re.search(r"cal-train compose (.*?--output \S+)$", header, re.MULTILINE | re.DOTALL)
    assert found, "the header gives the command that makes the model"
    parser = argparse.ArgumentParser()
    compose.add_arguments(parser)
    command = parser.parse_args(shlex.split(re.sub(r"\\\n#", "", found.group(1))))
    assert str(command.output) == first.model.model_name_or_path
    assert command.family == folder.rsplit("_", 1)[0]
    assert (command.aux_tower is not None) is folder.startswith("mgm")


@pytest.mark.parametrize("folder", ["mgm_7b", "mgm_13b"])
def test_hd_starts_from_the_first_stage_of_the_smaller_images(folder):
    first, high = load_recipe(recipe_path(f"{folder}/pretrain"), ON_CPU), recipe_path(f"{folder}_hd/finetune")
    recipe, before = load_recipe(high, ON_CPU), header_of(high).split("# Before")[1].split("# Launch")[0]
    assert not recipe_path(f"{folder}_hd/pretrain").exists(), "the original has no such stage"
    assert (recipe.model.model_name_or_path, recipe.model.image_grid) == (first.training.output_dir, 2)
    assert f"recipes/{folder}/pretrain.yaml" in before
    plain = load_recipe(recipe_path(f"{folder}/finetune"), ON_CPU)
    assert recipe.training.output_dir != plain.training.output_dir


@pytest.mark.parametrize("path", [*LLAVA15, *map(recipe_path, FAMILIES)], ids=relative)
def test_one_flag_turns_cal_on(path):
    cal = load_recipe(path, [*ON_CPU, "--cal"]).cal
    assert (cal.cal, cal.cal_strategy, cal.cal_low, cal.cal_high, cal.cal_window) == (True, "cal", 1.0, 5.0, 3)


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_header_says_what_a_reader_needs(path):
    header = header_of(path)
    is_published = path in LLAVA15 or path.parent.name in SCORES
    for word in ("Reproduces", "Data", "Hardware", "Launch", "CAL", "Status", *PUBLISHED_WORDS * is_published):
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
    kind = "DEEPSPEED" if path.stem.startswith("zero") else "FSDP" if path.stem == "fsdp2" else "MULTI_GPU"
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        # accelerate refuses these beside a DeepSpeed file
        assert set(config.deepspeed_config) == {"deepspeed_config_file", "zero3_init_flag"}
        assert config.mixed_precision is None
        settings = Path(config.deepspeed_config["deepspeed_config_file"])
        assert settings.stem == path.stem and settings.is_file()
        assert config.deepspeed_config["zero3_init_flag"] is path.stem.startswith("zero3")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
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
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
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
    assert set(notes) == {
        "lcs558k", "llava_mix665k", "llava_next", "open_llava_next", "mgm_pretrain", "mgm_instruction",
    }  # fmt: skip
    rows = notes["llava_mix665k"]["rows"]
    assert rows["total"] == sum(rows["by_folder"].values())
    for name in ("llava_mix665k", "mgm_pretrain", "mgm_instruction"):
        assert notes[name]["rows"]["total"] == sum(notes[name]["rows"]["by_source"].values())
    for name, note in notes.items():
        assert {"name", "source", "licence", "files", "layout", "rows", "template", "known_problems"} <= set(note)
        for recipe in note["used_by"]:
            assert f"data/{name}.yaml" in (ROOT / recipe).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_recipe_and_note_name_the_same_files(name):
    data = load_recipe(recipe_path(name), ON_CPU).data
    (note,) = re.findall(r"see (data/\w+\.yaml)", header_of(recipe_path(name)))
    check = yaml.safe_load((ROOT / note).read_text(encoding="utf-8"))["check"]
    assert check.split() == ["cal-train", "check_data", data.data_path, "--image_root", data.image_folder]
