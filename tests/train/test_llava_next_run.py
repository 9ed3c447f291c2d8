"""LLaVA-NeXT through whole runs: recipe, sampler, trainer, checkpoints, LoRA."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cal_train.cli.recipe import load_recipe
from cal_train.models.lora import merge
from cal_train.testing import write_tiny_image_rows, write_tiny_vlm
from cal_train.train.run import train


@pytest.fixture(scope="module")
def next_run(tmp_path_factory):
    """``next_run(*options) -> folder`` trains a tiny LLaVA-NeXT on rows with 0 to 3 images."""
    root = tmp_path_factory.mktemp("next")
    write_tiny_vlm(root / "vlm", family="llava_next")
    write_tiny_image_rows(root / "data", num_rows=16)
    (root / "recipe.yaml").write_text(
        f"""
model_name_or_path: {root / "vlm"}
data_path: {root / "data" / "data.json"}
image_folder: {root / "data" / "images"}
max_steps: 4
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
group_by_modality_length: true
image_aspect_ratio: anyres
learning_rate: 1e-2
optim: sgd
max_grad_norm: 0
lr_scheduler_type: constant
logging_steps: 1
save_strategy: "no"
report_to: none
dataloader_num_workers: 0
disable_tqdm: true
use_cpu: true
cal: true
"""
    )
    counter = iter(range(100))

    def run(*options):
        folder = root / f"run-{next(counter)}"
        return train(load_recipe(root / "recipe.yaml", ("--output_dir", str(folder), *options)))

    run.root = root
    return run


def moved(folder, base):
    """Parts of the model whose weights differ from the base model's."""
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    assert before.keys() == after.keys()
    names = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    parts = ("vision_tower", "multi_modal_projector", "image_newline", "language_model")
    return {part for part in parts if any(part in name for name in names)}, names


def test_stages_train_their_parts_and_every_run_saves_the_newline(next_run):
    base = next_run.root / "vlm"
    assert moved(next_run("--stage", "pretrain", "--max_steps", "1"), base)[0] == {"multi_modal_projector"}
    opened = ("--stage", "pretrain", "--max_steps", "2", "--tune_image_newline")
    assert moved(next_run(*opened), base)[0] == {"multi_modal_projector", "image_newline"}
    parts, names = moved(
        next_run("--tune_vision_tower", "--mm_vision_tower_lr", "2e-3", "--cal_ablation", "mask"), base
    )
    assert parts == {"vision_tower", "multi_modal_projector", "image_newline", "language_model"}
    assert not any("vision_tower" in name and (".layers.2." in name or "post_layernorm" in name) for name in names)


def test_a_resumed_lora_run_ends_where_the_uninterrupted_one_does_newline_included(next_run):
    lora = ("--lora_enable", "--lora_r", "2", "--lora_alpha", "4", "--lora_dropout", "0")
    whole = next_run(*lora)
    half = next_run(*lora, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
    resumed = next_run(*lora, "--resume_from_checkpoint", str(half / "checkpoint-2"))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    newline = "base_model.model.model.image_newline"
    start = load_file(half / "adapter_model.safetensors")[newline]
    assert not torch.equal(start, expected[newline])
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    merge(whole, next_run.root / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(next_run.root / "merged")
    assert torch.equal(merged.model.image_newline, expected[newline])


def test_sizes_are_kept_beside_the_run(next_run):
    folder = next_run("--max_steps", "1")
    with np.load(folder / "image_sizes.npz") as stored:
        assert len(stored["keys"]) == 24  # 16 rows with 0, 1, 2, 3, 0, ... images
        assert stored["sizes"].min() >= 20


def test_a_feature_cache_is_refused_by_its_option(next_run, tmp_path):
    with pytest.raises(ValueError, match="vision_feature_cache does not work with model_type 'llava_next'"):
        next_run("--vision_feature_cache", str(tmp_path / "cache"))


def test_the_square_image_choices_are_refused(next_run):
    with pytest.raises(ValueError, match=r"image_aspect_ratio 'square'.*tiles images"):
        next_run("--image_aspect_ratio", "square")


def test_a_newline_that_llava_does_not_have_cannot_be_trained(next_run, tmp_path):
    vlm = write_tiny_vlm(tmp_path / "llava")
    with pytest.raises(ValueError, match="tune_image_newline is set, but this model has no image_newline"):
        next_run("--model_name_or_path", str(vlm), "--image_aspect_ratio", "pad", "--tune_image_newline")


def test_the_run_says_which_parts_it_trains(next_run, caplog):
    with caplog.at_level(logging.INFO, logger="cal_train"):
        next_run("--max_steps", "1")
    assert "image_newline: 32 of 32 parameters trained" in caplog.text


@pytest.mark.slow
def test_zero_3_on_two_ranks_follows_one_process_newline_included(next_run, tmp_path):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    options = ("--group_by_modality_length", "false", "--gradient_accumulation_steps", "1", "--tune_vision_tower")
    one = next_run(*options, "--per_device_train_batch_size", "4")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "cal_train", "train", str(next_run.root / "recipe.yaml"), "--output_dir", str(tmp_path / "two")]
    command += [*options, "--per_device_train_batch_size", "2", "--deepspeed", str(tmp_path / "zero.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, env=environment, check=True, timeout=400)
    logs = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, tmp_path / "two")
    ]
    for name in ("loss", "grad_norm"):
        expected, found = ([line[name] for line in log if "loss" in line] for log in logs)
        assert found == pytest.approx(expected, rel=1e-4)
    start, expected, found = (
        AutoModelForImageTextToText.from_pretrained(folder).model.image_newline
        for folder in (next_run.root / "vlm", one, tmp_path / "two")
    )
    assert (expected - start).abs().max() > 1e-5
    assert (found - expected).abs().max() < 1e-6
