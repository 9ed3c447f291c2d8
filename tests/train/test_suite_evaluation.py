import json
import os
import signal

import pytest

from cal_train.cli.recipe import load_recipe
from cal_train.train.run import train
from cal_train.train.signals import StoppedBySignal
from cal_train.train.suite_evaluation import EvaluationFailedError

SAVING = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "6", "--save_total_limit", "1")


def run_with(tiny_run, folder, evaluate, *options):
    return train(
        load_recipe(tiny_run.recipe, (*SAVING, "--output_dir", str(folder), *options)), evaluate_checkpoint=evaluate
    )


@pytest.mark.parametrize("error", [EvaluationFailedError("no memory"), OSError(28, "no space"), KeyError("results")])
def test_no_failure_of_an_evaluation_ends_the_training(tiny_run, tmp_path, error):
    def evaluate(checkpoint, should_stop):
        raise error

    folder = run_with(tiny_run, tmp_path / "run", evaluate, "--max_steps", "2")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [line["suite/failed"] for line in history if "suite/failed" in line] == [1.0]


def test_every_save_is_evaluated_logged_at_its_step_and_a_failure_is_counted(
    tiny_run, tmp_path, max_difference, caplog
):
    def evaluate(checkpoint, should_stop):
        assert (checkpoint / "model.safetensors").is_file() and (checkpoint / "complete.json").is_file()
        assert not should_stop()
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        if step == 4:
            raise EvaluationFailedError("out of memory (all of it: log.txt)")
        return {"colour/acc": step / 10}

    folder = run_with(tiny_run, tmp_path / "run", evaluate)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [(line["step"], {k: v for k, v in line.items() if k.startswith("suite/")}) for line in history]
    assert {step: line for step, line in found if line} == {
        2: {"suite/colour/acc": 0.2},
        4: {"suite/failed": 1.0},
        6: {"suite/colour/acc": 0.6},
    }
    assert (
        "failed for" in caplog.text and "out of memory" in caplog.text and "1 evaluations by eval_suite" in caplog.text
    )
    assert max_difference(folder, tiny_run(*SAVING)) == 0  # training is not touched by it


def test_a_run_that_is_asked_to_stop_starts_no_evaluation_and_gives_up_the_one_at_work(tiny_run, tmp_path):
    seen = []

    def evaluate(checkpoint, should_stop):
        seen.append((checkpoint.name, should_stop()))
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(should_stop())
        raise EvaluationFailedError("given up")

    with pytest.raises(StoppedBySignal) as stopped:
        run_with(tiny_run, tmp_path / "run", evaluate)
    assert stopped.value.code == 143
    assert seen == [("checkpoint-2", False), True]  # the save at the stop is not evaluated
    assert (tmp_path / "run" / "checkpoint-3" / "complete.json").is_file()
