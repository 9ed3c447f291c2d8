"""The smoke recipes: the command in the header makes what the recipe needs, and four steps of it train."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cal_train.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPES = {
    "llava15_tiny": "llava",
    "llava_next_tiny": "llava_next",
    "mgm_tiny": "mgm",
    "mgm_hd_tiny": "mgm",
}
# one parameter of each part that a family's second stage trains, and of each that it leaves alone
TRAINED = {
    "llava": ["multi_modal_projector", "language_model"],
    "llava_next": ["multi_modal_projector", "language_model", "image_newline", "vision_tower"],
    "mgm": ["multi_modal_projector", "language_model", "patch_info_mining"],
}
FROZEN = {"llava": ["vision_tower"], "llava_next": [], "mgm": ["vision_tower.", "vision_tower_aux"]}


def command_of(recipe: Path) -> str:
    """Return the Python code that the header gives for making model and data."""
    header = recipe.read_text(encoding="utf-8").split("\nmodel_name_or_path")[0]
    found = re.search(r'^#\s+python -c "(.*?)"$', header, re.MULTILINE | re.DOTALL)
    assert found, f"{recipe.name} has no command that makes its model and data"
    return re.sub(r"\\\n#\s*", "", found.group(1))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_there_is_one_for_each_family():
    found = {path.stem for path in (ROOT / "recipes" / "smoke").glob("*.yaml")} - {"tower_tiny"}
    assert found == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name, tmp_path, monkeypatch):
    recipe = ROOT / "recipes" / "smoke" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    exec(command_of(recipe), {})
    assert main(["train", str(recipe), "--cal", "--report_to", "none"]) == 0

    (out,) = tmp_path.glob("runs/*/out")
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 4 and len(losses) == 4
    assert all(0 < loss < 20 for loss in losses), losses

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == RECIPES[name]
    assert config.get("image_grid", 1) == (2 if name == "mgm_hd_tiny" else 1)

    before, after = weights_of(out.parent / "model"), weights_of(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    for part in TRAINED[RECIPES[name]]:
        assert any(part in key for key in changed), f"{part} did not move"
    for part in FROZEN[RECIPES[name]]:
        assert any(part in key for key in before) and not any(part in key for key in changed), f"{part} moved"
