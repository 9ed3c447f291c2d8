"""The demo from package index to result table, as a table of contents.

A 5M-parameter language model and a real pretrained vision tower become a VLM; it is tuned twice from the same start,
without and with CAL, and both are asked about scenes, concepts and a drawing style that training never showed. Training
and evaluation are the commands that a user would type, run in processes of their own so that their time and memory are
known.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from cal_train.demo.assets import GGUF_FILE, fetch_assets, fetch_language_model
from cal_train.demo.commands import Cost, cost_table, costs_as_markdown, run_verb
from cal_train.demo.compare import ALL, Comparison, compare, detector_table, table_of, write_results
from cal_train.demo.eval_tables import tables_of_split
from cal_train.demo.evaluate import (
    Answers,
    Deltas,
    blind_split,
    detection,
    pooled,
    read_answers,
    read_deltas,
    tasks_of,
    write_scored_rows,
)
from cal_train.demo.language_model import TEMPLATE, train_language_model
from cal_train.demo.splits import TEST_SPLITS, write_splits
from cal_train.evals.lmms.results import RESULTS
from cal_train.evals.lmms.scene_tasks import SCENE_TABLES
from cal_train.evals.report.run_folder import SCORES_NAME
from cal_train.train.safe_save import complete_checkpoints

IMAGE_SIZE_PX = 56
NUM_TEST_SCENES = 200
NUM_SCORED_SCENES = 100
"""Of each held-out split, whose tokens delta is looked at."""
EVAL_BATCH_SIZE = 50
SCORED_ROWS = "scored_rows.json"


@dataclass(frozen=True)
class Plan:
    """The size of a demo.

    ``language_model_texts`` 0 takes SmolLM2-135M instead of training a small model. ``in_parts``: the demo may be
    stopped at any time; started again it keeps what is finished and goes on from the last checkpoint.
    ``vision_tower``: folder of a tower to take instead of the demo's own. ``suite`` asks about all held-out splits; its
    tasks look for their tables from the root of the repository that it is in.
    """

    name: str
    cache: Path
    runs: Path
    recipes: Path
    num_train_scenes: int
    language_model_texts: int
    seeds: Sequence[int]
    in_parts: bool = False
    vision_tower: Path | None = None
    suite: Path = Path("eval/suites/demo_splits.yaml")


def demo_plan(recipes: Path) -> Plan:
    """Return the demo of ``make demo``: minutes on two cores."""
    return Plan("demo", Path(".cache/demo"), Path("runs/demo"), recipes, 5000, 14400, (0,))


def long_plan(recipes: Path) -> Plan:
    """Return the demo of ``make demo-long``: SmolLM2-135M and three seeds, hours on two cores."""
    return Plan(
        "demo_long", Path(".cache/demo_long"), Path("runs/demo_long"), recipes, 12000, 0, (0, 1, 2), in_parts=True
    )


def run_demo(plan: Plan, console: Console) -> Path:
    """Run a demo and return the folder of its results."""
    costs: list[Cost] = []
    console.rule("ingredients")
    assets = fetch_assets(plan.cache)
    files = write_splits(
        plan.cache / "scenes", assets, plan.num_train_scenes, NUM_TEST_SCENES, image_size=IMAGE_SIZE_PX
    )
    tower = plan.vision_tower or assets.vision_tower
    composed = compose_model(plan, tower, files["pretrain"].parent / "images/train", console, costs)

    console.rule("stage 1: the projector learns from captions")
    aligned = plan.runs / "pretrain"
    train_stage(plan, ["pretrain.yaml", *paths(composed, aligned)], aligned, console, costs)

    for split in (split for split in TEST_SPLITS if split in files):
        tables_of_split(files[split], plan.suite.resolve().parents[2] / SCENE_TABLES)
    write_scored_rows(plan.runs / SCORED_ROWS, files, NUM_SCORED_SCENES)
    for seed in plan.seeds:
        for name, flag in (("baseline", "false"), ("cal", "true")):
            console.rule(f"stage 2: {name}, seed {seed}")
            folder = plan.runs / f"{name}-{seed}"
            options = ["--cal", flag, "--seed", str(seed), *paths(aligned, folder)]
            train_stage(plan, ["finetune.yaml", *options], folder, console, costs)
            ask_and_score(plan, folder, files, console, costs)
        compare_models(plan, seed, console, costs)
    return report(plan, files, costs, console)


def compose_model(plan: Plan, vision_tower: Path, images: Path, console: Console, costs: list[Cost]) -> Path:
    """Return the folder of the untrained VLM, its projector starting on features standardised on ``images``."""
    output, source = plan.cache / composed_name(plan), []
    if plan.language_model_texts:
        console.rule("a small language model learns the words, and to look things up")
        language_model = plan.cache / "language_model"
        if not (language_model / "tokenizer_config.json").is_file():  # saved last
            started = time.perf_counter()
            train_language_model(language_model, plan.language_model_texts, learning_rate=1e-3, batch_size=16)
            costs.append(Cost("language model (in this process)", time.perf_counter() - started, float("nan")))
    else:
        language_model = fetch_language_model(plan.cache)
        source = ["--gguf_file", GGUF_FILE]
    if not (output / "processor_config.json").is_file():
        arguments = ["compose", "--llm", str(language_model), *source, "--vision_tower", str(vision_tower)]
        arguments += ["--output", str(output), "--template", TEMPLATE, "--image_size", str(IMAGE_SIZE_PX)]
        arguments += ["--standardize_on", str(images)]
        run_verb(arguments, console, costs)
    return output


def composed_name(plan: Plan) -> str:
    """Return the folder's name, which for another tower tells its weights: a tower trained anew is composed anew."""
    if plan.vision_tower is None:
        return "composed"
    with (plan.vision_tower / "model.safetensors").open("rb") as weights:
        return f"composed-{hashlib.file_digest(weights, 'sha256').hexdigest()[:12]}"


def train_stage(plan: Plan, arguments: Sequence[str], folder: Path, console: Console, costs: list[Cost]) -> None:
    """Train a stage into ``folder``; of a demo in parts keep it if it is finished, or go on where it stopped."""
    record, resume = folder / "cost.json", ["--overwrite_output_dir", "true"]
    if plan.in_parts and record.is_file():
        costs.append(Cost(**json.loads(record.read_text())))
        console.print(f"{folder} is finished: kept")
        return
    if plan.in_parts and complete_checkpoints(folder):
        resume = ["--resume_from_checkpoint", "latest"]
    command = ["train", str(plan.recipes / arguments[0]), *arguments[1:], *resume]
    run_verb(command, console, costs, f"train {folder.name}")
    if "latest" in resume:  # its seconds are those of the last part only
        costs[-1] = replace(costs[-1], seconds=float("nan"))
    record.write_text(json.dumps(asdict(costs[-1])))


def paths(model: Path, output: Path) -> list[str]:
    """Return the options that chain one command to the next."""
    return ["--model_name_or_path", str(model), "--output_dir", str(output)]


def ask_and_score(plan: Plan, model: Path, files: dict[str, Path], console: Console, costs: list[Cost]) -> None:
    """Ask a model the held-out questions, with and without their pictures, and score the tokens of some answers.

    Without its picture a scene in another style is the same question, so it is not asked again.
    """
    splits = [split for split in TEST_SPLITS if split in files]
    blind_splits = dict.fromkeys(blind_split(split) for split in splits)
    ways = (
        (results_folder(plan, model.name), splits, []),
        (results_folder(plan, model.name, blind=True), blind_splits, ["--without_image", "true"]),
    )
    for output, asked, options in ways:
        if plan.in_parts and (output / RESULTS).is_file():
            console.print(f"{output} is finished: kept")
            continue
        command = ["eval", "--model", str(model), "--suite", str(plan.suite), "--output", str(output), *options]
        command += ["--batch_size", str(EVAL_BATCH_SIZE), "--tasks", *(task for s in asked for task in tasks_of(s))]
        run_verb(command, console, costs, f"eval {output.name}")
    scores = model / SCORES_NAME
    if plan.in_parts and scores.is_file():
        console.print(f"{scores} is finished: kept")
        return
    if not plan.in_parts:  # what a demo left that was stopped while it scored is of another model
        scores.with_name(f"{SCORES_NAME}.part").unlink(missing_ok=True)
    command = ["score", "--model", str(model), "--data", str(plan.runs / SCORED_ROWS), "--output", str(scores)]
    command += ["--image_root", str(files["heldout_scenes"].parent), "--batch_size", str(EVAL_BATCH_SIZE)]
    run_verb(command, console, costs, f"score {model.name}")


def results_folder(plan: Plan, model: str, blind: bool = False) -> Path:
    """Return where the results of ``cal-train eval`` on a model go."""
    return plan.runs / "eval" / (f"{model}-blind" if blind else model)


def compare_models(plan: Plan, seed: int, console: Console, costs: list[Cost]) -> None:
    """Compare the two models of a seed task by task."""
    pair = [str(results_folder(plan, f"{name}-{seed}")) for name in ("baseline", "cal")]
    output = results_folder(plan, f"compare-{seed}")
    run_verb(["eval", "compare", *pair, "--write", str(output)], console, costs, f"eval {output.name}")


def report(plan: Plan, files: dict[str, Path], costs: list[Cost], console: Console) -> Path:
    """Print and write the comparison, delta as a detector, the costs and the page; return the folder."""
    lines: list[Comparison] = []
    detectors: dict[str, float] = {}
    deltas = {name: [_deltas(plan, files, f"{name}-{seed}") for seed in plan.seeds] for name in ("baseline", "cal")}
    for split in (split for split in TEST_SPLITS if split in files):
        baseline, cal = (
            pooled([_answers(plan, split, files[split], f"{name}-{seed}") for seed in plan.seeds])
            for name in ("baseline", "cal")
        )
        lines += compare(split, baseline, cal)
        for name, found in (("baseline", deltas["baseline"]), ("CAL", deltas["cal"])):
            detected = detection([of_split[split] for of_split in found])
            detectors |= {f"{split}, {name}, {type_}": value for type_, value in detected.items()}
    page = plan.runs / "report.html"
    pair = [str(plan.runs / f"{name}-{plan.seeds[0]}") for name in ("baseline", "cal")]
    run_verb(["report", *pair, "--output", str(page), "--png", str(plan.runs / "pictures")], console, costs, "report")
    console.rule("results")
    console.print(table_of(lines))
    console.print(detector_table(detectors))
    console.print(cost_table(costs))
    write_results(plan.runs, lines, detectors)
    (plan.runs / "costs.json").write_text(json.dumps([asdict(cost) for cost in costs], indent=2))
    with (plan.runs / "results.md").open("a", encoding="utf-8") as file:
        file.write("\n" + costs_as_markdown(costs))
    for line in verdicts(lines):
        console.print(line)
    console.print(f"results: {plan.runs / 'results.md'}")
    console.print(f"report: {page} (opens in a browser from disk)")
    console.print(f"next: cal-train preview {plan.recipes / 'finetune.yaml'} --rows 3")
    return plan.runs


def _answers(plan: Plan, split: str, data: Path, model: str) -> Answers:
    return read_answers(split, data, results_folder(plan, model), results_folder(plan, model, blind=True))


def _deltas(plan: Plan, files: dict[str, Path], model: str) -> dict[str, Deltas]:
    return read_deltas(plan.runs / model / SCORES_NAME, plan.runs / SCORED_ROWS, files, plan.runs / model)


def verdicts(lines: Sequence[Comparison]) -> list[str]:
    """Say in words what the comparison shows, whatever it shows."""
    words = []
    for line in (line for line in lines if line.type == ALL):
        if line.low > 0:
            outcome = "CAL is better"
        elif line.high < 0:
            outcome = "CAL is worse"
        else:
            outcome = "no difference is shown (the interval holds 0)"
        words.append(
            f"{line.split}: {outcome}; {100 * line.difference:+.1f} points [{100 * line.low:+.1f}, "
            f"{100 * line.high:+.1f}], baseline {100 * line.baseline:.1f} %, blind {100 * line.baseline_blind:.1f} %"
        )
    return words
