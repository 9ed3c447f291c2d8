"""What a conversion did with every weight: a table for the terminal, ``conversion.json`` for the folder."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

REPORT_FILE = "conversion.json"


@dataclass
class Report:
    """What happened, in order of the table.

    Attributes:
        direction: ``original -> hf``, ``hf -> hf`` or ``hf -> original``.
        family: Of the model.
        moved: (name in the source, name in the result) -> number of weights.
        dropped: (name in the source, reason) -> number of weights.
        added: Names in the result -> where their values come from.
        notes: Choices that were made, one sentence each.
        num_converted: Weights whose dtype changed.
        added_rows: Rows of the vocabulary that the source does not have.
        source_config: The original config.json, for the way back.
        source_pad_token: The source's padding token, for the way back.
    """

    direction: str
    family: str
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    added: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_converted: int = 0
    added_rows: int = 0
    source_config: dict[str, Any] | None = None
    source_pad_token: str | None = None

    def write(self, folder: Path) -> None:
        """Write ``conversion.json``."""
        content = {
            "direction": self.direction,
            "family": self.family,
            "moved": [{"from": a, "to": b, "weights": count} for (a, b), count in self.moved.items()],
            "dropped": [{"name": a, "reason": b, "weights": count} for (a, b), count in self.dropped.items()],
            "added": [{"name": name, "from": source} for name, source in self.added.items()],
            "notes": self.notes,
            "weights_of_another_dtype": self.num_converted,
            "added_rows": self.added_rows,
            "source_config": self.source_config,
            "source_pad_token": self.source_pad_token,
        }
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """Return the table for the terminal."""
        table = Table(title=f"{self.family}: {self.direction}", title_justify="left")
        for name in ("in the source", "in the result", "weights"):
            table.add_column(name, justify="right" if name == "weights" else "left", overflow="fold")
        for (source, target), count in self.moved.items():
            table.add_row(_shown(source), _shown(target), str(count))
        grouped = Counter((re.sub(r"\d+", "*", name), source) for name, source in self.added.items())
        for (name, source), count in grouped.items():
            table.add_row(f"({source})", name, str(count))
        for (name, reason), count in self.dropped.items():
            table.add_row(name, f"left out: {reason}", str(count))
        return table


def added_before(folder: Path) -> dict[str, Any]:
    """Return what an earlier conversion recorded in a folder, or an empty object."""
    file = folder / REPORT_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _shown(prefix: str) -> str:
    return re.sub(r"\{\w\}", "*", prefix) + ("*" if prefix.endswith(".") or not prefix else "")
