"""Llip: an image has K mixture tokens, and every text mixes them in its own way before it is compared.

    alpha_ijhk = softmax over k of <K_ihk, q_jh> / T
    x_ij = concatenation over heads of sum_k alpha_ijhk V_ihk
    Z_ij = t <n(x_ij W_o), n(w_j)> + beta,   L = the sigmoid loss of `cal_train.objectives.siglip`

I images, T texts, K mixture tokens, H heads, E = D / H width of a head, D shared width, b pairs of this rank. Texts
(queries and targets) go round the ranks, keys and values stay. Texts are taken a few at a time, and their logits are
computed again in the backward pass. How W_o stays cheap is told in `cal_train.objectives.mixing`.

Source: Lavoie et al. 2024, arXiv:2405.00740, section 3, and facebookresearch/Llip (llip/open_clip/model.py, loss.py):
one key and one value projection per mixture token, T instead of the square root of E, scale 1 / 0.07 and bias -10 at
the start. Differs: several positives per row are allowed, and the norm of x W_o may come from a Gram matrix.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.gather import ONE_RANK, Ranks
from cal_train.objectives.mixing import MixedImages, pair_cosines, shortlist_cosines, tile_texts
from cal_train.objectives.siglip import Exchange, check_exchange, initial_bias, text_blocks
from cal_train.objectives.similarity import (
    as_scalar,
    clamp_log_scale_,
    exact_products,
    log_scale_parameter,
    projection,
    required,
    scalar_parameter,
    unit,
    widened,
)
from cal_train.towers.outputs import TowerOutputs, TowerShape

LAYER_NORM_WIDTH = 1280
"""Vision width from which keys, values and queries are normalised by default: the released H and G models are."""


def llip_loss(
    keys_BHKE: Tensor,
    values_BHKE: Tensor,
    queries_BHE: Tensor,
    text_embeds_BD: Tensor,
    out_proj_DD: Tensor,
    temperature: float,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids_B: Tensor | None = None,
) -> Tensor:
    """Return Llip's sigmoid loss over the full matrix of logits, as the equations say.

    Args:
        keys_BHKE: Keys of the mixture tokens of each image.
        values_BHKE: Their values.
        queries_BHE: Query of each text.
        text_embeds_BD: What the mixed image is compared with, of any length; normalised here.
        out_proj_DD: W_o; row vectors are multiplied with it from the left.
        temperature: T, which divides the products of keys and queries; there is no other factor.
        logit_scale: The factor t itself, already exponentiated.
        logit_bias: Beta, added to every logit.
        image_ids_B: Rows with equal ids are positives of each other; without it only a pair's own text is.

    Returns:
        A scalar, in float32 or wider.
    """
    with exact_products(keys_BHKE):
        keys, values, queries = widened(keys_BHKE), widened(values_BHKE), widened(queries_BHE)
        mixing_IJHK = torch.einsum("ihke,jhe->ijhk", keys / temperature, queries).softmax(-1)
        mixed_IJD = torch.einsum("ijhk,ihke->ijhe", mixing_IJHK, values).flatten(2)
        image_IJD, text_BD = unit(mixed_IJD @ widened(out_proj_DD)), unit(text_embeds_BD)
        cosines_BB = torch.einsum("ijd,jd->ij", image_IJD, text_BD)
        logits_BB = as_scalar(logit_scale, cosines_BB) * cosines_BB + as_scalar(logit_bias, cosines_BB)
        ids_B = torch.arange(len(logits_BB), device=logits_BB.device) if image_ids_B is None else image_ids_B
        return _sigmoid_sum(logits_BB, ids_B, ids_B) / len(logits_BB)


def _sigmoid_sum(logits_IT: Tensor, image_ids_I: Tensor, text_ids_T: Tensor) -> Tensor:
    is_positive_IT = image_ids_I[:, None] == text_ids_T
    return F.softplus(torch.where(is_positive_IT, -logits_IT, logits_IT)).sum()


def llip_term(
    images: Features,
    texts: Features,
    out_proj_DD: Tensor,
    temperature: float,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    ranks: Ranks = ONE_RANK,
    *,
    exchange: Exchange = "ring",
    chunk_size: int | None = None,
) -> Term:
    """Return this rank's part of the Llip loss of the whole batch: its images against all texts.

    Args:
        images: ``keys`` and ``values`` (b, H, K, E) of this rank, and ``image_ids`` (b,) if rows may share an image.
        texts: ``queries`` (b, H, E) and ``text_embeds`` (b, D).
        out_proj_DD: W_o.
        temperature: T.
        logit_scale: The factor t.
        logit_bias: Beta.
        ranks: The ranks that share the batch.
        exchange: How the texts of other ranks come here.
        chunk_size: Texts whose mixed images are held at a time; default: as many as `mixing.TILE_ELEMENTS` allows.

    Returns:
        The sum over this rank's images and all texts, weighted by the number of this rank's images.
    """
    with exact_products(images["keys"]):
        num_rows = len(images["keys"])
        num_texts = num_rows * ranks.world_size
        mixed = MixedImages.of(images["keys"], images["values"], out_proj_DD, temperature, num_texts)
        own_ids_b = torch.arange(num_rows, device=mixed.keys_HRE.device) + ranks.rank * num_rows
        ids_b = images.get("image_ids", own_ids_b)
        text_bD = unit(texts["text_embeds"])
        scale, bias = as_scalar(logit_scale, text_bD), as_scalar(logit_bias, text_bD)

        def tile_loss(queries_THE: Tensor, text_TD: Tensor, ids_T: Tensor) -> Tensor:
            return _sigmoid_sum(scale * pair_cosines(mixed, queries_THE, text_TD) + bias, ids_b, ids_T)

        loss = text_bD.new_zeros(())
        travelling = (widened(texts["queries"]), text_bD, ids_b)
        for block in text_blocks(travelling, ranks, exchange):
            tiles = tile_texts(mixed, tile_loss, block, chunk_size, is_only_block=len(block[0]) == num_texts)
            loss = loss + torch.stack(tiles).sum()
        return Term(loss, num_rows)


class Llip(nn.Module):
    """Heads for keys, values, queries and targets, a learned scale and bias, and the loss above."""

    reads = ("mixture_tokens", "text_pooled")

    def __init__(
        self,
        shape: TowerShape,
        *,
        embed_dim: int = 512,
        num_heads: int = 8,
        temperature: float = 5.0,
        has_layer_norm: bool | None = None,
        init_scale: float = 1 / 0.07,
        bias_init: float | Literal["auto"] = -10.0,
        global_batch_size: int | None = None,
        exchange: Exchange = "ring",
        chunk_size: int | None = None,
    ):
        """Build the heads.

        Args:
            shape: Sizes of the towers; the vision tower must have mixture tokens.
            embed_dim: Shared width. Paper: 512 for B models.
            num_heads: H. Paper: 8.
            temperature: T of the mixing softmax. Reference code: 5 for B, H and G models, 1 for L/14.
            has_layer_norm: Whether keys, values and queries pass a layer norm before they are split into heads.
                Default: for vision towers of width 1280 and more, as in the reference code's H and G models.
            init_scale: Start of the learned scale t. Reference code: 1 / 0.07.
            bias_init: Start of the learned bias, see `siglip.initial_bias`. Reference code: -10.
            global_batch_size: For ``bias_init: auto``.
            exchange: How the texts of other ranks come to this rank's images.
            chunk_size: Texts whose mixed images are held at a time; default: as many as fit 64 MiB.

        Raises:
            ValueError: If the tower has no mixture tokens or an option is out of range.
        """
        super().__init__()
        _check_options(shape, embed_dim, num_heads, temperature)
        check_exchange(exchange, chunk_size)
        self.num_heads, self.temperature = num_heads, temperature
        self.exchange: Exchange = exchange
        self.chunk_size = chunk_size
        self.loss_weights = {"contrastive": 1.0}
        has_norm = shape.vision_width >= LAYER_NORM_WIDTH if has_layer_norm is None else has_layer_norm
        per_token = (shape.num_mixture_tokens, shape.vision_width, embed_dim)
        self.key_weight = nn.Parameter(torch.randn(per_token) * shape.vision_width**-0.5)
        self.value_weight = nn.Parameter(torch.randn(per_token) * shape.vision_width**-0.5)
        self.query_projection = projection(shape.text_width, embed_dim)
        self.text_projection = projection(shape.text_width, embed_dim)
        self.key_norm, self.value_norm, self.query_norm = (
            nn.LayerNorm(embed_dim) if has_norm else nn.Identity() for _ in range(3)
        )
        self.out_proj = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim**-0.5)
        self.log_scale = log_scale_parameter(init_scale)
        self.logit_bias = scalar_parameter(initial_bias(bias_init, global_batch_size))

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return ``keys`` and ``values`` (B, H, K, E) of the mixture tokens."""
        (mixture_BKD,) = required(outputs, "mixture_tokens")
        heads = (self.num_heads, -1)
        keys_BKD = self.key_norm(torch.einsum("bkc,kcd->bkd", mixture_BKD, self.key_weight))
        values_BKD = self.value_norm(torch.einsum("bkc,kcd->bkd", mixture_BKD, self.value_weight))
        return {name: x.unflatten(2, heads).transpose(1, 2) for name, x in (("keys", keys_BKD), ("values", values_BKD))}

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return ``queries`` (B, H, E) and ``text_embeds`` (B, D)."""
        (pooled_BD,) = required(outputs, "text_pooled")
        queries_BD = self.query_norm(self.query_projection(pooled_BD))
        return {
            "queries": queries_BD.unflatten(1, (self.num_heads, -1)),
            "text_embeds": self.text_projection(pooled_BD),
        }

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return the contrastive term; rows with equal ``image_ids`` are positives of each other."""
        scale = self.log_scale.exp()
        options = {"exchange": self.exchange, "chunk_size": self.chunk_size}
        term = llip_term(images, texts, self.out_proj, self.temperature, scale, self.logit_bias, ranks, **options)
        return {"contrastive": term}

    @torch.no_grad()
    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return no terms, and the entropy in nats with which each head mixes the tokens of a matching pair."""
        keys_BHKE, queries_BHE = self.image_features(outputs)["keys"], self.text_features(outputs)["queries"]
        scores_BHK = (widened(keys_BHKE) * widened(queries_BHE)[:, :, None]).sum(-1) / self.temperature
        entropy_H = -(scores_BHK.softmax(-1) * scores_BHK.log_softmax(-1)).sum(-1).mean(0)
        return {}, {f"mixing_entropy/head_{h}": entropy for h, entropy in enumerate(entropy_H)}

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return the logits (I, T): every image mixed for every text."""
        with exact_products(images["keys"]):
            queries_THE, text_TD = widened(texts["queries"]), unit(texts["text_embeds"])
            mixed = MixedImages.of(images["keys"], images["values"], self.out_proj, self.temperature, len(text_TD))
            tiles = tile_texts(
                mixed,
                lambda q, w: pair_cosines(mixed, q, w),
                (queries_THE, text_TD),
                self.chunk_size,
                is_only_block=True,
            )
            return as_scalar(self.log_scale.exp(), text_TD) * torch.cat(tiles, 1) + as_scalar(self.logit_bias, text_TD)

    def shortlist_score(self, images: Features, texts: Features, num_candidates: int) -> Tensor:
        """Return `score` for likely pairs and minus infinity for the others (I, T): cheaper retrieval.

        Args:
            images: From `image_features`.
            texts: From `text_features`.
            num_candidates: Texts for every image and images for every text that are scored exactly; they are chosen
                by evenly mixed images, which is what scores tend to for a large temperature.
        """
        with exact_products(images["keys"]):
            keys, values, queries = (widened(x) for x in (images["keys"], images["values"], texts["queries"]))
            cosines_IT = shortlist_cosines(
                keys / self.temperature, values, queries, unit(texts["text_embeds"]), self.out_proj, num_candidates
            )
            return as_scalar(self.log_scale.exp(), keys) * cosines_IT + as_scalar(self.logit_bias, keys)

    def clamp_(self) -> None:
        """Keep the scale within [1, 100]; the bias is free."""
        clamp_log_scale_(self.log_scale)


def _check_options(shape: TowerShape, embed_dim: int, num_heads: int, temperature: float) -> None:
    if shape.num_mixture_tokens < 1:
        raise ValueError(
            "llip mixes the outputs of learned tokens: set num_mixture_tokens of the vision tower (paper: 32)"
        )
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} cannot be split into num_heads {num_heads}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be positive (reference code: 5)")
