"""SyCoCa: CoCa with attentive masks, and an image decoder that reconstructs patches from the caption.

B pairs, P patches, L text tokens, D encoder width, E shared width.

Patches are ranked by how well they fit their best word. The caption is written from the better half of the image; the
image decoder sees the worse half and the caption, and paints the better half (text-guided masked image modelling).

Source: Ma et al. 2024, arXiv:2401.02137. No code of it is public and the paper leaves much open; our answers:
patches and words are compared in the shared space of the contrastive loss, a patch passing the poolers alone; masked
patches are not shown to the vision tower at all, so a step encodes the image once whole and once in halves; the image
decoder is bidirectional, as wide as the vision tower and 4 layers deep (the paper: as deep as the text decoder); its
target are the pixels, normalised per patch, and its loss the squared error of masked patches.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.coca import Coca
from cal_train.objectives.gather import Ranks
from cal_train.objectives.image_decoder import ImageDecoder, normalize_patches, patchify
from cal_train.objectives.similarity import exact_products, required, unit, widened
from cal_train.towers.outputs import TowerOutputs, TowerShape

MaskAt = Literal["input", "tokens"]
MaskSelection = Literal["attentive", "random"]

ABLATIONS: dict[str, dict[str, Any]] = {
    "itc": {"caption_weight": 0.0, "ratio_low": 0.0, "tg_mim_weight": 0.0},
    "coca": {"ratio_low": 0.0, "tg_mim_weight": 0.0},
    "caption_mask_only": {"tg_mim_weight": 0.0},
    "mim_random": {"ratio_low": 0.0, "mask_selection": "random", "is_text_guided": False},
    "mim_attentive": {"ratio_low": 0.0, "is_text_guided": False},
    "tg_mim_random": {"ratio_low": 0.0, "mask_selection": "random"},
    "sycoca": {},
}
"""Options of `SyCoca` for each row of the paper's ablation table."""


def attentive_masks(
    patch_embeds_BPD: Tensor, token_embeds_BLD: Tensor, token_mask_BL: Tensor, ratio_low: float, ratio_high: float
) -> tuple[Tensor, Tensor]:
    """Return which patches to mask: those that fit the caption worst, and those that fit it best.

    A patch is scored by its largest cosine with a real token. Ties go by position. No gradient is taken.

    Args:
        patch_embeds_BPD: Patches in the shared space, not normalised.
        token_embeds_BLD: Text tokens in the shared space, not normalised.
        token_mask_BL: True for real tokens; others never decide a score.
        ratio_low: Share of patches to mask for captioning; rounded down to whole patches.
        ratio_high: Share of patches to mask for the image decoder.

    Returns:
        ``low`` and ``high`` (B, P), bool, True = masked: the lowest and the highest scores. Complements if both ratios
        are 1/2 and P is even.

    Raises:
        ValueError: If a ratio is not in [0, 1].
    """
    return masks_of_scores(attention_scores(patch_embeds_BPD, token_embeds_BLD, token_mask_BL), ratio_low, ratio_high)


@torch.no_grad()
def attention_scores(patch_embeds_BPE: Tensor, token_embeds_BLE: Tensor, token_mask_BL: Tensor) -> Tensor:
    """Return each patch's largest cosine with a real token (B, P), float32 or wider; -1 where there is no token."""
    with exact_products(patch_embeds_BPE):
        cosine_BPL = unit(patch_embeds_BPE) @ unit(token_embeds_BLE).transpose(1, 2)
    return cosine_BPL.masked_fill(~token_mask_BL.bool()[:, None], -1.0).amax(-1)


def masks_of_scores(scores_BP: Tensor, ratio_low: float, ratio_high: float) -> tuple[Tensor, Tensor]:
    """Return bool masks (B, P) of the lowest and of the highest scores; see `attentive_masks`."""
    num_patches = scores_BP.shape[1]
    num_low, num_high = num_masked(num_patches, ratio_low), num_masked(num_patches, ratio_high)
    order_BP = scores_BP.argsort(dim=1, stable=True)
    low_BP = torch.zeros_like(scores_BP, dtype=torch.bool).scatter(1, order_BP[:, :num_low], True)
    high_BP = torch.zeros_like(low_BP).scatter(1, order_BP[:, num_patches - num_high :], True)
    return low_BP, high_BP


def num_masked(num_patches: int, ratio: float) -> int:
    """Return the whole patches in a share of an image.

    Raises:
        ValueError: If the ratio is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"a mask ratio of {ratio} must be between 0 and 1")
    return math.floor(ratio * num_patches + 1e-9)  # 0.29 * 100 is 28.999999999999996


class SyCoca(nn.Module):
    """The SyCoCa objective: ``CLIP + lambda_IC * captioning + lambda_TM * masked image modelling``."""

    reads = Coca.reads
    num_steps: Tensor

    def __init__(
        self,
        shape: TowerShape,
        *,
        tg_mim_weight: float = 1.0,
        ratio_low: float = 0.5,
        ratio_high: float = 0.5,
        mask_at: MaskAt = "input",
        mask_selection: MaskSelection = "attentive",
        mask_warmup_steps: int = 0,
        image_decoder_layers: int = 4,
        num_heads: int | None = None,
        is_text_guided: bool = True,
        normalize_target: bool = True,
        **coca_options: Any,
    ):
        """Build CoCa and, unless ``tg_mim_weight`` is 0, the image decoder.

        Args:
            shape: The towers' sizes.
            tg_mim_weight: lambda_TM. Paper: 1; 0.1 to 1 are alike, 2 is worse.
            ratio_low: Share of patches hidden from the caption. Paper: 0.5; 0.25 to 0.75 are alike.
            ratio_high: Share of patches to reconstruct. Paper: 0.5.
            mask_at: ``input``: masked patches do not enter the vision tower. ``tokens``: they are left out behind it,
                which saves two half passes but has let them speak to the others.
            mask_selection: ``random`` ignores the scores: the paper's ablation.
            mask_warmup_steps: Optimizer steps with random masks, before scores mean something. Paper: not mentioned.
            image_decoder_layers: Depth of the image decoder. Paper: that of the text decoder, 12.
            num_heads: Attention heads of poolers and decoders; None: one per 64 channels.
            is_text_guided: False: the image decoder sees no caption (rows "MIM" of the paper's ablation).
            normalize_target: Target normalised per patch, so that predicting zeros costs 1; False: processed pixels.
            coca_options: Further ones of `Coca`; its ``caption_weight`` is lambda_IC, 2 in both papers.

        Raises:
            ValueError: If options are out of range, or a ratio would mask nothing or everything.
        """
        super().__init__()
        self.coca = Coca(shape, num_heads=num_heads, **coca_options)
        _check_masks(shape, ratio_low, ratio_high if tg_mim_weight else None, mask_at, mask_selection)
        self.shape = shape
        self.loss_weights = {**self.coca.loss_weights, "tg_mim": tg_mim_weight}
        self.ratio_low, self.ratio_high, self.mask_at = ratio_low, ratio_high, mask_at
        self.num_low = num_masked(shape.num_patches, ratio_low) if self.coca.captioner is not None else 0
        self.num_high = num_masked(shape.num_patches, ratio_high) if tg_mim_weight else 0
        self.is_random = mask_selection == "random"
        self.mask_warmup_steps, self.normalize_target = mask_warmup_steps, normalize_target
        self.image_decoder = (
            ImageDecoder(shape, image_decoder_layers, num_heads, is_text_guided) if tg_mim_weight else None
        )
        # a buffer, so that a resumed run stays in or out of the warm-up
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return those of `Coca`: the contrastive loss sees whole images."""
        return self.coca.image_features(outputs)

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return those of `Coca`."""
        return self.coca.text_features(outputs)

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return CLIP's term."""
        return self.coca.contrast(images, texts, ranks)

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return the caption term and ``tg_mim``, and the mean scores of what each of them masks.

        Raises:
            ValueError: If ``outputs`` hold a part of the patches only.
        """
        if not (self.num_low or self.num_high):
            return self.coca.local_terms(towers, pixel_values, outputs)
        scores_BP = self.patch_scores(outputs)
        low_BP, high_BP = masks_of_scores(self._ranking(scores_BP), self.ratio_low, self.ratio_high)
        terms, metrics = {}, {}
        if self.coca.captioner is not None:
            visible_BN, _ = _split(low_BP, self.num_low)
            terms["caption"] = self.coca.caption(outputs, self._encode(towers, pixel_values, outputs, visible_BN))
        if self.num_low:
            metrics["mask_score_low"] = (scores_BP * low_BP).sum() / low_BP.sum()
        if self.image_decoder is not None:
            terms["tg_mim"] = self._tg_mim(towers, pixel_values, outputs, high_BP)
            metrics["mask_score_high"] = (scores_BP * high_BP).sum() / high_BP.sum()
        return terms, metrics

    @torch.no_grad()
    def patch_scores(self, outputs: TowerOutputs) -> Tensor:
        """Return how well each patch fits its best word (B, P): a cosine in the shared space, for masks and pictures.

        Raises:
            ValueError: If ``outputs`` hold a part of the patches only.
        """
        patch_tokens_BPD, text_tokens_BLD, text_mask_BL = required(outputs, "patch_tokens", "text_tokens", "text_mask")
        if patch_tokens_BPD.shape[1] != self.shape.num_patches:
            raise ValueError(
                f"{patch_tokens_BPD.shape[1]} of {self.shape.num_patches} patches came from the vision tower: "
                "SyCoCa chooses the patches to drop itself; set patch_dropout to 0"
            )
        patches_BPE = self.coca.patch_features(patch_tokens_BPD)
        return attention_scores(patches_BPE, self.coca.clip.text_projection(text_tokens_BLD), text_mask_BL)

    def _ranking(self, scores_BP: Tensor) -> Tensor:
        """Return what patches are ranked by: their scores, or chance."""
        in_warmup = self.mask_warmup_steps > 0 and int(self.num_steps) < self.mask_warmup_steps
        return torch.rand_like(scores_BP) if self.is_random or in_warmup else scores_BP

    def _encode(self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs, visible_BN: Tensor) -> Tensor:
        """Return the patch tokens of the visible patches (B, N, D)."""
        (patch_tokens_BPD,) = required(outputs, "patch_tokens")
        if visible_BN.shape[1] == self.shape.num_patches:
            return patch_tokens_BPD
        if self.mask_at == "tokens":
            return patch_tokens_BPD.gather(1, visible_BN[..., None].expand(-1, -1, self.shape.vision_width))
        (visible_tokens_BND,) = required(towers(pixel_values=pixel_values, visible_patches=visible_BN), "patch_tokens")
        return visible_tokens_BND

    def _tg_mim(self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs, high_BP: Tensor) -> Term:
        """Return the squared error of the masked patches, a mean over the values of each patch."""
        assert self.image_decoder is not None
        text_tokens_BLD, text_mask_BL = required(outputs, "text_tokens", "text_mask")
        visible_BN, hidden_BM = _split(high_BP, self.num_high)
        tokens_BND = self._encode(towers, pixel_values, outputs, visible_BN)
        predicted_BMR = self.image_decoder(tokens_BND, visible_BN, hidden_BM, text_tokens_BLD, text_mask_BL)
        target_BPR = patchify(pixel_values, self.shape.patch_size)
        target_BMR = target_BPR.gather(1, hidden_BM[..., None].expand(-1, -1, target_BPR.shape[-1]))
        return reconstruction_term(predicted_BMR, target_BMR, self.normalize_target)

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return scaled cosines (I, T)."""
        return self.coca.score(images, texts)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the scale in [1, 100], and count the step for the warm-up of the masks."""
        self.coca.clamp_()
        self.num_steps += 1


def reconstruction_term(predicted_BMR: Tensor, target_BMR: Tensor, normalize_target: bool) -> Term:
    """Return the squared error of masked patches: a mean over the R values of each, summed over patches."""
    target_BMR = widened(target_BMR)
    if normalize_target:
        target_BMR = normalize_patches(target_BMR)
    error_BM = (widened(predicted_BMR) - target_BMR).square().mean(-1)
    return Term(error_BM.sum(), error_BM.numel())


def _split(mask_BP: Tensor, num_true: int) -> tuple[Tensor, Tensor]:
    """Return the indices of False (B, P - num_true) and of True (B, num_true), each in raster order."""
    order_BP = mask_BP.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BP.tensor_split([mask_BP.shape[1] - num_true], dim=1)  # pyright: ignore[reportReturnType]


def _check_masks(
    shape: TowerShape, ratio_low: float, ratio_high: float | None, mask_at: str, mask_selection: str
) -> None:
    """Raise ValueError for masks that leave a decoder nothing to see or nothing to do; None: no image decoder."""
    if mask_at not in ("input", "tokens"):
        raise ValueError(f"mask_at={mask_at!r} must be 'input' or 'tokens'")
    if mask_selection not in ("attentive", "random"):
        raise ValueError(f"mask_selection={mask_selection!r} must be 'attentive' or 'random'")
    if num_masked(shape.num_patches, ratio_low) == shape.num_patches:
        raise ValueError(f"ratio_low={ratio_low} masks all {shape.num_patches} patches: nothing is left to caption")
    if ratio_high is None:
        return
    if not 0 < num_masked(shape.num_patches, ratio_high) < shape.num_patches:
        raise ValueError(
            f"ratio_high={ratio_high} masks none or all of {shape.num_patches} patches: give a share in between, or "
            "tg_mim_weight: 0 to do without the image decoder"
        )
