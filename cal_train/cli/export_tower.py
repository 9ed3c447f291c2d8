"""``export_tower``: the image tower of a tower run as a plain Hugging Face folder."""

import argparse
import logging
from pathlib import Path

from cal_train.towers.export import export_tower
from cal_train.train.tower_checkpoint import SETTINGS_FILE, objective_heads

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export_tower``."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="Folder of a tower run, or a checkpoint of it."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="Folder to write.")


def run(args: argparse.Namespace) -> int:
    """Export the tower, and say where it is."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cal_train").setLevel(logging.INFO)
    if (args.checkpoint / SETTINGS_FILE).is_file():
        logger.info(
            "dropped: %s. A VLM reads the tower's patch tokens; what the objective makes of them, pooled tokens "
            "included, has no place in the tower's class",
            objective_heads(args.checkpoint),
        )
    print(f"wrote {export_tower(args.checkpoint, args.output)}")
    return 0
