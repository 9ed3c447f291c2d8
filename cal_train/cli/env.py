"""``env``: versions and hardware, for bug reports."""

import argparse

from cal_train.train.provenance import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``env`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print one ``name: value`` line per fact."""
    for name, value in environment().items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key}: {entry}")
        else:
            print(f"{name}: {value}")
    return 0
