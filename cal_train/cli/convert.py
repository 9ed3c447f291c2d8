"""``convert``: checkpoints of the original repositories to Hugging Face layout, and back."""

import argparse
from pathlib import Path

from rich.console import Console

from cal_train.models.convert.run import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``convert``."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder of LLaVA, LLaVA-NeXT, CAL or MGM: a whole checkpoint, a LoRA folder, one with mm_projector.bin, "
        "or a folder in Hugging Face layout.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="Folder to write.")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="Folder of the language model, for a LoRA folder or mm_projector.bin."
    )
    parser.add_argument(
        "--vision_tower",
        metavar="DIR",
        help="Folder of the vision tower, where the checkpoint does not hold its weights or it is not one of OpenAI's. "
        "With --to original: what config.json shall name.",
    )
    parser.add_argument("--aux_tower", metavar="DIR", help="The same for MGM's ConvNeXt tower.")
    parser.add_argument(
        "--to",
        choices=["hf", "original"],
        default="hf",
        help="Layout to write. hf also brings a Hugging Face folder to the names of llava-hf. Default: hf.",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="Chat template to save, as in compose. Default: what the language model was trained with; it is printed.",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Of the saved weights. Default: as the embedding is stored.",
    )
    parser.add_argument(
        "--pad_vocabulary_to",
        type=int,
        default=1,
        metavar="N",
        help="Make the number of vocabulary rows a multiple of N. Default: 1.",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the folder, show what became of the weights, and say what to run next."""
    report = convert(
        args.source,
        args.output,
        to=args.to,
        base=args.base,
        vision_tower=args.vision_tower,
        aux_tower=args.aux_tower,
        template=args.template,
        dtype=args.dtype,
        pad_vocabulary_to=args.pad_vocabulary_to,
    )
    console = Console()
    console.print(report.table())
    for note in report.notes:
        console.print(note, markup=False, highlight=False)
    print(f"wrote {args.output}")
    if args.to == "hf":
        print(f"next: cal-train train RECIPE.yaml --model_name_or_path {args.output}")
    return 0
