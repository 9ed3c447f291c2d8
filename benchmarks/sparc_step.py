"""What SPARC costs over CLIP at the geometry of a B/16: arithmetic of the whole step, and measured time.

The difference is a few thousandths of a step, less than the noise of two steps. So the parts are timed: towers once,
and of each objective all that it does on their outputs, forward and backward, alternating. Ratio:

    (towers + SPARC's part) / (towers + CLIP's part).

    python benchmarks/sparc_step.py [--rounds 5] [--small] [--out FOLDER]
"""

import argparse
import os
import statistics
import time
from dataclasses import fields
from pathlib import Path

import torch
from bench.record import RESULTS, Result, circumstances, print_result, write_results
from torch.utils.flop_counter import FlopCounterMode

from cal_train.objectives.base import Objective, total_loss
from cal_train.objectives.families import build_objective
from cal_train.objectives.gather import ONE_RANK
from cal_train.testing import tiny_pairs
from cal_train.towers.outputs import TowerOutputs
from cal_train.towers.two_tower import TwoTower, build_two_tower

METHODS = ("clip", "sparc")
TEXT_LENGTH = 55  # SPARC's; CLIP has 77, where SPARC's share is smaller still


def b16(is_small: bool) -> TwoTower:
    """Return the towers of CLIP B/16 (SPARC's text length), or tiny ones of the same kind."""
    layers, vision, text, side = (2, 64, 32, 32) if is_small else (12, 768, 512, 224)
    return build_two_tower(
        {
            "model_type": "clip_vision_model",
            "hidden_size": vision,
            "intermediate_size": 4 * vision,
            "num_hidden_layers": layers,
            "num_attention_heads": vision // 32,
            "image_size": side,
            "patch_size": 16,
        },
        {
            "model_type": "clip_text_model",
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_hidden_layers": layers,
            "num_attention_heads": text // 32,
            "max_position_embeddings": TEXT_LENGTH,
            "vocab_size": 32_000,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )


def objective_step(objective: Objective, towers: TwoTower, outputs: TowerOutputs) -> torch.Tensor:
    """Return an objective's loss from the outputs of the towers."""
    terms = objective.contrast(objective.image_features(outputs), objective.text_features(outputs), ONE_RANK)
    terms |= objective.local_terms(towers, torch.empty(0), outputs)[0]
    return total_loss(terms, objective.loss_weights)[0]


def encode(towers: TwoTower, batch: dict[str, torch.Tensor]) -> TowerOutputs:
    """Return the outputs of both towers."""
    return towers(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def leaves_of(outputs: TowerOutputs) -> TowerOutputs:
    """Return the outputs as the start of a graph of their own."""
    values = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    return TowerOutputs(
        **{
            name: value.detach().requires_grad_(value.is_floating_point()) if value is not None else None
            for name, value in values.items()
        }
    )


def count_flops(name: str, is_small: bool) -> int:
    """Return the multiplications and additions of a training step with two pairs."""
    towers = b16(is_small)
    objective = build_objective(name, towers.shape)
    with FlopCounterMode(display=False) as counter:
        objective_step(objective, towers, encode(towers, tiny_pairs(towers.shape, 2))).backward()
    return counter.get_total_flops()


def measure(batch_size: int, rounds: int, is_small: bool) -> dict[str, list[float]]:
    """Return the seconds of the towers' step and of each objective's part of it."""
    torch.manual_seed(0)
    towers = b16(is_small)
    objectives = {name: build_objective(name, towers.shape) for name in METHODS}
    batch = tiny_pairs(towers.shape, batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in ("towers", *METHODS)}
    for round_ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        outputs = encode(towers, batch)
        used = [outputs.patch_tokens, outputs.text_tokens, outputs.image_pooled, outputs.text_pooled]
        torch.autograd.backward([u for u in used if u is not None], [torch.ones_like(u) for u in used if u is not None])
        taken = {"towers": time.perf_counter() - start}
        for name, objective in objectives.items():
            own = leaves_of(outputs)
            start = time.perf_counter()
            objective_step(objective, towers, own).backward()
            taken[name] = time.perf_counter() - start
        if round_:
            for name, value in taken.items():
                seconds[name].append(value)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the program")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load = os.getloadavg()
    batch_size = 4 if arguments.small else 8
    flops = {name: count_flops(name, arguments.small) for name in METHODS}
    seconds = measure(batch_size, arguments.rounds, arguments.small)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = (middle["towers"] + middle["sparc"]) / (middle["towers"] + middle["clip"])
    result = Result(
        f"SPARC's step over CLIP's, batch {batch_size}, {TEXT_LENGTH} text tokens",
        ("", "CLIP", "SPARC", "SPARC / CLIP"),
        [
            ("GFLOP of a pair", *(f"{flops[m] / 2e9:.2f}" for m in METHODS), f"{flops['sparc'] / flops['clip']:.4f}"),
            ("ms of towers", *[f"{1e3 * middle['towers']:.0f}"] * 2, ""),
            ("ms of objective", *(f"{1e3 * middle[m]:.1f}" for m in METHODS), ""),
            ("ms of a step", *(f"{1e3 * (middle['towers'] + middle[m]):.0f}" for m in METHODS), f"{ratio:.4f}"),
        ],
    )
    print_result(result)
    data = {"flops": flops, "seconds": seconds, "ratio": ratio}
    write_results(arguments.out, "sparc_step", circumstances(load), [result], data)


if __name__ == "__main__":
    main()
