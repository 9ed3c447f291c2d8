"""The demo from package index to result table, as a table of contents.

A 5M-parameter language model and a real pretrained vision tower become a VLM; it is tuned twice from the same start,
without and with CAL, and both are asked about scenes, concepts and a drawing style that training never showed. Every
training step is the command that a user would type, run in a process of its own so that its time and memory are known.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from cal_train.demo.assets import GGUF_FILE, fetch_assets, fetch_language_model
from cal_train.demo.compare import ALL, Comparison, area_under_curve, compare, table_of, write_results
from cal_train.demo.evaluate import Answers, answer_split
from cal_train.demo.language_model import TEMPLATE, train_language_model
from cal_train.demo.splits import TEST_SPLITS, write_splits
from cal_train.evals.heatmap import ScoredSample, draw_heat_map
from cal_train.train.safe_save import complete_checkpoints

IMAGE_SIZE_PX = 56
NUM_TEST_SCENES = 200
NUM_HEAT_MAP_ROWS = 5

# A child's peak starts at that of the process that launches it, so a small process stands between.
_LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=open(sys.argv[1], "w"))
sys.exit(code)
"""


@dataclass(frozen=True)
class Plan:
    """The size of a demo.

    ``language_model_texts`` 0 takes SmolLM2-135M instead of training a small model. ``in_parts``: the demo may be
    stopped at any time; started again it keeps what is finished and goes on from the last checkpoint.
    ``vision_tower``: folder of a tower to take instead of the demo's own.
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


@dataclass(frozen=True)
class Cost:
    """Wall time (seconds) and peak memory (GiB, resident) of one command."""

    command: str
    seconds: float
    peak_memory_gib: float


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

    answers: dict[tuple[str, str], list[Answers]] = {}
    for seed in plan.seeds:
        for name, flag in (("baseline", "false"), ("cal", "true")):
            console.rule(f"stage 2: {name}, seed {seed}")
            folder = plan.runs / f"{name}-{seed}"
            options = ["--cal", flag, "--seed", str(seed), *paths(aligned, folder)]
            train_stage(plan, ["finetune.yaml", *options], folder, console, costs)
            for split in (split for split in TEST_SPLITS if split in files):
                answers.setdefault((split, name), []).append(
                    answer_split(folder, files[split], features=plan.cache / "features")
                )
    return report(plan, files, answers, costs, console)


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
    run_verb(["train", str(plan.recipes / arguments[0]), *arguments[1:], *resume], console, costs)
    if "latest" in resume:  # its seconds are those of the last part only
        costs[-1] = replace(costs[-1], seconds=float("nan"))
    record.write_text(json.dumps(asdict(costs[-1])))


def paths(model: Path, output: Path) -> list[str]:
    """Return the options that chain one command to the next."""
    return ["--model_name_or_path", str(model), "--output_dir", str(output)]


def run_verb(arguments: Sequence[str], console: Console, costs: list[Cost]) -> None:
    """Run ``cal-train VERB ...`` in a process of its own, showing its progress; note time and peak memory.

    Raises:
        ValueError: If the command fails; its own message stands above.
    """
    console.print(f"[bold]$ cal-train {' '.join(arguments)}[/]", highlight=False)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as peak:
        launcher = [sys.executable, "-c", _LAUNCHER, peak.name]
        code = subprocess.call([*launcher, sys.executable, "-m", "cal_train", *arguments])
        peak_kib = int(peak.read() or 0)
    if code:
        raise ValueError(f"`cal-train {' '.join(arguments)}` failed with exit code {code}")
    command = (
        f"{arguments[0]} {Path(arguments[arguments.index('--output_dir') + 1]).name}"
        if ("--output_dir" in arguments)
        else arguments[0]
    )
    costs.append(Cost(command, time.perf_counter() - started, peak_kib / 2**20))


def report(
    plan: Plan,
    files: dict[str, Path],
    answers: dict[tuple[str, str], list[Answers]],
    costs: list[Cost],
    console: Console,
) -> Path:
    """Print and write the comparison, delta as a detector, the costs and a heat map; return the folder."""
    lines: list[Comparison] = []
    detectors: dict[str, float] = {}
    for split in (split for split in TEST_SPLITS if split in files):
        baseline, cal = pooled(answers[split, "baseline"]), pooled(answers[split, "cal"])
        lines += compare(split, baseline, cal)
        for name, pool in (("baseline", baseline), ("CAL", cal)):
            detectors |= {f"{split}, {name}, {type_}": value for type_, value in detection(pool).items()}
    console.rule("results")
    console.print(table_of(lines))
    console.print(detector_table(detectors))
    console.print(cost_table(costs))
    write_results(plan.runs, lines, detectors)
    (plan.runs / "costs.json").write_text(json.dumps([asdict(cost) for cost in costs], indent=2))
    with (plan.runs / "results.md").open("a", encoding="utf-8") as file:
        file.write("\n" + costs_as_markdown(costs))
    picture = heat_map(plan, files["heldout_scenes"], plan.runs / f"cal-{plan.seeds[0]}")
    for line in verdicts(lines):
        console.print(line)
    console.print(f"results: {plan.runs / 'results.md'}   heat map: {picture}")
    console.print(f"next: cal-train preview {plan.recipes / 'finetune.yaml'} --rows 3")
    return plan.runs


def detection(answers: Answers) -> dict[str, float]:
    """Return delta's AUC as a detector of what only the picture tells, over all answer tokens and by question type."""
    by_type = {ALL: area_under_curve(answers.delta, answers.is_visual)}
    for type_ in dict.fromkeys(answers.types):
        chosen = answers.token_types == type_
        by_type[str(type_)] = area_under_curve(answers.delta[chosen], answers.is_visual[chosen])
    return by_type


def pooled(runs: Sequence[Answers]) -> Answers:
    """Return the answers of several seeds as one; a scene's answers of all seeds stay together."""
    return Answers(**{name: np.concatenate([getattr(run, name) for run in runs]) for name in vars(runs[0])})


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


def detector_table(detectors: dict[str, float]) -> Table:
    """Return delta's AUC as a detector of the words that only the image tells."""
    table = Table("split, model and question", "AUC", title="delta as a detector of visual tokens (0.5 = chance)")
    for name, value in detectors.items():
        table.add_row(name, f"{value:.3f}")
    return table


def cost_table(costs: Sequence[Cost]) -> Table:
    """Return wall time and peak memory of every command."""
    table = Table("command", "seconds", "peak GiB", title="cost (each command is a process of its own)")
    for cost in costs:
        table.add_row(cost.command, _measured(cost.seconds, 0), _measured(cost.peak_memory_gib, 2))
    return table


def costs_as_markdown(costs: Sequence[Cost]) -> str:
    """Return the cost table as Markdown."""
    rows = ["| command | seconds | peak GiB |", "| --- | --- | --- |"]
    rows += [
        f"| {cost.command} | {_measured(cost.seconds, 0)} | {_measured(cost.peak_memory_gib, 2)} |" for cost in costs
    ]
    return "\n".join(rows) + "\n"


def _measured(value: float, digits: int) -> str:
    """Return a number, or nothing where it was not measured (NaN)."""
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def heat_map(plan: Plan, data: Path, model: Path) -> Path:
    """Score a few held-out questions with the CAL model and draw their tokens coloured by delta."""
    rows = json.loads(data.read_text(encoding="utf-8"))[:NUM_HEAT_MAP_ROWS]
    few, scores = plan.runs / "heat_map_rows.json", plan.runs / "scores.jsonl"
    few.write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, "-m", "cal_train", "score", "--model", str(model), "--data", str(few)]
    subprocess.run([*command, "--image_root", str(data.parent), "--output", str(scores)], check=True)
    samples = []
    for row, line in zip(rows, scores.read_text(encoding="utf-8").splitlines(), strict=True):
        record = json.loads(line)
        question = row["conversations"][0]["value"].split("\n", 1)[1]
        samples.append(
            ScoredSample(Image.open(data.parent / row["image"]), question, record["tokens"], record["delta"])
        )
    return draw_heat_map(samples, plan.runs / "heat_map.png")
