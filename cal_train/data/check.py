"""Every row of a data set through the checks that training makes, without training."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from cal_train.data.examples import SampleEncoder, open_sample_image
from cal_train.data.images import ImageLimits, count_image_tokens
from cal_train.data.records import Rows
from cal_train.data.sample_stream import SampleFiles
from cal_train.data.sources import RowSummary, Source, parsed_rows
from cal_train.types import IGNORE_INDEX, BadSampleError, Problem, Sample

_ROWS_PER_ROUND = 256


@dataclass
class CheckReport:
    """What was found. The token counts stay 0 where no model folder was given."""

    num_rows: int = 0
    num_images: int = 0
    num_text_only: int = 0
    num_supervised: int = 0
    num_truncated: int = 0
    num_cut: int = 0
    num_leading_answers: int = 0
    duplicate_ids: list[tuple[str, str, int]] = field(default_factory=list)
    """File, id and how often it occurs there."""
    problems: list[Problem] = field(default_factory=list)


def check_source(
    report: CheckReport,
    source: Source,
    rows: Rows,
    summary: RowSummary,
    limits: ImageLimits,
    encoder: SampleEncoder | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> None:
    """Check all rows of one data file and add what is found to the report.

    Args:
        report: Is added to.
        source: Where the rows come from.
        rows: Its rows.
        summary: Of `cal_train.data.sources.summarize`.
        limits: Which images are refused.
        encoder: If given, rows are also rendered and tokenized as it does.
        on_rows: Called with the number of rows done since the last call.
    """
    check_rows(report, parsed_rows(source, rows), limits, encoder, on_rows)
    report.num_leading_answers += summary.num_leading_answers
    report.duplicate_ids += [(str(source.path), id, count) for id, count in summary.duplicate_ids.items()]


def check_files(
    report: CheckReport,
    files: SampleFiles,
    limits: ImageLimits,
    encoder: SampleEncoder | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> None:
    """Check all rows of a streamed source as `check_source` does; only their ids are held."""
    ids: Counter[str] = Counter()

    def counted() -> Iterator[Sample | Problem]:
        for row in files:
            ids[row.id] += 1
            yield row

    report.problems += files.blocks.problems
    check_rows(report, counted(), limits, encoder, on_rows)
    report.num_leading_answers += files.rows.num_leading_answers
    report.duplicate_ids += [(str(files.source.path), id, count) for id, count in ids.items() if count > 1]


def check_rows(
    report: CheckReport,
    rows: Iterable[Sample | Problem],
    limits: ImageLimits,
    encoder: SampleEncoder | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> None:
    """Open the images of rows, tokenize them where an encoder is given, and add what is found to the report."""
    waiting = iter(rows)
    # Threads for the images only: decoding releases the interpreter lock, and a tokenizer is not safe to share.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as executor:
        while batch := list(islice(waiting, _ROWS_PER_ROUND)):
            for opened in executor.map(lambda row: _open_row(row, limits), batch):
                _add(report, opened, encoder)
            report.num_rows += len(batch)
            on_rows(len(batch))


def _open_row(row: Sample | Problem, limits: ImageLimits) -> tuple[Sample, list[tuple[int, int]]] | Problem:
    """Return the sample and the (height, width) of each of its images, decoded once, or the row's problem."""
    if isinstance(row, Problem):
        return row
    try:
        return row, list(image_sizes(row, limits))
    except BadSampleError as error:
        return error.problem


def image_sizes(sample: Sample, limits: ImageLimits) -> Iterator[tuple[int, int]]:
    """Decode each image of a sample and yield its (height, width) in pixels.

    Raises:
        BadSampleError: If an image cannot be used.
    """
    for k in range(len(sample.images)):
        image = open_sample_image(sample, k, limits)
        yield image.height, image.width


def _add(
    report: CheckReport, opened: tuple[Sample, list[tuple[int, int]]] | Problem, encoder: SampleEncoder | None
) -> None:
    if isinstance(opened, Problem):
        report.problems.append(opened)
        return
    sample, sizes = opened
    report.num_images += len(sizes)
    report.num_text_only += not sizes
    if encoder is None:
        return
    try:
        example = encoder.tokenize(sample, count_image_tokens(encoder.processor, sizes))
    except BadSampleError as error:
        report.problems.append(error.problem)
        return
    report.num_supervised += int((example.labels != IGNORE_INDEX).sum())
    report.num_truncated += example.num_cut > 0
    report.num_cut += example.num_cut
