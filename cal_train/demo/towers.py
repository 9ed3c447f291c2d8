"""The towers' demo from package index to one table, as a table of contents.

Eight runs from the same real weights, with the same number of steps and pairs: every method of the toolkit, and CLIP a
second time with tuned settings. Each training is the command that a user would type, in a process of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console
from transformers.trainer import TRAINER_STATE_NAME

from cal_train.data.pair_set import PairSet, read_pair_set
from cal_train.data.pairs import PairSource
from cal_train.demo.assets import fill_once
from cal_train.demo.commands import Cost, cost_table, run_verb
from cal_train.demo.cut_tower import cut_tower
from cal_train.demo.tower_assets import fetch_tower_assets
from cal_train.demo.tower_data import SHOWN_FILE, TEST_SPLITS, write_tower_data
from cal_train.demo.tower_pictures import draw_masks, draw_word_maps
from cal_train.demo.tower_table import MethodResult, SplitResult, chance_row, table_of, write_tower_results
from cal_train.evals.towers import load_evaluator

METHODS = ("clip", "clip_tuned", "siglip", "filip", "coca", "sycoca", "sparc", "llip")
"""Names of the recipes, in the order of the table; everything is compared with the first."""

IMAGE_SIZE_PX = 56
NUM_LAYERS = 9
"""Of the vision tower's 12: see `cal_train.demo.cut_tower`."""
NUM_IMAGES_FOR_NORM = 192
TEMPLATES = ("{}", "a picture of {}")


@dataclass(frozen=True)
class TowerPlan:
    """Where the towers' demo reads and writes, and which recipes it runs."""

    cache: Path
    runs: Path
    recipes: Path
    methods: Sequence[str] = METHODS


def run_tower_demo(plan: TowerPlan, console: Console) -> Path:
    """Run the demo and return the folder of its results."""
    console.rule("ingredients")
    assets = fetch_tower_assets(plan.cache)
    data = write_tower_data(plan.cache / "towers", assets, IMAGE_SIZE_PX)
    images = sorted((data / "images").glob("train-*.png"))[:NUM_IMAGES_FOR_NORM]
    fill_once(
        plan.cache / "towers_vision",
        lambda folder: cut_tower(assets.vision_tower, folder, NUM_LAYERS, IMAGE_SIZE_PX, images),
    )

    costs: list[Cost] = []
    results: list[MethodResult] = []
    splits = {split: read_pair_set([PairSource(str(data / f"{split}.jsonl"))]) for split in TEST_SPLITS}
    for method in plan.methods:
        console.rule(method)
        folder = plan.runs / method
        arguments = ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
        run_verb(["tower", str(plan.recipes / f"{method}.yaml"), *arguments], console, costs, f"tower {method}")
        results.append(measure(method, folder, splits, costs[-1]))

    console.rule("results")
    chance = chance_row(splits)
    console.print(table_of(results, chance))
    console.print(cost_table(costs))
    write_tower_results(plan.runs, results, chance)
    show(plan, data, console)
    return plan.runs


def measure(method: str, folder: Path, splits: dict[str, PairSet], cost: Cost) -> MethodResult:
    """Return what a trained run scores on every split, and what its training cost."""
    evaluator = load_evaluator(folder)
    found = {}
    for split, pairs in splits.items():
        recall = evaluator.retrieval(pairs, ks=(1, 5))
        names = [pair.captions[0] for pair in pairs.images]
        accuracy = evaluator.zero_shot(pairs, names, TEMPLATES)["accuracy@1"]
        ways = (recall[f"{way}/recall@{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5))
        found[split] = SplitResult(*ways, zero_shot=accuracy)
    return MethodResult(method, found, step_seconds(folder), cost.peak_memory_gib, cost.seconds)


def step_seconds(folder: Path) -> float:
    """Return the seconds of a step without the waiting for data: the median over the windows of the log.

    The first window is left out where there are others: it holds what happens once.
    """
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    logged = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    working = [
        recipe["per_device_train_batch_size"] / line["pairs_per_second"] * (1 - line["data_wait_share"])
        for line in logged
        if "pairs_per_second" in line
    ]
    return median(working[1:] or working)


def show(plan: TowerPlan, data: Path, console: Console) -> None:
    """Draw what SPARC's words look at and what SyCoCa masks, and say what can be run next."""
    shown = read_pair_set([PairSource(str(data / SHOWN_FILE))])
    for method, draw in (("sparc", draw_word_maps), ("sycoca", draw_masks)):
        if method in plan.methods:
            picture = draw(load_evaluator(plan.runs / method), shown, plan.runs / f"{method}.png")
            console.print(f"picture: {picture}")
    first = plan.runs / plan.methods[0]
    console.print(f"results: {plan.runs / 'results.md'}")
    console.print(
        f"next: cal-train export_tower --checkpoint {first} --output {first}-vision, then cal-train demo "
        f"--vision_tower {first}-vision"
    )
