"""The image encoder: a Hugging Face ViT whose tokens can be dropped, chosen, and led by several class tokens.

The encoder keeps its class, configuration and parameter names, so that it can be exported as it is; only the way
through it is spelled out here, because tokens are removed between the embeddings and the first layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cal_train.towers.loading import TOWERS, at_image_size, has_class_token, load_tower, untrained_config


def vision_encoder(source: Mapping[str, Any] | str | Path, image_size: int | None = None) -> PreTrainedModel:
    """Return an untrained encoder from a configuration, or a pretrained one from a folder.

    Args:
        source: A configuration with ``model_type`` (one of `TOWERS`) and the fields of its Hugging Face class, or a
            folder of `cal_train.towers.loading.load_tower`.
        image_size: Side of the images in pixels; the positions of a pretrained encoder are interpolated. Default: what
            the source says.

    Raises:
        ValueError: If the model type is not supported, or the folder or the size cannot be used.
    """
    if isinstance(source, Mapping):
        model_type = source.get("model_type")
        if model_type not in TOWERS:
            raise ValueError(f"vision tower: model_type {model_type!r} is unsupported: use one of {', '.join(TOWERS)}")
        fields = source if image_size is None else {**source, "image_size": image_size}
        encoder = TOWERS[model_type](untrained_config(fields, "vision tower"))
        return at_image_size(encoder, encoder.config.image_size)  # refuses a size that the patches do not divide
    encoder = load_tower(Path(source))
    return encoder if image_size is None else at_image_size(encoder, image_size)


class VisionTower(nn.Module):
    """A ViT that returns its pooled output, its patch tokens and, with Llip, its mixture tokens.

    Llip's K learned tokens stand where the class token stood (Lavoie et al. 2024, arXiv:2405.00740). Here
    the first of them *is* the encoder's class token and K - 1 more come with it, each with a position of its own: K = 1
    is the plain ViT, a pretrained encoder starts as itself, and no parameter lies idle.

    Attributes:
        encoder: The Hugging Face model.
        patch_dropout: Share of the patches that a training step leaves out at random (FLIP, arXiv:2212.00794).
    """

    def __init__(self, encoder: PreTrainedModel, *, num_mixture_tokens: int = 0, patch_dropout: float = 0.0):
        """Wrap an encoder.

        Args:
            encoder: A model of `vision_encoder`.
            num_mixture_tokens: Llip's K (paper: 32 for B, 64 for larger); 0 for a plain class token.
            patch_dropout: In [0, 1); 0 keeps all patches. FLIP trains with 0.5 to 0.75.

        Raises:
            ValueError: If the options do not fit the encoder.
        """
        super().__init__()
        config = encoder.config
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout {patch_dropout} is not in [0, 1): it is the share of patches left out")
        if num_mixture_tokens < 0:
            raise ValueError(f"num_mixture_tokens {num_mixture_tokens} is negative: use 0 for none")
        if num_mixture_tokens and not has_class_token(config):
            raise ValueError(
                f"num_mixture_tokens {num_mixture_tokens}: mixture tokens take the place of the class token, which "
                f"{config.model_type} does not have; use a clip_vision_model"
            )
        self.encoder = encoder
        self.patch_dropout = patch_dropout
        self.num_mixture_tokens = num_mixture_tokens
        self.extra_tokens: nn.Parameter | None = None
        self.extra_positions: nn.Parameter | None = None
        if num_mixture_tokens > 1:  # the scales at which Hugging Face's CLIP starts its class token and its positions
            shape = (num_mixture_tokens - 1, config.hidden_size)
            self.extra_tokens = nn.Parameter(torch.randn(shape) * config.hidden_size**-0.5)
            self.extra_positions = nn.Parameter(torch.randn(shape) * config.initializer_range)
        mask_token: Any = getattr(encoder.embeddings, "mask_token", None)
        if mask_token is not None:  # of DINOv2's own pretraining: nothing here reads it
            mask_token.requires_grad_(False)

    def forward(
        self, pixel_values: Tensor, visible_patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode images.

        Args:
            pixel_values: (B, 3, S, S), S the encoder's image size.
            visible_patches: (B, P') int64, the patches to encode: the others do not enter the encoder at all (as in
                MAE, arXiv:2111.06377). Patch dropout does not apply to them.

        Returns:
            Pooled (B, D): class token; mean of the mixture tokens; SigLIP's attention pooling, or the mean of the
            patches if ``vision_use_head`` is false. Patch tokens (B, P', D): last layer behind its layer norm; all
            patches in raster order, those that dropout kept in raster order, or ``visible_patches`` in their order.
            Mixture tokens (B, K, D), or None.

        Raises:
            ValueError: If the images are of another size, or ``visible_patches`` of another shape or type.
        """
        leading, patches = self._embed(pixel_values)
        if visible_patches is None and self.training and self.patch_dropout:
            visible_patches = _random_patches(patches, self.patch_dropout)
        if visible_patches is not None:
            patches = _select(patches, visible_patches)
        tokens = self._encode(torch.cat([leading, patches], dim=1))
        leading, patches = tokens[:, : leading.shape[1]], tokens[:, leading.shape[1] :]
        if not has_class_token(self.encoder.config):
            head: Any = getattr(self.encoder, "head", None)
            return patches.mean(dim=1) if head is None else head(patches), patches, None
        return leading.mean(dim=1), patches, leading if self.num_mixture_tokens else None

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return leading tokens (B, max(K, 1) or 0, D) and all patches (B, P, D), positions added."""
        side = self.encoder.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            height, width = pixel_values.shape[-2:]
            raise ValueError(f"images of {height} x {width} pixels came to a tower for {side} x {side}")
        embedded = self.encoder.embeddings(pixel_values)  # pyright: ignore[reportCallIssue]
        split = int(has_class_token(self.encoder.config))
        leading, patches = embedded[:, :split], embedded[:, split:]
        if self.extra_tokens is not None and self.extra_positions is not None:
            extra = (self.extra_tokens + self.extra_positions).to(leading.dtype)
            leading = torch.cat([leading, extra.expand(leading.shape[0], -1, -1)], dim=1)
        return leading, patches

    def _encode(self, tokens: Tensor) -> Tensor:
        encoder: Any = self.encoder
        if encoder.config.model_type == "dinov2":
            return encoder.layernorm(encoder.encoder(tokens).last_hidden_state)
        if encoder.config.model_type == "clip_vision_model":
            tokens = encoder.pre_layrnorm(tokens)
        # CLIP's class norms the class token alone; for the others this norm is theirs too, the same at every token
        return encoder.post_layernorm(encoder.encoder(inputs_embeds=tokens).last_hidden_state)


def _random_patches(patches: Tensor, dropout: float) -> Tensor:
    """Return (B, P') patches to keep, drawn per image from the device's default generator, in raster order."""
    batch_size, num_patches = patches.shape[:2]
    num_kept = max(1, round(num_patches * (1 - dropout)))
    noise = torch.rand(batch_size, num_patches, device=patches.device)
    return noise.topk(num_kept, dim=1).indices.sort(dim=1).values


def _select(patches: Tensor, visible_patches: Tensor) -> Tensor:
    if visible_patches.ndim != 2 or visible_patches.shape[0] != patches.shape[0] or visible_patches.shape[1] == 0:
        raise ValueError(
            f"visible_patches has the shape {tuple(visible_patches.shape)}: expected ({patches.shape[0]}, P') "
            "with at least one patch per image"
        )
    if visible_patches.dtype != torch.int64:
        raise ValueError(f"visible_patches are indices and must be int64, not {visible_patches.dtype}")
    return patches.gather(1, visible_patches.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
