"""Which checkpoints of a run are evaluated, when and how often; real evaluations of a tiny run are slow tests."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from cal_train.cli.main import main
from cal_train.cli.recipe import load_recipe
from cal_train.cli.train import alone
from cal_train.evals.lmms.checkpoints import (
    check_settings,
    draw_suite,
    evaluate_run,
    evaluation_of,
    results_of_run,
)
from cal_train.evals.report.run_folder import read_source
from cal_train.testing import write_tiny_data, write_tiny_vlm
from cal_train.train.safe_save import mark_complete
from cal_train.train.suite_evaluation import EvaluationFailedError


def save(run, step, is_whole=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if is_whole:
        mark_complete(folder)
    return folder


def end(run, step):
    """What a run leaves when it ends."""
    (run / "config.json").write_text("{}")
    (run / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))


class Runner:
    """Stands for an evaluation: writes a score that follows from the name, fails for some, does something else."""

    def __init__(self, fails=(), meanwhile=lambda model: None, settings=None):
        self.fails, self.meanwhile, self.settings, self.seen = fails, meanwhile, settings or {}, []

    def __call__(self, model, output):
        self.seen.append(output.name)
        self.meanwhile(model)
        if output.name in self.fails or not model.exists():
            raise EvaluationFailedError("out of memory")
        output.mkdir(parents=True, exist_ok=True)
        score = int(output.name.rpartition("-")[2]) / 10 if "-" in output.name else 1.5
        (output / "results.json").write_text(
            json.dumps({"tasks": {"colour": {"metrics": {"acc": score}}}, "settings": self.settings})
        )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("{}")
    return folder


def evaluate(run, runner, **options):
    said = []
    outcome = evaluate_run(run, results_of_run(run, "tiny"), runner, say=said.append, **options)
    return outcome, said


def test_each_complete_checkpoint_once_oldest_first_and_the_final_model_last(run):
    for step in (20, 100, 9):
        save(run, step)
    save(run, 30, is_whole=False)
    (run / "checkpoint-40.partial").mkdir()
    runner = Runner()
    assert evaluate(run, runner)[0].evaluated == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    end(run, 110)  # behind the last checkpoint
    assert evaluate(run, runner)[0].evaluated == ["final"]
    outcome, said = evaluate(run, runner)
    assert not said and outcome.evaluated == [] and len(runner.seen) == 4


def test_a_final_model_that_is_the_last_checkpoint_is_not_evaluated_twice(run):
    save(run, 10)
    end(run, 10)
    assert evaluate(run, Runner())[0].evaluated == ["checkpoint-10"]
    state = {"global_step": 10, "best_model_checkpoint": "checkpoint-5"}  # then the final model is another one
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert evaluate(run, Runner())[0].evaluated == ["final"]


def test_a_failed_one_is_reported_the_others_go_on_and_it_is_tried_again_next_time(run):
    for step in (1, 2, 3):
        save(run, step)
    outcome, said = evaluate(run, Runner(fails=["checkpoint-2"]))
    assert outcome.failed == ["checkpoint-2"] and outcome.evaluated == ["checkpoint-1", "checkpoint-3"]
    assert "checkpoint-2: failed: out of memory" in said
    assert evaluate(run, Runner())[0].evaluated == ["checkpoint-2"]


def test_a_checkpoint_that_is_deleted_meanwhile_is_named_and_is_no_failure(run):
    save(run, 1), save(run, 2), save(run, 3)

    def rotate(model):
        shutil.rmtree(run / "checkpoint-1", ignore_errors=True)
        shutil.rmtree(run / "checkpoint-2", ignore_errors=True)

    outcome, said = evaluate(run, Runner(meanwhile=rotate))
    assert outcome.deleted == ["checkpoint-1"] and outcome.evaluated == ["checkpoint-3"] and not outcome.failed
    assert any("checkpoint-1: deleted by save_total_limit" in text for text in said)


def test_a_watcher_waits_for_checkpoints_until_the_run_has_ended(run):
    events = iter([lambda: save(run, 5), lambda: None, lambda: save(run, 10), lambda: (save(run, 15), end(run, 15))])
    end(run, 3)  # of an earlier start of the run, which does not count
    os.utime(run / "trainer_state.json", (1, 1))
    runner = Runner()
    outcome, _ = evaluate(run, runner, watch=True, wait=lambda seconds: next(events)())
    assert outcome.evaluated == ["checkpoint-5", "checkpoint-10", "checkpoint-15"]
    assert next(events, None) is None


def test_results_of_an_earlier_run_in_the_same_folder_are_made_anew(run):
    marker = save(run, 1) / "complete.json"
    evaluate(run, Runner())
    later = (results_of_run(run, "tiny") / "checkpoint-1" / "results.json").stat().st_mtime + 5
    os.utime(marker, (later, later))
    assert evaluate(run, Runner())[0].evaluated == ["checkpoint-1"]


def test_nothing_to_evaluate_and_no_run_at_all_are_one_message(run):
    with pytest.raises(ValueError, match="no complete checkpoint and no final model"):
        evaluate(run, Runner())
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(run / "none", Runner())


def test_results_of_other_settings_are_not_mixed(run):
    save(run, 1)
    evaluate(run, Runner(settings={"limit": 10, "dtype": "auto", "vcd_alpha": 1.0}))
    results = results_of_run(run, "tiny")
    check_settings(results, {"limit": 10, "dtype": "auto", "vcd_alpha": 1.0, "seconds": 3})
    for wrong in ({"limit": 20}, {"vcd_alpha": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_settings(results, {"limit": 10, "dtype": "auto", "vcd_alpha": 1.0} | wrong)


def test_results_are_curves_over_steps_on_the_page_and_as_png(run):
    save(run, 5), save(run, 10)
    end(run, 12)
    log = [{"step": step, "loss": 1.0, "suite/colour/acc": 0.0} for step in (5, 10)]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 12, "log_history": log}))
    assert draw_suite(run, "tiny") is None
    evaluate(run, Runner())
    curves = read_source(run).curves
    assert curves["tiny/colour/acc"] == {"run": [(5, 0.5), (10, 1.0), (12, 1.5)]}
    assert "loss" in curves and "suite/colour/acc" not in curves  # the log's copy is not drawn besides
    picture = draw_suite(run, "tiny")
    assert picture == run / "eval" / "tiny" / "curves.png"
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 1
    (run / "eval" / "tiny" / "checkpoint-5" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoint-5/results\.json is not a file of cal-train eval"):
        read_source(run)


def recipe_with(tmp_path, *options):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{{model_name_or_path: m, data_path: d.json, output_dir: {tmp_path / 'out'}, use_cpu: true}}")
    return load_recipe(path, options)


def test_what_a_recipe_asks_is_checked_before_it_trains(tmp_path, monkeypatch):
    suite = tmp_path / "tiny.yaml"
    suite.write_text("tasks: [colour]")
    assert evaluation_of(recipe_with(tmp_path)) is None
    with pytest.raises(ValueError, match="eval_suite_limit belongs to eval_suite"):
        evaluation_of(recipe_with(tmp_path, "--eval_suite_limit", "3"))
    with pytest.raises(ValueError, match=r"no suite at .*missing\.yaml"):
        evaluation_of(recipe_with(tmp_path, "--eval_suite", str(tmp_path / "missing.yaml")))
    monkeypatch.setattr("cal_train.evals.lmms.checkpoints.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="save_strategy is no"):
        evaluation_of(recipe_with(tmp_path, "--eval_suite", str(suite), "--save_strategy", "no"))
    assert callable(evaluation_of(recipe_with(tmp_path, "--eval_suite", str(suite))))
    monkeypatch.setattr("cal_train.evals.lmms.checkpoints.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs lmms-eval"):
        evaluation_of(recipe_with(tmp_path, "--eval_suite", str(suite)))


def test_results_that_cannot_be_written_are_a_failed_evaluation_and_no_end_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("cal_train.evals.lmms.checkpoints.find_spec", lambda name: name)
    (tmp_path / "tiny.yaml").write_text("tasks: [colour]")
    evaluate = evaluation_of(recipe_with(tmp_path, "--eval_suite", str(tmp_path / "tiny.yaml")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval").write_text("a file where the folder of results would be")
    with pytest.raises(EvaluationFailedError, match="NotADirectoryError"):
        evaluate(save(tmp_path / "out", 1), lambda: False)


def test_a_process_that_evaluates_is_told_nothing_of_ranks():
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "ACCELERATE_USE_DEEPSPEED": "true"}
    kept = {"PATH": "/bin", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "3", "ACCELERATE_USE_CPU": "true"}
    assert alone(told | kept) == kept


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and data, and a suite of one task on four noisy pictures."""
    pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: eval_suite is NOT tested")
    root = tmp_path_factory.mktemp("place")
    write_tiny_vlm(root / "vlm")
    write_tiny_data(root / "data", num_rows=8)
    rng, rows = np.random.default_rng(0), []
    for _ in range(4):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(stream, "PNG")
        picture = {"bytes": stream.getvalue(), "path": None}
        rows.append({"image": picture, "question": "what is in the image?", "answer": "a dog", "words": "a"})
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(root / "table.parquet")
    template = Path(__file__).parents[3] / "eval" / "tasks" / "_scenes_template"
    (root / "tasks").mkdir()
    shutil.copy(template, root / "tasks")
    task = {"include": "_scenes_template", "task": "tiny_words"}
    task["dataset_kwargs"] = {"data_files": {"test": str(root / "table.parquet")}}
    (root / "tasks" / "tiny_words.yaml").write_text(yaml.safe_dump(task))
    (root / "tiny.yaml").write_text("tasks: [tiny_words]\ninclude_path: tasks")
    recipe = {
        "model_name_or_path": str(root / "vlm"), "data_path": str(root / "data" / "data.json"),
        "image_folder": str(root / "data" / "images"), "template": "chat", "max_steps": 4, "save_steps": 2,
        "save_strategy": "steps", "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
        "dataloader_num_workers": 0, "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "eval_suite": str(root / "tiny.yaml"), "eval_suite_limit": 3,
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_lora_checkpoints_are_evaluated_during_training_and_the_watcher_does_the_rest(place, tmp_path, capsys):
    run = tmp_path / "run"
    lora = ["--lora_enable", "true", "--lora_r", "4", "--save_total_limit", "1"]
    assert main(["train", str(place / "recipe.yaml"), "--output_dir", str(run), *lora]) == 0
    made = run / "eval" / "tiny"
    assert {path.name for path in made.iterdir()} == {"checkpoint-2", "checkpoint-4", "curves.png"}
    first, last = results_in(made / "checkpoint-2"), results_in(made / "checkpoint-4")
    assert first["model"] == str(run / "checkpoint-2") and first["settings"]["limit"] == 3
    assert first["tasks"]["tiny_words"]["num_documents"] == 3
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = {
        line["step"]: line["suite/tiny_words/has_words"] for line in history if "suite/tiny_words/has_words" in line
    }
    assert logged == {
        2: first["tasks"]["tiny_words"]["metrics"]["has_words"],
        4: last["tasks"]["tiny_words"]["metrics"]["has_words"],
    }

    merged, alone_made = tmp_path / "merged", tmp_path / "alone"  # by hand, step by step
    assert main(["merge", "--adapter", str(run / "checkpoint-4"), "--output", str(merged)]) == 0
    by_hand = ["eval", "--model", str(merged), "--suite", str(place / "tiny.yaml"), "--output", str(alone_made)]
    assert main([*by_hand, "--limit", "3", "--device", "cpu"]) == 0
    same = "samples/tiny_words.jsonl"
    assert (alone_made / same).read_text() == (made / "checkpoint-4" / same).read_text()

    watcher = ["eval", "--run", str(run), "--suite", str(place / "tiny.yaml"), "--device", "cpu", "--watch"]
    assert main([*watcher, "--limit", "2"]) == 2 and "limit 3, asked is 2" in capsys.readouterr().err
    shutil.rmtree(made / "checkpoint-4")
    assert main([*watcher, "--limit", "3", "--batch_size", "8"]) == 0
    assert results_in(made / "checkpoint-4")["tasks"] == last["tasks"]


@pytest.mark.slow
def test_on_two_ranks_one_evaluates_and_a_broken_suite_does_not_end_the_training(place, tmp_path):
    (tmp_path / "broken.yaml").write_text(f"tasks: [no_such_task]\ninclude_path: {place / 'tasks'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "cal_train"]
    run = tmp_path / "run"
    words = ["train", str(place / "recipe.yaml"), "--output_dir", str(run), "--save_steps", "4"]
    words += ["--ddp_backend", "gloo", "--eval_suite", str(place / "tiny.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *words], check=True, env=environment, timeout=500)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert results_in(run / "eval" / "tiny" / "checkpoint-4")["settings"]["ranks"] == 1

    broken = ["train", str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "broken")]
    assert main([*broken, "--eval_suite", str(tmp_path / "broken.yaml"), "--save_steps", "4"]) == 0
    history = json.loads((tmp_path / "broken" / "trainer_state.json").read_text())["log_history"]
    assert [line["suite/failed"] for line in history if "suite/failed" in line] == [1.0]
    log = tmp_path / "broken" / "eval" / "broken" / "checkpoint-4.partial" / "log.txt"
    assert "no task 'no_such_task'" in log.read_text()
