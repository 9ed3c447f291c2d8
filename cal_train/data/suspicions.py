"""What looks wrong with a row that can be trained on: a wrong template, shifted labels, cut text, an empty image.

A row that cannot be trained on comes as a `cal_train.types.Problem` instead. A suspicion may be mistaken; it names what
was seen, so that a person can tell.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from cal_train.data.conversation import TURN_MARKS, load_template, missing_marks
from cal_train.types import IGNORE_INDEX, Sample, TokenizedExample

_MARK = re.compile(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>")
_GREY = (127, 129)  # what decoders fill the missing part of a JPEG with
_MISSING_SHARE = 0.1


@dataclass(frozen=True)
class Suspicion:
    """What was seen, and what to look at; both are sentences without their full stop."""

    problem: str
    cure: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.cure}."


def suspicions(
    sample: Sample,
    example: TokenizedExample,
    images: Sequence[Image.Image],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> tuple[Suspicion, ...]:
    """Return what looks wrong, the gravest first; an empty tuple is no proof that all is right.

    Args:
        sample: The row.
        example: Its tokens and labels.
        images: Its images, PIL RGB.
        tokenizer: That made the tokens.
        template: The Jinja source that made the text.
    """
    is_plain = template == load_template("plain")
    return (
        *_label_suspicions(sample, example, tokenizer, is_plain),
        *([] if is_plain else _template_suspicions(example, tokenizer)),
        *_begin_suspicions(example, tokenizer),
        *_length_suspicions(example),
        *(found for k, image in enumerate(images) if (found := image_suspicion(image, k))),
    )


def image_suspicion(image: Image.Image, k: int = 0) -> Suspicion | None:
    """Return what looks wrong with an image that could be decoded, or None."""
    whole: Any = image.getextrema()  # (lowest, highest) of each channel
    if all(high - low <= 2 for low, high in whole):
        colour = "#" + "".join(f"{low:02x}" for low, _ in whole)
        return Suspicion(f"image {k + 1} is one plain colour ({colour})", "Open it: its download may have failed")
    top = int(image.height * (1 - _MISSING_SHARE))
    rest: Any = image.crop((0, top, image.width, image.height)).getextrema()
    if image.height > 1 / _MISSING_SHARE and all(_GREY[0] <= low and high <= _GREY[1] for low, high in rest):
        return Suspicion(f"the lower end of image {k + 1} is plain grey", "Open it: a JPEG file that was cut looks so")
    return None


def _label_suspicions(
    sample: Sample, example: TokenizedExample, tokenizer: PreTrainedTokenizerBase, is_plain: bool
) -> Iterator[Suspicion]:
    """Compare what has labels with what the assistant says, turn by turn."""
    answers = [message.content for message in sample.messages if message.role == "assistant"]
    stretches = list(labelled_stretches(example.labels))
    if len(stretches) != len(answers) and not example.num_cut:
        yield Suspicion(
            f"{len(answers)} answers, but {len(stretches)} supervised stretches of tokens",
            "The template leaves out or joins turns, or an answer is empty: choose the template of this model",
        )
        return
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for k, (answer, stretch) in enumerate(zip(answers, stretches, strict=False)):
        is_cut = bool(example.num_cut) and k == len(stretches) - 1
        found = _stretch_suspicion(answer, stretch, tokenizer, is_cut, is_plain)
        if found is None and sum(id in special for id in stretch) > 1:
            found = Suspicion(
                f"the labels of answer {k + 1} reach past its end mark: {_tail(tokenizer, stretch)!r}",
                "The template supervises the head of the next turn: correct its generation marks",
            )
        if found is not None:
            yield found


def _stretch_suspicion(
    answer: str, stretch: list[int], tokenizer: PreTrainedTokenizerBase, is_cut: bool, is_plain: bool
) -> Suspicion | None:
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in stretch:
        return Suspicion(
            f"the answer {_head(answer)!r} has characters that the tokenizer does not know",
            "They are trained as the unknown token: is this the tokenizer of the model?",
        )
    said, wanted = _squeezed(str(tokenizer.decode(stretch, skip_special_tokens=False))), _squeezed(answer)
    if is_cut:
        wanted = wanted[: len(said)]
    if not wanted:
        return None if is_cut else Suspicion("an answer is empty: only its end is supervised", "Remove the turn")
    if not said.startswith(wanted):
        return Suspicion(
            f"the supervised tokens begin {_head(said)!r}, but the answer begins {_head(answer)!r}",
            "The labels are shifted, or the template changes the answer: correct its generation marks",
        )
    if said == wanted and not is_cut and not is_plain:
        return Suspicion(
            f"no end mark is supervised behind the answer {_head(answer)!r}",
            "The model will not learn to stop: choose a template that ends its answers",
        )
    return None


def _template_suspicions(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Suspicion]:
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = dict.fromkeys(mark for used in TURN_MARKS.values() for mark in used if mark in special)
    present = set(example.input_ids.tolist())
    if marks and not any(special[mark] in present for mark in marks):
        fitting = [name for name, used in TURN_MARKS.items() if used and not missing_marks(name, tokenizer)]
        yield Suspicion(
            f"the tokenizer has the turn marks {', '.join(marks)}, and the template uses none of them",
            f"Right only if the model was trained so; otherwise choose template {', '.join(fitting) or 'chat'}",
        )
    text = str(tokenizer.decode(example.input_ids[example.labels == IGNORE_INDEX], skip_special_tokens=False))
    if cut := sorted(set(_MARK.findall(text)) - set(special)):
        yield Suspicion(
            f"{', '.join(cut)} is no token of this tokenizer, so the model reads it in pieces",
            "The template, or the text, is made for another model",
        )


def _begin_suspicions(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> Iterator[Suspicion]:
    begin, ids = tokenizer.bos_token_id, example.input_ids[:2].tolist()
    if begin is None:
        return
    if ids == [begin, begin]:
        yield Suspicion(
            f"the row begins with {tokenizer.bos_token!r} twice",
            "Take it out of the chat template, or out of the first turn",
        )
    adds_begin = tokenizer("a")["input_ids"][:1] == [begin]  # pyright: ignore[reportIndexIssue]
    if adds_begin and ids[:1] != [begin]:
        yield Suspicion(
            f"the row does not begin with {tokenizer.bos_token!r}, which this tokenizer puts before a text",
            "Choose a template that writes it",
        )


def _length_suspicions(example: TokenizedExample) -> Iterator[Suspicion]:
    if example.num_cut:
        yield Suspicion(
            f"the last {example.num_cut} tokens are cut off, and with them the end of an answer",
            "Raise model_max_length; images take tokens too",
        )


def labelled_stretches(labels_S: torch.Tensor) -> Iterator[list[int]]:
    """Yield the ids of each unbroken run of label tokens."""
    stretch: list[int] = []
    for label in labels_S.tolist():
        if label != IGNORE_INDEX:
            stretch.append(label)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _squeezed(text: str) -> str:
    """Return a text without white space and in one normal form, which tokenizers may change."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _head(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:30]}…"


def _tail(tokenizer: PreTrainedTokenizerBase, stretch: list[int]) -> str:
    return str(tokenizer.decode(stretch[-6:], skip_special_tokens=False))
