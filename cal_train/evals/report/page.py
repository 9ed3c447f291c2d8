"""The page: one HTML file that needs nothing else, and that runs nothing of what it shows.

Captions are untrusted. They travel as JSON in ``<script type="application/json">`` with every ``<`` escaped, characters
that steer the display are written out, and the page's script sets text, never markup. A content security policy allows
exactly the page's own script and style, by their digests, and images as data URIs.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cal_train.evals.report.charts import curve_chart, histogram_chart
from cal_train.evals.report.checks import Finding, find_problems
from cal_train.evals.report.map_payload import map_records
from cal_train.evals.report.run_folder import Curves, ResultTable
from cal_train.evals.report.samples import Sample, prompt_of
from cal_train.evals.report.scores import ScoredRow
from cal_train.evals.report.summary import Summary, bin_edges, summarize, surprises
from cal_train.evals.report.words import CLASSES
from cal_train.evals.sight.values import SampleSight

MAX_SAMPLES = 50_000
MAX_TOKENS = 3_000_000

# Controls but tab and newline, zero-width and bidirectional controls, separators, tags, halves of surrogate pairs.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class ScoredModel:
    """The scores of one model; ``max_length`` as in the run that scored, if known; the file that they are from."""

    name: str
    rows: Sequence[ScoredRow]
    max_length: int | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class PageContent:
    """Everything that a page shows. ``models`` are none, one, or a pair of equal samples; limits in logits.

    ``samples`` and ``thumbnails`` are as from `cal_train.evals.report.samples`; ``notes`` are sentences about what the
    page leaves out. ``maps`` are by sample and model, see `cal_train.evals.report.maps`; ``map_layers`` the first and
    last layer whose attention they average, None for all.
    """

    title: str
    models: Sequence[ScoredModel]
    low: float
    high: float
    samples: Sequence[Sample | None]
    thumbnails: dict[Path | bytes, str]
    curves: Curves
    tables: Sequence[ResultTable]
    notes: Sequence[str] = ()
    maps: dict[int, list[SampleSight]] = field(default_factory=dict)
    map_layers: tuple[int, int] | None = None


def write_page(content: PageContent, output: str | Path) -> Path:
    """Write the page and return its path; what the limits leave out is said on it."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render_page(content), encoding="utf-8")
    return output


def render_page(content: PageContent) -> str:
    """Return the page as text.

    The heat map holds the first 50,000 samples, or fewer so that it has at most 3 million label tokens; distributions
    and counts are always of all.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cal_train.evals.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style, script = (_resource(environment, name) for name in ("page.css", "page.js"))
    shown = num_shown(content.models)
    summaries = _summaries(content)
    num_samples = len(content.models[0].rows) if content.models else 0
    notes = list(content.notes)
    runs = list(dict.fromkeys(run for by_run in content.curves.values() for run in by_run))
    if shown < num_samples:
        notes.append(f"The heat map shows the first {shown:,} of {num_samples:,} samples; everything else counts all.")
    return environment.get_template("page.html.jinja").render(
        title=visible_text(content.title),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        models=[(visible_text(model.name), summary, chart) for model, summary, chart in summaries],
        findings=[
            (
                visible_text(model.name),
                [_visible(finding) for finding in find_problems(model.rows, summary, model.max_length)],
            )
            for model, summary, _ in summaries
        ],
        low=content.low,
        high=content.high,
        classes=CLASSES,
        class_medians=_class_medians([summary for _, summary, _ in summaries]),
        curves=[curve_chart(metric, by_run) for metric, by_run in content.curves.items()],
        runs=runs,
        run_index={run: k for k, run in enumerate(runs)},
        tables=content.tables,
        is_number=lambda cell: cell[:1] in "0123456789+-.[",
        notes=notes,
        num_samples=num_samples,
        num_maps=len(content.maps),
        map_layers=content.map_layers,
        data=Markup(script_json(payload(content, shown))),
        images=Markup(script_json(list(content.thumbnails.values()))),
    )


def num_shown(models: Sequence[ScoredModel]) -> int:
    """Return how many samples the heat map holds, from the first."""
    if not models:
        return 0
    num_tokens = np.cumsum([len(row.tokens) * len(models) for row in models[0].rows[:MAX_SAMPLES]])
    return int((num_tokens <= MAX_TOKENS).sum())


def payload(content: PageContent, shown: int) -> dict[str, Any]:
    """Return what the heat map is drawn from, as plain values: numbers in logits, rounded to hundredths."""
    vocabulary: dict[str, int] = {}
    pictures: dict[str, int] = {}
    words: dict[str, int] = {}
    place_of = {image: k for k, image in enumerate(content.thumbnails)}
    surprise = surprises(content.models[0].rows) if content.models else np.empty(0)
    records = []
    for i in range(shown):
        row, sample = content.models[0].rows[i], content.samples[i] if content.samples else None
        image = sample.images[0] if sample and sample.images else None
        records.append(
            {
                "id": visible_text(row.id),
                "prompt": visible_text(prompt_of(sample)),
                "image": place_of.get(image, -1) if image is not None else -1,
                "tokens": [vocabulary.setdefault(visible_text(token), len(vocabulary)) for token in row.tokens],
                "gaps": (np.flatnonzero(np.diff(row.positions) > 1) + 1).tolist(),
                "surprise": round(float(surprise[i]), 2),
                "scores": [_scores(model.rows[i]) for model in content.models],
            }
        )
        if i in content.maps:
            records[-1]["maps"] = map_records(content.maps[i], pictures, words, visible_text)
    return {
        "names": [visible_text(model.name) for model in content.models],
        "low": content.low,
        "high": content.high,
        "vocabulary": list(vocabulary),
        "samples": records,
        "pictures": list(pictures),
        "words": list(words),
    }


def _scores(row: ScoredRow) -> list[list[float]]:
    """Return logits with and without the image, delta and weight."""
    values = (row.logit_with, row.logit_without, row.delta, row.weight)
    return [np.round(value.astype(np.float64), 2).tolist() for value in values]


def _summaries(content: PageContent) -> list[tuple[ScoredModel, Summary, Any]]:
    if not content.models:
        return []
    edges = bin_edges([model.rows for model in content.models], content.low, content.high)
    summaries = [summarize(model.rows, content.low, content.high, edges) for model in content.models]
    tallest = max(int(summary.histogram.counts.sum(0).max()) for summary in summaries)
    return [
        (model, summary, histogram_chart(summary.histogram, content.low, content.high, tallest))
        for model, summary in zip(content.models, summaries, strict=True)
    ]


def _class_medians(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """Return the median delta of each word class that occurs, one cell per model."""
    medians = [{name: median for name, _, median in summary.class_medians} for summary in summaries]
    names = [name for name in CLASSES if any(name in one for one in medians)]
    return [(name, [f"{one[name]:.2f}" if name in one else "" for one in medians]) for name in names]


def script_json(value: Any) -> str:
    """Return JSON that can stand inside a script element: it holds no ``<``, ``>``, ``&`` and no line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible_text(text: str) -> str:
    """Return a text with every character that steers the display written out, as in ``[U+202E]``."""
    return _STEERING.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def _visible(finding: Finding) -> Finding:
    return Finding(visible_text(finding.problem), visible_text(finding.cure))


def _resource(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
