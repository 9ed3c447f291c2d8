"""An image and a text encoder side by side: what survives the pretraining, and nothing that belongs to an objective."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cal_train.towers.outputs import TowerOutputs, TowerShape
from cal_train.towers.text import TextPooling, TextTower, text_encoder
from cal_train.towers.vision import VisionTower, vision_encoder

SETTINGS_FILE = "tower.json"
LEARNED_TOKENS_FILE = "learned_tokens.safetensors"
"""Holds what the Hugging Face folders have no place for: Llip's mixture tokens, CoCa's appended token."""


def build_two_tower(
    vision: Mapping[str, Any] | str | Path,
    text: Mapping[str, Any] | str | Path,
    *,
    image_size: int | None = None,
    num_mixture_tokens: int = 0,
    patch_dropout: float = 0.0,
    text_pooling: TextPooling = "eos",
    context_length: int | None = None,
    pad_token_id: int | None = None,
    lock_image: bool = False,
    lock_text: bool = False,
) -> "TwoTower":
    """Return two towers, each untrained (a configuration) or pretrained (a folder).

    Args:
        vision: See `cal_train.towers.vision.vision_encoder`.
        text: See `cal_train.towers.text.text_encoder`.
        image_size: Side of the images in pixels. Default: the vision encoder's.
        num_mixture_tokens: See `VisionTower`.
        patch_dropout: See `VisionTower`.
        text_pooling: See `TextTower`.
        context_length: See `TextTower`.
        pad_token_id: See `TextTower`.
        lock_image: Freeze the image tower (LiT, arXiv:2111.07991).
        lock_text: Freeze the text tower.

    Raises:
        ValueError: If a source cannot be used, or options do not fit together.
    """
    if lock_image and isinstance(vision, Mapping):
        raise ValueError("lock_image freezes an untrained image tower: give the folder of a pretrained one")
    if lock_text and isinstance(text, Mapping):
        raise ValueError("lock_text freezes an untrained text tower: give the folder of a pretrained one")
    if lock_image and num_mixture_tokens > 1:
        raise ValueError(f"num_mixture_tokens {num_mixture_tokens} with lock_image: the new tokens would stay random")
    if lock_image and patch_dropout:
        raise ValueError(f"patch_dropout {patch_dropout} with lock_image: a locked tower sees whole images")
    if lock_text and text_pooling == "cls_appended":
        raise ValueError("text pooling cls_appended with lock_text: the appended token would stay random")
    return TwoTower(
        VisionTower(
            vision_encoder(vision, image_size), num_mixture_tokens=num_mixture_tokens, patch_dropout=patch_dropout
        ),
        TextTower(text_encoder(text), pooling=text_pooling, context_length=context_length, pad_token_id=pad_token_id),
        lock_image=lock_image,
        lock_text=lock_text,
    )


class TwoTower(nn.Module):
    """Both encoders; either can be locked: no gradient, no dropout, no place in the graph.

    Attributes:
        vision: The image tower.
        text: The text tower.
        locked: Names of the locked towers, of ``vision`` and ``text``.
    """

    def __init__(self, vision: VisionTower, text: TextTower, *, lock_image: bool = False, lock_text: bool = False):
        super().__init__()
        self.vision = vision
        self.text = text
        self.locked = tuple(name for name, lock in (("vision", lock_image), ("text", lock_text)) if lock)
        if len(self.locked) == 2:
            raise ValueError("lock_image and lock_text together leave no tower to train: unlock one")
        for name in self.locked:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    @property
    def shape(self) -> TowerShape:
        """Return the sizes that objectives build their heads with."""
        vision, text = self.vision.encoder.config, self.text.encoder.config
        return TowerShape(
            vision_width=vision.hidden_size,
            text_width=text.hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vocab_size=text.vocab_size,
            context_length=self.text.context_length,
            pad_token_id=self.text.pad_token_id,
            num_mixture_tokens=self.vision.num_mixture_tokens,
            causal_text=self.text.causal,
        )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        visible_patches: Tensor | None = None,
    ) -> TowerOutputs:
        """Encode images, texts or both.

        Args:
            pixel_values: (B, 3, S, S).
            input_ids: (B, L) int64, padded on the right.
            text_mask: (B, L), true or 1 for real tokens. Default: all are real.
            visible_patches: (B, P') int64; limits the images to these patches.

        Raises:
            ValueError: If there is neither an image nor a text, or an input does not fit its tower.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("the towers were given neither pixel_values nor input_ids")
        fields: dict[str, Tensor | None] = {}
        if pixel_values is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and "vision" not in self.locked):
                pooled, patches, mixture = self.vision(pixel_values, visible_patches)
            fields |= {"image_pooled": pooled, "patch_tokens": patches, "mixture_tokens": mixture}
        if input_ids is not None:
            text_mask = torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask.bool()
            with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.locked):
                pooled, tokens = self.text(input_ids, text_mask)
            fields |= {"text_pooled": pooled, "text_tokens": tokens, "text_mask": text_mask, "input_ids": input_ids}
        return TowerOutputs(**fields)

    def train(self, mode: bool = True) -> "TwoTower":
        """Set training mode; locked towers stay in evaluation mode."""
        super().train(mode)
        for name in self.locked:
            self.get_submodule(name).eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, in the towers that train; arguments as Hugging Face's."""
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if name not in self.locked:
                tower.encoder.activation_checkpointing_enable(**options)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write ``vision/`` and ``text/`` in Hugging Face layout, ``tower.json``, and learned tokens if there are any.

        Image processor and tokenizer belong into ``vision/`` and ``text/``; whoever has them puts them there.

        Args:
            folder: Is made if it does not exist.
            weights: The state dict to write, where the towers' own parameters are split over ranks. Default: theirs.
        """
        folder, weights = Path(folder), self.state_dict() if weights is None else weights
        for name, encoder in (("vision", self.vision.encoder), ("text", self.text.encoder)):
            prefix = f"{name}.encoder."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            encoder.save_pretrained(folder / name, state_dict=own)
        if names := self._learned_tokens():
            tokens = {name: weights[name].detach().cpu().contiguous() for name in names}
            save_file(tokens, folder / LEARNED_TOKENS_FILE)
        settings = {
            "num_mixture_tokens": self.vision.num_mixture_tokens,
            "patch_dropout": self.vision.patch_dropout,
            "text_pooling": self.text.pooling,
            "context_length": self.text.context_length,
            "pad_token_id": self.text.pad_token_id,
            "lock_image": "vision" in self.locked,
            "lock_text": "text" in self.locked,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _learned_tokens(self) -> dict[str, nn.Parameter]:
        """Return the parameters outside the two encoders, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(("vision.encoder.", "text.encoder."))
        }


def freeze_unread(towers: TwoTower, reads: Collection[str]) -> None:
    """Freeze what leads to outputs alone that nobody reads: DDP stops at a parameter without gradient.

    Args:
        towers: Towers of any kind.
        reads: Fields of `TowerOutputs` that the objective reads.
    """
    poolers: dict[str, tuple[nn.Module | nn.Parameter | None, ...]] = {
        "image_pooled": (getattr(towers.vision.encoder, "head", None),),
        "text_pooled": (getattr(towers.text.encoder, "head", None), towers.text.cls_token),
    }
    for field, parts in poolers.items():
        for part in parts:
            if field not in reads and part is not None:
                part.requires_grad_(False)


def load_two_tower(folder: Path) -> TwoTower:
    """Load what `TwoTower.save_pretrained` wrote, in float32 and evaluation mode.

    Raises:
        ValueError: If a part is missing or does not fit.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} is not a folder of two towers: {SETTINGS_FILE} is missing")
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    vision_options = {name: settings.pop(name) for name in ("num_mixture_tokens", "patch_dropout")}
    lock = {name: settings.pop(name) for name in ("lock_image", "lock_text")}
    vision = VisionTower(vision_encoder(folder / "vision"), **vision_options)
    text = TextTower(text_encoder(folder / "text"), pooling=settings.pop("text_pooling"), **settings)
    towers = TwoTower(vision, text, **lock)
    file = folder / LEARNED_TOKENS_FILE
    stored = load_file(file) if file.is_file() else {}
    expected = towers._learned_tokens()
    if stored.keys() != expected.keys():
        differing = ", ".join(sorted(stored.keys() ^ expected.keys()))
        raise ValueError(f"{file} does not fit {SETTINGS_FILE}: {differing} missing or not expected")
    for name, token in stored.items():
        if token.shape != expected[name].shape:
            raise ValueError(f"{file}: {name} is {tuple(token.shape)}, expected {tuple(expected[name].shape)}")
    towers.load_state_dict({**towers.state_dict(), **stored})
    return towers.eval()
