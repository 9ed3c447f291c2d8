"""Attention blocks of the heads that live in objectives: poolers over patches, and decoders with cross-attention.

B batch, N positions, M positions of the context, Q learned queries, D width, C width of the context.

All blocks normalise before they attend (pre-norm) and draw their weights from N(0, 0.02), the projections that write
into the residual stream scaled down by the depth, as GPT-2 does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


def check_heads(width: int, num_heads: int | None) -> int:
    """Return the number of attention heads: one per 64 channels unless told otherwise.

    Raises:
        ValueError: If the width cannot be divided by it.
    """
    num_heads = num_heads or max(width // 64, 1)
    if width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {width}: give a divisor")
    return num_heads


class Attention(nn.Module):
    """Multi-head attention from ``width`` to a context of another width, in PyTorch's fused kernel."""

    def __init__(self, width: int, context_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(context_width, width)
        self.v_proj = nn.Linear(context_width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x_BND: Tensor, context_BMC: Tensor, context_mask_BM: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend from ``x`` to the context (B, N, D).

        Args:
            x_BND: Queries; a batch of one serves every sample of the context.
            context_BMC: Keys and values.
            context_mask_BM: True where the context may be seen. A sample that may see nothing gets the output bias.
            is_causal: Position n sees the context up to n; for self-attention.
        """
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(x_BND), self.k_proj(context_BMC), self.v_proj(context_BMC))
        )
        query = query.expand(len(key), -1, -1, -1)
        mask = None if context_mask_BM is None else context_mask_BM[:, None, None, :]
        if mask is not None:
            mask = mask | ~mask.any(-1, keepdim=True)  # attention over nothing would be nan; it is cut off below
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        attended = attended.transpose(1, 2).flatten(2)
        if context_mask_BM is not None:
            attended = attended * context_mask_BM.any(1)[:, None, None]
        return self.out_proj(attended)


class AttentionPooler(nn.Module):
    """Learned queries that each read all positions once: attention only, no MLP, no residual."""

    def __init__(self, width: int, num_queries: int, num_heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.norm_queries = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = Attention(width, width, num_heads)
        initialize(self)

    def forward(self, context_BMD: Tensor) -> Tensor:
        """Pool (B, M, D) to (B, Q, D)."""
        return self.attention(self.norm_queries(self.queries)[None], self.norm_context(context_BMD))

    def one_position(self, context_BMD: Tensor) -> Tensor:
        """Return what any query would read if a position were all there is (B, M, D): its value, projected."""
        return self.attention.out_proj(self.attention.v_proj(self.norm_context(context_BMD)))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to a context (none for ``context_width`` None) and an MLP of four times D."""

    def __init__(self, width: int, context_width: int | None, num_heads: int, is_causal: bool):
        super().__init__()
        self.is_causal = is_causal
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, width, num_heads)
        self.cross_attention = None
        if context_width is not None:
            self.norm_cross = nn.LayerNorm(width)
            self.norm_context = nn.LayerNorm(context_width)
            self.cross_attention = Attention(width, context_width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor, context_BMC: Tensor | None, context_mask_BM: Tensor | None = None) -> Tensor:
        """Return the block's output (B, N, D)."""
        normed_BND = self.norm_self(x_BND)
        x_BND = x_BND + self.self_attention(normed_BND, normed_BND, is_causal=self.is_causal)
        if self.cross_attention is not None:
            assert context_BMC is not None
            normed_BND = self.norm_cross(x_BND)
            x_BND = x_BND + self.cross_attention(normed_BND, self.norm_context(context_BMC), context_mask_BM)
        return x_BND + self.mlp(self.norm_mlp(x_BND))


class Decoder(nn.Module):
    """A stack of `DecoderBlock` and a last layer norm."""

    def __init__(self, width: int, context_width: int | None, num_layers: int, num_heads: int, is_causal: bool):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"a decoder of {num_layers} layers: give at least 1")
        self.blocks = nn.ModuleList(
            [DecoderBlock(width, context_width, num_heads, is_causal) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(width)
        initialize(self, num_layers)

    def forward(
        self, x_BND: Tensor, context_BMC: Tensor | None = None, context_mask_BM: Tensor | None = None
    ) -> Tensor:
        """Return the normalised output of the last block (B, N, D)."""
        for block in self.blocks:
            x_BND = block(x_BND, context_BMC, context_mask_BM)
        return self.norm(x_BND)


@torch.no_grad()
def initialize(module: nn.Module, num_layers: int | None = None) -> None:
    """Draw the linear weights below ``module`` anew and zero their biases; see the top of the file.

    ``num_layers`` blocks write into one residual stream, three projections each; None where there is no such stream.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            writes_residual = num_layers is not None and name.endswith(("out_proj", "mlp.2"))
            std = INIT_STD / (3 * num_layers) ** 0.5 if writes_residual and num_layers else INIT_STD
            nn.init.normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
