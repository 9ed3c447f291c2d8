"""What CAL costs: a training step with it, without it, of the stock Trainer, and as the reference code computes it.

All variants run in one process, one after the other, round after round, so that a busy machine slows all of them; the
ratios are taken within a round and their median is reported. A step is what the real Trainer runs for a micro-batch
(forward, backward, gradients cleared); there is no optimizer, whose time is the same for all. Peak memory is measured
in a fresh process per variant.

    python benchmarks/cal_overhead.py [--rounds 7] [--case 1|2|3] [--small] [--out FOLDER]
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.memory import in_fresh_process, peak_growth
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from bench.steps import LLAVA_7B, Case, Shape, Size, build_trainer, make_batch, run_step, step_flops

COMPARISONS = [("CAL", "plain"), ("CAL (mask)", "plain"), ("CAL", "stock"), ("CAL", "reference CAL")]
VARIANTS = ["plain", "CAL", "CAL (mask)", "stock", "reference CAL"]
# These were measured on a bare model before the trainer existed: the real one must not be slower.
TIME_TARGETS = {
    (1, "CAL", "plain"): 1.09,
    (1, "CAL", "stock"): 0.81,
    (1, "CAL", "reference CAL"): 0.58,
    (5, "CAL", "plain"): 1.0,
    (5, "CAL", "stock"): 0.67,
    (5, "CAL", "reference CAL"): 0.49,
}
MEMORY_TARGETS = {(1, "CAL", "stock"): 0.77, (5, "CAL", "stock"): 0.53}


def cases(is_small: bool) -> list[Case]:
    """Return the lengths of LLaVA-1.5, without and with activation checkpointing, and of a high-resolution model."""
    if is_small:
        size = Size(image_size=28, vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
        return [Case(size, Shape(num_images=1, num_text=20, num_labels=8, num_rows=2))]
    short, long = Shape(num_images=1, num_text=150, num_labels=100), Shape(num_images=5, num_text=300, num_labels=200)
    return [Case(Size(), short), Case(Size(), short, has_checkpointing=True), Case(Size(), long)]


def check_losses(losses: dict[str, float]) -> None:
    """Check that the variants that must have the same loss do: otherwise their times compare nothing.

    Raises:
        RuntimeError: If plain is not stock, the reference preset is not the reference, or the ablations differ.
    """
    for ours, other in (("plain", "stock"), ("reference preset", "reference CAL"), ("CAL", "CAL (mask)")):
        if abs(losses[ours] - losses[other]) > 1e-5 * abs(losses[other]):
            raise RuntimeError(f"the losses of {ours} and {other} differ: {losses[ours]} and {losses[other]}")
    if abs(losses["CAL"] - losses["plain"]) < 1e-4 * losses["plain"]:
        raise RuntimeError(f"CAL and plain have the same loss, {losses['CAL']}: all weights are equal")


def time_steps(case: Case, num_rounds: int) -> tuple[dict[str, float], dict[str, list[tuple[float, float]]]]:
    """Return the loss of every variant, and its (wall, CPU) seconds in every round.

    The step that gives the losses, which are checked, also warms up. Every other round runs in reverse order.
    """
    batch = make_batch(case)
    trainers = {name: build_trainer(name, case) for name in VARIANTS}
    losses = {name: run_step(trainer, batch) for name, trainer in trainers.items()}
    losses["reference preset"] = run_step(build_trainer("reference preset", case), batch)
    check_losses(losses)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for round_number in range(num_rounds):
        for name in VARIANTS if round_number % 2 else reversed(VARIANTS):
            wall, cpu = time.perf_counter(), time.process_time()
            run_step(trainers[name], batch)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return losses, seconds


def peak_of_step(variant: str, case: Case) -> int:
    """Return by how many bytes the first step of a variant raises the memory of its process, gradients included."""
    torch.set_num_threads(1)
    trainer, batch = build_trainer(variant, case), make_batch(case)
    return peak_growth(lambda: run_step(trainer, batch))


def measure(case: Case, num_rounds: int) -> dict[str, Any]:
    """Return everything that is measured and counted for a case, as plain values."""
    losses, seconds = time_steps(case, num_rounds)
    return {
        "image_tokens": case.num_tokens - case.shape.num_text,
        "text_tokens": case.shape.num_text,
        "labels": case.shape.num_labels,
        "rows": case.shape.num_rows,
        "checkpointing": case.has_checkpointing,
        "model": vars(case.size),
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": {name: in_fresh_process(peak_of_step, name, case) for name in VARIANTS},
        "gflop": {name: flops / 1e9 for name, flops in step_flops(_text_config(case), case).items()},
        "gflop_7b": {name: flops / 1e9 for name, flops in step_flops(LLAVA_7B, case).items()},
    }


def _text_config(case: Case) -> Any:
    return argparse.Namespace(**case.size.text_config())


def ratio(seconds: dict[str, list[tuple[float, float]]], pair: tuple[str, str], clock: int) -> tuple[float, str]:
    """Return the median over rounds of the ratio of two variants, and its range as text; clock 0 is wall, 1 is CPU."""
    ratios = [a[clock] / b[clock] for a, b in zip(seconds[pair[0]], seconds[pair[1]], strict=True)]
    return statistics.median(ratios), f"{min(ratios):.2f} - {max(ratios):.2f}"


def ratio_result(data: dict[str, Any], case: Case) -> Result:
    """Return the table of ratios of one case: time against its floor and its target, memory."""
    rows = []
    for pair in COMPARISONS:
        wall, spread = ratio(data["seconds"], pair, clock=0)
        cpu, _ = ratio(data["seconds"], pair, clock=1)
        floors = [data[count][pair[0]] / data[count][pair[1]] for count in ("gflop", "gflop_7b")]
        memory = data["peak_bytes"][pair[0]] / data["peak_bytes"][pair[1]]
        has_targets = case.size == Size() and not case.has_checkpointing
        key = (case.shape.num_images, *pair)
        targets = [table.get(key) if has_targets else None for table in (TIME_TARGETS, MEMORY_TARGETS)]
        shown = ["" if target is None else f"{target:.2f}" for target in targets]
        rows.append(
            [
                *(" / ".join(pair), f"{wall:.3f}", spread, f"{cpu:.3f}", f"{floors[0]:.3f}", shown[0]),
                *(f"{memory:.2f}", shown[1], f"{floors[1]:.3f}"),
            ]
        )
    header = ["ratio", "time", "range", "CPU time", "floor", "time target", "peak memory", "memory target", "floor, 7B"]
    return Result(f"{title(case)}: ratios, median of {len(data['seconds']['CAL'])} rounds", header, rows)


def step_result(data: dict[str, Any], case: Case) -> Result:
    """Return the table of absolute numbers of one case."""
    rows = []
    for name in VARIANTS:
        wall, cpu = (statistics.median(times) for times in zip(*data["seconds"][name], strict=True))
        peak, loss = data["peak_bytes"][name] / 2**20, data["losses"][name]
        rows.append([name, f"{wall:.3f}", f"{cpu:.3f}", f"{data['gflop'][name]:.1f}", f"{peak:.0f}", f"{loss:.5f}"])
    header = ["step", "seconds", "CPU seconds", "GFLOP (counted)", "peak MiB", "loss"]
    return Result(f"{title(case)}: steps", header, rows)


def title(case: Case) -> str:
    """Return what a case is, in words."""
    size, shape = case.size, case.shape
    return (
        f"{case.num_tokens - shape.num_text} image + {shape.num_text} text tokens, {shape.num_labels} labels, "
        f"{shape.num_rows} row(s){', checkpointing' if case.has_checkpointing else ''}; language model "
        f"{size.num_layers} x {size.hidden_size}, vocabulary {size.vocab_size}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds per case")
    parser.add_argument("--case", type=int, choices=(1, 2, 3), help="only this one of the three cases")
    parser.add_argument("--small", action="store_true", help="toy sizes, seconds: shows that the script works")
    parser.add_argument(
        "--out", type=Path, help="folder for results (default: benchmarks/results; not if --small, --case)"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    torch.set_num_threads(1)
    load, results, data = os.getloadavg(), [], []
    selected = cases(options.small)
    for case in selected if options.case is None else selected[options.case - 1 : options.case]:
        data.append(measure(case, options.rounds))
        for result in (ratio_result(data[-1], case), step_result(data[-1], case)):
            results.append(result)
            print_result(result)
    out = options.out or (None if options.small or options.case else RESULTS)
    if out is not None:
        write_results(out, "cal_overhead", circumstances(load), results, data)


if __name__ == "__main__":
    main()
