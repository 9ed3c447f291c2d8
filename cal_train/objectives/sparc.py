"""SPARC: CLIP plus a fine-grained loss that compares words with image regions inside each pair.

B pairs, P patches, L text tokens, D encoder width, E shared width.

Every word groups the patches that fit it best, and must recognise its own group among those of the other words of its
caption. No other sample takes part, so the fine loss needs no exchange between ranks.

Source: Bica et al. 2024, arXiv:2401.09865, section 2 and its listing. Differs: a word whose similarity is the same for
all patches weighs them equally (the paper divides 0 by 0), the mean over tokens leaves padding out (the listing keeps
it in), the global image passes ``h_v`` as section 2 says (the listing drops it; option ``pooled_head``). No public code
was used.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.clip import clip_term
from cal_train.objectives.gather import Ranks
from cal_train.objectives.similarity import (
    as_scalar,
    clamp_log_scale_,
    exact_products,
    log_scale_parameter,
    required,
    scaled_cosines,
    unit,
    widened,
)
from cal_train.towers.outputs import TowerOutputs, TowerShape

Reduction = Literal["sample", "token"]


def word_patch_weights(
    patch_embeds_BPE: Tensor, token_embeds_BLE: Tensor, threshold: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return how much each word takes from each patch, and which patches it kept.

    Similarities are inner products, stretched to [0, 1] over the patches of each word; those below the threshold
    become 0 and the rest is scaled to sum 1. A word that fits all patches equally weighs them equally.

    Args:
        patch_embeds_BPE: Adapted patches, not normalised; float32 or wider.
        token_embeds_BLE: Adapted text tokens, not normalised.
        threshold: Stretched similarity from which a patch is kept; None for the paper's 1 / P.

    Returns:
        Weights (B, L, P), each row of sum 1, with gradient, and a bool tensor of the same shape.
    """
    num_patches = patch_embeds_BPE.shape[1]
    similarity_BLP = token_embeds_BLE @ patch_embeds_BPE.transpose(1, 2)
    low_BL1, high_BL1 = similarity_BLP.amin(-1, keepdim=True), similarity_BLP.amax(-1, keepdim=True)
    range_BL1 = high_BL1 - low_BL1
    # an inner product is only known up to rounding of this size: a smaller range says nothing about the patches
    size_BL1 = token_embeds_BLE.norm(dim=-1, keepdim=True) * patch_embeds_BPE.norm(dim=-1).amax(-1)[:, None, None]
    constant_BL1 = range_BL1 <= 8 * torch.finfo(range_BL1.dtype).eps * size_BL1
    stretched_BLP = (similarity_BLP - low_BL1) / range_BL1.masked_fill(constant_BL1, 1.0)
    stretched_BLP = stretched_BLP.masked_fill(constant_BL1, 1.0)
    kept_BLP = stretched_BLP >= (1 / num_patches if threshold is None else threshold)
    weights_BLP = stretched_BLP * kept_BLP
    return weights_BLP / weights_BLP.sum(-1, keepdim=True), kept_BLP


def sparc_fine_loss(
    patch_embeds_BPD: Tensor,
    token_embeds_BLD: Tensor,
    token_mask_BL: Tensor,
    logit_scale: Tensor | float,
    threshold: float | None = None,
    reduction: Reduction = "sample",
) -> Tensor:
    """Return the contrast between words and their patch groups within each pair, a scalar in nats.

    Args:
        patch_embeds_BPD: Adapted patches of the shared width, not normalised.
        token_embeds_BLD: Adapted text tokens, not normalised.
        token_mask_BL: True for real tokens. The content of other tokens has no influence.
        logit_scale: Factor of the cosines.
        threshold: Stretched similarity from which a word keeps a patch; None for the paper's 1 / P.
        reduction: ``sample``: mean over the tokens of a sample, then over samples (equation 6). ``token``: mean over
            all tokens of the batch (the listing).

    Returns:
        float32, or float64 for float64 inputs. A caption of one token adds 0, and so does one without tokens.

    Raises:
        ValueError: If shapes do not fit together, the threshold is above 1 or the reduction is unknown.

    Source: equations 1 to 6 of the paper.
    """
    term, _ = fine_term(patch_embeds_BPD, token_embeds_BLD, token_mask_BL, logit_scale, threshold, reduction)
    return term.sum / torch.as_tensor(term.weight).clamp(min=1)


def fine_term(
    patch_embeds_BPE: Tensor,
    token_embeds_BLE: Tensor,
    token_mask_BL: Tensor,
    logit_scale: Tensor | float,
    threshold: float | None = None,
    reduction: Reduction = "sample",
) -> tuple[Term, Tensor]:
    """Return `sparc_fine_loss` as a sum with its weight, and the share of patches that the words kept."""
    _check_fine(patch_embeds_BPE, token_embeds_BLE, token_mask_BL, threshold, reduction)
    token_mask_BL = token_mask_BL.bool()
    with exact_products(patch_embeds_BPE):
        patches_BPE = widened(patch_embeds_BPE)
        # filled, not multiplied: 0 * nan of a padded token would be nan
        tokens_BLE = widened(token_embeds_BLE).masked_fill(~token_mask_BL[..., None], 0.0)
        weights_BLP, kept_BLP = word_patch_weights(patches_BPE, tokens_BLE, threshold)
        groups_BLE = weights_BLP @ patches_BPE
        loss_BL = _word_group_contrast(tokens_BLE, groups_BLE, token_mask_BL, logit_scale)
    tokens_of_B = token_mask_BL.sum(1)
    kept = (kept_BLP.to(loss_BL.dtype).mean(-1) * token_mask_BL).sum() / tokens_of_B.sum().clamp(min=1)
    if reduction == "token":
        return Term(loss_BL.sum(), tokens_of_B.sum()), kept
    return Term((loss_BL.sum(1) / tokens_of_B.clamp(min=1)).sum(), len(loss_BL)), kept


class Sparc(nn.Module):
    """The SPARC objective: ``lambda_g * CLIP(global) + lambda_f * fine``.

    Global embeddings come from the mean over patches and the masked mean over tokens, not from the towers' poolers.
    """

    reads = ("patch_tokens", "text_tokens")

    def __init__(
        self,
        shape: TowerShape,
        *,
        embed_dim: int = 512,
        contrastive_weight: float = 0.5,
        fine_weight: float = 1.0,
        local_reduction: Reduction = "sample",
        threshold_factor: float = 1.0,
        pooled_head: bool = True,
        use_special_tokens: bool = True,
        special_token_ids: Sequence[int] = (),
        init_scale: float = 1 / 0.07,
    ):
        """Build the adapters.

        Args:
            shape: The towers' sizes.
            embed_dim: Shared width E. Paper: 512.
            contrastive_weight: lambda_g. Paper: 0.5.
            fine_weight: lambda_f. The paper tried 0.5, 1, 5 and 10 and does not say which it kept.
            local_reduction: See `sparc_fine_loss`.
            threshold_factor: c of the threshold c / P. Paper: 1, which keeps nearly all patches of noise.
            pooled_head: Pass the mean patch through ``h_v`` (linear and GELU) before the adapter: section 2 of the
                paper. False: its listing.
            use_special_tokens: False leaves ``special_token_ids`` (begin, end) out of global mean and fine loss.
            special_token_ids: Token ids that stand for no word; only with ``use_special_tokens: false``.
            init_scale: Factor of the cosines at the start, shared by both losses. Paper: learned; CLIP's 1 / 0.07.

        Raises:
            ValueError: If options contradict each other.
        """
        super().__init__()
        if use_special_tokens == bool(special_token_ids):
            raise ValueError(
                f"use_special_tokens={use_special_tokens} with special_token_ids={list(special_token_ids)}: name the "
                "ids to leave out together with use_special_tokens: false"
            )
        if not 0 < threshold_factor <= shape.num_patches:
            raise ValueError(
                f"threshold_factor={threshold_factor} must be above 0 and at most the {shape.num_patches} patches of "
                "an image: beyond, no patch is kept"
            )
        if local_reduction not in ("sample", "token"):
            raise ValueError(f"local_reduction={local_reduction!r} must be 'sample' or 'token'")
        self.loss_weights = {"contrastive": contrastive_weight, "fine": fine_weight}
        self.local_reduction: Reduction = local_reduction
        self.threshold_factor = threshold_factor
        self.special_token_ids = tuple(special_token_ids)
        self.patch_adapter = nn.Linear(shape.vision_width, embed_dim)
        self.token_adapter = nn.Linear(shape.text_width, embed_dim)
        self.pooled_head = nn.Identity()
        if pooled_head and contrastive_weight:
            self.pooled_head = nn.Sequential(nn.Linear(shape.vision_width, shape.vision_width), nn.GELU())
        self.log_scale = log_scale_parameter(init_scale)

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return ``image_embeds`` (B, E): the adapted mean patch."""
        (patch_tokens_BPD,) = required(outputs, "patch_tokens")
        return {"image_embeds": self.patch_adapter(self.pooled_head(patch_tokens_BPD.mean(1)))}

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return ``text_embeds`` (B, E): the adapted mean over real tokens."""
        (tokens_BLD,) = required(outputs, "text_tokens")
        mask_BL = self.token_mask(outputs)
        tokens_BLD = tokens_BLD.masked_fill(~mask_BL[..., None], 0.0)
        mean_BD = tokens_BLD.sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        return {"text_embeds": self.token_adapter(mean_BD)}

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return CLIP's term on the global embeddings."""
        if not self.loss_weights["contrastive"]:
            return {}
        return {"contrastive": clip_term(images, texts, self.log_scale.exp(), ranks)}

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return the fine term, and the share of patches that words keep as ``kept_fraction``."""
        if not self.loss_weights["fine"]:
            return {}, {}
        patches_BPE, tokens_BLE = self._adapted(outputs)
        term, kept = fine_term(
            patches_BPE,
            tokens_BLE,
            self.token_mask(outputs),
            self.log_scale.exp(),
            self.threshold_factor / patches_BPE.shape[1],
            self.local_reduction,
        )
        return {"fine": term}, {"kept_fraction": kept}

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return scaled cosines of the global embeddings (I, T)."""
        return scaled_cosines(images["image_embeds"], texts["text_embeds"], self.log_scale.exp())

    def token_mask(self, outputs: TowerOutputs) -> Tensor:
        """Return the tokens that count as words (B, L): real ones, less the special ones where these are left out."""
        text_mask_BL, input_ids_BL = required(outputs, "text_mask", "input_ids")
        if not self.special_token_ids:
            return text_mask_BL.bool()
        special = torch.tensor(self.special_token_ids, device=input_ids_BL.device)
        return text_mask_BL.bool() & ~torch.isin(input_ids_BL, special)

    @torch.no_grad()
    def word_maps(self, outputs: TowerOutputs) -> Tensor:
        """Return each word's weights over the patches (B, L, P), in raster order, for pictures; padding is 0."""
        patches_BPE, tokens_BLE = self._adapted(outputs)
        threshold = self.threshold_factor / patches_BPE.shape[1]
        weights_BLP, _ = word_patch_weights(widened(patches_BPE), widened(tokens_BLE), threshold)
        return weights_BLP * self.token_mask(outputs)[..., None]

    def clamp_(self) -> None:
        """Keep the scale in [1, 100]."""
        clamp_log_scale_(self.log_scale)

    def _adapted(self, outputs: TowerOutputs) -> tuple[Tensor, Tensor]:
        patch_tokens_BPD, text_tokens_BLD = required(outputs, "patch_tokens", "text_tokens")
        return self.patch_adapter(patch_tokens_BPD), self.token_adapter(text_tokens_BLD)


def _word_group_contrast(
    tokens_BLE: Tensor, groups_BLE: Tensor, token_mask_BL: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """Return the two-way cross-entropy of each word (B, L), word k against group k; 0 for padding."""
    logits_BLL = as_scalar(logit_scale, tokens_BLE) * unit(tokens_BLE) @ unit(groups_BLE).transpose(1, 2)
    # a finite filler: with -inf, a caption without tokens would be nan in the backward pass
    filler = torch.finfo(logits_BLL.dtype).min
    words_BL = logits_BLL.masked_fill(~token_mask_BL[:, None, :], filler).logsumexp(2)
    groups_BL = logits_BLL.masked_fill(~token_mask_BL[:, :, None], filler).logsumexp(1)
    own_BL = logits_BLL.diagonal(dim1=1, dim2=2)
    return (0.5 * (words_BL + groups_BL) - own_BL).masked_fill(~token_mask_BL, 0.0)


def _check_fine(
    patches_BPE: Tensor, tokens_BLE: Tensor, token_mask_BL: Tensor, threshold: float | None, reduction: str
) -> None:
    if tokens_BLE.shape[:2] != token_mask_BL.shape or patches_BPE.shape[::2] != tokens_BLE.shape[::2]:
        raise ValueError(
            f"patches {tuple(patches_BPE.shape)}, tokens {tuple(tokens_BLE.shape)} and token mask "
            f"{tuple(token_mask_BL.shape)} do not fit together"
        )
    if threshold is not None and threshold > 1:
        raise ValueError(f"threshold={threshold} is above 1, the largest stretched similarity: no patch is kept")
    if reduction not in ("sample", "token"):
        raise ValueError(f"reduction={reduction!r} must be 'sample' or 'token'")
