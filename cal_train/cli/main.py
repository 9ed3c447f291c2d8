"""The program: ``cal-train VERB ...`` and ``python -m cal_train VERB ...``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError
from rich.console import Console

VERBS = {
    "train": "train a VLM by a recipe, with CAL by one flag",
    "compose": "build an untrained VLM from a language model and a vision tower",
    "tower": "pretrain an image and a text tower by a recipe",
    "eval_tower": "measure a tower run: retrieval, zero-shot, linear probe",
    "export_tower": "write the image tower of a tower run in Hugging Face layout",
    "check_data": "validate every row of a data file or recipe",
    "preview": "show tokens, labels and image spans of samples",
    "score": "write logits with and without image, delta and weight per label token",
    "report": "show scores, curves and results as one self-contained page",
    "eval": "run lmms-eval's benchmarks on a model, or compare two results",
    "merge": "fold LoRA adapters into a plain checkpoint",
    "estimate": "parameters, memory of a device, tokens and operations of a step, before any run",
    "convert": "bring original LLaVA, LLaVA-NeXT, CAL and MGM checkpoints to Hugging Face layout, and back",
    "env": "print versions and hardware, for bug reports",
    "demo": "train and compare a small real VLM with and without CAL",
    "demo_towers": "pretrain small real towers by every method, and compare them",
}
"""Verb -> one line. Each is a module of this package with ``add_arguments(parser)`` and ``run(arguments) -> int``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code. A user's mistake is one message, not a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="cal-train", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "verbs:\n" + "\n".join(f"  {verb:<14}{line}" for verb, line in VERBS.items())
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    verb = parser.parse_args(arguments[:1]).verb
    module = importlib.import_module(f"cal_train.cli.{verb}")
    verb_parser = argparse.ArgumentParser(
        prog=f"cal-train {verb}", description=VERBS[verb], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(verb_parser)
    if getattr(module, "TAKES_OPTIONS", False):  # free-form --key value pairs of a recipe
        parsed, parsed.options = verb_parser.parse_known_args(arguments[1:])
    else:
        parsed = verb_parser.parse_args(arguments[1:])
    try:
        return module.run(parsed)
    except (ValueError, FloatingPointError, OSError, StrictDataclassError) as error:
        # OSError: a folder that cannot be written, a full disk; StrictDataclassError: a value in a config.json
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False)
        return 2


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
