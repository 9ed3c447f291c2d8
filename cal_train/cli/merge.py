"""``merge``: fold a LoRA adapter into a plain checkpoint."""

import argparse
from pathlib import Path

from cal_train.models.lora import merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``merge``."""
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="Folder of the adapter.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="Folder to write.")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="Folder of the base model. Default: the one that the adapter names."
    )
    parser.add_argument(
        "--quantized_base",
        action="store_true",
        help="After a run with quantization: fold into the quantised weights, turned back to full precision, which "
        "gives the logits of the training. Default: into the base model as it is on disk.",
    )


def run(args: argparse.Namespace) -> int:
    """Merge the adapter, and say where the result is."""
    print(f"wrote {merge(args.adapter, args.output, args.base, args.quantized_base)}")
    return 0
