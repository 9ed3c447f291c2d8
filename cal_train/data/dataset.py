"""Rows of one or several sources as a map-style data set of tokenized examples with their images."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from cal_train.conf import DataArguments
from cal_train.data.conversation import render, resolve_template
from cal_train.data.image_sizes import add_sizes, read_sizes, size_key, write_sizes
from cal_train.data.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    count_image_tokens,
    image_inputs,
    is_anyres,
    open_image,
)
from cal_train.data.records import Rows, parse_row
from cal_train.data.sources import Source, draw_rows, modality_lengths, summarize, training_sources
from cal_train.data.tokenize import tokenize_conversation
from cal_train.types import IMAGE_MARK, BadSampleError, Message, Problem, Sample, TokenizedExample

logger = logging.getLogger(__name__)

LoadFeatures = Callable[[Path | bytes], torch.Tensor | None]
"""Cached tower features (P, D) of one image, or None if they are not cached."""


class VlmDataset(Dataset):
    """Map-style data set over a weighted mixture of sources.

    A source of weight w contributes ``round(w * rows)`` rows per epoch: each row as often as w's whole part says, and
    for the fraction rows drawn without replacement, anew each epoch, as a function of (seed, epoch) alone. The length
    is the same in every epoch. DataLoader workers must start after `set_epoch` (they do unless they are persistent).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: ProcessorMixin,
        template: str,
        max_length: int,
        image_position: Literal["keep", "front"] = "keep",
        limits: ImageLimits = DEFAULT_LIMITS,
        load_features: LoadFeatures | None = None,
        seed: int = 0,
    ):
        """Open the sources.

        Args:
            sources: The mixture.
            processor: Of the model; its image processor makes the vision inputs.
            template: A template's name, see `cal_train.data.conversation.resolve_template`.
            max_length: Tokens per row, image placeholders included.
            image_position: ``front`` moves the image marks of a turn to its beginning, each followed by a newline.
            limits: Which images are refused.
            load_features: If given, rows whose images are all cached return ``vision_features`` instead of pixels.
            seed: Of the draws for fractional weights.

        Raises:
            ValueError: If a file cannot be read, the mixture has no rows, a weight is not positive, the template does
                not fit the tokenizer, or the processor's image token is not ``IMAGE_MARK``.
        """
        if not sources:
            raise ValueError("no data: give data_path, or a list of sources under data")
        for source in sources:
            if source.weight <= 0:
                raise ValueError(f"source {source.path}: weight {source.weight} is not positive; leave the source out")
        image_token: str = processor.image_token  # pyright: ignore[reportAttributeAccessIssue]
        if image_token != IMAGE_MARK:
            raise ValueError(f"the processor's image token is {image_token!r}; only {IMAGE_MARK!r} is supported")
        self.sources = list(sources)
        self.processor, self.max_length, self.image_position = processor, max_length, image_position
        self.template = resolve_template(template, processor)
        self.limits, self.load_features, self.seed = limits, load_features, seed
        self.rows = [Rows(source.path) for source in self.sources]
        self.summaries = [summarize(rows) for rows in self.rows]
        self._warn_about_rows()
        self._lengths: np.ndarray | None = None
        self._first_rows = np.cumsum([0, *(len(rows) for rows in self.rows)])  # of each source, in `_lengths`
        self.set_epoch(0)
        if not len(self):
            raise ValueError("the mixture has no rows: the weights round every source to nothing")

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of an epoch; equal arguments give equal rows."""
        drawn = []
        for k, (source, rows) in enumerate(zip(self.sources, self.rows, strict=True)):
            rng = np.random.default_rng([self.seed, epoch, k])
            chosen = draw_rows(len(rows), source.weight, rng)
            drawn.append(np.stack([np.full(len(chosen), k), chosen], axis=1))
        self._index = np.concatenate(drawn)

    @property
    def lengths(self) -> np.ndarray:
        """Words plus image tokens of each row of this epoch (rows,) int64, negative for text-only rows."""
        if self._lengths is None:
            self.measure()
        assert self._lengths is not None
        return self._lengths[self._first_rows[self._index[:, 0]] + self._index[:, 1]]

    def measure(self, file: Path | None = None, show_progress: bool = False) -> None:
        """Count words and image tokens of every row, for `lengths`.

        Where the number of tokens depends on the image's size, headers are read; an image that cannot be used counts
        as 0 tokens and is reported when its row is read. Otherwise no image is touched.

        Args:
            file: Keeps the sizes for the next run.
            show_progress: Draw a bar while headers are read.
        """
        if is_anyres(self.processor):
            num_tokens = self._tokens_from_headers(file, show_progress)
        else:
            per_image = count_image_tokens(self.processor, [(336, 336)])[0]
            num_tokens = [summary.num_images.astype(np.int64) * per_image for summary in self.summaries]
        self._lengths = np.concatenate(
            [modality_lengths(summary, tokens) for summary, tokens in zip(self.summaries, num_tokens, strict=True)]
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> dict[str, Any] | Problem:
        """Return one example, or the `Problem` of a bad row.

        Keys: ``input_ids``, ``labels`` (S,) int64; ``num_cut``, the text tokens lost to truncation;
        ``sample_id``; for rows with images the vision inputs of `cal_train.data.images.image_inputs`, or
        ``vision_features`` (images, P, D).
        """
        try:
            sample = self.load_sample(i)
            vision, num_image_tokens = self._vision(sample)
            example = self.tokenize(sample, num_image_tokens)
        except BadSampleError as error:
            return error.problem
        kept = {"input_ids": example.input_ids, "labels": example.labels, "num_cut": example.num_cut}
        return {**kept, "sample_id": sample.id, **vision}

    def load_sample(self, i: int) -> Sample:
        """Return row ``i`` of this epoch with its form checked and its images unopened.

        Raises:
            BadSampleError: As `parse_row`.
        """
        source, row = (int(number) for number in self._index[i])
        return parse_row(self.rows[source][row], self.sources[source].path, row, self.sources[source].root)

    def tokenize(self, sample: Sample, num_image_tokens: Sequence[int]) -> TokenizedExample:
        """Return a sample's ids and labels.

        Raises:
            BadSampleError: If the template refuses its turns, or as `tokenize_conversation`.
        """
        tokenizer = self.processor.tokenizer
        messages = images_to_front(sample.messages) if self.image_position == "front" else sample.messages
        try:
            rendered = render(messages, self.template, tokenizer.special_tokens_map)
        except ValueError as error:
            raise _bad(sample, str(error), "Correct the turns, or choose another template") from error
        image_token_id: int = self.processor.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
        return tokenize_conversation(sample, rendered, tokenizer, image_token_id, num_image_tokens, self.max_length)

    def iter_images(self) -> Iterator[Path | bytes]:
        """Yield the images of every row of every source, in order and with repeats; rows of bad form are left out."""
        for k in range(len(self.sources)):
            for images in self._images_of_rows(k):
                yield from images

    def _images_of_rows(self, k: int) -> Iterator[tuple[Path | bytes, ...]]:
        """Yield the images of each row of source ``k``; none for a row of bad form, which is reported when read."""
        source, rows = self.sources[k], self.rows[k]
        for row in range(len(rows)):
            try:
                yield parse_row(rows[row], source.path, row, source.root).images
            except BadSampleError:
                yield ()

    def _tokens_from_headers(self, file: Path | None, show_progress: bool) -> list[np.ndarray]:
        """Return the image tokens of each row (rows,) int64, per source."""
        sizes = read_sizes(file) if file is not None else {}
        keys: list[list[list[int]]] = [[] for _ in self.sources]  # of each image of each row of each source

        def keyed_images() -> Iterator[tuple[int, Path | bytes]]:
            for k in range(len(self.sources)):
                for images in self._images_of_rows(k):
                    keys[k].append([size_key(image, self.limits) for image in images])
                    yield from zip(keys[k][-1], images, strict=True)

        if add_sizes(sizes, keyed_images(), self.limits, show_progress) and file is not None:
            write_sizes(file, sizes)
        usable = sorted({size for size in sizes.values() if any(size)})
        tokens_of = dict(zip(usable, count_image_tokens(self.processor, usable), strict=True)) | {(0, 0): 0}
        return [np.array([sum(tokens_of[sizes[key]] for key in row) for row in rows], np.int64) for rows in keys]

    def _vision(self, sample: Sample) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the sample's vision inputs and how many placeholders each of its images takes."""
        if not sample.images:
            return {}, []
        if self.load_features is not None:
            loaded = [self.load_features(image) for image in sample.images]
            features = [feature for feature in loaded if feature is not None]
            if len(features) == len(loaded):
                return {"vision_features": torch.stack(features)}, [len(feature) for feature in features]
        images = [open_sample_image(sample, k, self.limits) for k in range(len(sample.images))]
        return image_inputs(self.processor, images)

    def _warn_about_rows(self) -> None:
        for source, summary in zip(self.sources, self.summaries, strict=True):
            if summary.duplicate_ids:
                id, count = next(iter(summary.duplicate_ids.items()))
                extra = sum(summary.duplicate_ids.values()) - len(summary.duplicate_ids)
                logger.warning(
                    "%s: %d rows repeat the id of another row (%r occurs %d times)", source.path, extra, id, count
                )
            if summary.num_leading_answers:
                logger.warning(
                    "%s: %d rows begin with an assistant turn, which is dropped",
                    source.path,
                    summary.num_leading_answers,
                )


def build_dataset(
    options: DataArguments, processor: ProcessorMixin, seed: int = 0, load_features: LoadFeatures | None = None
) -> VlmDataset:
    """Return the training set of a recipe, from ``data_path`` or from the sources under ``data``.

    Raises:
        ValueError: If neither or both are given, or as `VlmDataset`.
    """
    return _dataset(training_sources(options), options, processor, seed, load_features)


def build_eval_dataset(
    options: DataArguments, processor: ProcessorMixin, load_features: LoadFeatures | None = None
) -> VlmDataset | None:
    """Return the set for the evaluation loss, or None if the recipe names none; ``image_folder`` is its image root."""
    if options.eval_data_path is None:
        return None
    source = Source(Path(options.eval_data_path), Path(options.image_folder) if options.image_folder else None)
    return _dataset([source], options, processor, 0, load_features)


def _dataset(
    sources: list[Source],
    options: DataArguments,
    processor: ProcessorMixin,
    seed: int,
    load_features: LoadFeatures | None,
) -> VlmDataset:
    return VlmDataset(
        sources,
        processor,
        options.template,
        options.model_max_length,
        options.image_position,
        ImageLimits(options.max_image_pixels, options.min_image_side),
        load_features,
        seed,
    )


def open_sample_image(sample: Sample, k: int, limits: ImageLimits) -> Image.Image:
    """Return image ``k`` of a sample as a PIL RGB image.

    Raises:
        BadSampleError: If it cannot be used; names the file.
    """
    image = sample.images[k]
    try:
        return open_image(image, limits)
    except ValueError as error:
        where = f"image {k} (bytes in the row)" if isinstance(image, bytes) else str(image)
        raise _bad(sample, f"{where}: {error}", "Replace the image, or remove the row") from error


def images_to_front(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Move the image marks of each turn to its beginning, each followed by a newline, as LLaVA-1.5 was trained."""

    def moved(message: Message) -> Message:
        count = message.content.count(IMAGE_MARK)
        if not count:
            return message
        text = message.content.replace(IMAGE_MARK, "").strip()
        return replace(message, content=(f"{IMAGE_MARK}\n" * count + text).strip())

    return tuple(moved(message) for message in messages)


def _bad(sample: Sample, problem: str, cure: str) -> BadSampleError:
    return BadSampleError(Problem(sample.file, sample.row, sample.id, problem, cure))
