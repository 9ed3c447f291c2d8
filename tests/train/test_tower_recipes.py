"""The tower recipes: published settings, and towers and objectives that fit each other at full size."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cal_train.cli.main import main
from cal_train.cli.tower_recipe import load_tower_recipe
from cal_train.objectives.families import OBJECTIVES, build_objective
from cal_train.testing import tiny_tokenizer, write_tiny_pairs
from cal_train.train.tower_parts import build_towers, image_processor_of, objective_options

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "towers").glob("*.yaml"))
ON_CPU = ["--use_cpu", "true", "--tf32", "false"]  # bf16 and tf32 are refused on a machine without a GPU

# learning rate, weight decay, beta2, warm-up, pairs of a step
PUBLISHED = {
    "clip": (1e-3, 0.1, 0.98, 2000, 4096),  # open_clip's small-data settings
    "siglip": (1e-3, 0.1, 0.95, 2000, 4096),  # beta2: paper; the rest as clip
    "coca": (8e-4, 0.01, 0.999, 0.02, 4096),  # paper
    "sycoca": (5e-4, 0.2, 0.98, 2000, 2048),  # batch: paper
    "sparc": (9e-4, 0.2, 0.98, 2500, 4096),  # within the paper's sweeps
    "llip": (5e-4, 0.2, 0.95, 2000, 4096),  # reference code
}


def test_there_is_a_recipe_for_each_method():
    assert [path.stem for path in RECIPES] == sorted(f"{name}_b16" for name in PUBLISHED)
    assert set(PUBLISHED) == set(OBJECTIVES) - {"filip"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_settings_are_the_published_ones(path):
    recipe = load_tower_recipe(path, ON_CPU)
    args, towers = recipe.training, recipe.towers
    assert path.stem == f"{towers.objective}_b16"
    found = (args.learning_rate, args.weight_decay, args.adam_beta2, args.warmup_steps, towers.global_batch_size)
    assert found == pytest.approx(PUBLISHED[towers.objective])
    assert args.bf16 and args.dataloader_drop_last and recipe.data.min_crop_scale == 0.9
    assert towers.vision_tower["patch_size"] == 16 and towers.vision_tower["image_size"] == 224
    assert args.output_dir == f"runs/towers/{path.stem}"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_towers_and_objective_fit_each_other_at_full_size(path):
    recipe = load_tower_recipe(path, ON_CPU)
    recipe.towers.text_tower["vocab_size"] = 49408
    towers = build_towers(recipe.towers, tiny_tokenizer())
    assert image_processor_of(recipe.towers, towers).crop_size["height"] == 224
    num_vision = sum(p.numel() for p in towers.vision.parameters())
    assert 85e6 < num_vision < 94e6, "a ViT-B/16 has 86M parameters, SigLIP's with its pooling head 93M"
    options = objective_options(recipe.towers, recipe.towers.global_batch_size)
    objective = build_objective(recipe.towers.objective, towers.shape, options)
    assert all(weight > 0 for weight in objective.loss_weights.values())


@pytest.mark.parametrize("path", [*RECIPES, ROOT / "recipes" / "smoke" / "tower_tiny.yaml"], ids=lambda path: path.stem)
def test_header_says_what_a_reader_needs(path):
    header = path.read_text(encoding="utf-8").split("\noutput_dir")[0]
    for word in ("Reproduces", "Data", "Hardware", "Launch", "CAL", "Status"):
        assert re.search(rf"^# {word}\b", header, re.MULTILINE), word
    assert str(path.relative_to(ROOT)) in header


def test_the_smoke_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_pairs("runs/smoke_tower")
    path = ROOT / "recipes" / "smoke" / "tower_tiny.yaml"
    assert yaml.safe_load(path.read_text())["tokenizer"] == "runs/smoke_tower/tokenizer"
    assert main(["tower", str(path), "--report_to", "none"]) == 0
    state = json.loads((tmp_path / "runs/smoke_tower/out/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
