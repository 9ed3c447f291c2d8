"""Tables on the screen and in files, with what is needed to believe and repeat them."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cal_train.train.provenance import environment

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Result:
    """One table: a title, a header, and rows of as many strings."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_result(result: Result) -> None:
    """Print a table."""
    table = Table(title=result.title, title_justify="left")
    for i, name in enumerate(result.header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in result.rows:
        table.add_row(*row)
    # a table in a log file keeps all its columns
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def circumstances(load_at_start: Sequence[float]) -> dict[str, Any]:
    """Return command, date, machine, versions and load of this run, as plain values.

    Args:
        load_at_start: `os.getloadavg` before the first measurement: it tells whether the machine was quiet.
    """
    arguments = list(sys.argv[1:])
    if "--out" in arguments:  # where the results went is a path of this machine
        start = arguments.index("--out")
        del arguments[start : start + 2]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "threads": torch.get_num_threads(),
        "load_at_start": [round(x, 1) for x in load_at_start],
        "load_at_end": [round(x, 1) for x in os.getloadavg()],
        **environment(),
    }


def write_results(folder: Path, name: str, facts: dict[str, Any], results: Sequence[Result], data: Any) -> None:
    """Write ``name.json`` (facts and raw data) and ``name.md`` (facts and tables) into a folder.

    Args:
        folder: Made if it does not exist.
        name: Of the benchmark.
        facts: From `circumstances`.
        results: The tables that were printed.
        data: Everything that was measured, for JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, "data": data}, indent=1) + "\n", encoding="utf-8")
    packages = ", ".join(f"{key} {facts['packages'][key]}" for key in ("torch", "transformers", "accelerate"))
    lines = [
        f"# {name}",
        "",
        f"`{facts['command']}`",
        "",
        f"{facts['date']}, commit {facts['git_commit']}, {packages}, Python {facts['python']}; "
        f"{facts['cpu']}, {facts['num_cpus']} CPUs, {facts['memory_gib']} GiB, {facts['threads']} thread(s), "
        f"load {facts['load_at_start'][0]} at the start and {facts['load_at_end'][0]} at the end.",
    ]
    for result in results:
        table = [result.header, ["---"] + ["---:"] * (len(result.header) - 1), *result.rows]
        lines += ["", f"## {result.title}", "", *("| " + " | ".join(row) + " |" for row in table)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
