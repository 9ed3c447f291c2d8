"""Verb ``score``: logits with and without image, delta and weight per label token, as JSON lines."""

import argparse

from rich.console import Console

from cal_train.cal.strategies import STRATEGIES, resolve_weighting
from cal_train.evals.score import score_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--model", required=True, help="model folder in Hugging Face layout")
    parser.add_argument("--data", required=True, help="JSON, JSONL or Parquet file")
    parser.add_argument("--image_root", help="folder of the images (default: the folder of the data file)")
    parser.add_argument("--output", required=True, help="JSON lines file to write")
    parser.add_argument("--ablation", choices=["remove", "mask"], help="how the image is taken away")
    parser.add_argument("--strategy", default="cal", choices=[s for s in STRATEGIES if s != "uniform"])
    parser.add_argument("--cal_low", type=float, default=1.0, help="lower clamp in logits")
    parser.add_argument("--cal_high", type=float, default=5.0, help="upper clamp in logits")
    parser.add_argument("--cal_window", type=int, default=3, help="smoothing window in tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--max_bad_samples", type=int, default=0, help="bad rows left out before the run stops")
    parser.add_argument(
        "--image_position", choices=["keep", "front"], default="keep", help="as in the recipe that trained the model"
    )
    parser.add_argument(
        "--template",
        default="chat",
        help="as in the recipe that trains on the scores (default: the folder's own)",
    )
    parser.add_argument(
        "--image_aspect_ratio",
        choices=["square", "pad", "anyres"],
        help="as in the recipe that will train on the scores (default: what the model folder says)",
    )
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens per row, image tokens included")


def run(arguments: argparse.Namespace) -> int:
    """Score and say what was written."""
    weighting = resolve_weighting(
        arguments.strategy, arguments.cal_low, arguments.cal_high, arguments.cal_window, arguments.ablation
    )
    count = score_file(
        arguments.model, arguments.data, arguments.image_root, arguments.output, weighting,
        arguments.batch_size, arguments.max_bad_samples, arguments.model_max_length, arguments.image_position,
        arguments.template, arguments.image_aspect_ratio,
    )  # fmt: skip
    Console().print(f"{count} samples scored into {arguments.output}")
    return 0
