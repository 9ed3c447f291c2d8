"""What packing gains: tokens per second of training steps over the same samples, in packed and in padded rows.

Each layout goes through the same samples in micro-batches: padded in random order, padded with rows grouped by kind and
length (`group_by_modality_length`, LLaVA's answer to padding), packed in random order. All alternate in one process on
one thread, every other round in reverse; ratios are taken within a round. A step is the real Trainer's (forward,
backward, gradients cleared; no optimizer). The vision tower never runs: batches bring its features, as from a cache.

Speed gains less than positions: the head works on label tokens, as many in every layout, and attention with an explicit
mask, which a CPU needs, also multiplies the pairs of a packed row that lie in different samples.

    python benchmarks/packing.py [--rounds 3] [--small] [--out FOLDER]

The demo's lengths need the files of `make demo`; without them those cases are left out. The demo asks one question per
row, which LLaVA's data does not; its scenes are therefore also taken with rows made as LLaVA's are, see `demo_rows`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from bench.steps import BOS, FIRST_WORD, IMAGE, Case, Shape, Size, build_trainer, run_step
from torch import Tensor
from transformers import AutoProcessor, Trainer

from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.sampling import modality_grouped_order
from cal_train.data.sources import Source
from cal_train.types import IGNORE_INDEX

DEMO = Path(".cache/demo")
DEMO_FILES = ("pretrain.json", "finetune.json")
TEXT_ONLY_SCENES = 3  # assumed, so that text-only rows are the longest, as in MIX665K
LAYOUTS = ("padded", "padded, grouped", "packed")
TOWER_WIDTH = 32  # of `tiny_llava`
SCALE = 9  # the published lengths are divided by it: 576 image tokens become 64, 2048 tokens 227
# Rows per source as counted in data/llava_mix665k.yaml. The lengths of the texts are assumptions, the set is not here:
# (rows in thousands, has an image, median text tokens, standard deviation of their logarithm)
MIX665K = {
    "LLaVA-Instruct": (158, True, 300, 0.5),
    "VQA, several questions per row": (310, True, 150, 0.5),
    "TextCaps": (22, True, 60, 0.2),
    "RefCOCO and Visual Genome": (135, True, 350, 0.5),
    "ShareGPT": (41, False, 1000, 0.8),
}


@dataclass(frozen=True)
class Mix:
    """Samples to train on: (image tokens, other tokens, label tokens) each."""

    name: str
    size: Size
    samples: Sequence[tuple[int, int, int]]
    pack_tokens: int
    rows_per_batch: int = 16


def mixes(is_small: bool) -> list[Mix]:
    """Return the cases; at toy size if ``is_small``."""
    if is_small:
        size = Size(image_size=28, vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
        samples = [(4 * (i % 3 > 0), 8 + 7 * (i % 5), 4) for i in range(16)]
        return [Mix("toy", size, samples, pack_tokens=64, rows_per_batch=8)]
    small = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688, "num_layers": 4, "num_heads": 4}
    found = [Mix("like mix665k, lengths / 9", Size(image_size=112, **small), mix665k_samples(64), 2048 // SCALE)]
    if DEMO.is_dir():
        size = Size(image_size=56, **small)
        found.append(Mix("the demo's stage 2", size, demo_samples(DEMO / "scenes" / "finetune.json", 64), 256))
        found.append(Mix("the demo's scenes in rows like mix665k", size, demo_row_samples(64), 256))
    return found


def mix665k_samples(count: int) -> list[tuple[int, int, int]]:
    """Return samples whose kinds and lengths are spread as in mix665k, divided by `SCALE`."""
    rng = np.random.default_rng(0)
    weights = np.array([rows for rows, *_ in MIX665K.values()], float)
    kinds = [list(MIX665K.values())[k] for k in rng.choice(len(weights), count, p=weights / weights.sum())]
    samples = []
    for _, has_image, median, spread in kinds:
        image = 576 if has_image else 0
        text = float(np.clip(median * np.exp(spread * rng.standard_normal()), 30, 2048 - image))
        samples.append((image // SCALE, max(round(text / SCALE), 4), max(round(text / SCALE / 2), 2)))
    return samples


def demo_samples(file: Path, count: int) -> list[tuple[int, int, int]]:
    """Return the lengths of rows of a file about the demo's scenes, as its processor and template make them."""
    processor = AutoProcessor.from_pretrained(DEMO / "composed", backend="pil")
    source = Source(file, DEMO / "scenes")
    dataset = VlmDataset([source], processor, "chat", processor.tokenizer.model_max_length)
    samples = []
    for i in np.random.default_rng(0).choice(len(dataset), count, replace=False):
        example = dataset[int(i)]
        if not isinstance(example, dict):
            raise ValueError(str(example))
        num_image = int((example["input_ids"] == processor.image_token_id).sum())
        num_labels = int((example["labels"] != IGNORE_INDEX).sum())
        samples.append((num_image, len(example["input_ids"]) - num_image, num_labels))
    return samples


def demo_row_samples(count: int) -> list[tuple[int, int, int]]:
    """Return the lengths of `demo_rows`."""
    rows = [json.loads((DEMO / "scenes" / name).read_text(encoding="utf-8")) for name in DEMO_FILES]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps(demo_rows(*rows, count)), encoding="utf-8")
        return demo_samples(file, count)


def demo_rows(captions: list[dict[str, Any]], questions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return rows about the demo's scenes whose kinds are as frequent as in mix665k.

    Instruction rows are the caption and then all questions of a scene; VQA and region rows all its questions, which
    LLaVA merges likewise; TextCaps the caption alone; ShareGPT, which has no image, `TEXT_ONLY_SCENES` scenes in words.

    Args:
        captions: Rows of stage 1, one per scene.
        questions: Rows of stage 2, one per question.
        count: Number of rows.
    """
    rng = np.random.default_rng(0)
    asked: dict[str, list[dict[str, str]]] = {}
    for row in questions:
        asked.setdefault(row["image"], []).extend(without_mark(row))
    scenes = [(row["image"], without_mark(row), asked[row["image"]]) for row in captions if row["image"] in asked]
    weights = np.array([rows for rows, *_ in MIX665K.values()], float)
    rows = []
    for number, kind in enumerate(rng.choice(list(MIX665K), count, p=weights / weights.sum())):
        chosen = [scenes[i] for i in rng.choice(len(scenes), TEXT_ONLY_SCENES, replace=False)]
        image, caption, turns = chosen[0]
        if kind == "ShareGPT":
            words = [turn for scene in chosen for turn in scene[1] + scene[2]]
            rows.append({"id": str(number), "conversations": words})
            continue
        turns = {"LLaVA-Instruct": caption + turns, "TextCaps": caption}.get(kind, turns)
        marked = [{**turns[0], "value": "<image>\n" + turns[0]["value"]}, *turns[1:]]
        rows.append({"id": str(number), "image": image, "conversations": marked})
    return rows


def without_mark(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return the turns of a row without the mark of its image."""
    return [{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in row["conversations"]]


def example_of(mix: Mix, i: int) -> dict[str, Any]:
    """Return sample ``i`` as a data set with cached features does: BOS, image, words, labels."""
    num_image, num_text, num_labels = mix.samples[i]
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(FIRST_WORD, mix.size.vocab_size, (num_image + num_text,), generator=generator)
    ids[0], ids[1 : 1 + num_image] = BOS, IMAGE
    labels = ids.clone()
    labels[:-num_labels] = IGNORE_INDEX
    example = {"input_ids": ids, "labels": labels, "num_cut": 0, "sample_id": str(i)}
    if num_image:
        example["vision_features"] = torch.randn(1, num_image, TOWER_WIDTH, generator=generator)
    return example


def batches_of(mix: Mix, layout: str) -> list[dict[str, Tensor]]:
    """Return the micro-batches of a layout; every layout holds every sample once."""
    rng = np.random.default_rng(0)
    if layout == "padded, grouped":
        lengths = np.array([(image + text) * (1 if image else -1) for image, text, _ in mix.samples])
        order = modality_grouped_order(lengths, mix.rows_per_batch, rng)
    else:
        order = rng.permutation(len(mix.samples))
    collate = Collator(0, mix.pack_tokens if layout == "packed" else None)
    examples = [example_of(mix, int(i)) for i in order]
    batches = [collate(examples[k : k + mix.rows_per_batch]) for k in range(0, len(examples), mix.rows_per_batch)]
    return [{name: value for name, value in batch.items() if isinstance(value, Tensor)} for batch in batches]


def mean_loss(trainer: Trainer, batches: list[dict[str, Tensor]]) -> float:
    """Run a step on every batch; return the loss per label token over all."""
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    return sum(run_step(trainer, batch) * n for batch, n in zip(batches, counts, strict=True)) / sum(counts)


def measure(mix: Mix, variant: str, num_rounds: int) -> dict[str, Any]:
    """Return losses and the (wall, CPU) seconds of every layout and round.

    The first pass warms up and gives the losses: layouts with equal samples must have equal ones.

    Raises:
        RuntimeError: If they have not.
    """
    trainer = build_trainer(variant, Case(mix.size, Shape(num_images=1, num_text=1, num_labels=1)))
    batches = {layout: batches_of(mix, layout) for layout in LAYOUTS}
    losses = {layout: mean_loss(trainer, batches[layout]) for layout in LAYOUTS}
    if max(losses.values()) - min(losses.values()) > 1e-5 * max(losses.values()):
        raise RuntimeError(f"{mix.name}, {variant}: the losses of the layouts differ: {losses}")
    seconds: dict[str, list[tuple[float, float]]] = {layout: [] for layout in LAYOUTS}
    for round_number in range(num_rounds):
        for layout in LAYOUTS if round_number % 2 else reversed(LAYOUTS):
            wall, cpu = time.perf_counter(), time.process_time()
            mean_loss(trainer, batches[layout])
            seconds[layout].append((time.perf_counter() - wall, time.process_time() - cpu))
    masks = {layout: [batch["attention_mask"] for batch in batches[layout]] for layout in LAYOUTS}
    return {
        "mix": mix.name,
        "variant": variant,
        "samples": len(mix.samples),
        "tokens": sum(image + text for image, text, _ in mix.samples),
        "shapes": {layout: [tuple(mask.shape) for mask in masks[layout]] for layout in LAYOUTS},
        "positions": {layout: sum(mask.numel() for mask in masks[layout]) for layout in LAYOUTS},
        "losses": losses,
        "seconds": seconds,
    }


def table(data: dict[str, Any]) -> Result:
    """Return the table of one mix and variant."""
    rows = []
    for layout in LAYOUTS:
        seconds, padded = data["seconds"][layout], data["seconds"]["padded"]
        ratios = [[b[clock] / a[clock] for a, b in zip(seconds, padded, strict=True)] for clock in (0, 1)]
        positions = data["positions"]
        rows.append(
            [
                layout,
                f"{data['tokens'] / statistics.median(wall for wall, _ in seconds):.0f}",
                f"{statistics.median(ratios[0]):.2f}",
                f"{min(ratios[0]):.2f} - {max(ratios[0]):.2f}",
                f"{statistics.median(ratios[1]):.2f}",
                f"{positions['padded'] / positions[layout]:.2f}",
                f"{1 - data['tokens'] / positions[layout]:.3f}",
                f"{data['losses'][layout]:.5f}",
            ]
        )
    header = [
        "layout",
        "tokens/s",
        "speed / padded",
        "range",
        "in CPU time",
        "positions saved",
        "padding share",
        "loss",
    ]
    title = f"{data['mix']}, {data['variant']}: {data['samples']} samples, {data['tokens']} tokens"
    return Result(f"{title}, median of {len(data['seconds']['packed'])} rounds", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per case")
    parser.add_argument("--small", action="store_true", help="toy sizes, seconds: shows that the script works")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results; not if --small)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    torch.set_num_threads(1)
    load, results, data = os.getloadavg(), [], []
    for mix in mixes(options.small):
        for variant in ("plain", "CAL"):
            data.append(measure(mix, variant, options.rounds))
            results.append(table(data[-1]))
            print_result(results[-1])
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        write_results(out, "packing", circumstances(load), results, data)


if __name__ == "__main__":
    main()
