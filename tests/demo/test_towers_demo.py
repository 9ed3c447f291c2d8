import io
import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from cal_train.data.pair_set import PairSet
from cal_train.data.pairs import Pair
from cal_train.demo import run, towers
from cal_train.demo.assets import Assets
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.run import Cost, Plan, composed_name
from cal_train.demo.splits import write_splits
from cal_train.demo.tower_assets import TowerAssets
from cal_train.demo.tower_concepts import PictureConcept
from cal_train.demo.tower_data import TEST_SPLITS
from cal_train.demo.tower_pictures import _hidden
from cal_train.demo.tower_table import COLUMNS, MethodResult, SplitResult, chance_row, markdown_of
from cal_train.demo.towers import METHODS, TowerPlan, step_seconds
from cal_train.testing import tiny_tokenizer
from cal_train.towers.export import export_tower

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"


def pair_set(captions_per_image):
    pairs = [
        Pair("f", i, str(i), str(i).encode(), tuple(f"{i} {k}" for k in range(n)))
        for i, n in enumerate(captions_per_image)
    ]
    return PairSet.of(pairs)


def test_guessing_scores_what_all_orders_of_the_candidates_score_on_average():
    pairs = pair_set([3, 1, 2])
    found = chance_row({"new_both": pairs}).splits["new_both"]
    owners = pairs.image_of_text.tolist()
    hits = {k: [] for k in (1, 5)}
    for order in itertools.permutations(owners):
        for k in hits:
            hits[k].append(np.mean([image in order[:k] for image in range(3)]))
    assert found.image_to_text_1 == pytest.approx(np.mean(hits[1]))
    assert found.image_to_text_5 == pytest.approx(np.mean(hits[5]))
    assert (found.text_to_image_1, found.text_to_image_5, found.zero_shot) == (1 / 3, 1, 1 / 3)


def result(method, step, peak):
    return MethodResult(method, {"new_both": SplitResult(0.1, 0.2, 0.3, 0.4, 0.5)}, step, peak, 60.0)


def test_costs_are_shown_against_the_first_row_and_guessing_costs_nothing():
    chance = replace(result("guessing", math.nan, math.nan), seconds=math.nan)
    text = markdown_of([result("clip", 2.0, 1.5), result("sycoca", 3.0, 1.8)], chance)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert rows[0] == ["method", "both new: T>I R@5", "both new: zero-shot", "step s", "x", "peak GiB", "x"]
    assert rows[2] == ["clip", "40.0", "50.0", "2.00", "1.00", "1.50", "1.00"]
    assert rows[3][-4:] == ["3.00", "1.50", "1.80", "1.20"]
    assert rows[4] == ["guessing", "40.0", "50.0", "", "", "", ""]


def test_the_table_has_columns_for_every_split():
    assert set(COLUMNS) == set(TEST_SPLITS)


def test_a_steps_time_leaves_out_waiting_for_data_and_the_first_window(tmp_path):
    lines = [(4.0, 0.0), (10.0, 0.5), (20.0, 0.2), (8.0, 0.0)]  # pairs per second, share of waiting
    history = [{"pairs_per_second": rate, "data_wait_share": wait} for rate, wait in lines] + [{"train_runtime": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"per_device_train_batch_size": 16}))
    assert step_seconds(tmp_path) == pytest.approx(0.8)  # of 0.8, 0.64 and 2


def test_hidden_patches_are_grey_and_the_others_as_they_were():
    image = np.random.default_rng(0).random((4, 4, 3))
    shown = _hidden(image, torch.tensor([True, False, False, True]))
    assert (shown[:2, :2] == 0.5).all() and (shown[2:, 2:] == 0.5).all()
    assert (shown[:2, 2:] == image[:2, 2:]).all() and (shown[2:, :2] == image[2:, :2]).all()


def test_another_tower_is_composed_anew_and_the_demos_own_keeps_its_folder(tmp_path):
    plan = Plan("toy", tmp_path, tmp_path, tmp_path, 1, 1, (0,))
    assert composed_name(plan) == "composed"
    names = []
    for content in (b"first", b"second", b"first"):
        (tmp_path / "model.safetensors").write_bytes(content)
        names.append(composed_name(replace(plan, vision_tower=tmp_path)))
    assert names[0] == names[2] != names[1] and "composed" not in names


def write_drawings(folder, code_points, shape):
    folder.mkdir()
    for i, code_point in enumerate(code_points):
        body = shape.format(f"#{(37 * i) % 256:02x}{(91 * i) % 256:02x}60")
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{body}</svg>'
        (folder / f"{code_point}.svg").write_text(svg)
    return folder


def write_vision(folder):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def write_text(folder, is_causal):
    tokenizer = tiny_tokenizer()
    options = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"intermediate_size": 48, "max_position_embeddings": 64, "use_cache": False}
    BertModel(BertConfig(**options, is_decoder=is_causal, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_assets(folder):
    code_points = [f"{i:04X}" for i in range(24)]
    names = [" ".join(pair) for pair in itertools.product(("red", "green", "blue", "yes"), ("square", "circle", "dog"))]
    names += [f"{name} on" for name in names]
    concepts = [
        PictureConcept(code_point, name, ("toy",), i % 3 == 0)
        for i, (code_point, name) in enumerate(zip(code_points, names, strict=True))
    ]
    styles = [
        write_drawings(folder / name, code_points, shape)
        for name, shape in (
            ("a", '<circle cx="4" cy="4" r="3" fill="{}"/>'),
            ("b", '<rect width="9" height="7" fill="{}"/>'),
        )
    ]
    texts = [write_text(folder / f"text_{is_causal}", is_causal) for is_causal in (False, True)]
    return TowerAssets(write_vision(folder / "vision"), *texts, tuple(concepts), *styles)


def write_tower_recipes(plan, assets):
    """The demo's own recipes with the toy's paths and sizes, and two steps."""
    plan.recipes.mkdir()
    for method in plan.methods:
        recipe = yaml.safe_load((RECIPES / "towers" / f"{method}.yaml").read_text())
        is_causal = recipe["text_tower"].endswith("causal")
        recipe |= {"text_tower": str(assets.causal_text_tower if is_causal else assets.text_tower)}
        recipe |= {
            "vision_tower": str(plan.cache / "towers_vision"),
            "data_path": str(plan.cache / "towers/train.jsonl"),
        }
        recipe |= {"max_steps": 2, "global_batch_size": 4, "context_length": 24, "logging_steps": 1}
        recipe |= {"disable_tqdm": True, "report_to": "none"}
        recipe["objective_options"] |= {"embed_dim": 16}
        if "special_token_ids" in recipe["objective_options"]:
            recipe["objective_options"] |= {"special_token_ids": [1, 2]}
        (plan.recipes / f"{method}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole demo at toy size: made-up drawings, random towers, every method in a process of its own."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    assets = toy_assets(folder)
    plan = TowerPlan(folder / "cache", folder / "runs", folder / "recipes")
    write_tower_recipes(plan, assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "fetch_tower_assets", lambda cache: assets)
        patch.setattr(towers, "NUM_LAYERS", 2)
        results = towers.run_tower_demo(plan, Console(file=io.StringIO(), width=200, soft_wrap=True))
    return folder, results


@pytest.mark.slow
def test_the_demo_leaves_a_row_per_method_and_two_pictures(finished):
    _, results = finished
    rows = json.loads((results / "results.json").read_text())
    assert [row["method"] for row in rows] == [*METHODS, "guessing"]
    for row in rows:
        assert set(row["splits"]) == set(TEST_SPLITS)
        shares = [share for split in row["splits"].values() for share in split.values()]
        assert len(shares) == 15 and all(0 <= share <= 1 for share in shares)
    assert all(row["step_seconds"] > 0 and row["peak_memory_gib"] > 0.05 for row in rows[:-1])
    text = (results / "results.md").read_text()
    assert all(f"| {method} |" in text for method in METHODS)
    for name in ("sparc", "sycoca"):
        with Image.open(results / f"{name}.png") as picture:
            assert min(picture.size) > 100


@pytest.mark.slow
def test_a_tower_of_the_demo_is_exported_composed_and_trained_in_the_cal_demo(finished, tmp_path, monkeypatch):
    _, results = finished
    tower = export_tower(results / "clip", tmp_path / "exported")
    trained = Dinov2Model.from_pretrained(results / "clip" / "vision").state_dict()
    exported = Dinov2Model.from_pretrained(tower).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in trained.items())

    def write_language_model(output, *_, **__):
        tokenizer = tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(output)
        tokenizer.save_pretrained(output)

    monkeypatch.setattr(run, "train_language_model", write_language_model)
    plan = Plan("toy", tmp_path / "cache", tmp_path / "runs", tmp_path / "recipes", 16, 60, (0,), vision_tower=tower)
    style = write_drawings(
        tmp_path / "style", [c.code_point for c in CONCEPTS], '<circle cx="4" cy="4" r="3" fill="{}"/>'
    )
    files = write_splits(plan.cache / "scenes", Assets(tower, style, None), 16, 2, image_size=run.IMAGE_SIZE_PX)
    costs: list[Cost] = []
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    composed = run.compose_model(plan, tower, files["pretrain"].parent / "images/train", console, costs)
    plan.recipes.mkdir()
    recipe = yaml.safe_load((RECIPES / "finetune.yaml").read_text())
    recipe |= {"data_path": str(files["finetune"]), "vision_feature_cache": str(plan.cache / "features")}
    recipe |= {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, "cal_low": 0.01}
    (plan.recipes / "finetune.yaml").write_text(yaml.safe_dump(recipe))
    output = plan.runs / "cal-0"
    run.train_stage(plan, ["finetune.yaml", "--cal", "true", *run.paths(composed, output)], output, console, costs)
    model = AutoModelForImageTextToText.from_pretrained(output)
    inside = dict(model.model.vision_tower.state_dict())
    assert all(
        torch.equal(inside[name], value) for name, value in exported.items()
    )  # the VLM's tower is the trained one
    assert [asdict(cost)["command"] for cost in costs[1:]] == ["compose", "train cal-0"]
    shutil.rmtree(output)
