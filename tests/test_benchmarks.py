"""Every benchmark runs at toy size, and what it prints and writes is complete. No test asserts a time."""

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROUNDS = ("--rounds", "2")


def run_small(name: str, out: Path, *options: str) -> str:
    """Run ``benchmarks/NAME.py --small`` as a user does; return what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--small", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def markdown_rows(path: Path) -> list[list[str]]:
    """Return the cells of every table row below the headers."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_cal_overhead_prints_every_ratio_and_step_and_writes_what_it_measured(tmp_path):
    printed = run_small("cal_overhead", tmp_path, *ROUNDS)
    for name in ("CAL / plain", "CAL / stock", "CAL / reference CAL", "CAL (mask) / plain", "reference CAL", "floor"):
        assert name in printed, name
    written = json.loads((tmp_path / "cal_overhead.json").read_text(encoding="utf-8"))
    assert {"command", "date", "git_commit", "packages", "cpu", "load_at_start", "threads"} <= set(written["facts"])
    [case] = written["data"]
    assert {len(rounds) for rounds in case["seconds"].values()} == {2}
    assert case["losses"]["plain"] == pytest.approx(case["losses"]["stock"], rel=1e-5)
    assert case["losses"]["reference preset"] == pytest.approx(case["losses"]["reference CAL"], rel=1e-5)
    assert all(peak > 0 for peak in case["peak_bytes"].values())
    rows = markdown_rows(tmp_path / "cal_overhead.md")
    assert [row[0] for row in rows if row[0].startswith("CAL / ")] == [
        "CAL / plain",
        "CAL / stock",
        "CAL / reference CAL",
    ]
    assert {len(row) for row in rows} == {9, 6}


@pytest.mark.slow
def test_loss_memory_prints_every_method_and_writes_what_it_measured(tmp_path):
    printed = run_small("loss_memory", tmp_path, *ROUNDS)
    for name in ("all logits", "ours", "torch, its chunks", "torch, our chunks", "frozen head", "2^24"):
        assert name in printed, name
    written = json.loads((tmp_path / "loss_memory.json").read_text(encoding="utf-8"))
    assert [case["is_learning"] for case in written["data"]["methods"]] == [True, False]
    assert len(markdown_rows(tmp_path / "loss_memory.md")) == 2 * 2 + 2 * 4 + 5


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from bench import steps

    return steps


def test_counted_work_is_what_pytorch_counts(steps):
    """The floor comes from `step_flops`; the oracle is PyTorch's own counter on the real steps."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product_in_place(_, left, right, **kwargs):  # the counter does not know ``addmm_``
        return 2 * left[0] * left[1] * right[1]

    size = steps.Size(28, vocab_size=3000, hidden_size=128, intermediate_size=256, num_layers=3, num_heads=4)
    case = steps.Case(size, steps.Shape(num_images=2, num_text=40, num_labels=16, num_rows=2))
    batch = steps.make_batch(case)
    for variant in ("plain", "CAL", "CAL (mask)", "stock", "reference CAL"):
        trainer = steps.build_trainer(variant, case)
        trainer.model.set_attn_implementation("eager")  # the counter does not see the CPU's fused attention
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_in_place}) as counter:
            steps.run_step(trainer, batch)
        expected, counted = steps.step_flops(trainer.model.config.text_config, case)[variant], counter.get_total_flops()
        print(variant, counted / expected)
        # eager attention does not skip the half above the diagonal, and tower and projector are in the counter's sum
        assert 1 <= counted / expected < 1.08, variant


def test_the_reference_step_does_not_use_the_code_it_is_compared_with(steps):
    tree = ast.parse((ROOT / "benchmarks" / "bench" / "steps.py").read_text(encoding="utf-8"))
    bodies = [node for node in tree.body if getattr(node, "name", "") in ("ReferenceCalTrainer", "reference_loss")]
    assert len(bodies) == 2
    names = {node.id for body in bodies for node in ast.walk(body) if isinstance(node, ast.Name)}
    assert not names & {"VlmTrainer", "STRATEGIES", "TokenWeighting", "attach_step"}


@pytest.mark.slow
def test_tower_losses_prints_every_loss_at_every_size_and_writes_what_it_measured(tmp_path):
    pytest.importorskip("open_clip", reason="the bench extra is not installed")
    printed = run_small("tower_losses", tmp_path, *ROUNDS)
    for name in ("CLIP", "SigLIP", "open_clip", "2048"):
        assert name in printed, name
    written = json.loads((tmp_path / "tower_losses.json").read_text(encoding="utf-8"))
    assert {"command", "date", "git_commit", "packages", "cpu", "load_at_start", "threads"} <= set(written["facts"])
    assert len(written["data"]) >= 2


@pytest.mark.slow
def test_sparc_step_prints_its_share_of_clips_step(tmp_path):
    printed = run_small("sparc_step", tmp_path, *ROUNDS)
    assert "FLOP" in printed and "SPARC" in printed


@pytest.mark.slow
def test_mgm_hd_prints_mining_and_steps_and_writes_what_it_measured(tmp_path):
    printed = run_small("mgm_hd", tmp_path, *ROUNDS)
    for name in ("chunks", "CAL", "llava_next", "mgm"):
        assert name in printed, name
    written = json.loads((tmp_path / "mgm_hd.json").read_text(encoding="utf-8"))
    assert {"command", "date", "git_commit", "packages", "cpu", "load_at_start", "threads"} <= set(written["facts"])


@pytest.mark.slow
def test_packing_prints_every_layout_and_writes_what_it_measured(tmp_path):
    printed = run_small("packing", tmp_path, *ROUNDS)
    for name in ("padded", "padded, grouped", "packed", "tokens/s", "positions saved"):
        assert name in printed, name
    written = json.loads((tmp_path / "packing.json").read_text(encoding="utf-8"))
    assert [case["variant"] for case in written["data"]] == ["plain", "CAL"]
    samples = [4 * (i % 3 > 0) + 8 + 7 * (i % 5) for i in range(16)]  # the toy's lengths
    for case in written["data"]:
        assert case["tokens"] == sum(samples)
        assert sum(samples) <= case["positions"]["packed"] < case["positions"]["padded"] <= 16 * max(samples)
        assert case["losses"]["packed"] == pytest.approx(case["losses"]["padded"], rel=1e-5)
        assert {len(rounds) for rounds in case["seconds"].values()} == {2}
    assert {len(row) for row in markdown_rows(tmp_path / "packing.md")} == {8}


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere freed memory is not given back at once")
def test_estimates_lie_between_0_9_and_1_35_of_the_memory_that_processes_use(tmp_path):
    """Full, with checkpointing, LoRA and projector only, all with CAL; the oracle is the system's own peak."""
    printed = run_small("estimate_check", tmp_path)
    for name in ("full", "checkpointing", "LoRA", "projector only"):
        assert name in printed, name
    written = json.loads((tmp_path / "estimate_check.json").read_text(encoding="utf-8"))
    for run in written["data"]:
        assert run["estimated"] == pytest.approx(sum(run["parts"].values()))
        assert 0.9 < run["estimated"] / run["measured"] < 1.35, run["name"]
    full, more_rows, *_ = written["data"]
    assert more_rows["measured"] > full["measured"] and more_rows["estimated"] > full["estimated"]


@pytest.mark.slow
def test_the_table_of_recipes_holds_what_a_calculation_by_hand_gives(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "recipe_table.py"), "--small", "--gpus", "8", "64"]
    done = subprocess.run([*command, "--out", str(tmp_path / "table.md")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Estimated, not measured" in done.stdout
    rows = {(row[0], row[2]): row for row in markdown_rows(tmp_path / "table.md")[2:]}
    llava, spread = rows["llava15_7b/finetune", "8"], rows["llava15_7b/finetune", "64"]
    assert llava[1] == "zero3" and llava[3:5] == ["16", "726"] and llava[6] == "2048"  # 576 + 150
    assert rows["llava_next_7b/finetune", "8"][4] == "3078"  # 2,928 + 150: all tiles
    # 6.76 G trained weights: 2 bytes of weight, 2 of gradient and 12 of state are split (arXiv:1910.02054, section 3)
    assert float(llava[5]) - float(spread[5]) == pytest.approx(16 * 6.76e9 * (1 / 8 - 1 / 64) / 2**30, rel=0.02)
    # forward and backward, two operations per weight, 6.48 G weights without embedding and head, 16 x 726 tokens
    assert float(llava[8]) == pytest.approx(6 * 6.48e9 * 16 * 726 / 1e12, rel=0.15)  # attention, head and tower besides
    assert float(llava[9]) == pytest.approx(1.07, abs=0.011)  # 1 + 150 / 726 / 3


def test_rows_about_the_demo_scenes_are_merged_as_llava_merges_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import packing

    def row(image, question, answer):
        return {"image": image, "conversations": [{"value": f"<image>\n{question}"}, {"value": answer}]}

    captions = [row(f"{i}.png", "Describe the picture.", f"caption {i}") for i in range(6)]
    questions = [row(f"{i}.png", f"question {k}?", f"answer {k} of {i}") for i in range(6) for k in range(i % 3 + 1)]
    rows = packing.demo_rows(captions, questions, 400)
    with_image = [row for row in rows if "image" in row]
    assert 1 - len(with_image) / 400 == pytest.approx(41 / 666, abs=0.04)  # ShareGPT's share of mix665k
    for row in with_image:
        values, number = [turn["value"] for turn in row["conversations"]], int(row["image"].split(".")[0])
        assert [value.startswith("<image>\n") for value in values] == [True] + [False] * (len(values) - 1)
        answers = [f"answer {k} of {number}" for k in range(number % 3 + 1)]
        assert values[1::2] in ([f"caption {number}"], answers, [f"caption {number}", *answers])
    text_only = [turn["value"] for row in rows if "image" not in row for turn in row["conversations"]]
    assert text_only and not any("<image>" in value for value in text_only)
