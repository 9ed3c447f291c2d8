"""One sample to one example: rendered, tokenized, its images opened and processed. There is no other way."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import ProcessorMixin

from cal_train.conf import DataArguments
from cal_train.data.collate import DELTA_BITS
from cal_train.data.conversation import render, resolve_template
from cal_train.data.images import DEFAULT_LIMITS, ImageLimits, image_inputs, open_image
from cal_train.data.tokenize import tokenize_conversation
from cal_train.types import IMAGE_MARK, BadSampleError, Message, Problem, Sample, TokenizedExample

_MOST_CHARACTERS = 1_000_000
_CHARACTERS_PER_TOKEN = 32
"""Longer texts are refused unless ``max_length`` is as large: a text of words has about four characters per token."""

LoadFeatures = Callable[[Path | bytes], torch.Tensor | None]
"""Cached tower features (P, D) of one image, or None if they are not cached."""

LoadDeltas = Callable[[Sample, TokenizedExample], torch.Tensor]
"""Stored deltas of a sample's label tokens, (S,) float32; see `cal_train.data.stored_deltas`."""


class SampleEncoder:
    """Makes examples of samples, for map-style and for streamed data alike."""

    def __init__(
        self,
        processor: ProcessorMixin,
        template: str,
        max_length: int,
        image_position: Literal["keep", "front"] = "keep",
        limits: ImageLimits = DEFAULT_LIMITS,
        load_features: LoadFeatures | None = None,
    ):
        """Resolve the template.

        Args:
            processor: Of the model; its image processor makes the vision inputs.
            template: A template's name, see `cal_train.data.conversation.resolve_template`.
            max_length: Tokens per row, image placeholders included.
            image_position: ``front`` moves the image marks of a turn to its beginning, each followed by a newline.
            limits: Which images are refused.
            load_features: If given, rows whose images are all cached return ``vision_features`` instead of pixels.

        Raises:
            ValueError: If the template does not fit the tokenizer, or the processor's image token is not
                ``IMAGE_MARK``.
        """
        image_token: str = processor.image_token  # pyright: ignore[reportAttributeAccessIssue]
        if image_token != IMAGE_MARK:
            raise ValueError(f"the processor's image token is {image_token!r}; only {IMAGE_MARK!r} is supported")
        self.processor, self.max_length, self.image_position = processor, max_length, image_position
        self.template = resolve_template(template, processor)
        self.limits, self.load_features = limits, load_features

    def encode(self, sample: Sample, load_deltas: LoadDeltas | None = None) -> dict[str, Any]:
        """Return the example of a sample.

        Keys: ``input_ids``, ``labels`` (S,) int64; ``num_cut``, the text tokens lost to truncation; ``sample_id``; with
        stored deltas ``delta_bits`` (S,) int32; for rows with images the vision inputs of
        `cal_train.data.images.image_inputs`, or ``vision_features`` (images, P, D).

        Raises:
            BadSampleError: If an image cannot be used, or as `tokenize`, or as ``load_deltas``.
        """
        vision, num_image_tokens = self._vision(sample)
        example = self.tokenize(sample, num_image_tokens)
        kept = {"input_ids": example.input_ids, "labels": example.labels, "num_cut": example.num_cut}
        if load_deltas is not None:
            kept[DELTA_BITS] = load_deltas(sample, example).view(torch.int32)
        return {**kept, "sample_id": sample.id, **vision}

    def tokenize(self, sample: Sample, num_image_tokens: Sequence[int]) -> TokenizedExample:
        """Return a sample's ids and labels.

        Raises:
            BadSampleError: If the row is far too long, the template refuses its turns, or as `tokenize_conversation`.
        """
        tokenizer = self.processor.tokenizer
        self._refuse_oversized(sample)
        messages = images_to_front(sample.messages) if self.image_position == "front" else sample.messages
        try:
            rendered = render(messages, self.template, tokenizer.special_tokens_map)
        except ValueError as error:
            raise _bad(sample, str(error), "Correct the turns, or choose another template") from error
        image_token_id: int = self.processor.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
        return tokenize_conversation(sample, rendered, tokenizer, image_token_id, num_image_tokens, self.max_length)

    def _refuse_oversized(self, sample: Sample) -> None:
        """Refuse what would be cut down to a small part of itself: time and memory go with the whole of it."""
        num_characters = sum(len(message.content) for message in sample.messages)
        most = max(_MOST_CHARACTERS, _CHARACTERS_PER_TOKEN * self.max_length)
        if num_characters > most:
            raise _bad(sample, f"{num_characters} characters of text, at most {most} are read", "Cut the row in pieces")
        if len(sample.messages) > self.max_length:  # each takes a token at least
            raise _bad(
                sample,
                f"{len(sample.messages)} turns, more than the {self.max_length} tokens of model_max_length",
                "Cut the row in pieces",
            )

    def _vision(self, sample: Sample) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return the sample's vision inputs and how many placeholders each of its images takes."""
        if not sample.images:
            return {}, []
        if self.load_features is not None:
            loaded = [self.load_features(image) for image in sample.images]
            features = [feature for feature in loaded if feature is not None]
            if len(features) == len(loaded):
                return {"vision_features": torch.stack(features)}, [len(feature) for feature in features]
        made: list[dict[str, torch.Tensor]] = []
        counts: list[int] = []
        for k in range(len(sample.images)):  # one at a time: many large images would not fit into memory together
            inputs, count = image_inputs(self.processor, [open_sample_image(sample, k, self.limits)])
            made.append(inputs)
            counts += count
            if sum(counts) > self.max_length:
                raise _bad(
                    sample,
                    f"row longer than the limit: its first {k + 1} of {len(sample.images)} images take {sum(counts)} "
                    f"tokens and the limit is {self.max_length}",
                    "Raise model_max_length, or give the row fewer images",
                )
        return {name: torch.cat([inputs[name] for inputs in made]) for name in made[0]}, counts


def build_encoder(
    options: DataArguments, processor: ProcessorMixin, load_features: LoadFeatures | None = None
) -> SampleEncoder:
    """Return the encoder of a recipe.

    Raises:
        ValueError: As `SampleEncoder`.
    """
    limits = ImageLimits(options.max_image_pixels, options.min_image_side)
    return SampleEncoder(
        processor, options.template, options.model_max_length, options.image_position, limits, load_features
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
