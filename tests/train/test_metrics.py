"""The window of a log line: what time and work it takes in."""

import time

import pytest
import torch

from cal_train.train import metrics
from cal_train.train import trainer as trainer_module
from cal_train.train.metrics import LogWindow, Stopwatch


def test_time_that_is_left_out_is_not_in_the_throughput(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 11.0])  # made, started, read, started again
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    cpu = torch.device("cpu")
    window = LogWindow(cpu, None, Stopwatch(cpu))
    window.start(0)
    window.add({"attention_mask": torch.ones(4, 25, dtype=torch.long)}, {})
    window.leave_out(8.0)
    assert window.report(1, {}, lambda tensor: tensor)["tokens_per_second"] == pytest.approx(100 / 2)


def test_the_evaluation_loss_is_left_out_of_the_throughput(tiny_run, monkeypatch):
    left_out, batches = [], trainer_module.eval_batches

    def slowly(*arguments):
        time.sleep(0.3)
        return batches(*arguments)

    monkeypatch.setattr(trainer_module, "eval_batches", slowly)
    monkeypatch.setattr(LogWindow, "leave_out", lambda self, seconds: left_out.append(seconds))
    data = str(tiny_run.root / "data" / "data.json")
    tiny_run("--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2")
    assert len(left_out) == 2 and min(left_out) >= 0.3
