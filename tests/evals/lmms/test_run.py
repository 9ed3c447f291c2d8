"""The demo's suite on tiny models, from rendered tables to results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cal_train.cli.main import main
from cal_train.demo.eval_tables import tables_of_split
from cal_train.demo.scenes import QUESTION_TYPES, ask, sample_scene
from cal_train.evals.lmms.results import read_results
from cal_train.testing import write_tiny_vlm

pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: cal-train eval is NOT tested")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lmms-eval's dependencies

ROOT = Path(__file__).parents[3]
NUM_SCENES = 5
LLAVA_HF = ["--through", "llava_hf"]


def write_split(folder):
    """A small split as the demo writes it, with noise for pictures."""
    rng, rows, truth = np.random.default_rng(0), [], {}
    (folder / "images").mkdir(parents=True)
    for n in range(NUM_SCENES):
        scene = sample_scene(rng, f"scene-{n}")
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"images/{n}.png")
        for turn in ask(scene, rng):
            id = f"{scene.id}/{turn.type}"
            said = [{"from": "human", "value": f"<image>\n{turn.question}"}, {"from": "gpt", "value": turn.answer}]
            rows.append({"id": id, "image": f"images/{n}.png", "conversations": said})
            truth[id] = [{"type": turn.type, "scene": scene.id, "spans": turn.spans}]
    (folder / "heldout_scenes.json").write_text(json.dumps(rows))
    (folder / "heldout_scenes.truth.json").write_text(json.dumps(truth))
    return folder / "heldout_scenes.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of ``eval/`` with small tables where its task files look for them, and a tiny model."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "eval", root / "eval")
    tables_of_split(write_split(root / "split"), root / ".cache/demo/eval")
    shutil.rmtree(root / "split")  # the tables hold the pictures themselves
    suite = yaml.safe_load((root / "eval/suites/demo.yaml").read_text())
    suite["tasks"].remove("demo_kind_choice")
    (root / "eval/suites/generated.yaml").write_text(yaml.safe_dump(suite))
    write_tiny_vlm(root / "model")
    return root


def command(place, suite, output, *options):
    arguments = ["eval", "--model", place / "model", "--suite", place / f"eval/suites/{suite}.yaml"]
    return [*map(str, arguments), "--output", str(output), "--device", "cpu", "--dtype", "float32", *options]


def told(folder):
    summary, samples = read_results(folder)
    answers = {task: [(row["doc_id"], row["answer"]) for row in rows] for task, rows in samples.items()}
    return {task: found["metrics"] for task, found in summary["tasks"].items()}, answers, summary


def assert_same(folder, batched, **settings):
    """The scores of a batched evaluation on one rank, and its answers, in the tasks that were asked."""
    metrics, answers, summary = told(folder)
    one, one_answers, _ = told(batched)
    assert {name: summary["settings"][name] for name in settings} == settings
    assert len(metrics) >= 5 and metrics == {task: one[task] for task in metrics}
    generated = [task for task in answers if task != "demo_kind_choice"]  # whose answers are float32 sums
    assert {task: answers[task] for task in generated} == {task: one_answers[task] for task in generated}


@pytest.fixture(scope="module")
def batched(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("batched") / "out"
    assert main(command(place, "demo", output, "--batch_size", "8")) == 0
    return output


def test_a_suite_leaves_results_samples_prompts_and_versions(batched):
    metrics, answers, summary = told(batched)
    assert set(answers) == {*(f"demo_{type_}" for type_ in QUESTION_TYPES), "demo_kind_choice"}
    assert all(len(rows) == NUM_SCENES for rows in answers.values())
    assert len({answer for _, answer in answers["demo_name"]}) > 1
    assert set(metrics["demo_presence"]) == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    task = summary["tasks"]["demo_name"]
    assert task["prompt"] == {"pre_prompt": "", "post_prompt": ""} and task["generation"]["max_new_tokens"] == 24
    assert summary["versions"]["lmms_eval"].startswith("0.7.") and summary["settings"]["batch_size"] == 8
    table = (batched / "results.md").read_text()
    assert "| demo_presence | yes_ratio |" in table and "- lmms_eval 0.7" in table


def test_the_choice_is_the_likeliest_sentence(batched):
    lines = (ROOT / "eval/tasks/demo_kind_choice.yaml").read_text().splitlines()
    choices = [line.removeprefix("  - ") for line in lines if line.startswith("  - It is")]
    rows = read_results(batched)[1]["demo_kind_choice"]
    for row in rows:
        losses = [loss for loss, _ in row["answer"]]
        assert len(losses) == 8 and len(set(losses)) == 8
        assert row["scores"]["acc"] == float(choices[np.argmin(losses)] == row["target"])


def test_llava_hf_and_our_model_give_the_same_answers_and_scores(place, batched, tmp_path):
    assert main(command(place, "generated", tmp_path / "theirs", *LLAVA_HF)) == 0
    metrics, answers, summary = told(tmp_path / "theirs")
    assert summary["settings"]["through"] == "llava_hf" and len(answers) == 5
    ours, our_answers, _ = told(batched)
    assert answers == {task: our_answers[task] for task in answers}
    assert metrics == {task: ours[task] for task in metrics}
    assert main(["eval", "compare", str(batched), str(tmp_path / "theirs")]) == 0


def test_ways_to_ask_are_recorded_and_a_comparison_says_so(place, batched, tmp_path, capsys):
    few = ["--tasks", "demo_count", "demo_name", "--batch_size", "5"]
    assert main(command(place, "demo", tmp_path / "vcd", *few, "--vcd_alpha", "2.5")) == 0
    _, answers, summary = told(tmp_path / "vcd")
    _, plain, before = told(batched)
    assert list(answers) == ["demo_count", "demo_name"] and answers["demo_name"] != plain["demo_name"]
    assert (summary["settings"]["vcd_alpha"], summary["settings"]["vcd_beta"]) == (2.5, 0.1)
    assert "vcd_alpha" not in before["settings"] and "- vcd_alpha: 2.5" in (tmp_path / "vcd/results.md").read_text()
    assert main(command(place, "demo", tmp_path / "blind", *few, "--without_image", "true")) == 0
    _, blind, summary = told(tmp_path / "blind")
    assert summary["settings"]["without_image"] is True and blind["demo_name"] != plain["demo_name"]
    capsys.readouterr()
    assert main(["eval", "compare", str(tmp_path / "vcd"), str(tmp_path / "blind")]) == 0
    told_so = capsys.readouterr().out.replace("\n", " ")
    assert "vcd_alpha was 2.5 and off" in told_so and "without_image was off and True" in told_so


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vcd_beta", "0.2"], "belongs to --vcd_alpha"),
        (["--tasks", "demo_nam"], "no task 'demo_nam': did you mean demo_name"),
        ([*LLAVA_HF, "--without_image", "true"], "only our own model"),
        ([*LLAVA_HF, "--batch_size", "8"], "llava_hf asks one document at a time"),
    ],
)
def test_options_that_do_not_go_together_are_one_message(place, tmp_path, capsys, options, message):
    assert main(command(place, "demo", tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_document_at_a_time_gives_what_eight_give(place, batched, tmp_path):
    assert main(command(place, "demo", tmp_path / "out", "--batch_size", "1")) == 0
    assert_same(tmp_path / "out", batched, ranks=1, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "options", "batch_size"),
    [("demo", ["--batch_size", "1"], 1), ("demo", ["--batch_size", "8"], 8), ("generated", LLAVA_HF, 1)],
    ids=["ours-1", "ours-8", "llava_hf"],
)
def test_two_ranks_give_the_answers_of_one(place, batched, tmp_path, suite, options, batch_size):
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "0", "-m", "cal_train"]
    arguments = [a for a in command(place, suite, tmp_path / "out", *options) if a not in ("--device", "cpu")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *launch, *arguments], check=True, env=env, cwd=tmp_path, timeout=500)
    assert_same(tmp_path / "out", batched, ranks=2, batch_size=batch_size)


@pytest.mark.slow  # lmms-eval reads the files of all its tasks
def test_a_task_that_does_not_exist_is_one_message(place, tmp_path, capsys):
    (place / "eval/suites/typo.yaml").write_text("tasks: [demo_nam]\ninclude_path: ../tasks")
    assert main(command(place, "typo", tmp_path / "out")) == 2
    assert "lmms-eval has no task 'demo_nam': did you mean demo_name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_one_message(place, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    arguments = command(place, "demo", tmp_path / "out")
    arguments[arguments.index("--model") + 1] = str(tmp_path)
    assert main(arguments) == 2
    assert "a model of type 'bert'" in capsys.readouterr().err
