"""Patch info mining: every patch attends to the high-resolution features of the area that it covers.

With query q of a patch and features a_j of the cells of its area, LayerNorm'd and projected to keys and values,

    m = sum_j softmax_j(q . k_j / sqrt(W)) v_j,   k_j = K norm_k(a_j) + b_k,   v_j = V norm_v(a_j) + b_v.

Both norms share their statistics: norm(a) = g * n(a) + c. Then q . k_j = (g_k * K'q) . n(a_j) + (a term without j), and
m = V (g_v * sum_j softmax_j n(a_j) + c_v) + b_v, because the weights sum to 1. So keys and values are never made: two
products per patch take the place of two per cell, and what is left has no parameters and is done in chunks of patches.
The map of all stages at full size is not made either: a chunk upsamples the rows that it reads.

I images, N patches a side, W width of the first tower, C channels of all stages, s cells along the side of a patch.

Source: Li et al. 2024, arXiv:2403.18814, section 3.2. Differs: the order of the products, and a NaN stays one (the
original turns it into 0 before the softmax).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

EPS = 1e-5
"""Of the LayerNorms; one for both, as their statistics are shared."""


class TransposedLinear(nn.Linear):
    """A linear layer that moves the other factor of a dot product through itself."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return ``t`` (..., in) and ``shift`` (...) with ``query . linear(x) = t . x + shift``."""
        return query @ self.weight, query @ self.bias


class TransposedScale(nn.LayerNorm):
    """Scale and shift of a LayerNorm, moved to the other factor of a dot product."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return ``t`` (..., C) and ``shift`` (...) with ``query . norm(x) = t . standardised(x) + shift``."""
        return query * self.weight, query @ self.bias


class Scale(nn.LayerNorm):
    """Scale and shift of a LayerNorm for what is standardised already."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input (..., C) scaled and shifted."""
        return input * self.weight + self.bias


class PatchInfoMining(nn.Module):
    """The mining layers. Each parameter is used in the forward of its own module, which is where ZeRO-3 gathers it."""

    gradient_checkpointing = False

    def __init__(self, width: int, aux_width: int, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.query_norm = nn.LayerNorm(width, eps=EPS)
        self.query_proj = nn.Linear(width, width)
        self.key_norm = TransposedScale(aux_width, eps=EPS)
        self.key_proj = TransposedLinear(aux_width, width)
        self.value_norm = Scale(aux_width, eps=EPS)
        self.value_proj = nn.Linear(aux_width, width)

    def forward(self, patches: Tensor, stages: tuple[Tensor, ...], shrink: int = 1) -> Tensor:
        """Return what the patches find, (I, N, N, W).

        Args:
            patches: Features of the first tower in the order of the image, (I, N, N, W).
            stages: Feature maps of the auxiliary tower, (I, C_k, H_k, H_k), the largest first.
            shrink: Factor by which the map of all stages is made smaller first.
        """
        query = self.query_proj(self.query_norm(patches)) / patches.shape[-1] ** 0.5
        query, shift = self.key_proj(query)
        query, norm_shift = self.key_norm(query)
        mined = mine(query, shift + norm_shift, stages, shrink, self.chunk_size, self._runner(query, stages))
        return self.value_proj(self.value_norm(mined.to(query.dtype)))

    def _runner(self, query: Tensor, stages: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """Return how a chunk is run: recomputed in the backward, where keeping every chunk would undo the chunking."""
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, *stages))
        is_chunked = query[..., 0].numel() > self.chunk_size
        if not needs_gradient or not (is_chunked or (self.gradient_checkpointing and self.training)):
            return _run
        return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def mine(
    query: Tensor,
    shift: Tensor,
    stages: tuple[Tensor, ...],
    shrink: int = 1,
    chunk_size: int = 192,
    run: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return the weighted mean of the standardised features of each patch's area, (I, N, N, C).

    Args:
        query: Transposed queries (I, N, N, C).
        shift: What is added to all scores of a patch, (I, N, N). It changes no weight; it keeps the parameters in it
            in the graph, whose gradient is 0.
        stages: Feature maps (I, C_k, H_k, H_k), the largest first.
        shrink: Factor by which the map is made smaller first.
        chunk_size: Patches at once, rounded to whole rows of patches of one image.
        run: Runs a function on its arguments. Default: calls it.
    """
    run = run or _run
    side = query.shape[1]
    num_rows = min(max(chunk_size // side, 1), side)
    images = []
    for i in range(len(query)):
        maps = [stage[i] for stage in stages]
        rows = [
            run(partial(mine_rows, first=first, shrink=shrink), query[i, first:last], shift[i, first:last], *maps)
            for first in range(0, side, num_rows)
            for last in [min(first + num_rows, side)]
        ]
        images.append(torch.cat(rows))
    return torch.stack(images)


def mine_rows(query: Tensor, shift: Tensor, *maps: Tensor, first: int, shrink: int) -> Tensor:
    """Return the weighted means for R rows of patches of one image, (R, N, C).

    Args:
        query: Transposed queries of the rows, (R, N, C).
        shift: (R, N).
        maps: Feature maps of the image, (C_k, H_k, H_k).
        first: Index of the first row.
        shrink: Factor by which the map is made smaller.
    """
    num_rows, side, channels = query.shape
    cell = maps[0].shape[-1] // (shrink * side)
    features = full_size_rows(maps, first * cell * shrink, (first + num_rows) * cell * shrink)
    if shrink > 1:
        wide = features.to(_at_least_float32(features))
        wide = F.interpolate(wide[None], scale_factor=1 / shrink, mode="bilinear", align_corners=False)[0]
        features = wide.to(features.dtype)
    areas = features.view(channels, num_rows, cell, side, cell).permute(1, 3, 2, 4, 0).reshape(-1, cell**2, channels)
    areas = F.layer_norm(areas, (channels,), eps=EPS)
    scores = torch.matmul(areas, query.reshape(-1, channels, 1))[..., 0] + shift.reshape(-1, 1)
    weights = scores.softmax(dim=-1, dtype=_at_least_float32(scores)).to(areas.dtype)
    return torch.matmul(weights[:, None], areas).view(num_rows, side, channels)


def full_size_rows(maps: tuple[Tensor, ...] | list[Tensor], start: int, stop: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of all maps upsampled to the size of the first, (C, stop - start, H_0).

    Bilinear upsampling reads one row beyond those that it covers, so a strip with a row more on either side gives
    exactly the rows of the whole map.
    """
    size = maps[0].shape[-1]
    strips = [maps[0][:, start:stop]]
    for feature_map in maps[1:]:
        factor = size // feature_map.shape[-1]
        low, high = max(start // factor - 1, 0), min(-(-stop // factor) + 1, feature_map.shape[-2])
        strip = feature_map[:, low:high].to(_at_least_float32(feature_map))
        larger = F.interpolate(strip[None], size=((high - low) * factor, size), mode="bilinear", align_corners=False)[0]
        strips.append(larger[:, start - low * factor : stop - low * factor].to(feature_map.dtype))
    return torch.cat(strips)


def _run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
