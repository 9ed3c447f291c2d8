"""The package is one way: which module may import which, and what only some may touch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cal_train"

# part -> the parts it may import, itself aside
MAY_IMPORT = {
    "types": set(),
    "folders": set(),
    "conf": {"types"},
    "data": {"types", "folders", "conf"},
    "conf_towers": {"types", "conf", "data"},
    "cal": {"types"},
    "towers": {"types", "folders"},
    "objectives": {"types", "cal", "towers"},
    "models": {"types", "folders", "conf", "data", "cal", "towers"},
    "train": {"types", "folders", "conf", "conf_towers", "data", "cal", "towers", "objectives", "models"},
    "evals": {"types", "folders", "conf", "conf_towers", "data", "cal", "towers", "objectives", "models", "train"},
    "demo": {
        "types",
        "folders",
        "conf",
        "conf_towers",
        "data",
        "cal",
        "towers",
        "objectives",
        "models",
        "train",
        "evals",
    },
    "cli": {
        "types",
        "folders",
        "conf",
        "conf_towers",
        "data",
        "cal",
        "towers",
        "objectives",
        "models",
        "train",
        "evals",
        "demo",
    },
    "testing": {"types", "conf", "data", "towers", "models"},
    "__init__": set(),
    "__main__": {"cli"},
}
MAY_USE_TRAINER = {"train", "evals", "demo", "cli"}
MAY_COMMUNICATE = {"gather.py"}
MAY_READ_ENVIRONMENT = {"cli", "testing", "__main__"}
FOLDERS_WITHOUT_CODE = {"data", "eval", "recipes", "zero_configs"}
LONGEST_MODULE = 350


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Return the first name below the package: ``cal_train/cal/loss.py`` -> ``cal``, ``conf.py`` -> ``conf``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything imported, inside functions too; relative imports are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parent.parts
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    """Return one line per broken rule of a module; ``path`` says where in the package it would be."""
    tree, part = ast.parse(source), part_of(path)
    found = []
    for line, name in imported_names(path, tree):
        top, _, rest = name.partition(".")
        if top == "cal_train":
            other = rest.split(".")[0]
            if other != part and other in MAY_IMPORT and other not in MAY_IMPORT[part]:
                found.append(f"{path}:{line}: {part} must not import {other}")
        if top in FOLDERS_WITHOUT_CODE:
            found.append(f"{path}:{line}: {top}/ is not code")
        if top == "wandb":
            found.append(f"{path}:{line}: wandb is the Trainer's business (report_to)")
        if name.startswith("torch.distributed") and part != "train" and path.name not in MAY_COMMUNICATE:
            found.append(f"{path}:{line}: only train and objectives/gather.py talk to other ranks")
        uses_trainer = name == "transformers.Trainer" or name.startswith("transformers.trainer.")
        if uses_trainer and part not in MAY_USE_TRAINER:
            found.append(f"{path}:{line}: only train and what builds on it uses transformers.Trainer")
        if name in ("os.environ", "os.getenv", "sys.argv") and part not in MAY_READ_ENVIRONMENT:
            found.append(f"{path}:{line}: only cli reads {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("os.environ", "os.getenv", "sys.argv") and part not in MAY_READ_ENVIRONMENT:
                found.append(f"{path}:{node.lineno}: only cli reads {name}")
    return found


def test_every_module_keeps_the_import_direction():
    paths = modules()
    assert len(paths) >= 30, f"only {len(paths)} modules seen: does the search still reach the package?"
    unknown = {part_of(path) for path in paths} - set(MAY_IMPORT)
    assert not unknown, f"new parts {sorted(unknown)}: give them a place in MAY_IMPORT"
    assert {"types", "conf", "data", "cal", "models", "train", "cli"} <= {part_of(path) for path in paths}
    found = [rule for path in paths for rule in broken_rules(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_the_order_has_no_cycle():
    for part, others in MAY_IMPORT.items():
        for other in others:
            assert part not in MAY_IMPORT[other], f"{part} and {other} may import each other"


@pytest.mark.parametrize(
    ("where", "source", "message"),
    [
        ("cal/loss.py", "from cal_train.conf import CalArguments", "cal must not import conf"),
        ("data/collate.py", "def f():\n    import cal_train.models.llava", "data must not import models"),
        ("data/collate.py", "from cal_train import models", "data must not import models"),
        ("models/llava.py", "from ..train import trainer", "models must not import train"),
        ("train/run.py", "from cal_train.testing import tiny_llava", "train must not import testing"),
        ("models/llava.py", "from transformers import Trainer", "transformers.Trainer"),
        ("models/llava.py", "from transformers.trainer import Trainer", "transformers.Trainer"),
        ("train/run.py", "import os\nos.environ['A']", "only cli reads os.environ"),
        ("train/run.py", "from os import getenv", "only cli reads os.getenv"),
        ("demo/scenes.py", "import sys\nsys.argv", "only cli reads sys.argv"),
        ("cli/train.py", "import data", "data/ is not code"),
        ("cli/train.py", "from recipes.x import y", "recipes/ is not code"),
        ("train/run.py", "import wandb", "wandb"),
        ("objectives/clip.py", "import torch.distributed as dist", "other ranks"),
        ("towers/vision.py", "from cal_train.objectives.clip import clip_loss", "towers must not import objectives"),
    ],
)
def test_a_broken_rule_is_seen(where, source, message):
    found = broken_rules(PACKAGE / where, source)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("models/llava.py", "from cal_train.cal.loss import x\nfrom cal_train.data import collate\nimport datasets"),
        ("cal/loss.py", "from . import weights\nfrom cal_train.types import IGNORE_INDEX"),
        ("train/trainer.py", "from transformers import Trainer\nimport os\nos.path.join('a')"),
        ("cli/main.py", "import sys\nsys.argv"),
    ],
)
def test_allowed_imports_are_not_reported(where, source):
    assert broken_rules(PACKAGE / where, source) == []


def test_tests_and_benchmarks_do_not_import_the_folders_without_code():
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(paths) >= 5
    for path in paths:
        for line, name in imported_names(path, ast.parse(path.read_text(encoding="utf-8"))):
            assert name.partition(".")[0] not in FOLDERS_WITHOUT_CODE, f"{path}:{line} imports {name}"


def test_no_module_is_a_grab_bag_or_too_long():
    for path in modules():
        assert path.stem not in {"utils", "util", "misc", "common", "helpers"}, path
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= LONGEST_MODULE, f"{path} has {num_lines} lines, at most {LONGEST_MODULE} are allowed"


def test_cal_train_is_the_only_package():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"cal_train"}
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/ is not a package: import mode is importlib"
