"""Head and loss alone: all logits at once, ours in chunks, and torch's `linear_cross_entropy` in chunks.

The question is whether torch's function could take the place of `cal_train.cal.loss`. All methods compute
``sum_n w_n * CE_n`` and its gradients from N label rows; they run alternating in one process, and peak memory is
measured in a fresh process per method. N label rows, V vocabulary, D width.

    python benchmarks/loss_memory.py [--rounds 3] [--small] [--out FOLDER]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench.memory import in_fresh_process, peak_growth
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from torch import Tensor

from cal_train.cal.loss import CHUNK_ELEMENTS, weighted_linear_cross_entropy

WIDTH = 512


class Case(NamedTuple):
    """Sizes of the head, and whether it learns (stage 2) or is frozen (stage 1, LoRA)."""

    num_rows: int
    vocab_size: int
    is_learning: bool = True


class Problem(NamedTuple):
    """Inputs of a loss."""

    hidden_ND: Tensor
    head_weight_VD: Tensor
    labels_N: Tensor
    token_weights_N: Tensor


CASES = [
    *(Case(num_rows, 32_000) for num_rows in (200, 1000, 4000)),
    *(Case(num_rows, 128_000) for num_rows in (200, 1000)),
    Case(1000, 32_000, is_learning=False),
    Case(1000, 128_000, is_learning=False),
]
SMALL_CASES = [Case(64, 500), Case(64, 500, is_learning=False)]
CHUNKS = [2**power for power in range(22, 27)]


def all_logits(problem: Problem) -> Tensor:
    """Return the loss from the full (N, V) logits."""
    ce_N = F.cross_entropy(F.linear(problem.hidden_ND, problem.head_weight_VD), problem.labels_N, reduction="none")
    return (ce_N * problem.token_weights_N).sum()


def ours(problem: Problem, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Return the loss from chunks of at most ``chunk_elements`` logits."""
    chunk_size = max(chunk_elements // len(problem.head_weight_VD), 1)
    return weighted_linear_cross_entropy(*problem, chunk_size=chunk_size)


def torch_chunks(problem: Problem, has_our_chunks: bool) -> Tensor:
    """Return the loss from torch's function, in chunks of its own choice or of our size."""
    chunk_size = max(CHUNK_ELEMENTS // len(problem.head_weight_VD), 1)
    options = (
        torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
        if has_our_chunks
        else torch.nn.LinearCrossEntropyOptions()
    )
    ce_N = F.linear_cross_entropy(
        problem.hidden_ND, problem.head_weight_VD, problem.labels_N, reduction="none", options=options
    )
    return (ce_N * problem.token_weights_N).sum()


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "all logits": all_logits,
    "ours": ours,
    "torch, its chunks": partial(torch_chunks, has_our_chunks=False),
    "torch, our chunks": partial(torch_chunks, has_our_chunks=True),
}
CHUNK_METHODS: dict[str, Callable[[Problem], Tensor]] = {
    f"2^{chunk.bit_length() - 1}": partial(ours, chunk_elements=chunk) for chunk in CHUNKS
}


def make_problem(case: Case) -> Problem:
    """Return random inputs, equal on every call."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(case.num_rows, WIDTH, generator=generator).requires_grad_()
    weight_VD = torch.randn(case.vocab_size, WIDTH, generator=generator).mul_(WIDTH**-0.5)
    labels_N = torch.randint(case.vocab_size, (case.num_rows,), generator=generator)
    token_weights_N = torch.rand(case.num_rows, generator=generator) * 4 + 1
    return Problem(hidden_ND, weight_VD.requires_grad_(case.is_learning), labels_N, token_weights_N)


def run(method: Callable[[Problem], Tensor], problem: Problem) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradients."""
    loss = method(problem)
    inputs = [x for x in (problem.hidden_ND, problem.head_weight_VD) if x.requires_grad]
    return loss.item(), list(torch.autograd.grad(loss, inputs))


def check(case: Case, methods: dict[str, Callable[[Problem], Tensor]]) -> None:
    """Raise ``RuntimeError`` unless all methods agree in value and gradients with the full logits."""
    problem = make_problem(case)
    expected, expected_gradients = run(all_logits, problem)
    for name, method in methods.items():
        loss, gradients = run(method, problem)
        errors = [abs(loss - expected) / expected]
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip(gradients, expected_gradients, strict=True)]
        if max(errors) > 1e-5:
            raise RuntimeError(f"{name} differs from the full logits for {case}: relative errors {errors}")


def peak_of(method: Callable[[Problem], Tensor], case: Case) -> int:
    """Return by how many bytes loss and gradients raise the memory of this process."""
    torch.set_num_threads(1)
    problem = make_problem(case)
    return peak_growth(lambda: run(method, problem))


def measure(case: Case, methods: dict[str, Callable[[Problem], Tensor]], num_rounds: int) -> dict[str, Any]:
    """Return (wall, CPU) seconds of every round and peak memory of every method."""
    check(case, methods)  # also warms up
    problem = make_problem(case)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(num_rounds):
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(method, problem)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    peaks = {name: in_fresh_process(peak_of, method, case) for name, method in methods.items()}
    return {**case._asdict(), "width": WIDTH, "seconds": seconds, "peak_bytes": peaks}


def result_of(title: str, data: Sequence[dict[str, Any]]) -> Result:
    """Return the table of several cases with the same methods: seconds, CPU seconds and peak MiB of each."""
    names = list(data[0]["seconds"])
    rows = []
    for case in data:
        where = f"N {case['num_rows']}, V {case['vocab_size']}{'' if case['is_learning'] else ', frozen head'}"
        for name in names:
            wall, cpu = (statistics.median(times) for times in zip(*case["seconds"][name], strict=True))
            rows.append([where, name, f"{wall:.3f}", f"{cpu:.3f}", f"{case['peak_bytes'][name] / 2**20:.0f}"])
    return Result(title, ["head", "method", "seconds", "CPU seconds", "peak MiB"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per case")
    parser.add_argument("--small", action="store_true", help="toy sizes, seconds: shows that the script works")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results; none if --small)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be at least 1")
    torch.set_num_threads(1)
    load, results, data = os.getloadavg(), [], {}
    cases = SMALL_CASES if options.small else CASES
    chunk_cases = SMALL_CASES[:1] if options.small else [Case(2000, 32_000), Case(1000, 128_000)]
    for key, title, chosen, methods in (
        ("methods", f"loss and gradients, width {WIDTH}, float32; peak includes the gradients", cases, METHODS),
        ("chunks", f"ours by logits per chunk (the default is {CHUNK_ELEMENTS})", chunk_cases, CHUNK_METHODS),
    ):
        data[key] = [measure(case, methods, options.rounds) for case in chosen]
        results.append(result_of(title, data[key]))
        print_result(results[-1])
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        write_results(out, "loss_memory", circumstances(load), results, data)


if __name__ == "__main__":
    main()
