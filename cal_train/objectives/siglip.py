"""SigLIP: every pair of an image and a text is a yes-or-no question of its own.

    Z_ij = t <u_i, w_j> + beta,  y_ij = 1 for positives and -1 otherwise
    L = 1/B sum_ij softplus(-y_ij Z_ij)  =  1/B [sum_ij softplus(Z_ij)  -  sum over positives of Z_ij]

B pairs of the whole batch, b of this rank, D shared width; N rows and M columns of a matrix of logits. The second form
needs no matrix of labels, and no pair needs another one: texts go round the ranks, and every block of logits turns into
its sum and its gradients tile by tile.

Source: Zhai et al. 2023, arXiv:2303.15343, algorithm 1 (the bias in its equation has the other sign). Differs: several
positives per row are allowed, and the bias may start where uninformative logits have the least loss.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
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
    scalar_parameter,
    scaled_cosines,
    tiles,
    unit,
)
from cal_train.towers.outputs import TowerOutputs, TowerShape

Exchange = Literal["ring", "ring_bidirectional", "gather"]
CHUNK_SIZE = 1024


def siglip_loss(
    image_embeds_BD: Tensor,
    text_embeds_BD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids_B: Tensor | None = None,
) -> Tensor:
    """Return the sigmoid loss over the full matrix of logits: summed over all pairs, divided by B.

    Args:
        image_embeds_BD: One embedding per image, of any length; normalised here in float32 or wider.
        text_embeds_BD: The embeddings of the images' texts, in the same order.
        logit_scale: The factor t itself, already exponentiated.
        logit_bias: Beta, added to every logit.
        image_ids_B: Rows with equal ids are positives of each other; without it only a pair's own text is.

    Returns:
        A scalar.
    """
    with exact_products(image_embeds_BD):
        image_BD, text_BD = unit(image_embeds_BD), unit(text_embeds_BD)
        logits_BB = as_scalar(logit_scale, image_BD) * image_BD @ text_BD.T + as_scalar(logit_bias, image_BD)
        ids_B = torch.arange(len(image_BD), device=image_BD.device) if image_ids_B is None else image_ids_B
        sign_BB = torch.where(ids_B[:, None] == ids_B[None, :], -1.0, 1.0).to(logits_BB)
        return F.softplus(sign_BB * logits_BB).sum() / len(image_BD)


def siglip_term(
    images: Features,
    texts: Features,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    ranks: Ranks = ONE_RANK,
    *,
    exchange: Exchange = "ring",
    chunk_size: int = CHUNK_SIZE,
) -> Term:
    """Return this rank's part of the sigmoid loss of the whole batch: its images against all texts.

    Args:
        images: ``image_embeds`` (b, D) of this rank, and ``image_ids`` (b,) if rows may share an image.
        texts: ``text_embeds`` (b, D).
        logit_scale: The factor t.
        logit_bias: Beta.
        ranks: The ranks that share the batch.
        exchange: How the texts of other ranks come here.
        chunk_size: Rows and columns of logits held at a time.

    Returns:
        The sum over this rank's images and all texts, weighted by the number of this rank's images.
    """
    with exact_products(images["image_embeds"]):
        image_bD, text_bD = unit(images["image_embeds"]), unit(texts["text_embeds"])
        scale, bias = as_scalar(logit_scale, image_bD), as_scalar(logit_bias, image_bD)
        travelling = (text_bD, images["image_ids"]) if "image_ids" in images else (text_bD,)
        loss = image_bD.new_zeros(())
        for index, block in enumerate(text_blocks(travelling, ranks, exchange)):
            loss = loss + softplus_sum(image_bD, block[0], scale, bias, chunk_size)
            if len(block) == 2:
                sums_bD, counts_b = positive_sums(block[0], images["image_ids"], block[1])
                loss = loss - scale * (image_bD * sums_bD).sum() - bias * counts_b.sum()
            elif index == 0:
                own_bD = block[0][_own_rows(ranks, len(image_bD), exchange)]
                loss = loss - scale * (image_bD * own_bD).sum() - bias * len(image_bD)
        return Term(loss, len(image_bD))


def text_blocks(travelling: tuple[Tensor, ...], ranks: Ranks, exchange: Exchange):
    """Yield the blocks of texts that this rank compares its images with; its own are in the first.

    Args:
        travelling: What describes a text; the first dimension is the text.
        ranks: The ranks that share the batch.
        exchange: ``ring`` and ``ring_bidirectional`` give W blocks, ``gather`` one.
    """
    if exchange == "gather":
        yield tuple(ranks.all_gather(tensor) for tensor in travelling)
    else:
        yield from ranks.ring(travelling, is_bidirectional=exchange == "ring_bidirectional")


def _own_rows(ranks: Ranks, num_rows: int, exchange: Exchange) -> slice:
    start = ranks.rank * num_rows if exchange == "gather" else 0
    return slice(start, start + num_rows)


def softplus_sum(
    rows_ND: Tensor, columns_MD: Tensor, scale: Tensor, bias: Tensor, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Return the sum of ``softplus(scale * rows @ columns.T + bias)``, holding one tile of logits at a time.

    Args:
        rows_ND: Unit vectors.
        columns_MD: Unit vectors.
        scale: Scalar tensor.
        bias: Scalar tensor.
        chunk_size: Side of the tiles.

    Returns:
        A scalar. Being a sum, its gradients are formed along with it, so that no logit is computed twice.
    """
    return _SoftplusSum.apply(rows_ND, columns_MD, scale, bias, chunk_size)


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, columns_MD, scale, bias, chunk_size):
        scaled_ND = rows_ND * scale
        total, grad_bias = rows_ND.new_zeros(()), rows_ND.new_zeros(())
        needs_grad = any(ctx.needs_input_grad)
        grad_scaled_ND, grad_columns_MD = torch.zeros_like(rows_ND), torch.zeros_like(columns_MD)
        with exact_products(rows_ND):
            for row, column in tiles(len(rows_ND), len(columns_MD), chunk_size):
                logits = torch.addmm(bias, scaled_ND[row], columns_MD[column].T)
                total += F.softplus(logits).sum()
                if needs_grad:
                    grad = logits.sigmoid_()
                    grad_bias += grad.sum()
                    grad_scaled_ND[row].addmm_(grad, columns_MD[column])
                    grad_columns_MD[column].addmm_(grad.T, scaled_ND[row])
        if needs_grad:
            grad_scale = (grad_scaled_ND * rows_ND).sum()
            ctx.save_for_backward(grad_scaled_ND.mul_(scale), grad_columns_MD, grad_scale, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(grad_total * grad for grad in ctx.saved_tensors), None


def initial_bias(bias_init: float | Literal["auto"], global_batch_size: int | None) -> float:
    """Return the start of the logit bias.

    Args:
        bias_init: A number (paper: -10), or ``auto`` for ``-ln(B - 1)``, where logits that say nothing have the least
            loss, softplus(-beta) + (B - 1) softplus(beta). Advised below B = 2000.
        global_batch_size: B over all ranks and cached chunks; for ``auto`` alone.

    Raises:
        ValueError: If ``auto`` comes without a batch size of at least 2, or the value is something else.
    """
    if bias_init != "auto":
        if isinstance(bias_init, str):
            raise ValueError(f"bias_init {bias_init!r} must be a number or 'auto'")
        return float(bias_init)
    if global_batch_size is None or global_batch_size < 2:
        raise ValueError(
            f"bias_init 'auto' is -ln(B - 1) for the batch of all ranks, but global_batch_size is {global_batch_size}: "
            "give at least 2, or a number as bias_init (paper: -10)"
        )
    return -math.log(global_batch_size - 1)


class SigLip(nn.Module):
    """Two linear heads into the shared space, a learned scale and bias, and the loss above."""

    reads = ("image_pooled", "text_pooled")

    def __init__(
        self,
        shape: TowerShape,
        *,
        embed_dim: int = 512,
        init_scale: float = 10.0,
        bias_init: float | Literal["auto"] = -10.0,
        global_batch_size: int | None = None,
        exchange: Exchange = "ring",
        chunk_size: int = CHUNK_SIZE,
    ):
        """Build the heads.

        Args:
            shape: Sizes of the towers.
            embed_dim: Shared width. Paper: the towers' width, 768 for B; the heads are square there.
            init_scale: Start of the learned scale t. Paper: 10.
            bias_init: Start of the learned bias, see `initial_bias`. Paper: -10.
            global_batch_size: For ``bias_init: auto``.
            exchange: How the texts of other ranks come to this rank's images. Paper: ``ring``.
            chunk_size: Rows and columns of logits held at a time.

        Raises:
            ValueError: If an option is out of range.
        """
        super().__init__()
        check_exchange(exchange, chunk_size)
        self.exchange: Exchange = exchange
        self.chunk_size = chunk_size
        self.loss_weights = {"contrastive": 1.0}
        self.image_projection = projection(shape.vision_width, embed_dim)
        self.text_projection = projection(shape.text_width, embed_dim)
        self.log_scale = log_scale_parameter(init_scale)
        self.logit_bias = scalar_parameter(initial_bias(bias_init, global_batch_size))

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
        options = {"exchange": self.exchange, "chunk_size": self.chunk_size}
        return {"contrastive": siglip_term(images, texts, self.log_scale.exp(), self.logit_bias, ranks, **options)}

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return no terms: SigLIP compares pooled embeddings alone."""
        return {}, {}

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return the logits (I, T): scaled cosines plus bias."""
        cosines_IT = scaled_cosines(images["image_embeds"], texts["text_embeds"], self.log_scale.exp())
        return cosines_IT + as_scalar(self.logit_bias, cosines_IT)

    def clamp_(self) -> None:
        """Keep the scale within [1, 100]; the bias is free."""
        clamp_log_scale_(self.log_scale)


def check_exchange(exchange: str, chunk_size: int | None) -> None:
    """Refuse an unknown way of exchange or an empty chunk.

    Raises:
        ValueError: Naming the value and what is allowed.
    """
    if exchange not in get_args(Exchange):
        raise ValueError(f"exchange {exchange!r} must be one of {', '.join(get_args(Exchange))}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
