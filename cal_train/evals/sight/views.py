"""Which image token is which patch: the pictures that the vision tower saw, and grids of image tokens over them.

Pictures are made from the model's own pixels, so that padding, cropping and tiling show as they were. T tiles of an
image, P patches of a tile, M image tokens of a sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

from cal_train.evals.sight.values import NO_TOKEN, View
from cal_train.models.anyres import num_tiles


def views_of(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: Mapping[str, Tensor], counts: Sequence[int]
) -> list[View]:
    """Return the views of a sample's images: each whole, and its tiles side by side where the family has tiles.

    Image tokens that are no patch (LLaVA-NeXT's newlines) are in no view.

    Args:
        model: The VLM.
        processor: Of the model.
        inputs: From `cal_train.data.images.image_inputs`, of these images alone.
        counts: Image tokens of each image.

    Raises:
        ValueError: If an image's tokens are not the patches of its tiles.
    """
    views, first, pixels = [], 0, _split_tiles(model, inputs)
    for image, (tiles_TCHW, count) in enumerate(zip(pixels, counts, strict=True)):
        config: Any = model.config
        rows, columns = (side // config.vision_config.patch_size for side in tiles_TCHW.shape[-2:])
        size = inputs["image_sizes"][image].tolist() if "image_sizes" in inputs else None
        whole, grid = _places(model, len(tiles_TCHW), rows, columns, count, size)
        pictures = [_picture(tile, processor) for tile in tiles_TCHW]
        if whole is not None:
            index, tokens = whole
            views.append(View(image, "whole", pictures[index], _shifted(tokens, first)))
        if grid is not None:
            order, tokens = grid
            stitched = np.concatenate([np.concatenate([pictures[k] for k in row], axis=1) for row in order])
            views.append(View(image, "tiles", *_trimmed(stitched, _shifted(tokens, first))))
        first += count
    return views


def _split_tiles(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tiles of each image (T, C, H, W)."""
    pixels, config = inputs["pixel_values"], model.config
    if pixels.ndim == 5:
        return list(pixels)
    if "image_sizes" not in inputs:
        return list(pixels[:, None])
    sizes: list[list[int]] = inputs["image_sizes"].tolist()
    counts = [num_tiles(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes]
    return list(pixels.split(counts))


_Whole = tuple[int, np.ndarray]
_Grid = tuple[list[list[int]], np.ndarray]


def _places(
    model: PreTrainedModel, num: int, rows: int, columns: int, count: int, size: list[int] | None
) -> tuple[_Whole | None, _Grid | None]:
    """Return the tile that is the whole image with its tokens, and the order of the others with theirs."""
    per_tile, config = rows * columns, model.config
    if size is not None:
        source_M = _packed_sources(model, num, per_tile, size)
        _require_patches(len(source_M), count)
        side = config.vision_config.image_size
        grid_columns = (_tile_grid(config, size)[1] // side) if num > 1 else 0
        order = [list(range(1, num))[k : k + grid_columns] for k in range(0, num - 1, grid_columns or 1)]
    else:
        source_M = np.arange(num * per_tile)
        _require_patches(len(source_M), count)
        grid = int(getattr(config, "image_grid", 1))
        order = [list(range(row * grid, (row + 1) * grid)) for row in range(grid)] if num > 1 else []
    token_of = np.full(num * per_tile, NO_TOKEN)
    token_of[source_M[source_M >= 0]] = np.flatnonzero(source_M >= 0)
    tiles = token_of.reshape(num, rows, columns)
    in_grid = {k for row in order for k in row}
    left = [k for k in range(num) if k not in in_grid]
    whole = (left[0], tiles[left[0]]) if left else None
    if not order:
        return whole, None
    return whole, (order, np.concatenate([np.concatenate([tiles[k] for k in row], axis=1) for row in order]))


def _packed_sources(model: PreTrainedModel, num: int, per_tile: int, size: list[int]) -> np.ndarray:
    """Return which patch each of LLaVA-NeXT's image tokens is, -1 for a newline, by packing the patches' numbers."""
    numbers = torch.arange(num * per_tile, dtype=torch.float64).reshape(num, per_tile, 1)
    body: Any = model.model
    strategy = model.config.vision_feature_select_strategy
    packed, _ = body.pack_image_features([numbers], [size], strategy, torch.tensor([-1.0], dtype=torch.float64))
    return packed[0][:, 0].round().long().numpy()


def _tile_grid(config: Any, size: list[int]) -> tuple[int, int]:
    height, width = select_best_resolution(tuple(size), list(config.image_grid_pinpoints))
    return height, width


def _require_patches(num_patches: int, count: int) -> None:
    if num_patches != count:
        raise ValueError(
            f"an image has {count} tokens but its tiles have {num_patches} patches: this vision tower's tokens are not "
            "its patches, so there is no map of them"
        )


def _picture(tile_CHW: Tensor, processor: Any) -> np.ndarray:
    """Return a tile as it looked before it was normalised."""
    images = processor.image_processor
    pixels = tile_CHW.float().cpu()
    if getattr(images, "do_normalize", True):
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
        pixels = pixels * deviation + mean
    return (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _shifted(tokens: np.ndarray, first: int) -> np.ndarray:
    return np.where(tokens >= 0, tokens + first, NO_TOKEN)


def _trimmed(picture: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut away the rows and columns of patches that are no tokens: LLaVA-NeXT drops the padding around its tiles."""
    patch = picture.shape[0] // tokens.shape[0]
    rows, columns = (np.flatnonzero((tokens >= 0).any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return (
        picture[top * patch : bottom * patch, left * patch : right * patch],
        tokens[top:bottom, left:right],
    )
