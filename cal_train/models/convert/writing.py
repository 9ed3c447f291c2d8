"""Write a converted folder aside, and give it its name only when it is complete."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor


@contextmanager
def folder_aside(output: Path) -> Iterator[Path]:
    """Yield a new folder beside ``output`` that becomes ``output`` if nothing is raised, and is removed otherwise.

    Raises:
        ValueError: If ``output`` exists and is not an empty folder.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.parent / f".{output.name}.{token_hex(4)}"
    aside.mkdir()
    try:
        yield aside
        if output.exists():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder: choose another one")


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write safetensors, in shards of 5 GB with an index where there is more."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        # the writer leaves out a name that shares memory with another, and refuses parts of a larger piece
        is_whole = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in seen
        own[name] = tensor.contiguous() if is_whole else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    save_torch_state_dict(own, folder, max_shard_size="5GB", metadata={"format": "pt"})


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return the tensors in one dtype, and how many of them were converted.

    Raises:
        ValueError: If a tensor is not of floating point, as in a quantised checkpoint.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name} is stored as {tensor.dtype}: use the folder with the weights before quantisation")
    converted = sum(tensor.dtype != dtype for tensor in state.values())
    return {name: tensor.to(dtype) for name, tensor in state.items()}, converted
