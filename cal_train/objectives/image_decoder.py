"""Reconstruction of hidden image patches from visible ones and a caption: the image decoder of SyCoCa.

B pairs, P patches of the whole image, N visible patches, M hidden ones, L text tokens, D width, R values of a
patch (3 * side^2).

Source of the parts: masked autoencoders, He et al. 2022, arXiv:2111.06377 (mask token, sine-cosine positions, target
normalised per patch); the cross-attention to text is SyCoCa's.
"""

import torch
from torch import Tensor, nn

from cal_train.objectives.attention import INIT_STD, Decoder, check_heads
from cal_train.towers.outputs import TowerShape

VARIANCE_FLOOR = 1e-6
"""Added to a patch's variance, as MAE does; a patch of one colour becomes all zeros."""


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, H, W) into patches (B, P, 3 * side^2), in raster order; a rest at the border is left out."""
    columns = nn.functional.unfold(pixel_values, kernel_size=patch_size, stride=patch_size)
    return columns.transpose(1, 2)


def normalize_patches(patches_BPR: Tensor) -> Tensor:
    """Bring each patch to mean 0 and (biased) variance 1, so that predicting 0 costs 1."""
    variance_BP1, mean_BP1 = torch.var_mean(patches_BPR, dim=-1, correction=0, keepdim=True)
    return (patches_BPR - mean_BP1) / (variance_BP1 + VARIANCE_FLOOR).sqrt()


def grid_positions(side: int, width: int) -> Tensor:
    """Return fixed sine-cosine position embeddings (side^2, D): half of the channels tell the row, half the column.

    Raises:
        ValueError: If the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"vision width {width} must be a multiple of 4 for sine and cosine of row and column")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D / 2)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


class ImageDecoder(nn.Module):
    """Bidirectional self-attention over all positions, cross-attention to text tokens, a linear map to pixels."""

    grid: Tensor

    def __init__(self, shape: TowerShape, num_layers: int, num_heads: int | None, is_text_guided: bool):
        """Build the decoder.

        Args:
            shape: The towers' sizes; the decoder is as wide as the vision tower.
            num_layers: Depth.
            num_heads: Attention heads; None: one per 64 channels.
            is_text_guided: False leaves the cross-attention out: plain masked image modelling.

        Raises:
            ValueError: If the heads do not divide the width, or the width is not a multiple of 4.
        """
        super().__init__()
        width = shape.vision_width
        self.mask_token = nn.Parameter(torch.randn(width) * INIT_STD)
        grid = grid_positions(shape.image_size // shape.patch_size, width)
        self.register_buffer("grid", grid, persistent=False)
        self.embed = nn.Linear(width, width)
        self.decoder = Decoder(
            width,
            shape.text_width if is_text_guided else None,
            num_layers,
            check_heads(width, num_heads),
            is_causal=False,
        )
        self.to_pixels = nn.Linear(width, 3 * shape.patch_size**2)
        nn.init.normal_(self.to_pixels.weight, std=INIT_STD)
        nn.init.zeros_(self.to_pixels.bias)

    def forward(
        self,
        visible_tokens_BND: Tensor,
        visible_BN: Tensor,
        hidden_BM: Tensor,
        text_tokens_BLD: Tensor,
        text_mask_BL: Tensor,
    ) -> Tensor:
        """Predict the pixels of the hidden patches.

        Args:
            visible_tokens_BND: Tower outputs of the visible patches.
            visible_BN: Their indices in the image.
            hidden_BM: Indices of the patches to predict.
            text_tokens_BLD: Unimodal text tokens, without the appended class token.
            text_mask_BL: True for real tokens.

        Returns:
            (B, M, 3 * side^2).
        """
        embedded_BND = self.embed(visible_tokens_BND)
        x_BPD = self.mask_token.to(embedded_BND.dtype).expand(len(embedded_BND), len(self.grid), -1)
        x_BPD = x_BPD.scatter(1, _as_index(visible_BN, embedded_BND), embedded_BND) + self.grid
        x_BPD = self.decoder(x_BPD, text_tokens_BLD, text_mask_BL.bool())
        return self.to_pixels(x_BPD.gather(1, _as_index(hidden_BM, x_BPD)))


def _as_index(rows_BN: Tensor, tokens_BPD: Tensor) -> Tensor:
    return rows_BN[..., None].expand(-1, -1, tokens_BPD.shape[-1])
