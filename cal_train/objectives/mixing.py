"""Images mixed for every text: the pair-wise part of Llip, with the output projection W_o kept out of the pairs.

    cos_ij = <x_ij W_o, w_j> / |x_ij W_o|,    x_ij = sum_hk alpha_ijhk V_ihk  (head h fills its own E columns)

I images, T texts, K mixture tokens, H heads, E = D / H width of a head, D width, R = I * K rows, N = H * K tokens of
an image over all heads. As written, each pair costs D^2 multiply-adds for W_o. Two identities avoid them, exactly:

    <x W_o, w>  = sum_hk alpha_hk <V_hk, (W_o w)_h>             one product with W_o per text
    |x W_o|^2   = alpha M alpha^T,  M_i = V_i W_o W_o^T V_i^T   one Gram matrix (N, N) per image, N^2 per pair

The second pays where N < D and there are enough texts to share M; it holds N^2 values per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cal_train.objectives.similarity import unit, widened

TILE_ELEMENTS = 2**24
"""Values held at a time by a tile of texts, about: 64 MiB in float32."""
MIN_SQUARED_NORM = 1e-24
"""Floor of |x W_o|^2, as `torch.nn.functional.normalize` has for the norm."""


@dataclass(frozen=True)
class MixedImages:
    """All that pairs need to know of the images.

    Attributes:
        keys_HRE: Keys over the temperature, head by head.
        values_HRE: Values, head by head.
        out_proj_DD: W_o.
        gram_INN: M of every image, or None where W_o per pair is cheaper.
    """

    keys_HRE: Tensor
    values_HRE: Tensor
    out_proj_DD: Tensor
    gram_INN: Tensor | None
    num_images: int

    @classmethod
    def of(
        cls, keys_IHKE: Tensor, values_IHKE: Tensor, out_proj_DD: Tensor, temperature: float, num_texts: int
    ) -> "MixedImages":
        """Arrange keys and values for products with texts.

        Args:
            keys_IHKE: Keys of the mixture tokens.
            values_IHKE: Their values.
            out_proj_DD: W_o.
            temperature: Divides the products of keys and queries.
            num_texts: How many texts the images will be compared with: decides between the two forms.

        Raises:
            ValueError: If heads and widths do not fit together.
        """
        num_images, num_heads, num_tokens, head_width = keys_IHKE.shape
        width = num_heads * head_width
        if values_IHKE.shape != keys_IHKE.shape or out_proj_DD.shape != (width, width):
            raise ValueError(
                f"keys {tuple(keys_IHKE.shape)}, values {tuple(values_IHKE.shape)} and out_proj "
                f"{tuple(out_proj_DD.shape)} do not fit together"
            )
        keys, values, out_proj = widened(keys_IHKE), widened(values_IHKE), widened(out_proj_DD)
        has_gram = gram_is_cheaper(num_texts, num_heads, num_tokens, width)
        return cls(
            (keys / temperature).transpose(0, 1).flatten(1, 2),
            values.transpose(0, 1).flatten(1, 2),
            out_proj,
            _gram(values, out_proj) if has_gram else None,
            num_images,
        )

    @property
    def values_per_text(self) -> int:
        """Return how many values a tile holds for one text, about."""
        num_heads, num_rows, _ = self.keys_HRE.shape
        per_image = len(self.out_proj_DD) if self.gram_INN is None else num_heads * num_rows // self.num_images
        return num_heads * num_rows + 2 * self.num_images * per_image


def gram_is_cheaper(num_texts: int, num_heads: int, num_tokens: int, width: int) -> bool:
    """Return whether norms from Gram matrices take fewer multiply-adds, the matrices themselves included."""
    size = num_heads * num_tokens
    matrix = num_tokens * width**2 + size**2 * width // num_heads
    return num_texts * size**2 + matrix < num_texts * width**2


def _gram(values_IHKE: Tensor, out_proj_DD: Tensor) -> Tensor:
    num_images, num_heads, num_tokens, head_width = values_IHKE.shape
    metric_HEHE = (out_proj_DD @ out_proj_DD.T).view(num_heads, head_width, num_heads, head_width)
    # (V W_o W_o^T) block by block: a row of V is zero outside its own head
    pulled_IHKGE = torch.einsum("ihke,hegf->ihkgf", values_IHKE, metric_HEHE)
    gram_IHKGL = torch.einsum("ihkge,igle->ihkgl", pulled_IHKGE, values_IHKE)
    return gram_IHKGL.reshape(num_images, num_heads * num_tokens, num_heads * num_tokens)


def pair_cosines(images: MixedImages, queries_THE: Tensor, text_TD: Tensor) -> Tensor:
    """Return the cosine of every image, mixed for the text, with every text (I, T).

    Args:
        images: From `MixedImages.of`.
        queries_THE: Queries of the texts.
        text_TD: Unit vectors of the texts.
    """
    num_heads, num_rows, head_width = images.keys_HRE.shape
    num_images = images.num_images
    split = (num_heads, num_images, num_rows // num_images, len(text_TD))  # H, I, K, T
    mixing_HIKT = (images.keys_HRE @ queries_THE.permute(1, 2, 0)).view(split).softmax(2)
    if images.gram_INN is None:
        mixed_HITE = mixing_HIKT.transpose(2, 3) @ images.values_HRE.view(*split[:3], head_width)
        projected_ITD = mixed_HITE.permute(1, 2, 0, 3).flatten(2) @ images.out_proj_DD
        along_IT = (projected_ITD * text_TD).sum(-1)
        squared_IT = projected_ITD.square().sum(-1)
    else:
        pulled_HET = (text_TD @ images.out_proj_DD.T).view(-1, num_heads, head_width).permute(1, 2, 0)
        along_IT = (mixing_HIKT * (images.values_HRE @ pulled_HET).view(split)).sum((0, 2))
        mixing_INT = mixing_HIKT.transpose(0, 1).flatten(1, 2)
        squared_IT = (mixing_INT * (images.gram_INN @ mixing_INT)).sum(1)
    return along_IT * squared_IT.clamp(min=MIN_SQUARED_NORM).rsqrt()


def tile_texts(
    images: MixedImages,
    compute: Callable[..., Tensor],
    texts: Sequence[Tensor],
    chunk_size: int | None,
    *,
    is_only_block: bool,
) -> list[Tensor]:
    """Return ``compute(*chunk)`` for every chunk of texts, computed again in the backward pass.

    Args:
        images: They decide how many texts fit a chunk.
        compute: From texts, and the images it holds, to a tensor.
        texts: Tensors whose first dimension is the text.
        chunk_size: Texts of a chunk; None for as many as `TILE_ELEMENTS` allows.
        is_only_block: Whether no other texts follow: a single chunk is then kept, as computing it again saves nothing.
    """
    chunk_size = chunk_size or max(TILE_ELEMENTS // images.values_per_text, 1)
    chunks = list(zip(*(tensor.split(chunk_size) for tensor in texts), strict=True))
    if is_only_block and len(chunks) == 1:
        return [compute(*chunks[0])]
    return [checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]


def shortlist_cosines(
    keys_IHKE: Tensor,
    values_IHKE: Tensor,
    queries_THE: Tensor,
    text_TD: Tensor,
    out_proj_DD: Tensor,
    num_candidates: int,
) -> Tensor:
    """Return exact cosines (I, T) for the pairs that evenly mixed images find likely, minus infinity for the others.

    Args:
        keys_IHKE: Keys over the temperature.
        values_IHKE: Values.
        queries_THE: Queries of the texts.
        text_TD: Unit vectors of the texts.
        out_proj_DD: W_o.
        num_candidates: Texts kept for every image, and images kept for every text.

    Raises:
        ValueError: If no candidates are asked for.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates {num_candidates} must be at least 1")
    out_proj = widened(out_proj_DD)
    even_IT = unit(values_IHKE.mean(2).flatten(1) @ out_proj) @ text_TD.T
    is_likely_IT = torch.zeros_like(even_IT, dtype=torch.bool)
    for dim in (0, 1):
        is_likely_IT.scatter_(dim, even_IT.topk(min(num_candidates, even_IT.shape[dim]), dim).indices, True)
    cosines_IT = torch.full_like(even_IT, -torch.inf)
    pairs = is_likely_IT.nonzero()
    per_pair = 2 * keys_IHKE[0].numel() + 2 * len(out_proj)
    for image, text in (chunk.unbind(1) for chunk in pairs.split(max(TILE_ELEMENTS // per_pair, 1))):
        mixing_CHK = (keys_IHKE[image] @ queries_THE[text][..., None]).squeeze(-1).softmax(-1)
        mixed_CD = (mixing_CHK[:, :, None] @ values_IHKE[image]).flatten(1)
        cosines_IT[image, text] = (unit(mixed_CD @ out_proj) * text_TD[text]).sum(-1)
    return cosines_IT
