"""Pairs to batches: decode, crop, choose captions, tokenize, pad; what is lost on the way is counted."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from cal_train.data.images import DEFAULT_LIMITS, ImageLimits, open_image
from cal_train.data.pair_rows import open_pairs
from cal_train.data.pairs import Pair, PairSource
from cal_train.data.stream_loader import RowStream, StreamBatch
from cal_train.data.stream_plan import Share
from cal_train.types import BadSampleError, Problem

Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions to token ids of one length."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int

    def __post_init__(self):
        name = type(self.tokenizer).__name__
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"{name} has no padding token: set tokenizer.pad_token before training")
        if self.context_length < 1:
            raise ValueError(f"context_length is {self.context_length}: give at least 1 token")

    def encode(self, captions: Sequence[str]) -> tuple[dict[str, torch.Tensor], int]:
        """Tokenize and pad on the right.

        A caption that is too long loses its last words but keeps the token that the tokenizer closes with.

        Returns:
            ``input_ids`` and ``attention_mask`` (captions, context_length) int64, and how many captions were cut.

        Raises:
            ValueError: If the tokenizer makes nothing of a caption.
        """
        shape = (len(captions), self.context_length)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id, dtype=torch.int64)  # pyright: ignore
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        num_cut = 0
        for row, ids in enumerate(self.tokenizer(list(captions), verbose=False)["input_ids"] if captions else []):
            if not ids:
                raise ValueError(f"the tokenizer makes no token of the caption {captions[row]!r}")
            kept = self._cut(ids)
            num_cut += len(kept) < len(ids)
            input_ids[row, : len(kept)] = torch.tensor(kept)
            attention_mask[row, : len(kept)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}, num_cut

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.context_length:
            return ids
        closes = ids[-1] in self.tokenizer.all_special_ids
        return [*ids[: self.context_length - 1], ids[-1]] if closes else ids[: self.context_length]


@dataclass(frozen=True)
class BatchMaker:
    """Turns the rows of a window into batches of a fixed size.

    Their inputs are ``pixel_values`` (B, 3, H, W) float32; ``input_ids`` and ``attention_mask`` (B, L) int64, padded on
    the right to the context length; with multiple positives ``image_ids`` (B,) int64.

    Attributes:
        transform: Image and random numbers to ``pixel_values`` (3, H, W).
        encoder: Of the captions.
        captions_per_image: Rows per image, each with another caption as long as there are others.
        with_image_ids: Whether batches carry ``image_ids``.
        limits: Which images are refused.
    """

    transform: Transform
    encoder: CaptionEncoder
    captions_per_image: int = 1
    with_image_ids: bool = False
    limits: ImageLimits = DEFAULT_LIMITS

    def make(
        self, window: Sequence[Pair | Problem], chosen: Sequence[int], spare: Iterable[int], rng: np.random.Generator
    ) -> StreamBatch:
        """Make a batch of the ``chosen`` rows of a window.

        A bad row is replaced by the next good one of ``spare``; when these are used up, by a good row of the batch.

        Raises:
            ValueError: If no row at all is usable.
        """
        images, dropped = list[tuple[Pair, torch.Tensor]](), list[Problem]()
        num_good = 0
        for turn, i in enumerate(chain(chosen, spare)):
            if len(images) == len(chosen):
                break
            try:
                images.append(self._load(window[i], rng))
                num_good += turn < len(chosen)
            except BadSampleError as error:
                dropped.append(error.problem)
        if not images:
            raise ValueError(f"no usable pair among {len(window)} rows, first: {dropped[0]}")
        images = [images[k % len(images)] for k in range(len(chosen))]
        return self._collate(images, dropped, len(chosen) - num_good, rng)

    def _load(self, row: Pair | Problem, rng: np.random.Generator) -> tuple[Pair, torch.Tensor]:
        if isinstance(row, Problem):
            raise BadSampleError(row)
        try:
            return row, self.transform(open_image(row.image, self.limits), rng)
        except ValueError as error:
            cure = "Replace the image, or drop the row"
            raise BadSampleError(Problem(row.file, row.row, row.id, str(error), cure)) from error

    def _collate(
        self, images: list[tuple[Pair, torch.Tensor]], dropped: list[Problem], num_bad: int, rng: np.random.Generator
    ) -> StreamBatch:
        pairs = [pair for pair, _ in images for _ in range(self.captions_per_image)]
        captions = [caption for pair, _ in images for caption in self._draw_captions(pair, rng)]
        tokens, num_cut = self.encoder.encode(captions)
        pixels = torch.stack([pixel_values for _, pixel_values in images])
        inputs = {"pixel_values": pixels.repeat_interleave(self.captions_per_image, 0), **tokens}
        if self.with_image_ids:
            inputs["image_ids"] = torch.tensor([pair.image_id for pair in pairs])
        return StreamBatch(inputs, [pair.id for pair in pairs], dropped, num_cut, num_bad * self.captions_per_image)

    def _draw_captions(self, pair: Pair, rng: np.random.Generator) -> list[str]:
        order = rng.permutation(len(pair.captions))
        return [pair.captions[order[k % len(order)]] for k in range(self.captions_per_image)]


def pair_stream(
    sources: Sequence[PairSource],
    maker: BatchMaker,
    batch_size: int,
    share: Share = Share(),  # noqa: B008 (frozen)
    shuffle_pool: int = 4096,
    seed: int = 0,
) -> RowStream[Pair]:
    """Open the sources and return this rank's batches.

    Args:
        sources: The mixture.
        maker: Makes the batches.
        batch_size: Pairs of a batch on one rank.
        share: Rank and number of ranks.
        shuffle_pool: Encoded rows that a worker holds and mixes.
        seed: Of order, crops and captions; equal on all ranks.

    Raises:
        ValueError: If a source cannot be read or is empty, the batch size does not fit the captions per image, or
            there are fewer pairs than one batch per rank.
    """
    images, rest = divmod(batch_size, maker.captions_per_image)
    if rest or images < 1:
        raise ValueError(f"batch size {batch_size} is no multiple of captions_per_image {maker.captions_per_image}")
    layout = {"batch_size": batch_size, "captions_per_image": maker.captions_per_image}
    blocks, weights = [open_pairs(source) for source in sources], [source.weight for source in sources]
    return RowStream(blocks, weights, maker.make, images, share, shuffle_pool, seed, layout)
