"""From one or two paths to a page, and to pictures: reads what is there and joins it."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cal_train.data.score_notes import file_digest, read_about
from cal_train.evals.report.page import PageContent, ScoredModel
from cal_train.evals.report.run_folder import ReportSource, merge_curves, read_source
from cal_train.evals.report.samples import find_samples, thumbnails
from cal_train.evals.report.scores import pair_up, read_scores
from cal_train.evals.report.summary import surprises
from cal_train.types import Sample

logger = logging.getLogger(__name__)

MAX_THUMBNAILS = 1000


@dataclass(frozen=True)
class DataPlace:
    """The data file that was scored, and the folder of its images."""

    data: Path
    image_root: Path | None


def gather(
    paths: Sequence[str | Path],
    place: DataPlace | None = None,
    low: float | None = None,
    high: float | None = None,
    max_thumbnails: int = MAX_THUMBNAILS,
) -> PageContent:
    """Return what a page about one path, or about a pair, shows.

    Args:
        paths: One or two score files or run folders; of a pair, the first is the baseline.
        place: Where prompts and images are. Default: what ``FILE.about.json`` beside the scores names, if that file is
            still the one that was scored.
        low: Lower clamp limit in logits. Default: that of the run that scored, else 1.
        high: Upper clamp limit in logits. Default: that of the run that scored, else 5.
        max_thumbnails: Distinct images on the page; half of them go to the most surprising samples.

    Raises:
        ValueError: If a path has nothing to report, a file is not what it should be, or a pair does not match.
    """
    sources = [read_source(path) for path in paths]
    scored = [source for source in sources if source.scores is not None]
    if len(sources) == 2 and len(scored) == 1:
        missing = next(path for path, source in zip(paths, sources, strict=True) if source.scores is None)
        raise ValueError(f"{missing} has no scores to compare with: score the same data with it, as scores.jsonl")
    abouts = [read_about(source.scores) for source in scored if source.scores is not None]
    models = [_model(source, about) for source, about in zip(scored, abouts, strict=True)]
    if len(models) == 2:
        pair_up(list(models[0].rows), list(models[1].rows), (str(scored[0].scores), str(scored[1].scores)))
    notes: list[str] = []
    samples: list[Sample | None] = []
    pictures: dict[Path | bytes, str] = {}
    if models:
        place = place or _remembered_place(abouts[0], notes)
        if place is not None:
            samples = find_samples(models[0].rows, place.data, place.image_root)
            pictures = _pictures(models[0], samples, max_thumbnails, notes)
    limits = abouts[0].get("weighting", {}) if abouts else {}
    return PageContent(
        title=" and ".join(_names(sources)),
        models=[dataclasses.replace(model, name=name) for name, model in zip(_names(scored), models, strict=True)],
        low=_limit(low, limits, "low", 1.0),
        high=_limit(high, limits, "high", 5.0),
        samples=samples,
        thumbnails=pictures,
        curves=merge_curves(sources),
        tables=[table for source in sources for table in source.tables],
        notes=notes,
    )


def _model(source: ReportSource, about: dict[str, Any]) -> ScoredModel:
    assert source.scores is not None
    token, max_length = about.get("image_token_id"), about.get("max_length")
    rows = read_scores(source.scores, token if isinstance(token, int) else None)
    return ScoredModel(source.name, rows, max_length if isinstance(max_length, int) else None, source.scores)


def _names(sources: Sequence[ReportSource]) -> list[str]:
    """Return the sources' names; equal ones are told apart by their folders."""
    names = [source.name for source in sources]
    if len(set(names)) == len(names):
        return names
    return [
        f"{source.scores.resolve().parent.name}/{source.name}" if source.scores else source.name for source in sources
    ]


def _limit(given: float | None, remembered: Any, name: str, default: float) -> float:
    if given is not None:
        return given
    value = remembered.get(name) if isinstance(remembered, dict) else None
    return float(value) if isinstance(value, int | float) else default


def _remembered_place(about: dict[str, Any], notes: list[str]) -> DataPlace | None:
    """Return where the scored data is, if it is still there and the same."""
    paths = about.get("paths") if isinstance(about.get("paths"), dict) else {}
    data, root = paths.get("data"), paths.get("image_root")  # pyright: ignore[reportOptionalMemberAccess]
    if not isinstance(data, str) or not isinstance(root, str) or not Path(data).is_file():
        notes.append("Without prompts and images: give --data and --image_root to see them.")
        return None
    if file_digest(data) != about.get("data_sha256"):
        notes.append(f"Without prompts and images: {data} has changed since it was scored (--data takes it anyway).")
        return None
    return DataPlace(Path(data), Path(root))


def _pictures(
    model: ScoredModel, samples: Sequence[Sample | None], limit: int, notes: list[str]
) -> dict[Path | bytes, str]:
    by_surprise = np.argsort(-surprises(model.rows), kind="stable").tolist()
    made, failed = thumbnails((samples[i] for i in by_surprise), limit // 2)
    rest, failed_too = thumbnails(
        (s for s in samples if not (s and s.images and s.images[0] in made)), limit - len(made)
    )
    made |= rest
    wanted = {sample.images[0] for sample in samples if sample is not None and sample.images}
    missing = sum(sample is None for sample in samples)
    if len(wanted) > len(made) + max(failed, failed_too):
        notes.append(f"Images are shown for {len(made):,} of {len(wanted):,}, half of them by surprise, half in order.")
    if failed or failed_too:
        notes.append(f"{max(failed, failed_too)} images could not be read.")
    if missing:
        notes.append(f"{missing} samples are not usable in the data file any more (images missing?): shown without.")
    return made
