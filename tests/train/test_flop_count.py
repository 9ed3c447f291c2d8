"""Operations per second and MFU in the log; the oracle is PyTorch's counter on the real steps."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cal_train.models.flops import peak_flops
from cal_train.testing import write_tiny_vlm
from cal_train.train.flop_count import FlopCount
from cal_train.train.trainer import VlmTrainer

STEP = ("--max_steps", "1", "--attn_implementation", "eager")  # the counter does not see the CPU's fused attention
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}  # products outweigh the pairs of tokens


def product_in_place(_, left, right, **kwargs):
    return 2 * left[0] * left[1] * right[1]  # the counter does not know ``addmm_``


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return str(write_tiny_vlm(tmp_path_factory.mktemp("wide") / "vlm", **WIDE))


@pytest.fixture
def counts(tiny_run, wide, monkeypatch):
    """Train a step; return operations (by PyTorch, useful, ablated) and the share of positions that are tokens."""
    found = {}
    step, add = VlmTrainer.training_step, FlopCount.add

    def training_step(self, *args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
            loss = step(self, *args, **kwargs)
        found["torch"] = counter.get_total_flops()
        return loss

    def noted(self, inputs):
        add(self, inputs)
        found["ours"] = self.useful, self.ablated
        found["filled"] = float(inputs["attention_mask"].float().mean())

    monkeypatch.setattr(VlmTrainer, "training_step", training_step)
    monkeypatch.setattr(FlopCount, "add", noted)

    def run(*options):
        tiny_run(*STEP, "--model_name_or_path", wide, "--per_device_train_batch_size", "8", *options)
        return found["torch"], *found["ours"], found["filled"]

    return run


@pytest.mark.parametrize(
    "options",
    [
        ("--cal", "false"),
        ("--cal", "true"),
        ("--cal", "true", "--tune_vision_tower", "true"),
        ("--stage", "pretrain"),
        ("--cal", "true", "--packing", "true"),
        ("--cal", "true", "--lora_enable", "true", "--lora_dropout", "0"),
    ],
    ids=["plain", "cal", "tower", "projector", "packed", "lora"],
)
def test_counted_work_is_what_pytorch_counts(counts, options):
    # padding and the pairs above the diagonal, at this size a few percent, are work for the counter and not for us
    by_torch, useful, ablated, filled = counts(*options)
    print(options, filled, (useful + ablated) / by_torch)
    assert filled * 0.93 < (useful + ablated) / by_torch < 1.02


def test_the_pass_without_the_image_is_counted_apart(counts):
    plain, with_cal = counts("--cal", "false"), counts("--cal", "true")
    assert with_cal[1] == plain[1] and plain[2] == 0
    assert with_cal[2] == pytest.approx(with_cal[0] - plain[0], rel=0.15)


def logged(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return next(line for line in history if "loss" in line)


def test_mfu_is_a_share_of_the_peak_that_is_stated(tiny_run):
    line = logged(tiny_run("--max_steps", "1", "--device_peak_tflops", "0.5", "--cal", "true"))
    assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)
    assert 0 < line["cal/flops_share"] < 1


def test_no_mfu_where_the_peak_is_not_known(tiny_run):
    line = logged(tiny_run("--max_steps", "1"))
    assert "mfu" not in line and line["tflops_per_second"] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak):
    assert peak_flops(name) == peak
