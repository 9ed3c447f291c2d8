"""CLIP: every image picks its text among all texts of the batch, and the reverse.

    Z_ij = s <u_i, w_j>,  u, w unit vectors
    L = 1/(2B) sum_i [lse_j Z_ij - mean over positives of i of Z_ij] + the same for columns

B pairs of the whole batch, b of this rank, W ranks, D shared width; N rows and M columns of a matrix of logits.

Source: Radford et al. 2021, arXiv:2103.00020, figure 3. Differs: with ranks, each holds the logits of its images
against all texts once (b x B); what its rows say about other ranks' columns travels as one log-sum-exp per column, so
that images need not be gathered. ``backend: tiled`` never holds more than a tile of logits: the idea is that of Inf-CL
(Cheng et al. 2024, arXiv:2410.17243), here with a running maximum, both directions in one pass, and in plain PyTorch.
Several positives per row share the target evenly (Khosla et al. 2020, arXiv:2004.11362, equation 2).
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.gather import ONE_RANK, Ranks
from cal_train.objectives.similarity import (
    as_scalar,
    clamp_log_scale_,
    exact_products,
    log_scale_parameter,
    positive_sums,
    projection,
    required,
    scaled_cosines,
    tiles,
    unit,
)
from cal_train.towers.outputs import TowerOutputs, TowerShape

Backend = Literal["local", "tiled"]
TILE_SIZE = 1024


def clip_loss(
    image_embeds_BD: Tensor, text_embeds_BD: Tensor, logit_scale: Tensor | float, image_ids_B: Tensor | None = None
) -> Tensor:
    """Return CLIP's symmetric cross-entropy over the full matrix of logits.

    Args:
        image_embeds_BD: One embedding per image, of any length; normalised here in float32 or wider.
        text_embeds_BD: The embeddings of the images' texts, in the same order.
        logit_scale: The factor s itself, already exponentiated.
        image_ids_B: Rows with equal ids are positives of each other; without it only a pair's own text is.

    Returns:
        A scalar; 0 for a single pair.
    """
    with exact_products(image_embeds_BD):
        image_BD, text_BD = unit(image_embeds_BD), unit(text_embeds_BD)
        logits_BB = as_scalar(logit_scale, image_BD) * image_BD @ text_BD.T
        positive_B = logits_BB.diagonal()
        if image_ids_B is not None:
            is_positive_BB = image_ids_B[:, None] == image_ids_B[None, :]
            positive_B = (logits_BB * is_positive_BB).sum(1) / is_positive_BB.sum(1)
        return ((logits_BB.logsumexp(1) + logits_BB.logsumexp(0)) / 2 - positive_B).mean()


def tiled_clip_loss(
    image_embeds_BD: Tensor,
    text_embeds_BD: Tensor,
    logit_scale: Tensor | float,
    image_ids_B: Tensor | None = None,
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """Return `clip_loss` without ever holding its matrix: memory grows with B, not with its square.

    Args:
        image_embeds_BD: As in `clip_loss`.
        text_embeds_BD: As in `clip_loss`.
        logit_scale: As in `clip_loss`.
        image_ids_B: As in `clip_loss`.
        tile_size: Rows and columns of logits held at a time.

    Returns:
        A scalar with exact gradients, the scale's included.
    """
    images: Features = {"image_embeds": image_embeds_BD}
    if image_ids_B is not None:
        images["image_ids"] = image_ids_B
    term = clip_term(images, {"text_embeds": text_embeds_BD}, logit_scale, backend="tiled", tile_size=tile_size)
    return term.sum / term.weight


def clip_term(
    images: Features,
    texts: Features,
    logit_scale: Tensor | float,
    ranks: Ranks = ONE_RANK,
    *,
    backend: Backend = "local",
    tile_size: int = TILE_SIZE,
) -> Term:
    """Return this rank's part of the CLIP loss of the whole batch.

    Args:
        images: ``image_embeds`` (b, D) of this rank, and ``image_ids`` (b,) if rows may share an image.
        texts: ``text_embeds`` (b, D).
        logit_scale: The factor s.
        ranks: The ranks that share the batch.
        backend: ``local`` holds the logits of this rank's images against all texts, ``tiled`` one tile of them.
        tile_size: Side of a tile.

    Returns:
        The sum over this rank's pairs of both directions' halves, weighted by their number.
    """
    with exact_products(images["image_embeds"]):
        image_bD, text_bD = unit(images["image_embeds"]), unit(texts["text_embeds"])
        scale = as_scalar(logit_scale, image_bD)
        text_BD = ranks.all_gather(text_bD)
        side = tile_size if backend == "tiled" else len(text_BD)
        row_lse_b, column_lse_B = tiled_logsumexps(image_bD, text_BD, scale, side)
        column_lse_Wb = ranks.all_to_all(column_lse_B.view(ranks.world_size, -1))
        # a positive pair counts for its row and its column; summed over ranks both halves are the sum over rows
        positive_b = scale * (image_bD * _mean_positive(text_bD, text_BD, images, ranks)).sum(-1)
        return Term(((row_lse_b + column_lse_Wb.logsumexp(0)) / 2 - positive_b).sum(), len(image_bD))


def _mean_positive(text_bD: Tensor, text_BD: Tensor, images: Features, ranks: Ranks) -> Tensor:
    """Return the mean of the texts that belong to each of this rank's images."""
    if "image_ids" not in images:
        return text_bD
    ids_b = images["image_ids"]
    sums_bD, counts_b = positive_sums(text_BD, ids_b, ranks.all_gather(ids_b))
    return sums_bD / counts_b[:, None]


def tiled_logsumexps(
    rows_ND: Tensor, columns_MD: Tensor, scale: Tensor, tile_size: int = TILE_SIZE
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of every row (N,) and of every column (M,) of ``scale * rows @ columns.T``.

    Args:
        rows_ND: Unit vectors.
        columns_MD: Unit vectors.
        scale: Scalar tensor.
        tile_size: Side of the tiles. Logits are computed again in the backward pass, unless one tile holds them all.
    """
    return _TiledLogSumExps.apply(rows_ND, columns_MD, scale, tile_size)


class _TiledLogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, columns_MD, scale, tile_size):
        scaled_ND = rows_ND * scale
        row_lse_N = rows_ND.new_full((len(rows_ND),), -torch.inf)
        column_lse_M = rows_ND.new_full((len(columns_MD),), -torch.inf)
        with exact_products(rows_ND):
            for row, column in tiles(len(rows_ND), len(columns_MD), tile_size):
                logits = scaled_ND[row] @ columns_MD[column].T
                # each joins by the larger of the two maxima: exact at any scale, no overflow
                row_lse_N[row] = torch.logaddexp(row_lse_N[row], logits.logsumexp(1))
                column_lse_M[column] = torch.logaddexp(column_lse_M[column], logits.logsumexp(0))
        ctx.tile_size = tile_size
        kept = [logits] if tile_size >= max(len(rows_ND), len(columns_MD)) else []
        ctx.save_for_backward(rows_ND, columns_MD, scale, row_lse_N, column_lse_M, *kept)
        return row_lse_N, column_lse_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_row_N, grad_column_M):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_ND, columns_MD, scale, row_lse_N, column_lse_M, *kept = ctx.saved_tensors
        scaled_ND = rows_ND * scale
        grad_scaled_ND, grad_columns_MD = torch.zeros_like(rows_ND), torch.zeros_like(columns_MD)
        with exact_products(rows_ND):
            for row, column in tiles(len(rows_ND), len(columns_MD), ctx.tile_size):
                logits = kept[0] if kept else scaled_ND[row] @ columns_MD[column].T
                grad = (logits - row_lse_N[row, None]).exp_().mul_(grad_row_N[row, None])
                grad += (logits - column_lse_M[None, column]).exp_().mul_(grad_column_M[None, column])
                grad_scaled_ND[row].addmm_(grad, columns_MD[column])
                grad_columns_MD[column].addmm_(grad.T, scaled_ND[row])
        grad_scale = (grad_scaled_ND * rows_ND).sum()
        return grad_scaled_ND.mul_(scale), grad_columns_MD, grad_scale, None


class Clip(nn.Module):
    """Two linear heads into the shared space, a learned scale, and the loss above."""

    reads = ("image_pooled", "text_pooled")

    def __init__(
        self,
        shape: TowerShape,
        *,
        embed_dim: int = 512,
        init_scale: float = 1 / 0.07,
        backend: Backend = "local",
        tile_size: int | None = None,
    ):
        """Build the heads.

        Args:
            shape: Sizes of the towers.
            embed_dim: Shared width. Paper: 512 for B, 768 for L models.
            init_scale: Start of the learned scale. Paper: 1 / 0.07.
            backend: ``local``, or ``tiled`` where the logits of this rank's images with all texts do not fit.
            tile_size: Side of the tiles of ``tiled``; default `TILE_SIZE`.

        Raises:
            ValueError: If an option is out of range, or a tile size comes without tiles.
        """
        super().__init__()
        if backend not in get_args(Backend):
            raise ValueError(f"backend {backend!r} must be one of {', '.join(get_args(Backend))}")
        if tile_size is not None and (backend != "tiled" or tile_size < 1):
            raise ValueError(f"tile_size {tile_size} with backend {backend!r}: it is the side >= 1 of 'tiled' alone")
        self.backend: Backend = backend
        self.tile_size = tile_size or TILE_SIZE
        self.loss_weights = {"contrastive": 1.0}
        self.image_projection = projection(shape.vision_width, embed_dim)
        self.text_projection = projection(shape.text_width, embed_dim)
        self.log_scale = log_scale_parameter(init_scale)

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return ``image_embeds`` (B, E)."""
        (pooled_BD,) = required(outputs, "image_pooled")
        return {"image_embeds": self.image_projection(pooled_BD)}

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return ``text_embeds`` (B, E)."""
        (pooled_BD,) = required(outputs, "text_pooled")
        return {"text_embeds": self.text_projection(pooled_BD)}

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return the contrastive term; rows with equal ``image_ids`` are positives of each other."""
        scale = self.log_scale.exp()
        return {"contrastive": clip_term(images, texts, scale, ranks, backend=self.backend, tile_size=self.tile_size)}

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return no terms: CLIP compares pooled embeddings alone."""
        return {}, {}

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return the scaled cosines (I, T)."""
        return scaled_cosines(images["image_embeds"], texts["text_embeds"], self.log_scale.exp())

    def clamp_(self) -> None:
        """Keep the scale within [1, 100]."""
        clamp_log_scale_(self.log_scale)
