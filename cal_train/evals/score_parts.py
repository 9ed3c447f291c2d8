"""A score file in the making: its finished rows, how far it came, and of what it is made.

Next to ``FILE.part`` stands ``FILE.part.json`` with the row to go on from. It is replaced after every batch, so that a
process killed at any moment loses at most the batch in hand. Next to a finished ``FILE`` stands ``FILE.about.json``,
which says what was scored with what.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from cal_train.data.score_notes import note_path
from cal_train.types import Problem


@dataclass
class Progress:
    """Rows of the data file that are done, the bytes they take in the ``.part`` file, samples written, rows dropped."""

    rows: int = 0
    num_bytes: int = 0
    samples: int = 0
    dropped: list[Problem] = field(default_factory=list)


class ScoreParts:
    """The files of one score run; ``about`` must be equal for a run to be continued, its ``paths`` aside."""

    def __init__(self, output: str | Path, about: Mapping[str, Any]):
        self.output = Path(output)
        self.about = json.loads(json.dumps(about))  # as it will be read back
        self.part, self.state = Path(f"{output}.part"), Path(f"{output}.part.json")

    def progress(self) -> Progress:
        """Return how far an earlier run with the same model, data and options came; nothing done if there is none.

        Raises:
            ValueError: If the earlier run was another one, or its files are damaged.
        """
        if not self.state.is_file():
            return Progress()
        cure = f"Repeat that run to finish it, or delete {self.state} to start over"
        try:
            saved = json.loads(self.state.read_text(encoding="utf-8"))
            about, counts = saved["about"], saved["progress"]
            dropped = [Problem(**problem) for problem in counts["dropped"]]
            progress = Progress(int(counts["rows"]), int(counts["num_bytes"]), int(counts["samples"]), dropped)
            if min(progress.rows, progress.num_bytes, progress.samples) < 0 or not isinstance(about, dict):
                raise ValueError("a count below 0, or a note that is none")
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{self.state} is damaged ({error!r}). Delete it to start over") from error
        changed = [key for key in self.about if key != "paths" and about.get(key) != self.about[key]]
        if changed:
            what = "; ".join(f"{key} was {about.get(key)!r}, is {self.about[key]!r}" for key in changed)
            raise ValueError(f"{self.part} is the unfinished output of another run: {what}. {cure}")
        if not self.part.is_file() or self.part.stat().st_size < progress.num_bytes:
            raise ValueError(f"{self.part} is shorter than {self.state} says. Delete {self.state} to start over")
        return progress

    def open(self, progress: Progress) -> IO[bytes]:
        """Open the ``.part`` file behind its finished rows; what a killed process wrote beyond them is cut off."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        file = self.part.open("r+b" if progress.num_bytes else "wb")
        file.truncate(progress.num_bytes)
        file.seek(progress.num_bytes)
        return file

    def save(self, file: IO[bytes], progress: Progress) -> None:
        """Note that everything written so far is finished."""
        file.flush()
        progress.num_bytes = file.tell()
        _replace(self.state, {"about": self.about, "progress": asdict(progress)})

    def finish(self, progress: Progress) -> None:
        """Give the complete file its name; first the note beside it, so that a score file is never without."""
        left_out = [problem.row for problem in progress.dropped]
        _replace(note_path(self.output), self.about | {"left_out": left_out})
        self.part.replace(self.output)
        self.state.unlink(missing_ok=True)


def _replace(path: Path, value: Any) -> None:
    temporary = Path(f"{path}.new")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(temporary, path)
