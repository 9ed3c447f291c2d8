import io
import json
import math
import resource
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from cal_train.demo import run
from cal_train.demo.assets import GGUF_FILE, Assets
from cal_train.demo.commands import Cost, costs_as_markdown, run_verb
from cal_train.demo.compare import Answers, Comparison, compare
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.evaluate import pooled
from cal_train.demo.run import Plan, ask_and_score, compose_model, train_stage, verdicts
from cal_train.demo.scenes import QUESTION_TYPES
from cal_train.demo.splits import TEST_SPLITS
from cal_train.evals.lmms.results import read_results
from cal_train.train.safe_save import mark_complete

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "demo"


def quiet():
    return Console(file=io.StringIO(), width=200, soft_wrap=True)


def plan(folder, texts=600):
    suite = folder / "eval" / "suites" / "demo_splits.yaml"
    return Plan("toy", folder / "cache", folder / "runs", folder / "recipes", 40, texts, (0,), suite=suite)


def answers(scenes, is_right):
    right, n = np.array(is_right, bool), len(scenes)
    return Answers(np.full(n, "name"), np.array(scenes), right, ~right)


def line(**values):
    base = Comparison("heldout_scenes", "all", 10, 0.5, 0.625, 0.125, 0.05, 0.2, 0.25, 0.25)
    return replace(base, **values)


def test_pooled_seeds_keep_every_answer_in_order_and_share_their_scenes():
    first, second = answers(["a", "b"], [1, 0]), answers(["a", "b"], [1, 1])
    pool = pooled([first, second])
    assert pool.scenes.tolist() == ["a", "b", "a", "b"] and pool.is_right.tolist() == [True, False, True, True]
    assert pool.is_right_blind.tolist() == [False, True, False, False] and pool.types.tolist() == ["name"] * 4


def test_the_same_answers_under_a_second_seed_make_no_interval_narrower():
    rng = np.random.default_rng(0)
    scenes = [f"s{i}" for i in range(40)]
    baseline, cal = (answers(scenes, rng.random(40) < 0.5) for _ in range(2))
    once, twice = compare("s", baseline, cal)[-1], compare("s", pooled([baseline] * 2), pooled([cal] * 2))[-1]
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high)) and twice.num_questions == 80


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "CAL is better"),
        (-0.2, -0.01, "CAL is worse"),
        (-0.01, 0.2, "no difference is shown"),
        (0.0, 0.2, "no difference is shown"),
        (-0.2, 0.0, "no difference is shown"),
    ],
)
def test_a_verdict_is_drawn_from_the_interval_alone(low, high, words):
    (verdict,) = verdicts([line(low=low, high=high)])
    assert words in verdict
    assert sum(phrase in verdict for phrase in ("better", "worse", "no difference")) == 1


def test_a_verdict_states_its_numbers_in_percent_and_there_is_one_per_split():
    lines = [line(type="name"), line(), line(type="place", split="heldout_style"), line(split="heldout_style")]
    first, second = verdicts(lines)
    assert first.startswith("heldout_scenes: ") and second.startswith("heldout_style: ")
    assert "+12.5 points [+5.0, +20.0], baseline 50.0 %, blind 25.0 %" in first


def test_costs_leave_out_a_memory_that_was_not_measured():
    text = costs_as_markdown([Cost("train cal-0", 61.6, 1.256), Cost("language model", 30.2, math.nan)])
    assert text.splitlines()[2:] == ["| train cal-0 | 62 | 1.26 |", "| language model | 30 |  |"]
    assert all(row.count("|") == 4 for row in text.splitlines())


def test_a_failing_command_is_named_with_its_exit_code():
    costs = []
    with pytest.raises(ValueError, match=r"`cal-train no_such_verb --x` failed with exit code 2"):
        run_verb(["no_such_verb", "--x"], quiet(), costs)
    assert costs == []


@pytest.fixture(scope="module")
def env_cost():
    """The cost of one command, started by a process that has been larger than the command ever is."""
    np.ones(2**29, np.uint8).sum()
    costs, started = [], time.perf_counter()
    run_verb(["env"], quiet(), costs)
    elapsed = time.perf_counter() - started
    (cost,) = costs
    return cost, elapsed


def test_a_command_that_succeeds_is_noted_with_its_time_and_memory(env_cost):
    cost, elapsed = env_cost
    assert cost.command == "env" and 0 < cost.seconds <= elapsed
    assert 0.05 < cost.peak_memory_gib < 16  # GiB: a process that imports torch


def test_the_memory_of_a_command_is_not_that_of_the_process_that_starts_it(env_cost):
    own_peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert env_cost[0].peak_memory_gib < 0.9 * own_peak_gib


def test_a_model_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    for name, last_file in (("language_model", "tokenizer_config.json"), ("composed", "processor_config.json")):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / last_file).write_text("{}")
    for name in ("train_language_model", "run_verb"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("made again"))
    costs = []
    assert (
        compose_model(plan(tmp_path), tmp_path / "tower", tmp_path / "images", quiet(), costs)
        == tmp_path / "cache" / "composed"
    )
    assert costs == []


def test_without_texts_the_fetched_gguf_file_is_composed(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(run, "fetch_language_model", lambda cache: cache / "smollm2")
    monkeypatch.setattr(run, "train_language_model", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(run, "run_verb", lambda arguments, *_: commands.append(list(arguments)))
    compose_model(plan(tmp_path, texts=0), tmp_path / "tower", tmp_path / "images", quiet(), [])
    (command,) = commands
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert command[0] == "compose" and options["--gguf_file"] == GGUF_FILE
    assert options["--llm"] == str(tmp_path / "cache" / "smollm2")
    assert options["--standardize_on"] == str(tmp_path / "images")


def test_a_demo_in_parts_goes_on_where_it_stopped_and_keeps_what_is_finished(tmp_path, monkeypatch):
    commands = []

    def run_verb(arguments, _, costs, label):
        commands.append(list(arguments))
        costs.append(Cost(label, 12.0, 1.5))

    monkeypatch.setattr(run, "run_verb", run_verb)
    in_parts, folder = replace(plan(tmp_path), in_parts=True), tmp_path / "runs" / "baseline-0"
    (folder / "checkpoint-20").mkdir(parents=True)
    (folder / "checkpoint-20" / "trainer_state.json").write_text("{}")
    mark_complete(folder / "checkpoint-20")
    for _ in range(2):
        train_stage(in_parts, ["finetune.yaml", "--seed", "0"], folder, quiet(), costs := [])
        assert costs[0].command == "train baseline-0" and np.isnan(costs[0].seconds)  # of a part of the stage only
    recipe = str(tmp_path / "recipes" / "finetune.yaml")
    assert commands == [["train", recipe, "--seed", "0", "--resume_from_checkpoint", "latest"]]
    train_stage(plan(tmp_path), ["finetune.yaml"], folder, quiet(), costs := [])  # in one part: always anew
    assert commands[1:] == [["train", recipe, "--overwrite_output_dir", "true"]] and costs == [
        Cost("train baseline-0", 12.0, 1.5)
    ]


def test_a_demo_in_parts_evaluates_once_and_any_other_each_time(tmp_path, monkeypatch):
    commands, model = [], tmp_path / "runs" / "cal-0"
    monkeypatch.setattr(run, "run_verb", lambda arguments, *_: commands.append(list(arguments)))
    files = {split: tmp_path / "scenes" / f"{split}.json" for split in ("heldout_scenes", "heldout_style")}
    ask_and_score(plan(tmp_path), model, files, quiet(), [])
    assert [command[0] for command in commands] == ["eval", "eval", "score"]
    seen, blind = (command[command.index("--tasks") + 1 :] for command in commands[:2])
    types = ["name", "kind", "place", "count", "presence"]
    assert sorted(seen) == sorted(f"{split}_{type_}" for split in ("demo", "demo_style") for type_ in types)
    assert sorted(blind) == sorted(f"demo_{type_}" for type_ in types)  # the same questions: asked once
    assert "--without_image" not in commands[0] and "--without_image" in commands[1]
    for command in commands[:2]:
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True)
        (output / "results.json").write_text("{}")
    model.mkdir(parents=True)
    (model / "scores.jsonl").write_text("")
    (model / "scores.jsonl.part").write_text("of the model before")
    ask_and_score(replace(plan(tmp_path), in_parts=True), model, files, quiet(), [])
    assert len(commands) == 3
    ask_and_score(plan(tmp_path), model, files, quiet(), [])
    assert len(commands) == 6 and not (model / "scores.jsonl.part").exists()


def write_style(folder, shape):
    folder.mkdir()
    for i, concept in enumerate(CONCEPTS):
        text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{shape.format(f"#{8 * i:02x}4080")}</svg>'
        (folder / f"{concept.code_point}.svg").write_text(text)
    return folder


def write_tower(folder):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor.save_pretrained(folder)
    return folder


def write_recipes(toy):
    """The demo's own recipes with the toy's paths, two steps, and a clamp that such small deltas get past."""
    toy.recipes.mkdir()
    for stage in ("pretrain", "finetune"):
        recipe = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
        recipe |= {"data_path": str(toy.cache / "scenes" / f"{stage}.json"), "max_steps": 2, "disable_tqdm": True}
        recipe |= {"vision_feature_cache": str(toy.cache / "features"), "per_device_train_batch_size": 4}
        recipe["cal_low"] = 0.01
        (toy.recipes / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole demo at toy size: made-up drawings and a random tower, all commands in processes of their own."""
    pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: the demo's evaluation is NOT tested")
    folder = tmp_path_factory.mktemp("demo")
    toy = plan(folder, texts=60)
    write_recipes(toy)
    shutil.copytree(ROOT / "eval", folder / "eval")
    circle, square = '<circle cx="4" cy="4" r="3" fill="{}"/>', '<rect width="9" height="7" fill="{}"/>'
    assets = Assets(write_tower(folder / "tower"), write_style(folder / "a", circle), write_style(folder / "b", square))
    printed = io.StringIO()
    console = Console(file=printed, width=200, soft_wrap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fetch_assets", lambda cache: assets)
        # few texts suffice where all words come often: of the seeds 0 to 7 this one needs the fewest
        patch.setattr(run, "train_language_model", partial(run.train_language_model, seed=3))
        patch.setattr(run, "NUM_TEST_SCENES", 4)
        patch.setattr(run, "NUM_SCORED_SCENES", 3)
        results = run.run_demo(toy, console)
    return toy, results, printed.getvalue()


@pytest.mark.slow
def test_the_demo_leaves_its_tables_costs_and_picture(finished):
    toy, results, printed = finished
    assert results == toy.runs
    table = [
        [cell.strip() for cell in row.split("|")[1:4]] for row in (results / "results.md").read_text().splitlines()
    ]
    for split in TEST_SPLITS:
        for type_, count in {**dict.fromkeys(QUESTION_TYPES, 4), "all": 4 * len(QUESTION_TYPES)}.items():
            assert [split, type_, str(count)] in table
        assert any(row.startswith(f"{split}: ") for row in printed.splitlines())  # the verdict
    result = json.loads((results / "results.json").read_text())
    assert {entry["split"] for entry in result["accuracy"]} == set(TEST_SPLITS)
    assert set(result["auc_of_delta"]) == {
        f"{split}, {name}, {type_}"
        for split in TEST_SPLITS
        for name in ("baseline", "CAL")
        for type_ in ("all", *QUESTION_TYPES)
    }
    assert all(0 <= area <= 1 for area in result["auc_of_delta"].values())
    with Image.open(results / "pictures" / "heat_map_2.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.slow
def test_the_demo_evaluates_through_lmms_eval_and_ends_with_its_page(finished):
    _, results, printed = finished
    last = [row for row in printed.splitlines() if row.strip()][-3:]
    assert last[0].startswith("results: ") and last[2].startswith("next: cal-train preview ")
    page = Path(last[1].removeprefix("report: ").split()[0])
    assert page == results / "report.html" and "heldout_scenes/scene-00000/name" in page.read_text()
    accuracy = json.loads((results / "results.json").read_text())["accuracy"]
    for name in ("baseline", "cal"):
        summary, samples = read_results(results / "eval" / f"{name}-0")
        assert summary["versions"]["lmms_eval"].startswith("0.7.") and len(samples) == 15
        blind = read_results(results / "eval" / f"{name}-0-blind")[0]
        assert blind["settings"]["without_image"] is True and len(blind["tasks"]) == 10
        for type_ in ("name", "kind", "place", "count"):  # of presence, lmms-eval has POPE's scores
            for split, task in (("heldout_scenes", "demo"), ("heldout_concepts", "demo_concepts")):
                (entry,) = [e for e in accuracy if (e["split"], e["type"]) == (split, type_)]
                metrics = summary["tasks"][f"{task}_{type_}"]["metrics"], blind["tasks"][f"{task}_{type_}"]["metrics"]
                assert [entry[name], entry[f"{name}_blind"]] == [metric["exact_match"] for metric in metrics]
    assert "| demo_name |" in (results / "eval" / "compare-0" / "compare.md").read_text()


@pytest.mark.slow
def test_the_demo_notes_what_every_command_cost(finished):
    _, results, _ = finished
    costs = json.loads((results / "costs.json").read_text())
    stages = [f"{verb} {name}-0" for name in ("baseline", "cal") for verb in ("train", "eval", "eval", "score")]
    stages[2], stages[6] = "eval baseline-0-blind", "eval cal-0-blind"
    commands = ["compose", "train pretrain", *stages, "eval compare-0", "report"]
    assert [cost["command"] for cost in costs[1:]] == commands
    assert all(cost["seconds"] > 0 for cost in costs) and all(cost["peak_memory_gib"] > 0.05 for cost in costs[1:])
    text = (results / "results.md").read_text()
    assert all(f"| {command} |" in text for command in commands)


@pytest.mark.slow
def test_the_demo_trains_both_models_from_the_same_start_and_cal_in_one_alone(finished):
    toy, results, printed = finished
    shown = [row.split() for row in printed.splitlines() if row.startswith("$ cal-train train")]
    starts = [row[row.index("--model_name_or_path") + 1] for row in shown]
    assert starts == [str(toy.cache / "composed"), str(results / "pretrain"), str(results / "pretrain")]
    weights = [(results / name / "model.safetensors").read_bytes() for name in ("pretrain", "baseline-0", "cal-0")]
    assert len(set(weights)) == 3
