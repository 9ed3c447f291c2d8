"""``compose``: build an untrained VLM from a language model and vision towers."""

import argparse
import json
import logging
from pathlib import Path

from cal_train.data.conversation import TURN_MARKS
from cal_train.models.compose import compose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compose``."""
    parser.add_argument(
        "--family", choices=["llava", "llava_next", "mgm"], default="llava", help="Family of the VLM. Default: llava."
    )
    parser.add_argument("--llm", type=Path, required=True, metavar="DIR", help="Folder of a causal language model.")
    parser.add_argument("--gguf_file", metavar="FILE", help="Name of a GGUF file in --llm to read instead.")
    parser.add_argument(
        "--vision_tower",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder of a CLIP, SigLIP or DINOv2 tower, or of a CLIP or SigLIP dual encoder.",
    )
    parser.add_argument(
        "--aux_tower",
        type=Path,
        metavar="DIR",
        help="Folder of a ConvNeXt tower for high-resolution images (mgm), in transformers' layout or open_clip's.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="Folder to write.")
    parser.add_argument(
        "--template",
        metavar="NAME",
        help=f"Chat template to save: {', '.join(TURN_MARKS)}, or chat (the language model's own). Default: chat if "
        "the language model has one, else vicuna_v1.",
    )
    parser.add_argument("--image_size", type=int, metavar="PX", help="Side of the images. Default: the tower's own.")
    parser.add_argument(
        "--image_aspect_ratio",
        choices=["square", "pad"],
        default="square",
        help="How images become square: crop the centre, or pad with the mean colour. Default: square.",
    )
    parser.add_argument(
        "--grid_pinpoints",
        type=json.loads,
        metavar="JSON",
        help="Grids of tiles, [[height, width], ...] in pixels (llava_next). Default: LLaVA-NeXT's five, ordered so "
        "that transformers chooses as the original code does.",
    )
    parser.add_argument(
        "--image_grid",
        type=int,
        choices=[1, 2],
        default=1,
        help="Tiles along a side (mgm); 2 is MGM-HD, which also sees the whole image. Default: 1.",
    )
    parser.add_argument(
        "--vision_feature_layer",
        type=int,
        default=-2,
        metavar="N",
        help="Hidden state of the tower that the projector reads. Default: -2.",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Of the saved weights. Default: as the language model is stored.",
    )
    parser.add_argument(
        "--pad_vocabulary_to",
        type=int,
        default=1,
        metavar="N",
        help="Make the number of vocabulary rows a multiple of N (64 suits tensor cores). Default: 1.",
    )
    parser.add_argument(
        "--standardize_on",
        type=Path,
        metavar="DIR",
        help="Folder of images: start the projector as if its input were standardised on them, which saves a small "
        "model many steps. Default: LLaVA's plain start.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the projector's initial weights. Default: 0.")


def run(args: argparse.Namespace) -> int:
    """Compose the model, one line per event, and say what to run next."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cal_train").setLevel(logging.INFO)
    folder = compose(
        args.llm,
        args.vision_tower,
        args.output,
        gguf_file=args.gguf_file,
        template=args.template,
        image_size=args.image_size,
        image_aspect_ratio=args.image_aspect_ratio,
        vision_feature_layer=args.vision_feature_layer,
        dtype=args.dtype,
        pad_vocabulary_to=args.pad_vocabulary_to,
        standardize_on=args.standardize_on,
        seed=args.seed,
        family=args.family,
        aux_tower=args.aux_tower,
        grid_pinpoints=args.grid_pinpoints,
        image_grid=args.image_grid,
    )
    print(f"wrote {folder}")
    captions = "" if "gemma" in (args.template or "") else " --template plain"
    print(f"next: cal-train train RECIPE.yaml --stage pretrain{captions} --model_name_or_path {folder}")
    return 0
