"""Text to token ids and labels: one tokenisation, labels by character offsets, image marks expanded to placeholders."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cal_train.data.conversation import RenderedConversation
from cal_train.types import IGNORE_INDEX, IMAGE_MARK, BadSampleError, Problem, Sample, TokenizedExample

# Characters that start a text behind a cut (see `_encode_continuation`). A letter, white space, a digit and a mark: no
# tokenizer joins all four to whatever follows.
_ANCHORS = ("a", "\n", "0", ".")


def tokenize_conversation(
    sample: Sample,
    rendered: RenderedConversation,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: Sequence[int],
    max_length: int,
) -> TokenizedExample:
    """Turn a rendered conversation into ids and labels with the image placeholders expanded.

    A token is supervised when it overlaps a supervised character range. What exceeds ``max_length`` is cut from the end
    of the text and counted; an image is never cut.

    Args:
        sample: The row, for its place in error messages and for the check of its texts.
        rendered: Its text and supervised ranges, from `cal_train.data.conversation.render`.
        tokenizer: A fast tokenizer in which ``IMAGE_MARK`` is one special token.
        image_token_id: Id of that token, which stands at every position that an image feature fills.
        num_image_tokens: Placeholders of each image, in order.
        max_length: Tokens, placeholders included.

    Raises:
        BadSampleError: If a text contains a special token, if images and marks in the rendered text do not match, if an
            image does not fit into ``max_length``, or if no supervised token is left.
        ValueError: If the tokenizer is slow (it knows no offsets).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} is slow and knows no character offsets: load it with AutoTokenizer, "
            "or convert it to a tokenizer.json with convert_slow_tokenizer"
        )
    _refuse_special_tokens(sample, tokenizer)
    try:
        ids, is_supervised = _encode(rendered, tokenizer)
    except ValueError as error:
        raise _bad(sample, str(error), "Change the first or last characters of the answer") from error
    is_image = ids == image_token_id
    if is_image.sum() != len(num_image_tokens):
        raise _bad(
            sample,
            f"{is_image.sum()} image tokens in the rendered text, but {len(num_image_tokens)} images",
            "Choose a template that keeps every image in its place",
        )
    counts = np.ones(len(ids), np.int64)
    counts[is_image] = num_image_tokens
    ends = np.cumsum(counts)[is_image]
    input_ids = np.repeat(ids, counts)
    labels = np.repeat(np.where(is_supervised & ~is_image, ids, IGNORE_INDEX), counts)
    if len(ends) and ends[-1] > max_length:
        raise _bad(
            sample,
            f"row longer than the limit: its last image ends at token {ends[-1]} and the limit is {max_length}",
            "Raise model_max_length, or shorten the text before the image",
        )
    num_cut = max(0, len(input_ids) - max_length)
    labels = labels[:max_length]
    if (labels[1:] == IGNORE_INDEX).all():  # the first token has nothing to be predicted from
        where = f" within the first {max_length} of {len(input_ids)} tokens" if num_cut else ""
        raise _bad(sample, f"no supervised token{where}", "Raise model_max_length, or remove the row")
    spans = tuple((int(end - count), int(end)) for end, count in zip(ends, num_image_tokens, strict=True))
    return TokenizedExample(torch.from_numpy(input_ids[:max_length]), torch.from_numpy(labels), spans, num_cut)


def _bad(sample: Sample, problem: str, cure: str) -> BadSampleError:
    return BadSampleError(Problem(sample.file, sample.row, sample.id, problem, cure))


def _refuse_special_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse texts that contain a special token's string: it would become that token, not text."""
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    for i, message in enumerate(sample.messages):
        text = message.content.replace(IMAGE_MARK, "") if message.role == "user" else message.content
        if found := _any_of(special).search(text):
            raise _bad(
                sample,
                f"turn {i} ({message.role}) contains {found[0]!r}, a special token of the tokenizer",
                "Remove it, or write it differently (for example with a space inside)",
            )


@lru_cache(maxsize=8)
def _any_of(strings: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True)) or r"(?!)")


def _encode(rendered: RenderedConversation, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (S,) int64 and whether each is supervised (S,) bool."""
    text = rendered.text
    supervised = np.zeros(len(text) + 1, bool)
    for start, end in rendered.supervised:
        supervised[start:end] = True
    ids, starts, ends = _encode_piece(tokenizer, text)
    if cuts := _cuts(rendered, tokenizer, ids, starts, ends):
        edges = list(pairwise([0, *cuts, len(text)]))
        pieces = [
            _encode_continuation(tokenizer, text[a:b]) if a else _encode_piece(tokenizer, text[a:b]) for a, b in edges
        ]
        ids = np.concatenate([piece[0] for piece in pieces])
        starts = np.concatenate([piece[1] + a for piece, (a, _) in zip(pieces, edges, strict=True)])
        ends = np.concatenate([piece[2] + a for piece, (a, _) in zip(pieces, edges, strict=True)])
    before = np.concatenate([[0], np.cumsum(supervised)])
    # A token of no width (a normalizer's addition) belongs to the character that it stands before.
    return ids, before[np.maximum(ends, starts + 1)] > before[starts]


def _cuts(
    rendered: RenderedConversation,
    tokenizer: PreTrainedTokenizerBase,
    ids: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
) -> list[int]:
    """Return the characters at which the text must be cut and tokenized in pieces, in order.

    At generation time the prompt ends where the answer starts. A byte-level tokenizer may join the newline before an
    answer with one at its start, or split two newlines before an answer but not at the end of a text; then the model
    would be trained behind a prompt that it never sees. So each prompt is tokenized by itself, from its last
    special token on (nothing is joined across one), and compared. At the end of an answer a cut is needed only where a
    token lies across it.
    """
    special_ids = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    is_special = np.isin(ids, special_ids)
    cuts = []
    for start, end in rendered.supervised:
        stop = int(np.searchsorted(starts, start))
        first = int(np.max(np.flatnonzero(is_special[:stop]), initial=0))
        if stop and not np.array_equal(
            _encode_piece(tokenizer, rendered.text[starts[first] : start])[0], ids[first:stop]
        ):
            cuts.append(start)
        if ((starts < end) & (end < ends)).any():
            cuts.append(end)
    return cuts


def _encode_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids and the start and end character of each token, int64 (S,)."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int64), offsets[:, 0], offsets[:, 1]


def _encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize text that continues another one.

    SentencePiece-like tokenizers put a space before the text that they are given. Here that space goes to a character
    in front of the text, whose tokens are dropped.
    """
    for anchor in _ANCHORS:
        ids, starts, ends = _encode_piece(tokenizer, anchor + text)
        first = int(np.searchsorted(starts, len(anchor)))
        if first and ends[first - 1] <= len(anchor):
            return ids[first:], starts[first:] - len(anchor), ends[first:] - len(anchor)
    raise ValueError(
        f"the tokenizer joins {text[:20]!r} with whatever precedes it: no label boundary can be placed there"
    )
