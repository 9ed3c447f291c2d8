"""What a run was made with: versions, hardware and commit, for run folders and bug reports."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cal_train
from cal_train.folders import read_object
from cal_train.train.yaml_files import read_mapping

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "bitsandbytes",
    "flash_attn",
    "lmms_eval",
)


def environment() -> dict[str, str | int | float | dict]:
    """Return versions, hardware and the commit of the installed package, as plain values that JSON holds.

    Packages that are not installed are listed as such. Nothing of the user's (paths, names, variables) is included.
    """
    return {
        "cal_train": cal_train.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count() or 0,
        "memory_gib": _memory_gib(),
        "cuda": torch.version.cuda or "none",
        "gpus": {
            str(i): f"{torch.cuda.get_device_name(i)}, "
            f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.1f} GiB"
            for i in range(torch.cuda.device_count())
        }
        or "none",
    }


RECORDS = ("recipe.yaml", "environment.json")
"""Files that say what a run was made with: its options, and all else. In the run folder and in each checkpoint."""


def read_record(folder: Path) -> dict[str, Any]:
    """Return what both files of a run folder or checkpoint say; empty if one is missing.

    Raises:
        ValueError: If one of them is not what a run writes; names the file.
    """
    recipe, facts = (folder / name for name in RECORDS)
    if not (recipe.is_file() and facts.is_file()):
        return {}
    return read_mapping(recipe) | read_object(facts)


def git_commit() -> str:
    """Return the commit that the package runs from, with ``-dirty`` when files differ from it.

    A package that was not installed from a checkout answers with the commit of its install record, or ``unknown``.
    """
    root = Path(cal_train.__file__).resolve().parents[1]
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        if commit is not None:
            return commit + ("-dirty" if _git(root, "status", "--porcelain") else "")
    try:
        record = metadata.distribution("cal_train").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        record = None
    return json.loads(record or "{}").get("vcs_info", {}).get("commit_id", "unknown")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, no commit yet, or a checkout of another owner
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    """Return the machine's memory, or 0 where the system does not tell."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0.0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
