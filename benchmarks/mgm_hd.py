"""What thousands of image tokens cost: mining of MGM-HD in chunks, and CAL in the Trainer for LLaVA-NeXT and MGM-HD.

Token counts are the real ones, widths are small. Mining is compared in chunks, in one piece, and as it is described,
with every key and value made; forward and backward of the mining layers, towers frozen. A step is what the Trainer
runs for a micro-batch, without the optimizer. All variants of a comparison run in one process, round after round, in
alternating order; peak memory is measured in a fresh process per variant.

    python benchmarks/mgm_hd.py [--rounds 5] [--part mining|steps] [--small] [--out FOLDER]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench.memory import in_fresh_process, peak_growth
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from bench.steps import FIRST_WORD, IMAGE, Size, run_step
from torch import Tensor

from cal_train.cal.strategies import STRATEGIES
from cal_train.conf import VlmTrainingArguments
from cal_train.models.families import family_of
from cal_train.models.mgm.mining import PatchInfoMining, full_size_rows
from cal_train.testing import tiny_vlm
from cal_train.train.trainer import VlmTrainer
from cal_train.types import IGNORE_INDEX

GRID = 2
WIDTHS = (256, (48, 96, 192, 384))  # a quarter of CLIP-L's and ConvNeXt-L's
MINING = ("chunks", "one piece", "keys and values")
STEPS = ("plain", "CAL")
NUM_TEXT, NUM_LABELS = 300, 200


def mining_inputs(is_small: bool) -> tuple[PatchInfoMining, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return mining layers, the patches of the tiles as a raster, those of the global image, and the feature maps."""
    width, channels = (16, (4, 6, 8, 10)) if is_small else WIDTHS
    side = 4 if is_small else 24
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = PatchInfoMining(width, sum(channels), 16 if is_small else 192)
    raster = torch.randn(1, GRID * side, GRID * side, width, generator=generator)
    whole = torch.randn(1, side, side, width, generator=generator)
    maps = [torch.randn(1, c, (16 * side) >> k, (16 * side) >> k, generator=generator) for k, c in enumerate(channels)]
    return layers, raster, whole, tuple(maps)


def described_mining(layers: PatchInfoMining, patches: Tensor, stages: tuple[Tensor, ...], shrink: int) -> Tensor:
    """Return what `PatchInfoMining` returns, from the description: the whole map, every key and every value."""
    state = dict(layers.named_parameters())

    def layer(name: str, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], state[f"{name}_norm.weight"], state[f"{name}_norm.bias"])
        return F.linear(x, state[f"{name}_proj.weight"], state[f"{name}_proj.bias"])

    side, width = patches.shape[1], patches.shape[-1]
    whole = full_size_rows([stage[0] for stage in stages], 0, stages[0].shape[-1])
    if shrink > 1:
        whole = F.interpolate(whole[None], scale_factor=1 / shrink, mode="bilinear")[0]
    areas = whole.unflatten(2, (side, -1)).unflatten(1, (side, -1)).permute(1, 3, 2, 4, 0).flatten(2, 3)
    scores = layer("key", areas) @ layer("query", patches[0])[..., None] / width**0.5
    return (scores.softmax(2).transpose(2, 3) @ layer("value", areas))[None, :, :, 0]


def mine_once(variant: str, inputs: tuple[PatchInfoMining, Tensor, Tensor, tuple[Tensor, ...]]) -> float:
    """Run mining of one image forward and backward; return a number that all variants share."""
    layers, raster, whole, stages = inputs
    chunk_size = layers.chunk_size
    if variant == "one piece":
        layers.chunk_size = 10**9
    run: Callable[..., Tensor] = layers
    if variant == "keys and values":
        run = lambda patches, stages, shrink: described_mining(layers, patches, stages, shrink)  # noqa: E731
    total = run(raster, stages, 1).square().mean() + run(whole, stages, GRID).square().mean()
    total.backward()
    layers.zero_grad()
    layers.chunk_size = chunk_size
    return total.item()


def peak_of_mining(variant: str, is_small: bool) -> int:
    """Return by how many bytes mining raises the memory of its process."""
    torch.set_num_threads(1)
    inputs = mining_inputs(is_small)
    return peak_growth(lambda: mine_once(variant, inputs))


def build(family: str, variant: str, is_small: bool) -> tuple[VlmTrainer, dict[str, Tensor]]:
    """Return the trainer of a variant, towers frozen, and a batch of one row with one image."""
    size = Size(image_size=28, vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
    size = size if is_small else Size()
    hd = {"image_grid": GRID, "image_global": True, "high_res_size": 128 if is_small else 1536}
    options = hd if family == "mgm" else None
    model, processor = tiny_vlm(family, image_size=size.image_size, family_options=options, **size.text_config())
    family_functions = family_of(model)
    for parameter in family_functions.tower_parameters(model):
        parameter.requires_grad_(False)
    with torch.no_grad():  # logits of the same spread at every width: the deltas reach both clamp limits
        model.lm_head.weight *= 40 / size.hidden_size**0.5
    args = VlmTrainingArguments(
        output_dir=tempfile.gettempdir(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    weighting = STRATEGIES["cal"] if variant == "CAL" else None
    trainer = VlmTrainer(model, args, processor, weighting, train_dataset=None, data_collator=list)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, make_batch(family, model, size)


def make_batch(family: str, model: Any, size: Size) -> dict[str, Tensor]:
    """Return one row: words, an image that fills the largest grid, words, labels."""
    generator = torch.Generator().manual_seed(0)
    side, num_tiles = size.image_size, GRID**2 + 1
    images = {"pixel_values": torch.randn(num_tiles, 3, side, side, generator=generator)}
    if family == "mgm":
        high_res = model.config.high_res_size
        images["pixel_values"] = images["pixel_values"][None]
        images["high_res_pixel_values"] = torch.randn(1, 3, high_res, high_res, generator=generator)
    else:
        images["image_sizes"] = torch.tensor([[3 * side, 3 * side]])
    functions = family_of(model)
    with torch.no_grad():
        num_tokens = len(functions.image_embeds(model, functions.vision_features(model, images), images))
    ids = torch.randint(FIRST_WORD, size.vocab_size, (1, num_tokens + NUM_TEXT), generator=generator)
    ids[:, 40 : 40 + num_tokens] = IMAGE
    labels = ids.clone()
    labels[:, :-NUM_LABELS] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}


def peak_of_step(family: str, variant: str, is_small: bool) -> int:
    """Return by how many bytes the first step raises the memory of its process, gradients included."""
    torch.set_num_threads(1)
    trainer, batch = build(family, variant, is_small)
    return peak_growth(lambda: run_step(trainer, batch))


def time_all(work: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, Any]:
    """Return the value of every variant and its (wall, CPU) seconds per round, every other round in reverse order."""
    values = {name: run() for name, run in work.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for round_number in range(num_rounds):
        for name in list(work) if round_number % 2 else list(reversed(work)):
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"values": values, "seconds": seconds}


def measure_mining(num_rounds: int, is_small: bool) -> dict[str, Any]:
    """Return times and peaks of mining.

    Raises:
        RuntimeError: If the variants do not compute the same.
    """
    inputs = mining_inputs(is_small)
    measured = time_all({name: lambda name=name: mine_once(name, inputs) for name in MINING}, num_rounds)
    values = measured["values"].values()
    if max(values) - min(values) > 1e-4 * max(values):
        raise RuntimeError(f"the variants of mining differ: {measured['values']}")
    peaks = {name: in_fresh_process(peak_of_mining, name, is_small) for name in MINING}
    return {
        **measured,
        "peak_bytes": peaks,
        "image_tokens": inputs[1][0, ..., 0].numel() + inputs[2][0, ..., 0].numel(),
    }


def measure_steps(family: str, num_rounds: int, is_small: bool) -> dict[str, Any]:
    """Return times and peaks of a training step of a family."""
    built = {name: build(family, name, is_small) for name in STEPS}
    num_tokens = int((built["plain"][1]["input_ids"] == IMAGE).sum())
    work = {name: lambda pair=pair: run_step(*pair) for name, pair in built.items()}
    measured = time_all(work, num_rounds)
    peaks = {name: in_fresh_process(peak_of_step, family, name, is_small) for name in STEPS}
    return {**measured, "peak_bytes": peaks, "image_tokens": num_tokens, "family": family}


def table(title: str, data: dict[str, Any], base: str) -> Result:
    """Return medians, peaks, and the ratio of each variant to ``base`` within a round (median and range)."""
    rows = []
    for name, times in data["seconds"].items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [[a[k] / b[k] for a, b in zip(times, data["seconds"][base], strict=True)] for k in (0, 1)]
        peaks = data["peak_bytes"]
        rows.append(
            [
                *(name, f"{wall:.3f}", f"{cpu:.3f}", f"{statistics.median(ratios[0]):.3f}"),
                *(f"{min(ratios[0]):.2f} - {max(ratios[0]):.2f}", f"{statistics.median(ratios[1]):.3f}"),
                *(f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[base]:.2f}"),
            ]
        )
    header = ["", "seconds", "CPU seconds", f"/ {base}", "range", f"CPU / {base}", "peak MiB", f"peak / {base}"]
    return Result(title, header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--part", choices=("mining", "steps"), help="only this part")
    parser.add_argument("--small", action="store_true", help="toy sizes, seconds: shows that the script works")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results; not if --small)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    torch.set_num_threads(1)
    load, results, data = os.getloadavg(), [], {}
    if options.part != "steps":
        data["mining"] = measure_mining(options.rounds, options.small)
        title = f"Mining for {data['mining']['image_tokens']} image tokens, forward and backward"
        results.append(table(title, data["mining"], "keys and values"))
        print_result(results[-1])
    for family in ("llava_next", "mgm") if options.part != "mining" else ():
        data[family] = measure_steps(family, options.rounds, options.small)
        name = "MGM-HD" if family == "mgm" else "LLaVA-NeXT"
        title = f"{name}: {data[family]['image_tokens']} image + {NUM_TEXT} text tokens, {NUM_LABELS} labels"
        results.append(table(title, data[family], "plain"))
        print_result(results[-1])
    out = options.out or (None if options.small or options.part else RESULTS)
    if out is not None:
        write_results(out, "mgm_hd", circumstances(load), results, data)


if __name__ == "__main__":
    main()
