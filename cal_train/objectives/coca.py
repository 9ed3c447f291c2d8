"""CoCa: CLIP plus captioning, from one pass through each tower.

B pairs, P patches, Q generative queries, L text tokens, D encoder width, E shared width, V vocabulary.

The text tower is the unimodal half of the paper's text decoder: causal, with a learned token appended behind the text
whose output is the text embedding (pooling ``cls_appended``). The multimodal half lives here, with the poolers.

Source: Yu et al. 2022, arXiv:2205.01917, sections 3.1 and 3.2, table 8 for the poolers. Differs: both directions of the
contrastive loss count half, and the caption loss is a mean over tokens, so that the weights 1 and 2 mean what they mean
for the public open_clip models (the paper's equation 3 is ``caption_reduction: seq_sum``). Public weights come with one
pooler instead of the cascade, a shifted padding mask and an output head that was never initialised; none of it is here.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cal_train.cal.loss import weighted_linear_cross_entropy
from cal_train.objectives.attention import INIT_STD, AttentionPooler, Decoder, check_heads
from cal_train.objectives.base import Features, Term, Towers
from cal_train.objectives.clip import Clip
from cal_train.objectives.gather import Ranks
from cal_train.objectives.similarity import required
from cal_train.towers.outputs import TowerOutputs, TowerShape

CaptionReduction = Literal["token_mean", "seq_sum"]


class Captioner(nn.Module):
    """Multimodal half of the text decoder: causal self-attention over the text, cross-attention to the image."""

    def __init__(self, shape: TowerShape, num_layers: int, num_heads: int | None):
        super().__init__()
        heads = check_heads(shape.text_width, num_heads)
        self.decoder = Decoder(shape.text_width, shape.vision_width, num_layers, heads, is_causal=True)
        # small weights: the first loss is close to ln V
        self.head_weight = nn.Parameter(torch.randn(shape.vocab_size, shape.text_width) * INIT_STD)

    def forward(self, text_tokens_BLD: Tensor, image_tokens_BQD: Tensor) -> Tensor:
        """Return hidden states (B, L, D); position t knows the tokens up to t and predicts token t + 1."""
        return self.decoder(text_tokens_BLD, image_tokens_BQD)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the vocabulary logits of hidden states (..., V)."""
        return F.linear(hidden, self.head_weight)


def caption_term(
    captioner: Captioner,
    outputs: TowerOutputs,
    image_tokens_BQD: Tensor,
    reduction: CaptionReduction,
    chunk_size: int | None = None,
) -> Term:
    """Return the cross-entropy of every real token given the ones before it and the image.

    Args:
        captioner: Decoder and head.
        outputs: Text fields of the towers.
        image_tokens_BQD: What the decoder sees of the image.
        reduction: ``token_mean``: weight is the number of predicted tokens. ``seq_sum``: weight is the batch size.
        chunk_size: Tokens whose logits are held at a time; see `weighted_linear_cross_entropy`.
    """
    text_tokens_BLD, input_ids_BL, text_mask_BL = required(outputs, "text_tokens", "input_ids", "text_mask")
    # real tokens stand in front and see nothing behind them, so the decoder needs no padding mask
    hidden_BLD = captioner(text_tokens_BLD[:, :-1], image_tokens_BQD)
    is_target_BL = text_mask_BL[:, 1:].bool()
    hidden_ND, labels_N = hidden_BLD[is_target_BL], input_ids_BL[:, 1:][is_target_BL]
    total = weighted_linear_cross_entropy(
        hidden_ND, captioner.head_weight, labels_N, torch.ones_like(labels_N), chunk_size=chunk_size
    )
    return Term(total, len(labels_N) if reduction == "token_mean" else len(hidden_BLD))


class Coca(nn.Module):
    """The CoCa objective: ``lambda_con * CLIP + lambda_cap * captioning``, with cascaded attention poolers."""

    reads = ("patch_tokens", "text_pooled", "text_tokens")

    def __init__(
        self,
        shape: TowerShape,
        *,
        num_queries: int = 256,
        decoder_layers: int = 12,
        num_heads: int | None = None,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        caption_reduction: CaptionReduction = "token_mean",
        caption_chunk_size: int | None = None,
        **clip_options: Any,
    ):
        """Build poolers, projections and, unless ``caption_weight`` is 0, the captioning decoder.

        Args:
            shape: The towers' sizes.
            num_queries: Queries of the generative pooler. Paper: 256.
            decoder_layers: Depth of the multimodal half; the paper makes it as deep as the text tower, 12 for Base.
            num_heads: Attention heads of poolers and decoder; None: one per 64 channels.
            contrastive_weight: lambda_con. Paper: 1; its equation 2 counts both directions whole, which is 2 here.
            caption_weight: lambda_cap. Paper: 2.
            caption_reduction: ``token_mean`` as open_clip, or ``seq_sum`` as the paper's equation 3.
            caption_chunk_size: Tokens whose vocabulary logits are held at a time; None: 64 MiB of them.
            clip_options: Those of `Clip`: ``embed_dim``, ``init_scale``, ``backend`` and ``tile_size``.

        Raises:
            ValueError: If an option is out of range, the heads do not divide a width, or the text tower is not causal.
        """
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries} must be at least 1")
        if not contrastive_weight:
            raise ValueError("contrastive_weight=0 would leave the embeddings untrained that `score` compares")
        if caption_weight and not shape.causal_text:
            raise ValueError(
                "captioning needs a causal text tower: in this one every token sees the token it is to predict. Use a "
                "CLIP text model, or caption_weight: 0"
            )
        if caption_reduction not in ("token_mean", "seq_sum"):
            raise ValueError(f"caption_reduction={caption_reduction!r} must be 'token_mean' or 'seq_sum'")
        self.shape = shape
        self.loss_weights = {"contrastive": contrastive_weight, "caption": caption_weight}
        self.caption_reduction: CaptionReduction = caption_reduction
        self.caption_chunk_size = caption_chunk_size
        heads = check_heads(shape.vision_width, num_heads)
        self.generative_pooler = AttentionPooler(shape.vision_width, num_queries, heads)
        self.contrastive_pooler = AttentionPooler(shape.vision_width, 1, heads)
        self.image_norm = nn.LayerNorm(shape.vision_width)
        self.clip = Clip(shape, **clip_options)
        self.captioner = Captioner(shape, decoder_layers, num_heads) if caption_weight else None

    def image_features(self, outputs: TowerOutputs) -> Features:
        """Return ``image_embeds`` (B, E): patches, through both poolers, projected."""
        (patch_tokens_BPD,) = required(outputs, "patch_tokens")
        pooled_B1D = self.contrastive_pooler(self.generative_pooler(patch_tokens_BPD))
        return {"image_embeds": self.clip.image_projection(self.image_norm(pooled_B1D[:, 0]))}

    def text_features(self, outputs: TowerOutputs) -> Features:
        """Return ``text_embeds`` (B, E): the projected output of the tower's appended token."""
        return self.clip.text_features(outputs)

    def contrast(self, images: Features, texts: Features, ranks: Ranks) -> dict[str, Term]:
        """Return CLIP's term."""
        return self.clip.contrast(images, texts, ranks)

    def local_terms(
        self, towers: Towers, pixel_values: Tensor, outputs: TowerOutputs
    ) -> tuple[dict[str, Term], dict[str, Tensor]]:
        """Return the caption term."""
        if self.captioner is None:
            return {}, {}
        (patch_tokens_BPD,) = required(outputs, "patch_tokens")
        return {"caption": self.caption(outputs, patch_tokens_BPD)}, {}

    def caption(self, outputs: TowerOutputs, patch_tokens_BPD: Tensor) -> Term:
        """Return the caption term for texts of ``outputs`` and an image given by these patches, all or some."""
        assert self.captioner is not None
        image_tokens_BQD = self.generative_pooler(patch_tokens_BPD)
        return caption_term(self.captioner, outputs, image_tokens_BQD, self.caption_reduction, self.caption_chunk_size)

    def patch_features(self, patch_tokens_BPD: Tensor) -> Tensor:
        """Return each patch in the shared space (B, P, E): the embedding of an image that is this patch alone.

        Attention over one position weighs it 1, so poolers reduce to the path of their values.
        """
        pooled_BPD = self.contrastive_pooler.one_position(self.generative_pooler.one_position(patch_tokens_BPD))
        return self.clip.image_projection(self.image_norm(pooled_BPD))

    def score(self, images: Features, texts: Features) -> Tensor:
        """Return scaled cosines (I, T)."""
        return self.clip.score(images, texts)

    def clamp_(self) -> None:
        """Keep the scale in [1, 100]."""
        self.clip.clamp_()

    @torch.no_grad()
    def generate(
        self,
        towers: Towers,
        pixel_values: Tensor,
        start_token_id: int,
        end_token_id: int,
        max_length: int | None = None,
    ) -> Tensor:
        """Write captions greedily, to look at while training: nothing is cached, so a long caption is slow.

        Args:
            towers: The two encoders, in eval mode.
            pixel_values: (B, 3, H, W).
            start_token_id: First token of every caption.
            end_token_id: Token behind which a caption is padded.
            max_length: Longest caption in tokens; None: the context of the text tower.

        Returns:
            Token ids (B, L), the start token included, padded on the right.

        Raises:
            ValueError: If the model was built without a captioning decoder.
        """
        if self.captioner is None:
            raise ValueError("caption_weight=0: this model has no captioning decoder")
        patch_tokens = towers(pixel_values=pixel_values).patch_tokens
        assert patch_tokens is not None
        image_tokens_BQD = self.generative_pooler(patch_tokens)
        input_ids = torch.full((len(pixel_values), 1), start_token_id, device=pixel_values.device)
        is_done_B = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        while input_ids.shape[1] < (max_length or self.shape.context_length) and not is_done_B.all():
            text_tokens = towers(input_ids=input_ids, text_mask=torch.ones_like(input_ids)).text_tokens
            assert text_tokens is not None
            next_B = self.captioner.logits(self.captioner(text_tokens, image_tokens_BQD)[:, -1]).argmax(-1)
            next_B = next_B.masked_fill(is_done_B, self.shape.pad_token_id)
            is_done_B |= next_B == end_token_id
            input_ids = torch.cat([input_ids, next_B[:, None]], dim=1)
        return input_ids
