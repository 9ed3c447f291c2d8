"""Unit vectors, positives and tiles: what the losses over all pairs of a batch share.

Row i and column j belong together where their image ids are equal; without ids, where i and j are the same pair.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cal_train.towers.outputs import TowerOutputs

MAX_LOG_SCALE = math.log(100)
"""CLIP's cap of the learned scale: logits stay within 100."""


def widened(values: Tensor) -> Tensor:
    """Return the values in float32, or unchanged if they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(embeds: Tensor) -> Tensor:
    """Return the embeddings at length 1 along the last dimension, in float32 or wider."""
    return F.normalize(widened(embeds), dim=-1)


def exact_products(values: Tensor) -> torch.autocast:
    """Return a context in which products keep the dtype of their factors: a logit of 100 has no digits in bf16."""
    return torch.autocast(values.device.type, enabled=False)


def scaled_cosines(image_embeds_IE: Tensor, text_embeds_TE: Tensor, scale: Tensor) -> Tensor:
    """Return the cosine of every image with every text (I, T) times the scale, in float32 or wider."""
    with exact_products(image_embeds_IE):
        image_IE, text_TE = unit(image_embeds_IE), unit(text_embeds_TE)
        return as_scalar(scale, image_IE) * image_IE @ text_TE.T


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a scale or bias, of one element, with the dtype and device of ``like``; a parameter stays in the graph."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def positive_sums(columns_MD: Tensor, row_ids_N: Tensor, column_ids_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every row, the sum (N, D) of the columns that belong to it, and how many they are (N,).

    A mean over positives is linear in the columns, so no (N, M) matrix of labels is needed: columns are summed per id.
    """
    _, groups = torch.unique(torch.cat([row_ids_N, column_ids_M]), return_inverse=True)
    row_group_N, column_group_M = groups[: len(row_ids_N)], groups[len(row_ids_N) :]
    sums_GD = columns_MD.new_zeros(len(groups), columns_MD.shape[1]).index_add(0, column_group_M, columns_MD)
    counts_G = columns_MD.new_zeros(len(groups)).index_add(0, column_group_M, columns_MD.new_ones(len(column_ids_M)))
    return sums_GD[row_group_N], counts_G[row_group_N]


def tiles(num_rows: int, num_columns: int, tile_size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the row and column ranges of square tiles that cover a matrix.

    Raises:
        ValueError: If the tile size is not positive.
    """
    if tile_size < 1:
        raise ValueError(f"tile size {tile_size} must be at least 1")
    for row in range(0, num_rows, tile_size):
        for column in range(0, num_columns, tile_size):
            yield slice(row, row + tile_size), slice(column, column + tile_size)


def projection(width: int, embed_dim: int) -> nn.Linear:
    """Return a linear map without bias from a tower's width to the shared width, drawn with CLIP's deviation."""
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def scalar_parameter(value: float) -> nn.Parameter:
    """Return a learned number, of shape (1,): FSDP2 cannot split a tensor without dimensions."""
    return nn.Parameter(torch.tensor([value]))


def log_scale_parameter(init_scale: float) -> nn.Parameter:
    """Return the learned logarithm of a logit scale (1,).

    Raises:
        ValueError: If the scale lies outside the range that `clamp_log_scale_` keeps.
    """
    if not 1 <= init_scale <= 100:
        raise ValueError(f"init_scale {init_scale} is outside [1, 100], the range the learned scale is kept in")
    return scalar_parameter(math.log(init_scale))


@torch.no_grad()
def clamp_log_scale_(log_scale: Tensor) -> None:
    """Bring a learned log scale back into [0, ln 100], in place."""
    log_scale.clamp_(0, MAX_LOG_SCALE)


def required(outputs: TowerOutputs, *names: str) -> tuple[Tensor, ...]:
    """Return the named fields of a tower pass.

    Raises:
        ValueError: If the pass has no such output, because it ran over the other modality or another kind of tower.
    """
    values = {name: vars(outputs)[name] for name in names}
    if missing := [name for name, value in values.items() if value is None]:
        raise ValueError(f"the tower pass has no {', '.join(missing)}: this objective needs {', '.join(names)}")
    return tuple(values.values())
