"""Commands of a demo, each in a process of its own, and what they cost."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

# A child's peak starts at that of the process that launches it, so a small process stands between.
_LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=open(sys.argv[1], "w"))
sys.exit(code)
"""


@dataclass(frozen=True)
class Cost:
    """Wall time (seconds) and peak memory (GiB, resident) of one command."""

    command: str
    seconds: float
    peak_memory_gib: float


def run_verb(arguments: Sequence[str], console: Console, costs: list[Cost], label: str = "") -> None:
    """Run ``cal-train VERB ...`` in a process of its own, showing its progress; note time and peak memory.

    ``label`` stands for the command in the costs; default is the verb.

    Raises:
        ValueError: If the command fails; its own message stands above.
    """
    console.print(f"[bold]$ cal-train {' '.join(arguments)}[/]", highlight=False)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as peak:
        launcher = [sys.executable, "-c", _LAUNCHER, peak.name]
        code = subprocess.call([*launcher, sys.executable, "-m", "cal_train", *arguments])
        peak_kib = int(peak.read() or 0)
    if code:
        raise ValueError(f"`cal-train {' '.join(arguments)}` failed with exit code {code}")
    costs.append(Cost(label or arguments[0], time.perf_counter() - started, peak_kib / 2**20))


def cost_table(costs: Sequence[Cost]) -> Table:
    """Return wall time and peak memory of every command."""
    table = Table("command", "seconds", "peak GiB", title="cost (each command is a process of its own)")
    for cost in costs:
        table.add_row(cost.command, _measured(cost.seconds, 0), _measured(cost.peak_memory_gib, 2))
    return table


def costs_as_markdown(costs: Sequence[Cost]) -> str:
    """Return the cost table as Markdown."""
    rows = ["| command | seconds | peak GiB |", "| --- | --- | --- |"]
    rows += [
        f"| {cost.command} | {_measured(cost.seconds, 0)} | {_measured(cost.peak_memory_gib, 2)} |" for cost in costs
    ]
    return "\n".join(rows) + "\n"


def _measured(value: float, digits: int) -> str:
    """Return a number, or nothing where it was not measured (NaN)."""
    return "" if np.isnan(value) else f"{value:.{digits}f}"
