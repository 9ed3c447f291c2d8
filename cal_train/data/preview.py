"""Samples as coloured tokens: what is prompt, what is supervised, where the images are."""

import html
from dataclasses import dataclass
from typing import Literal

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from cal_train.data.check import image_sizes
from cal_train.data.dataset import VlmDataset
from cal_train.data.examples import SampleEncoder
from cal_train.data.images import count_image_tokens
from cal_train.types import IGNORE_INDEX, BadSampleError, Problem, Sample, TokenizedExample

Kind = Literal["prompt", "supervised", "image"]

_LEGEND: dict[Kind, str] = {"prompt": "prompt", "supervised": "supervised (has a label)", "image": "image span"}
_TERMINAL_STYLES: dict[Kind, tuple[str, str]] = {  # two shades each, in turn, so that token borders show
    "prompt": ("grey70", "grey50"),
    "supervised": ("bold green", "bold cyan"),
    "image": ("black on yellow", "black on yellow"),
}
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Preview</title><style>
body {{ font: 15px/1.7 monospace; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1em; margin-bottom: .2em; }} pre {{ white-space: pre-wrap; margin: 0; }}
p {{ margin: .2em 0; color: #555; }} span {{ border-right: 1px solid #fff; border-radius: 2px; }}
.prompt {{ background: #e8e8e8; }} .supervised {{ background: #b7e4c7; }} .image {{ background: #ffe08a; }}
.problem {{ color: #a4161a; }}
</style></head><body><h1>Preview</h1><p>{legend}</p>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Segment:
    """One token, or one whole image span, as text."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Preview:
    """One row: a title with its place and counts, and its segments, or else its problem."""

    title: str
    counts: str = ""
    segments: tuple[Segment, ...] = ()
    problem: Problem | None = None


def preview_row(dataset: VlmDataset, i: int) -> Preview:
    """Return row ``i`` of the data set as it will be trained; a bad row comes with its problem."""
    try:
        return preview_sample(dataset.load_sample(i), dataset.encoder)
    except BadSampleError as error:
        return preview_sample(error.problem, dataset.encoder)


def preview_sample(row: Sample | Problem, encoder: SampleEncoder) -> Preview:
    """Return a row as it will be trained; a bad row comes with its problem."""
    if isinstance(row, Problem):
        return Preview(f"row {row.row}, id {row.id}", problem=row)
    sample = row
    try:
        num_image_tokens = count_image_tokens(encoder.processor, list(image_sizes(sample, encoder.limits)))
        example = encoder.tokenize(sample, num_image_tokens)
    except BadSampleError as error:
        return preview_sample(error.problem, encoder)
    num_supervised = int((example.labels != IGNORE_INDEX).sum())
    counts = (
        f"{len(example.input_ids)} tokens: {num_supervised} supervised, {sum(num_image_tokens)} for "
        f"{len(num_image_tokens)} images; {example.num_cut} tokens were cut"
    )
    segments = token_segments(example, encoder.processor.tokenizer)
    return Preview(f"{sample.file}, row {sample.row}, id {sample.id}", counts, tuple(segments))


def token_segments(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Return the tokens of an example in order, each image span as one segment ``<image ×n>``."""
    # Decoded behind a known token: alone, SentencePiece-like tokens lose their leading space.
    lead = tokenizer.encode("a", add_special_tokens=False)[-1:]
    lead_text = str(tokenizer.decode(lead, skip_special_tokens=False))
    image_ends = dict(example.image_spans)
    segments, position = [], 0
    while position < len(example.input_ids):
        if position in image_ends:
            segments.append(Segment(f"<image ×{image_ends[position] - position}>", "image"))  # noqa: RUF001
            position = image_ends[position]
            continue
        token = int(example.input_ids[position])
        text = str(tokenizer.decode([*lead, token], skip_special_tokens=False)).removeprefix(lead_text)
        segments.append(Segment(text, "prompt" if example.labels[position] == IGNORE_INDEX else "supervised"))
        position += 1
    return segments


def to_terminal(previews: list[Preview]) -> Text:
    """Return the previews as coloured text with a legend."""
    page = Text("legend: ")
    for kind, meaning in _LEGEND.items():
        page.append(f" {meaning} ", style=_TERMINAL_STYLES[kind][0]).append("  ")
    for preview in previews:
        page.append(f"\n\n{preview.title}\n", style="bold")
        if preview.problem:
            page.append(f"{preview.problem.problem}. {preview.problem.cure}", style="red")
            continue
        page.append(f"{preview.counts}\n", style="dim")
        for i, segment in enumerate(preview.segments):
            page.append(segment.text.replace("\n", "⏎\n"), style=_TERMINAL_STYLES[segment.kind][i % 2])
    return page


def to_html(previews: list[Preview]) -> str:
    """Return the previews as one self-contained page; every text from the data is escaped."""
    legend = " ".join(f'<span class="{kind}">{html.escape(meaning)}</span>' for kind, meaning in _LEGEND.items())
    parts = []
    for preview in previews:
        parts.append(f"<h2>{html.escape(preview.title)}</h2>")
        if preview.problem:
            parts.append(f'<p class="problem">{html.escape(f"{preview.problem.problem}. {preview.problem.cure}")}</p>')
            continue
        tokens = (
            f'<span class="{segment.kind}">{html.escape(segment.text)}</span>'.replace("\n", "⏎\n")
            for segment in preview.segments
        )
        parts.append(f"<p>{html.escape(preview.counts)}</p><pre>{''.join(tokens)}</pre>")
    return _PAGE.format(legend=legend, body="\n".join(parts))
