"""Suites: YAML files that pin which tasks of lmms-eval are run, with which prompts, on how much of their data."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cal_train.train.yaml_files import read_mapping


@dataclass(frozen=True)
class Suite:
    """What one evaluation runs.

    Attributes:
        name: File name without its ending.
        tasks: Names of tasks or groups of lmms-eval.
        prompt_variant: Which entry of a task's ``lmms_eval_specific_kwargs`` makes its prompts.
        include_path: Folder of further task files, made absolute; relative to the suite file in YAML.
        limit: Documents of each task; None is all of them.
        expected: JSON file of published numbers, made absolute; relative to the suite file in YAML.
        local_data: Name of the data that must be rendered first; None for data that lmms-eval fetches itself.
    """

    name: str
    tasks: tuple[str, ...]
    prompt_variant: str = "default"
    include_path: Path | None = None
    limit: int | None = None
    expected: Path | None = None
    local_data: str | None = None


def load_suite(path: str | Path) -> Suite:
    """Read a suite file.

    Raises:
        ValueError: If it is not such a file: the value, and the nearest name of an unknown key, are named.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(str(near) for near in path.parent.glob("*.yaml"))
        raise ValueError(f"no suite at {path}" + (f": there are {', '.join(there)}" if there else ""))
    values = read_mapping(path)
    known = [f.name for f in fields(Suite) if f.name != "name"]
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}: {nearest(unknown[0], known)}")
    tasks = values.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"{path}: tasks must be a list of names, got {tasks!r}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"{path}: a task is named twice")
    _check_limit(values.get("limit"), str(path))
    places: dict[str, Any] = {
        key: _beside(path, values[key]) for key in ("include_path", "expected") if values.get(key)
    }
    options: dict[str, Any] = values | places | {"tasks": tuple(tasks)}
    return Suite(path.stem, **options)


def only_tasks(suite: Suite, tasks: Sequence[str]) -> Suite:
    """Return the suite with some of its tasks, in its order.

    Raises:
        ValueError: If one of them is not in the suite, or none is given.
    """
    if other := [task for task in tasks if task not in suite.tasks]:
        raise ValueError(f"suite {suite.name} has no task {other[0]!r}: {nearest(other[0], suite.tasks)}")
    if not tasks:
        raise ValueError(f"no task of suite {suite.name} is named: it has {', '.join(suite.tasks)}")
    return replace(suite, tasks=tuple(task for task in suite.tasks if task in tasks))


def check_tasks(suite: Suite, known: Collection[str]) -> None:
    """Refuse a suite with a task that lmms-eval does not have.

    Raises:
        ValueError: Naming the task and the nearest one that exists.
    """
    for task in suite.tasks:
        if task not in known:
            raise ValueError(f"suite {suite.name}: lmms-eval has no task {task!r}: {nearest(task, known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint with the names most like one that is unknown."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "none is like it; `python -m lmms_eval tasks` lists tasks"


def _check_limit(limit: Any, origin: str) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{origin}: limit must be a positive number of documents or null, got {limit!r}")


def _beside(path: Path, place: Any) -> Path:
    found = (path.parent / str(place)).resolve()
    if not found.exists():
        raise ValueError(f"{path}: {found} does not exist")
    return found
