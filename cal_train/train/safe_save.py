"""Write a checkpoint or a final model so that what stands in the run folder is whole, whenever the run is killed.

Everything is written aside and renamed when complete, on a file system where a rename within the run folder is atomic:

    checkpoint-8.partial/checkpoint-8/   while it is written; never resumed from
    checkpoint-8/complete.json           its marker: every file of the checkpoint with its size, written last
    model.partial/                       the final model, whose files are moved into the run folder one by one

With several nodes, the run folder must be on a disk that all of them share.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MARKER_NAME = "complete.json"
PARTIAL_SUFFIX = ".partial"
OUTPUT_ASIDE = f"model{PARTIAL_SUFFIX}"
# Without one of these a folder is not a model: they come last, and those of an older model go first.
ENTRANCES = ("config.json", "adapter_config.json", "tower.json")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")


@dataclass(frozen=True)
class Ranks:
    """Who writes with whom.

    Attributes:
        accelerator: Talks to the other ranks.
        is_writer: Whether this rank marks, renames and deletes.
        may_agree: Whether a rank that failed may meet the others afterwards. Not where the writing itself is collective
            (DeepSpeed, FSDP): the others then wait inside of it, and the launcher has to end them.
    """

    accelerator: Accelerator
    is_writer: bool
    may_agree: bool

    def agree(self, error: Exception | None) -> None:
        """Raise the error of this rank, and on all ranks if there was one on any."""
        if error is not None and not self.may_agree:
            raise error
        failed = torch.tensor(float(error is not None), device=self.accelerator.device)
        any_failed = bool(self.accelerator.reduce(failed, "sum"))
        if error is not None:
            raise error
        if any_failed:
            raise OSError("another rank could not write its part, see its message")


def write_checkpoint(run_folder: Path, step: int, write: Callable[[Path], None], ranks: Ranks) -> Path:
    """Write ``checkpoint-<step>`` aside, mark it complete and rename it; all ranks call this.

    Args:
        run_folder: Where the checkpoint ends up.
        step: Its number.
        write: Writes the part of this rank into ``checkpoint-<step>`` below the folder it is given.
        ranks: This rank among the others.

    Raises:
        OSError: If it could not be written on some rank, for a full disk say. What there is of it has been removed;
            older checkpoints are untouched.
    """
    final = run_folder / f"checkpoint-{step}"
    aside = run_folder / f"{final.name}{PARTIAL_SUFFIX}"
    with _failure_explained(final, aside, ranks.is_writer):
        _write_together(aside, lambda: write(aside), ranks)
        ranks.agree(_error_of(lambda: mark_complete(aside / final.name)) if ranks.is_writer else None)
    if ranks.is_writer:
        _put_in_place(aside, final)
    ranks.accelerator.wait_for_everyone()  # no rank may look for the checkpoint before it is there
    return final


def write_output(folder: Path, write: Callable[[Path], None], ranks: Ranks) -> None:
    """Write a model aside and move its files into a folder, that of the configuration last; all ranks call this.

    Raises:
        OSError: As `write_checkpoint`. Files of an older model are replaced only once the new one is written.
    """
    aside = folder / OUTPUT_ASIDE
    with _failure_explained(folder, aside, ranks.is_writer):
        _write_together(aside, lambda: write(aside), ranks)
    if ranks.is_writer:
        _move_files(aside, folder)
    ranks.accelerator.wait_for_everyone()


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint: its files with their sizes in bytes, after all of them are on the disk."""
    files = _files_of(checkpoint)
    for path in files:
        _to_disk(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    marker = checkpoint / MARKER_NAME
    marker.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _to_disk(marker)
    _to_disk(checkpoint)


def incomplete_because(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not complete, or None if it is."""
    marker = checkpoint / MARKER_NAME
    if not marker.is_file():
        return f"no {MARKER_NAME}"
    try:
        sizes = dict(json.loads(marker.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MARKER_NAME} is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} when it was written"
    return None


def step_of(checkpoint: Path) -> int:
    """Return the number of a ``checkpoint-N`` folder, -1 for any other name."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() and step != checkpoint.name else -1


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest step first."""
    numbered = (path for path in run_folder.glob("checkpoint-*") if step_of(path) >= 0)
    return sorted((path for path in numbered if incomplete_because(path) is None), key=step_of)


def rotate(run_folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the oldest complete checkpoints beyond a limit (None or 0: no limit); those in ``keep`` never."""
    checkpoints = complete_checkpoints(run_folder)
    old = [path for path in checkpoints if path not in keep]
    for path in old[: max(len(checkpoints) - limit, 0)] if limit else []:
        doomed = path.with_name(path.name + PARTIAL_SUFFIX)  # killed here, half a checkpoint must not look like one
        _remove(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)


def settle_partials(run_folder: Path) -> None:
    """Clear up what a killed run left: finish a rename that was due, remove what is half-written, and name both."""
    if not run_folder.is_dir():
        return
    for aside in sorted(run_folder.glob(f"*{PARTIAL_SUFFIX}")):
        final = aside.with_name(aside.name.removesuffix(PARTIAL_SUFFIX))
        if step_of(final) >= 0 and incomplete_because(aside / final.name) is None:
            logger.warning("%s was complete but for its name: kept as %s", aside, final.name)
            _put_in_place(aside, final)
        elif step_of(final) >= 0 or aside.name == OUTPUT_ASIDE:
            logger.warning("%s was left half-written: removed", aside)
            _remove(aside)


def is_write_error(error: Exception) -> bool:
    """Return whether an error says that a file could not be written, as a full disk makes torch and safetensors say."""
    torch_failed = isinstance(error, RuntimeError) and any(
        part in str(error) for part in ("inline_container.cc", "PytorchStreamWriter", "iostream error")
    )
    return torch_failed or isinstance(error, OSError | SafetensorError)


@contextmanager
def _failure_explained(final: Path, aside: Path, is_writer: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)
        if not is_write_error(error):
            raise
        run_folder = aside.parent
        last = complete_checkpoints(run_folder)
        free = shutil.disk_usage(run_folder).free / 2**20 if run_folder.is_dir() else float("nan")
        raise OSError(
            f"{final} could not be written: {error}. {free:.0f} MiB are free there; what there was of it is removed. "
            f"Last complete checkpoint: {last[-1] if last else 'none'}. Make room (save_total_limit bounds the number "
            "of checkpoints), then go on with --resume_from_checkpoint latest"
        ) from error


def _write_together(aside: Path, write: Callable[[], None], ranks: Ranks) -> None:
    """Let every rank write into a new folder; raise on all of them if one could not."""
    ranks.agree(_error_of(lambda: _make_anew(aside)) if ranks.is_writer else None)
    ranks.agree(_error_of(write))


def _error_of(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # raised again by the caller, after the other ranks were told
        return error
    return None


def _make_anew(aside: Path) -> None:
    _remove(aside)
    aside.mkdir(parents=True)


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename ``aside/<final name>``; a checkpoint that was there goes once the new one has its name."""
    if final.exists():  # a run that was resumed from an older checkpoint comes by this step again
        _remove(aside / "replaced")
        final.rename(aside / "replaced")
    (aside / final.name).rename(final)
    _to_disk(final.parent)
    _remove(aside)


def _move_files(source: Path, target: Path) -> None:
    files = [path.relative_to(source) for path in _files_of(source)]
    for name in {*files, *(Path(name) for name in ENTRANCES)}:
        if name.name in ENTRANCES:
            (target / name).unlink(missing_ok=True)
    for folder in {(target / name).parent for name in files}:  # shards of an older model that the new one has not
        for path in (path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
            if path.relative_to(target) not in files:
                path.unlink()
    for name in sorted(files, key=lambda name: (name.name in ENTRANCES, -len(name.parts), name)):
        _to_disk(source / name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
    _to_disk(target)
    _remove(source)


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER_NAME)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
