"""The text encoder: any Hugging Face encoder, pooled by the mask and never by the ids.

What stands at padded positions never reaches anything: the ids there are replaced by the padding token's before the
encoder sees them, and attention masks them (except for ``last``, whose convention is to see them all).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPTextModel, PreTrainedModel, SiglipTextModel
from transformers.masking_utils import create_causal_mask

from cal_train.towers.loading import folder_config, load_strict, untrained_config

TextPooling = Literal["eos", "last", "mean", "first", "cls_appended"]
"""How tokens become one vector; see `TextTower`."""

_TEXT_HALF: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "siglip": SiglipTextModel,
    "siglip_text_model": SiglipTextModel,
}
"""Classes that AutoModel does not pick by itself, by ``model_type``; of dual encoders the text half."""

_POSITIONS_FROM_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}
"""Model types whose first position is ``pad_token_id + 1``: so many rows of their positions are out of reach."""


def text_encoder(source: Mapping[str, Any] | str | Path) -> PreTrainedModel:
    """Return an untrained encoder from a configuration, or a pretrained one from a folder.

    Args:
        source: A configuration with ``model_type`` and the fields of its Hugging Face class, or a folder whose weights
            are safetensors. Of a CLIP or SigLIP folder the text half is taken.

    Raises:
        ValueError: If the model type is unknown, or the folder cannot be used.
    """
    if isinstance(source, Mapping):
        config = untrained_config(source, "text tower")
        model_class = _TEXT_HALF.get(config.model_type)
        return model_class(config) if model_class is not None else AutoModel.from_config(config)
    folder = Path(source)
    config = folder_config(folder, "text tower")
    return load_strict(_TEXT_HALF.get(config.model_type, AutoModel), folder, "text tower", may_lack={"pooler"})


class TextTower(nn.Module):
    """A text encoder that returns its pooled output and its tokens.

    Poolings:
        ``eos``: the last real token (CLIP; found by the mask, since the end token need not have the largest id).
        ``mean``: the mean over the real tokens (SPARC, sentence encoders).
        ``first``: the first token (BERT's [CLS]).
        ``last``: SigLIP's convention: the text is padded to the whole context, padding is seen like any token, and the
            last position is taken, whether padding or not, through the encoder's own linear head if it has one.
        ``cls_appended``: a learned token behind everything else (CoCa, arXiv:2205.01917, section 3.2). It sees the real
            tokens and itself, no text token sees it, and its place does not depend on how long the batch is padded.

    Attributes:
        encoder: The Hugging Face model.
        pooling: One of the above.
        context_length: Most tokens of a text.
        causal: Whether a token sees only those before it, as captioning needs.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        pooling: TextPooling = "eos",
        context_length: int | None = None,
        pad_token_id: int | None = None,
    ):
        """Wrap an encoder.

        Args:
            encoder: A model of `text_encoder`.
            pooling: See the class.
            context_length: Default: all positions that the encoder has.
            pad_token_id: The tokenizer's padding token. Default: the encoder's configuration.

        Raises:
            ValueError: If the options do not fit the encoder.
        """
        super().__init__()
        config = encoder.config
        _check(encoder, pooling)
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and config.model_type in _POSITIONS_FROM_PADDING:
            most -= config.pad_token_id + 1
        self.context_length = _first_not_none("context_length", context_length, most)
        if most is not None and not 1 <= self.context_length <= most:
            raise ValueError(f"context_length {context_length} is not in 1..{most}, the positions of the text encoder")
        self.pad_token_id = _first_not_none("pad_token_id", pad_token_id, config.pad_token_id)
        if not 0 <= self.pad_token_id < config.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {config.vocab_size}")
        self.encoder = encoder
        self.pooling: TextPooling = pooling
        self.cls_token: nn.Parameter | None = None
        if pooling == "cls_appended":  # its position is always the same, so the position's vector is part of it
            self.cls_token = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        unread = "head" if isinstance(encoder, SiglipTextModel) and pooling != "last" else "pooler"
        if isinstance(module := getattr(encoder, unread, None), nn.Module):
            module.requires_grad_(False)  # the class's own pooling; a parameter without gradient stops DDP
        self.causal = _is_causal(encoder, self.pad_token_id)

    def forward(self, input_ids: Tensor, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Args:
            input_ids: (B, L) int64, padded on the right, with at least one real token per text.
            text_mask: (B, L), true or 1 for real tokens. Default: all are real.

        Returns:
            Pooled (B, D), and tokens (B, L, D): last layer behind its layer norm. Tokens at padded positions depend on
            the real ones alone.

        Raises:
            ValueError: If the texts are longer than the context, or mask and ids differ in shape.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask.bool()
        if mask.shape != input_ids.shape:
            raise ValueError(f"text_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}: they must agree")
        if input_ids.shape[1] > self.context_length:
            raise ValueError(
                f"texts of {input_ids.shape[1]} tokens came to a text tower with a context of {self.context_length}: "
                "cut them when they are tokenized"
            )
        input_ids = input_ids.masked_fill(~mask, self.pad_token_id)
        if self.pooling == "last":
            return self._encode_whole_context(input_ids)
        if self.cls_token is not None:
            tokens = self._encode_with_cls(input_ids, mask, self.cls_token)
            return tokens[:, -1], tokens[:, :-1]
        tokens = self.encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        return self._pool(tokens, mask), tokens

    def _pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "first":
            return tokens[:, 0]
        if self.pooling == "mean":
            return (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        last_real = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)
        return tokens[torch.arange(len(tokens), device=mask.device), last_real]

    def _encode_whole_context(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        length = input_ids.shape[1]
        padded = nn.functional.pad(input_ids, (0, self.context_length - length), value=self.pad_token_id)
        tokens = self.encoder(input_ids=padded).last_hidden_state
        pooled = tokens[:, -1]
        if isinstance(self.encoder, SiglipTextModel):
            pooled = self.encoder.head(pooled)
        return pooled, tokens[:, :length]

    def _encode_with_cls(self, input_ids: Tensor, mask: Tensor, cls_token: Tensor) -> Tensor:
        """Return (B, L + 1, D); being last in a causal encoder, the appended token is seen by no other."""
        encoder: Any = self.encoder
        embedded = encoder.embeddings(input_ids)
        batch_size = embedded.shape[0]
        embedded = torch.cat([embedded, cls_token.to(embedded.dtype).expand(batch_size, 1, -1)], dim=1)
        attention_mask = create_causal_mask(
            config=encoder.config,
            inputs_embeds=embedded,
            attention_mask=torch.cat([mask, mask.new_ones(batch_size, 1)], dim=1),
            past_key_values=None,
        )
        encoded = encoder.encoder(inputs_embeds=embedded, attention_mask=attention_mask, is_causal=True)
        return encoder.final_layer_norm(encoded.last_hidden_state)


def _check(encoder: PreTrainedModel, pooling: str) -> None:
    config = encoder.config
    if pooling not in get_args(TextPooling):
        raise ValueError(f"text pooling {pooling!r} does not exist: use one of {', '.join(get_args(TextPooling))}")
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder with a decoder: use an encoder alone as text tower")
    if pooling == "cls_appended" and not isinstance(encoder, CLIPTextModel):
        raise ValueError(
            f"text pooling cls_appended needs an encoder in which no token sees those behind it, and whose positions "
            f"can be left out: use clip_text_model, not {config.model_type}"
        )
    if isinstance(encoder, SiglipTextModel) and pooling == "last" and config.projection_size != config.hidden_size:
        raise ValueError(
            f"the SigLIP text encoder's head maps {config.hidden_size} to {config.projection_size} dimensions, but a "
            "text tower's pooled output and tokens have one width: set projection_size to hidden_size"
        )


def _first_not_none(name: str, *values: int | None) -> int:
    for value in values:
        if value is not None:
            return value
    raise ValueError(f"the text encoder's configuration has no {name}: set it")


@torch.no_grad()
def _is_causal(encoder: PreTrainedModel, pad_token_id: int) -> bool:
    """Return whether the first token's output is blind to the second token; no configuration says so for all models."""
    was_training = encoder.training
    encoder.eval()
    first = []
    for second_id in (pad_token_id, (pad_token_id + 1) % encoder.config.vocab_size):
        ids = torch.tensor([[pad_token_id, second_id]], device=encoder.device)
        first.append(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0])
    encoder.train(was_training)
    return torch.equal(*first)
