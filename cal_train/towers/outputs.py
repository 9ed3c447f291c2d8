"""What the two towers hand to every objective.

Shape letters of this package and of `cal_train.objectives`: B pairs of a batch, P patch tokens of an image, L text
tokens, K mixture tokens, D encoder width (of either tower), E shared width, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TowerShape:
    """The sizes that an objective needs to build its heads. Sides are in pixels, ``context_length`` in tokens.

    ``causal_text`` says whether a text token sees only those before it; captioning from a text tower in which tokens
    see those behind them would be given its answers.
    """

    vision_width: int
    text_width: int
    image_size: int
    patch_size: int
    vocab_size: int
    context_length: int
    pad_token_id: int
    num_mixture_tokens: int = 0
    causal_text: bool = True

    @property
    def num_patches(self) -> int:
        """Return the patch tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TowerOutputs:
    """One forward pass of a two-tower model. Nothing is projected or normalised: heads belong to the objective.

    The image fields are None after a pass over texts alone, and the reverse.

    Attributes:
        image_pooled: (B, D), the tower's own pooled output: class token or attention pooling.
        patch_tokens: (B, P, D), last layer behind its layer norm, no class token, in raster order. With a subset of
            the patches, only those, in the order in which they were asked for.
        mixture_tokens: (B, K, D), outputs of Llip's learned tokens; None for a tower without them.
        text_pooled: (B, D), the tower's own pooled output.
        text_tokens: (B, L, D), last layer behind its layer norm.
        text_mask: (B, L) bool, True for real tokens.
        input_ids: (B, L) int64, padded on the right.
    """

    image_pooled: Tensor | None = None
    patch_tokens: Tensor | None = None
    mixture_tokens: Tensor | None = None
    text_pooled: Tensor | None = None
    text_tokens: Tensor | None = None
    text_mask: Tensor | None = None
    input_ids: Tensor | None = None
