"""CLIP and SigLIP losses on the same features: ours beside open_clip's, in value, time and memory.

Features only: the towers cost the same whichever loss follows. All methods compute the loss of B pairs and its
gradients for embeddings, scale and bias, from the same un-normalised embeddings; they run alternating in one process,
every other round in reverse order, and peak memory is measured in a fresh process per method. Before any timing the
losses must be equal to 1e-5. A method whose matrices would not fit the free memory is left out, and the table says so.

    python benchmarks/tower_losses.py [--rounds 3] [--quick] [--out FOLDER]

open_clip is in the extra `bench`: pip install -c constraints.txt -e '.[bench]'
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from bench.memory import in_fresh_process, peak_growth
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from torch import Tensor

from cal_train.objectives.clip import clip_term
from cal_train.objectives.siglip import siglip_term

WIDTH = 512
SIZES = [1024, 2048, 4096, 8192, 16_384, 32_768]
QUICK_SIZES = [512, 1024, 2048]
LARGEST_TIMED = 8192
"""Beyond it only the memory is measured: on a CPU one round would take minutes."""
DENSE_MATRICES = 9
"""Matrices of B x B float32 allowed for a dense loss; open_clip's peak was that of 6 (CLIP) and 8 (SigLIP)."""


class Pairs(NamedTuple):
    """Inputs of a loss."""

    image_embeds_BD: Tensor
    text_embeds_BD: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


def open_clip_clip(pairs: Pairs) -> Tensor:
    """Return CLIP's loss by open_clip, in one process."""
    from open_clip.loss import ClipLoss

    images, texts = (F.normalize(x, dim=-1) for x in pairs[:2])  # open_clip's models do this
    return ClipLoss()(images, texts, pairs.logit_scale)


def open_clip_siglip(pairs: Pairs) -> Tensor:
    """Return SigLIP's loss by open_clip, in one process."""
    from open_clip.loss import SigLipLoss

    images, texts = (F.normalize(x, dim=-1) for x in pairs[:2])
    return SigLipLoss()(images, texts, pairs.logit_scale, pairs.logit_bias)


def features(pairs: Pairs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the pairs as objectives hand them over."""
    return {"image_embeds": pairs.image_embeds_BD}, {"text_embeds": pairs.text_embeds_BD}


def ours_clip_local(pairs: Pairs) -> Tensor:
    """Return CLIP's loss from one matrix of logits."""
    term = clip_term(*features(pairs), pairs.logit_scale)
    return term.sum / term.weight


def ours_clip_tiled(pairs: Pairs) -> Tensor:
    """Return CLIP's loss from tiles."""
    term = clip_term(*features(pairs), pairs.logit_scale, backend="tiled")
    return term.sum / term.weight


def ours_siglip(pairs: Pairs) -> Tensor:
    """Return SigLIP's loss from chunks."""
    term = siglip_term(*features(pairs), pairs.logit_scale, pairs.logit_bias)
    return term.sum / term.weight


Method = Callable[[Pairs], Tensor]
METHODS: dict[str, dict[str, Method]] = {
    "CLIP": {"open_clip": open_clip_clip, "ours, local": ours_clip_local, "ours, tiled": ours_clip_tiled},
    "SigLIP": {"open_clip": open_clip_siglip, "ours, chunked": ours_siglip},
}
LINEAR = {"ours, tiled", "ours, chunked"}


def make_pairs(num_pairs: int) -> Pairs:
    """Return random pairs that belong together a little, equal on every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_pairs, WIDTH, generator=generator)
    texts = torch.randn(num_pairs, WIDTH, generator=generator).add_(images, alpha=0.3)
    return Pairs(*(x.requires_grad_() for x in (images, texts, torch.tensor(1 / 0.07), torch.tensor(-10.0))))


def run(method: Method, pairs: Pairs) -> float:
    """Return the loss after taking its gradients, which are dropped."""
    loss = method(pairs)
    torch.autograd.grad(loss, pairs, allow_unused=True)  # CLIP has no bias
    return loss.item()


def peak_of(method: Method, num_pairs: int) -> int:
    """Return by how many bytes loss and gradients raise the memory of this process."""
    torch.set_num_threads(1)
    run(method, make_pairs(8))  # imports
    pairs = make_pairs(num_pairs)
    return peak_growth(lambda: run(method, pairs))


def is_feasible(name: str, num_pairs: int) -> bool:
    """Return whether a method's matrices fit the memory that is free now."""
    return name in LINEAR or DENSE_MATRICES * 4 * num_pairs**2 < psutil.virtual_memory().available


def time_methods(methods: dict[str, Method], num_pairs: int, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, CPU) seconds of every round of every method.

    Raises:
        RuntimeError: If the methods do not agree on the loss.
    """
    pairs = make_pairs(num_pairs)
    losses = {name: run(method, pairs) for name, method in methods.items()}
    if max(losses.values()) - min(losses.values()) > 1e-5 * max(losses.values()):
        raise RuntimeError(f"the losses of {num_pairs} pairs differ: {losses}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for index in range(num_rounds):
        for name in list(methods) if index % 2 == 0 else reversed(methods):
            wall, cpu = time.perf_counter(), time.process_time()
            run(methods[name], pairs)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def measure(loss: str, num_pairs: int, num_rounds: int) -> dict[str, Any]:
    """Return seconds (for small enough batches) and peak bytes of every method that fits the memory."""
    feasible = {name: method for name, method in METHODS[loss].items() if is_feasible(name, num_pairs)}
    seconds = time_methods(feasible, num_pairs, num_rounds) if num_pairs <= LARGEST_TIMED else {}
    peaks = {name: in_fresh_process(peak_of, method, num_pairs) for name, method in feasible.items()}
    return {"loss": loss, "num_pairs": num_pairs, "width": WIDTH, "seconds": seconds, "peak_bytes": peaks}


def row_of(case: dict[str, Any], name: str) -> list[str]:
    """Return a method's row: CPU seconds and peak, each also as a ratio to open_clip's."""
    where = [f"{case['loss']}, B {case['num_pairs']}", name]
    peaks, seconds = case["peak_bytes"], case["seconds"]
    if name not in peaks:
        return [*where, "-", "-", "does not fit", "-"]
    times = ["-", "-"]
    if name in seconds:
        cpu = [[cpu for _, cpu in seconds[method]] for method in (name, "open_clip")]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(*cpu, strict=True))
        times = [f"{statistics.median(cpu[0]):.3f}", f"{ratio:.2f}"]
    against = f"{peaks['open_clip'] / peaks[name]:.1f}" if "open_clip" in peaks else "-"
    return [*where, *times, f"{peaks[name] / 2**20:.0f}", against]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write it to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per case")
    parser.add_argument("--quick", "--small", action="store_true", help=f"batches of {QUICK_SIZES} only")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results; none if --quick)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    try:
        import open_clip  # noqa: F401
    except ImportError:
        parser.error("open_clip is missing: pip install -c constraints.txt -e '.[bench]'")
    torch.set_num_threads(1)
    load, data = os.getloadavg(), []
    for num_pairs in QUICK_SIZES if options.quick else SIZES:
        data += [measure(loss, num_pairs, options.rounds) for loss in METHODS]
    result = Result(
        f"loss and gradients of B pairs, width {WIDTH}, float32, 1 thread; ratios to open_clip in the same rounds",
        ["loss", "method", "CPU seconds", "ours / open_clip", "peak MiB", "open_clip's peak / this"],
        [row_of(case, name) for case in data for name in METHODS[case["loss"]]],
    )
    print_result(result)
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        write_results(out, "tower_losses", circumstances(load), [result], data)


if __name__ == "__main__":
    main()
