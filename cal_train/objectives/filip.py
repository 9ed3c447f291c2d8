"""FILIP: every patch picks its best word and every word its best patch; the fine-grained baseline.

    i2t_ij = mean over patches p of max over words l of <v_ip, w_jl>
    t2i_ij = mean over words l of max over patches p of <v_ip, w_jl>
    L = 1/2 [cross-entropy of the rows of s * i2t  +  cross-entropy of the columns of s * t2i]

I images, T texts, P patch tokens, L text tokens, E shared width, B pairs of the whole batch, b of this rank, W ranks.
All similarities of a block of images with a block of texts are one product, from which both matrices are read; blocks
are computed again in the backward pass. Cost grows with B^2 L P E, so keep the batch or the tokens few.

Source: Yao et al. 2021, arXiv:2111.07783, section 3.1. Differs: with ``token_share`` below 1, the tokens that take part
are chosen by their best match within their own pair, where the paper looks at all pairs of a rank: so the loss does not
depend on how the batch is split over ranks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.gather import ONE_RANK, Ranks
from cal_train.objectives.similarity import (
    as_scalar,
    clamp_log_scale_,
    exact_products,
    log_scale_parameter,
    projection,
    required,
    unit,
)
from cal_train.towers.outputs import TowerOutputs, TowerShape

TILE_ELEMENTS = 2**24
"""Similarities of patches with words held at a time: 64 MiB in float32."""
ABSENT = -2.0
"""Similarity of a padded word: below every cosine, and finite, so that a text without words has finite scores."""


def filip_loss(
    patch_embeds_BPE: Tensor, token_embeds_BLE: Tensor, token_mask_BL: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """Return FILIP's symmetric cross-entropy for one process.

    Args:
        patch_embeds_BPE: Patch embeddings of any length; normalised here in float32 or wider.
        token_embeds_BLE: Word embeddings of the images' texts, in the same order.
        token_mask_BL: True for real words; padding has no influence.
        logit_scale: The factor s itself, already exponentiated.

    Returns:
        A scalar.
    """
    images = {"patch_embeds": patch_embeds_BPE}
    term = filip_term(images, {"token_embeds": token_embeds_BLE, "text_mask": token_mask_BL}, logit_scale)
    return term.sum / term.weight


def filip_term(
    images: Features,
    texts: Features,
    logit_scale: Tensor | float,
    ranks: Ranks = ONE_RANK,
    *,
    token_share: float = 1.0,
    tile_elements: int = TILE_ELEMENTS,
) -> Term:
    """Return this rank's part of the FILIP loss of the whole batch.

    Args:
        images: ``patch_embeds`` (b, P, E) of this rank, and ``image_ids`` (b,) if rows may share an image.
        texts: ``token_embeds`` (b, L, E) and ``text_mask`` (b, L); L may differ between ranks.
        logit_scale: The factor s.
        ranks: The ranks that share the batch.
        token_share: Share of the patches and of the words that take part, see `best_tokens`.
        tile_elements: Similarities held at a time.

    Returns:
        The sum over this rank's pairs of both directions' halves, weighted by their number.
    """
    with exact_products(images["patch_embeds"]):
        patches_bPE, tokens_bLE, mask_bL = unit(images["patch_embeds"]), unit(texts["token_embeds"]), texts["text_mask"]
        if token_share < 1:
            patches_bPE, tokens_bLE, mask_bL = best_tokens(patches_bPE, tokens_bLE, mask_bL.bool(), token_share)
        tokens_BLE, mask_BL = _gather_texts(tokens_bLE, mask_bL.bool(), ranks)
        scale = as_scalar(logit_scale, patches_bPE)
        to_text_bB, to_image_bB = token_similarities(patches_bPE, tokens_BLE, mask_BL, tile_elements)
        # images stay: what they say about a text of another rank is a log-sum-exp that goes to that rank
        column_lse_Wb = ranks.all_to_all((scale * to_image_bB).logsumexp(0).view(ranks.world_size, -1))
        lse_b = ((scale * to_text_bB).logsumexp(1) + column_lse_Wb.logsumexp(0)) / 2
        positive_b = scale * _positive_mean((to_text_bB + to_image_bB) / 2, images.get("image_ids"), ranks)
        return Term((lse_b - positive_b).sum(), len(patches_bPE))


def token_similarities(
    patches_IPE: Tensor, tokens_TLE: Tensor, mask_TL: Tensor, tile_elements: int = TILE_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Return both token-wise similarities of all images with all texts, (I, T) each.

    Args:
        patches_IPE: Unit vectors.
        tokens_TLE: Unit vectors.
        mask_TL: True for real words.
        tile_elements: Similarities of single tokens held at a time; at least those of one image with one text are.

    Returns:
        The mean over patches of the best word, and the mean over words of the best patch.
    """
    pair = patches_IPE.shape[1] * tokens_TLE.shape[1]
    num_images = min(max(tile_elements // pair, 1), len(patches_IPE))
    num_texts = max(tile_elements // (pair * num_images), 1)
    is_one_tile = num_images >= len(patches_IPE) and num_texts >= len(tokens_TLE)
    rows = []
    for patches in patches_IPE.split(num_images):
        blocks = []
        for tokens, mask in zip(tokens_TLE.split(num_texts), mask_TL.split(num_texts), strict=True):
            if is_one_tile:  # computing it again would save nothing
                blocks.append(_tile_similarities(patches, tokens, mask))
            else:
                recomputed = checkpoint(
                    _tile_similarities, patches, tokens, mask, use_reentrant=False, preserve_rng_state=False
                )
                blocks.append(recomputed)
        rows.append([torch.cat(matrix, dim=1) for matrix in zip(*blocks, strict=True)])
    to_text_IT, to_image_IT = (torch.cat(matrix) for matrix in zip(*rows, strict=True))
    return to_text_IT, to_image_IT


def _tile_similarities(patches_IPE: Tensor, tokens_TLE: Tensor, mask_TL: Tensor) -> tuple[Tensor, Tensor]:
    (num_images, num_patches, _), (num_texts, length, _) = patches_IPE.shape, tokens_TLE.shape
    similarity_IPTL = (patches_IPE.flatten(0, 1) @ tokens_TLE.flatten(0, 1).T).view(
        num_images, num_patches, num_texts, length
    )
    to_text_IT = similarity_IPTL.masked_fill(~mask_TL, ABSENT).amax(3).mean(1)
    best_patch_ITL = similarity_IPTL.amax(1) * mask_TL
    return to_text_IT, best_patch_ITL.sum(2) / mask_TL.sum(1).clamp(min=1)


def best_tokens(
    patches_BPE: Tensor, tokens_BLE: Tensor, mask_BL: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of every pair that match their pair best.

    Args:
        patches_BPE: Unit vectors.
        tokens_BLE: Unit vectors.
        mask_BL: True for real words.
        share: Of the patches, and of the real words of each text, rounded up. Paper: 0.25.

    Returns:
        Patches, words and word mask, fewer of each. The choice has no gradient, the chosen have.
    """
    with torch.no_grad():
        similarity_BPL = patches_BPE @ tokens_BLE.transpose(1, 2)
        num_patches, num_slots = (math.ceil(share * size) for size in similarity_BPL.shape[1:])
        patch_score_BP = similarity_BPL.masked_fill(~mask_BL[:, None], ABSENT).amax(2)
        chosen_patches = patch_score_BP.topk(num_patches).indices
        token_score_BL = similarity_BPL.amax(1).masked_fill(~mask_BL, ABSENT)
        chosen_tokens = token_score_BL.topk(num_slots).indices
        num_kept_B = torch.ceil(share * mask_BL.sum(1).double())  # rounds as math.ceil does above
        kept_mask = torch.arange(num_slots, device=mask_BL.device) < num_kept_B[:, None]
    width = patches_BPE.shape[2]
    patches = patches_BPE.gather(1, chosen_patches[..., None].expand(-1, -1, width))
    tokens = tokens_BLE.gather(1, chosen_tokens[..., None].expand(-1, -1, width))
    return patches, tokens, kept_mask


def _gather_texts(tokens_bLE: Tensor, mask_bL: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    length = torch.tensor(tokens_bLE.shape[1], device=tokens_bLE.device)
    missing = int(ranks.all_reduce_max(length)) - tokens_bLE.shape[1]
    return ranks.all_gather(F.pad(tokens_bLE, (0, 0, 0, missing))), ranks.all_gather(F.pad(mask_bL, (0, missing)))


def _positive_mean(similarity_bB: Tensor, ids_b: Tensor | None, ranks: Ranks) -> Tensor:
    """Return the mean similarity of each of this rank's images with the texts that belong to it."""
    num_rows = len(similarity_bB)
    if ids_b is None:
        return similarity_bB[:, ranks.rank * num_rows :].diagonal()
    is_positive_bB = ids_b[:, None] == ranks.all_gather(ids_b)
    return (similarity_bB * is_positive_bB).sum(1) / is_positive_bB.sum(1)


class Filip(nn.Module):
    """Two linear heads for patches and words, a learned scale, and the loss above."""

    reads = ("patch_tokens", "text_tokens")

    def __init__(
        self,
        shape: TowerShape,
        *,
        embed_dim: int = 256,
        init_scale: float = 1 / 0.07,
        token_share: float = 1.0,
        tile_elements: int = TILE_ELEMENTS,
    ):
        """Build the heads.

        Args:
            shape: Sizes of the towers.
            embed_dim: Shared width. Paper: 256.
            init_scale: Start of the learned scale. Paper: 1 / 0.07.
            token_share: Share of patches and words that is compared across pairs. Paper: 0.25 in training.
            tile_elements: Similarities of single tokens held at a time.

        Raises:
            ValueError: If an option is out of range.
        """
        super().__init__()
        if not 0 < token_share <= 1:
            raise ValueError(f"token_share {token_share} must be above 0 and at most 1, which keeps every token")
        if tile_elements < 1:
            raise ValueError(f"tile_elements {tile_elements} must be at least 1")
        self.token_share, self.tile_elements = token_share, tile_elements
        self.loss_weights = {"contrastive": 1.0}
        self.patch_projection = projection(shape.vision_width, embed_dim)
        self.token_projection = projection(shape.text_width, embed_dim)
        self.log_scale = log_scale_parameter(init_scale)

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return ``patch_embeds`` (B, P, E)."""
        (patches_BPD,) = required(outputs, "patch_tokens")
        return {"patch_embeds": self.patch_projection(patches_BPD)}

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return ``token_embeds`` (B, L, E) and ``text_mask`` (B, L)."""
        tokens_BLD, mask_BL = required(outputs, "text_tokens", "text_mask")
        return {"token_embeds": self.token_projection(tokens_BLD), "text_mask": mask_BL}

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return the contrastive term; rows with equal ``image_ids`` are positives of each other."""
        options = {"token_share": self.token_share, "tile_elements": self.tile_elements}
        return {"contrastive": filip_term(images, texts, self.log_scale.exp(), ranks, **options)}

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return no terms: all of FILIP compares pairs."""
        return {}, {}

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return the scaled mean of both similarities (I, T), over all tokens."""
        with exact_products(images["patch_embeds"]):
            patches_IPE, tokens_TLE = unit(images["patch_embeds"]), unit(texts["token_embeds"])
            both = token_similarities(patches_IPE, tokens_TLE, texts["text_mask"].bool(), self.tile_elements)
            return as_scalar(self.log_scale.exp(), patches_IPE) * (both[0] + both[1]) / 2

    def clamp_(self) -> None:
        """Keep the scale within [1, 100]."""
        clamp_log_scale_(self.log_scale)
