"""What every run does around its training: logging, the folder, and the record of what it was made with."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import TrainingArguments

from cal_train.train.provenance import environment


def output_folder(args: TrainingArguments) -> Path:
    """Return the run folder, which every recipe names."""
    return Path(cast(str, args.output_dir))


def set_up_logging(args: TrainingArguments) -> None:
    """One line per event on the main process; other ranks only warn."""
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cal_train").setLevel(level)


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the row order and of fractional source weights."""
    return args.data_seed if args.data_seed is not None else args.seed


def write_record(args: TrainingArguments, groups: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Write the resolved recipe, versions, commit and seed into the run folder, before step 1.

    Args:
        args: Training arguments; only the process that saves writes.
        groups: The recipe's other dataclasses.
        facts: What else belongs into ``environment.json``.
    """
    if not args.should_save:
        return
    folder = output_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    resolved: dict[str, Any] = {}
    for group in groups:
        resolved |= dataclasses.asdict(group)
    resolved |= args.to_dict()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved, default=str)), sort_keys=True))
    record = environment() | {"seed": args.seed, "world_size": args.world_size, **facts}
    (folder / "environment.json").write_text(json.dumps(record, indent=2))
