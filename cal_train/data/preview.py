"""Samples as coloured tokens: what is prompt, what is supervised, where the images are."""

import html
from dataclasses import dataclass
from typing import Literal

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from cal_train.data.examples import SampleEncoder, open_sample_image
from cal_train.data.images import count_image_tokens
from cal_train.data.suspicions import Suspicion, suspicions
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
.problem, .suspicion {{ color: #a4161a; }} .suspicion {{ font-weight: bold; }}
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
    """One row: a title with its place and counts, what looks wrong, and its segments; or else its problem."""

    title: str
    counts: str = ""
    segments: tuple[Segment, ...] = ()
    problem: Problem | None = None
    suspicions: tuple[Suspicion, ...] = ()


def preview_sample(row: Sample | Problem, encoder: SampleEncoder) -> Preview:
    """Return a row as it will be trained; a bad row comes with its problem."""
    if isinstance(row, Problem):
        return Preview(f"row {row.row}, id {row.id}", problem=row)
    sample = row
    try:
        images = [open_sample_image(sample, k, encoder.limits) for k in range(len(sample.images))]
        num_image_tokens = count_image_tokens(encoder.processor, [(image.height, image.width) for image in images])
        example = encoder.tokenize(sample, num_image_tokens)
    except BadSampleError as error:
        return preview_sample(error.problem, encoder)
    num_supervised = int((example.labels != IGNORE_INDEX).sum())
    counts = (
        f"{len(example.input_ids)} tokens: {num_supervised} supervised, {sum(num_image_tokens)} for "
        f"{len(num_image_tokens)} images; {example.num_cut} tokens were cut"
    )
    tokenizer = encoder.processor.tokenizer
    segments = tuple(token_segments(example, tokenizer))
    found = suspicions(sample, example, images, tokenizer, encoder.template)
    return Preview(f"{sample.file}, row {sample.row}, id {sample.id}", counts, segments, suspicions=found)


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
    if verdict := _verdict(previews):
        page.append(f"\n{verdict}", style="bold red")
    for preview in previews:
        page.append(f"\n\n{preview.title}\n", style="bold")
        if preview.problem:
            page.append(f"{preview.problem.problem}. {preview.problem.cure}", style="red")
            continue
        page.append(f"{preview.counts}\n", style="dim")
        for suspicion in preview.suspicions:
            page.append(f"! {suspicion}\n", style="bold red")
        for i, segment in enumerate(preview.segments):
            page.append(segment.text.replace("\n", "⏎\n"), style=_TERMINAL_STYLES[segment.kind][i % 2])
    return page


def to_html(previews: list[Preview]) -> str:
    """Return the previews as one self-contained page; every text from the data is escaped."""
    legend = " ".join(f'<span class="{kind}">{html.escape(meaning)}</span>' for kind, meaning in _LEGEND.items())
    verdict = _verdict(previews)
    parts = [f'<p class="suspicion">{html.escape(verdict)}</p>'] if verdict else []
    for preview in previews:
        parts.append(f"<h2>{html.escape(preview.title)}</h2>")
        if preview.problem:
            parts.append(f'<p class="problem">{html.escape(f"{preview.problem.problem}. {preview.problem.cure}")}</p>')
            continue
        tokens = (
            f'<span class="{segment.kind}">{html.escape(segment.text)}</span>'.replace("\n", "⏎\n")
            for segment in preview.segments
        )
        parts.append(f"<p>{html.escape(preview.counts)}</p>")
        parts += [f'<p class="suspicion">! {html.escape(str(suspicion))}</p>' for suspicion in preview.suspicions]
        parts.append(f"<pre>{''.join(tokens)}</pre>")
    return _PAGE.format(legend=legend, body="\n".join(parts))


def _verdict(previews: list[Preview]) -> str:
    """Return one line about all rows, empty if nothing looks wrong."""
    num_bad = sum(preview.problem is not None for preview in previews)
    num_suspect = sum(bool(preview.suspicions) for preview in previews)
    parts = [f"{num_bad} cannot be trained on"] * bool(num_bad) + [f"{num_suspect} look wrong (!)"] * bool(num_suspect)
    return f"Of {len(previews)} rows, {' and '.join(parts)}." if parts else ""
