"""The vocabulary's word nearest to each image embedding: what the projector says in the language model's own words.

The paper's figure 6 (arXiv 2405.17871) shows it for a model with and without CAL. M image tokens, V vocabulary,
D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 8192


@torch.no_grad()
def nearest_rows(embeds_MD: Tensor, table_VD: Tensor, is_word_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of an embedding table with the largest cosine, and that cosine, for each embedding.

    The table is gone through 8,192 rows at a time, in float32; of equal cosines the first row wins.

    Args:
        embeds_MD: Image embeddings as the language model reads them.
        table_VD: The language model's *input* embeddings. Where the output head has a table of its own, it plays no
            part: the question is which word the image token resembles at the input.
        is_word_V: Which rows count, see `word_rows`.

    Returns:
        Rows (M,) int64 and cosines (M,) float32.

    Raises:
        ValueError: If no row counts.
    """
    if not is_word_V.any():
        raise ValueError("the vocabulary has no words to compare with: every token is special")
    unit_MD = F.normalize(embeds_MD.float(), dim=-1)
    best_M = torch.full((len(embeds_MD),), -torch.inf, device=embeds_MD.device)
    rows_M = torch.zeros(len(embeds_MD), dtype=torch.long, device=embeds_MD.device)
    for start in range(0, len(table_VD), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosine_MR = unit_MD @ F.normalize(table_VD[part].float(), dim=-1).T
        top_M, row_M = cosine_MR.masked_fill(~is_word_V[part].to(cosine_MR.device), -torch.inf).max(dim=1)
        rows_M = torch.where(top_M > best_M, row_M + start, rows_M)
        best_M = torch.maximum(top_M, best_M)
    return rows_M, best_M


def word_rows(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Tensor:
    """Return which rows of the embedding table are tokens of ordinary text, (V,) bool.

    Special tokens are none, nor are the rows beyond the tokenizer's vocabulary that pad the table. Byte tokens stay in:
    that a patch is nearest to one of them is worth knowing.
    """
    is_word_V = torch.arange(num_rows) < len(tokenizer)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    is_word_V[torch.tensor(sorted(id for id in special if id < num_rows), dtype=torch.long)] = False
    return is_word_V


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token with its leading space; one that is no text by itself comes as the raw token."""
    # Decoded behind a known token: alone, SentencePiece-like tokens lose their leading space.
    lead = tokenizer.encode("a", add_special_tokens=False)[-1:]
    lead_text = str(tokenizer.decode(lead))
    texts = [str(tokenizer.decode([*lead, id])).removeprefix(lead_text) for id in ids]
    return [
        str(tokenizer.convert_ids_to_tokens(id)) if not text or "\ufffd" in text else text
        for id, text in zip(ids, texts, strict=True)
    ]
