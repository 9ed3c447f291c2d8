"""Rows of one or several sources as a map-style data set of tokenized examples with their images."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from cal_train.conf import DataArguments
from cal_train.data.examples import LoadDeltas, LoadFeatures, SampleEncoder
from cal_train.data.image_sizes import add_sizes, read_sizes, size_key, write_sizes
from cal_train.data.images import DEFAULT_LIMITS, ImageLimits, count_image_tokens, is_anyres
from cal_train.data.records import Rows, parse_row
from cal_train.data.sources import Source, draw_rows, modality_lengths, parsed_rows, summarize, training_sources
from cal_train.types import BadSampleError, Problem, Sample

logger = logging.getLogger(__name__)


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
        self.sources = list(sources)
        self.encoder = SampleEncoder(processor, template, max_length, image_position, limits, load_features)
        self.processor, self.max_length, self.image_position = processor, max_length, image_position
        self.limits, self.seed = limits, seed
        self.load_deltas: Sequence[LoadDeltas] = ()  # one per source, or none at all
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
        """Return one example (see `SampleEncoder.encode`), or the `Problem` of a bad row."""
        try:
            sample = self.load_sample(i)
            load_deltas = self.load_deltas[self._index[i, 0]] if self.load_deltas else None
            return self.encoder.encode(sample, load_deltas)
        except BadSampleError as error:
            return error.problem

    def load_sample(self, i: int) -> Sample:
        """Return row ``i`` of this epoch with its form checked and its images unopened.

        Raises:
            BadSampleError: As `parse_row`.
        """
        source, row = (int(number) for number in self._index[i])
        return parse_row(self.rows[source][row], self.sources[source].path, row, self.sources[source].root)

    def iter_images(self) -> Iterator[Path | bytes]:
        """Yield the images of every row of every source, in order and with repeats; rows of bad form are left out."""
        for k in range(len(self.sources)):
            for images in self._images_of_rows(k):
                yield from images

    def _images_of_rows(self, k: int) -> Iterator[tuple[Path | bytes, ...]]:
        """Yield the images of each row of source ``k``; none for a row of bad form, which is reported when read."""
        for row in parsed_rows(self.sources[k], self.rows[k]):
            yield () if isinstance(row, Problem) else row.images

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
