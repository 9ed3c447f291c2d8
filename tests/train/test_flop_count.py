"""Operations per second and MFU in the log; the oracle is PyTorch's counter on the real steps."""

import json
from collections import Counter
from types import SimpleNamespace

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
def step_of(tiny_run, wide, monkeypatch):
    """Train one step; return its batch, the operations by PyTorch, and our counter after it."""
    found = {}
    step, add = VlmTrainer.training_step, FlopCount.add

    def training_step(self, *args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
            loss = step(self, *args, **kwargs)
        found["torch"] = counter.get_total_flops()
        return loss

    def noted(self, inputs):
        self.reset()
        add(self, inputs)
        found["batch"], found["ours"], found["useful"], found["ablated"] = inputs, self, self.useful, self.ablated

    monkeypatch.setattr(VlmTrainer, "training_step", training_step)
    monkeypatch.setattr(FlopCount, "add", noted)

    def run(*options):
        tiny_run(*STEP, "--model_name_or_path", wide, "--per_device_train_batch_size", "8", *options)
        return SimpleNamespace(**found)

    return run


def samples_of(batch, image_token_id):
    """Return (row, tokens, image tokens) of each sample, whether rows hold one or several."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    numbers = batch.get("segment_ids", mask * torch.arange(1, len(mask) + 1)[:, None])
    samples = []
    for number in range(1, int(numbers.max()) + 1):
        is_here = numbers == number
        row = int(is_here.any(1).nonzero()[0])
        samples.append((row, int(is_here.sum()), int((ids[is_here] == image_token_id).sum())))
    return samples


def computed(batch, ours):
    """Return what eager attention multiplies: padded rows, and every pair of a row's positions, visible or not."""
    rates, kept = ours.rates, Counter()
    for row, tokens, images in samples_of(batch, ours.image_token_id):
        if images:
            kept[row] += tokens - images
    (num_rows, length), width = batch["input_ids"].shape, max(kept.values())
    return (
        num_rows * (rates.decoder[0] * length + rates.decoder[1] * length**2)
        + (len(kept) * (rates.ablated[0] * width + rates.ablated[1] * width**2) if rates.ablation else 0)
        + rates.vision_tower * len(batch["pixel_values"])
        + rates.projector * int((batch["input_ids"] == ours.image_token_id).sum())
        + rates.head * int((batch["labels"][:, 1:] != -100).sum())
    )


OPTIONS = {
    "plain": ("--cal", "false"),
    "cal": ("--cal", "true"),
    "tower": ("--cal", "true", "--tune_vision_tower", "true"),
    "projector": ("--stage", "pretrain"),
    "packed": ("--cal", "true", "--packing", "true"),
    "lora": ("--cal", "true", "--lora_enable", "true", "--lora_dropout", "0"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rates_times_all_that_is_computed_is_what_pytorch_counts(step_of, name):
    step = step_of(*OPTIONS[name])
    print(name, computed(step.batch, step.ours) / step.torch)
    assert step.torch == pytest.approx(computed(step.batch, step.ours), rel=0.02)
    assert step.useful + step.ablated < step.torch


@pytest.mark.parametrize("name", ["cal", "packed"])
def test_padding_and_pairs_that_cannot_be_seen_are_not_counted(step_of, name):
    step = step_of(*OPTIONS[name])
    rates, samples = step.ours.rates, samples_of(step.batch, step.ours.image_token_id)
    assert len(samples) == 8 and any(images == 0 for *_, images in samples)
    lengths = [tokens for _, tokens, _ in samples]
    without_image = [tokens - images for _, tokens, images in samples if images]

    def decoded(rate, lengths):  # token k of a sample sees k pairs
        return rate[0] * sum(lengths) + rate[1] * sum(sum(range(1, length + 1)) for length in lengths)

    assert step.ablated == pytest.approx(decoded(rates.ablated, without_image))
    others = step.useful - decoded(rates.decoder, lengths)
    images, labels = len(step.batch["pixel_values"]), int((step.batch["labels"][:, 1:] != -100).sum())
    patches = sum(images for *_, images in samples)
    assert others == pytest.approx(rates.vision_tower * images + rates.projector * patches + rates.head * labels)


def test_the_pass_without_the_image_is_counted_apart(step_of):
    plain, with_cal = step_of(*OPTIONS["plain"]), step_of(*OPTIONS["cal"])
    assert with_cal.useful == plain.useful and plain.ablated == 0 < with_cal.ablated
    more = computed(with_cal.batch, with_cal.ours) - computed(plain.batch, plain.ours)
    assert with_cal.torch - plain.torch == pytest.approx(more, rel=0.02)
    assert with_cal.ablated < more


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
