"""Weights from score files: which file belongs to which source, and whether it fits the run."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cal_train.cal.strategies import TokenWeighting
from cal_train.conf import Recipe
from cal_train.data.dataset import VlmDataset
from cal_train.data.score_notes import image_processing_digest, template_digest, tokenizer_digest
from cal_train.data.sources import Source, training_sources
from cal_train.data.stored_deltas import Scored, StoredDeltas

logger = logging.getLogger(__name__)


def score_files(recipe: Recipe) -> list[Path]:
    """Return the score file of each source, or none at all where CAL is off or runs its own second pass.

    Raises:
        ValueError: If some sources have one and others do not, or they are given in both places.
    """
    if not recipe.cal.cal:
        return []
    sources = training_sources(recipe.data)
    given = [source.scores for source in sources if source.scores is not None]
    if recipe.cal.cal_scores is not None:
        if given or len(sources) > 1:
            raise ValueError("cal_scores is for data_path; with a list of sources, give each its own scores: FILE")
        return [Path(recipe.cal.cal_scores)]
    if given and len(given) < len(sources):
        missing = next(source for source in sources if source.scores is None)
        raise ValueError(f"source {missing.path} has no scores, others do: give them to all, or to none")
    return given


def read_deltas(recipe: Recipe, weighting: TokenWeighting | None, dataset: VlmDataset) -> bool:
    """Let the training set read its deltas from score files, if the recipe names them; return whether it does.

    Raises:
        ValueError: If the weighting cannot follow from stored deltas, or as `StoredDeltas`.
    """
    files = score_files(recipe)
    if not files or weighting is None:
        return False
    check_storable(weighting)
    dataset.load_deltas = open_deltas(files, dataset, weighting)
    return True


def check_storable(weighting: TokenWeighting) -> None:
    """Refuse a weighting that needs more than the deltas of label tokens, or none at all.

    Raises:
        ValueError: Saying what to change.
    """
    if weighting.ablation is None:
        raise ValueError("cal_scores is given, but cal_strategy uniform weighs all tokens alike: leave one of them out")
    if weighting.scope == "flat":
        raise ValueError(
            "cal_scope flat smooths over tokens without labels, of which a score file holds no delta: use cal_scope "
            "labels, or leave cal_scores out"
        )


def open_deltas(files: Sequence[Path], dataset: VlmDataset, weighting: TokenWeighting) -> list[StoredDeltas]:
    """Return the checked deltas of each source, and log whose they are."""
    assert weighting.ablation is not None
    processor = dataset.processor
    needed = Scored(
        tokenizer_sha256=tokenizer_digest(processor.tokenizer),  # pyright: ignore[reportAttributeAccessIssue]
        template_sha256=template_digest(processor),
        images_sha256=image_processing_digest(processor),
        max_length=dataset.max_length,
        image_position=dataset.image_position,
        image_token_id=processor.image_token_id,  # pyright: ignore[reportAttributeAccessIssue]
        ablation=weighting.ablation,
    )
    found = []
    for file, rows, source in zip(files, dataset.rows, dataset.sources, strict=True):
        found.append(StoredDeltas(file, rows, needed))
        _announce(file, source, found[-1])
    return found


def _announce(file: Path, source: Source, deltas: StoredDeltas) -> None:
    logger.info(
        "weights of %s follow from %s, scored by %s: no pass without images runs", source.path, file, deltas.model
    )
    if deltas.num_left_out:
        logger.warning("%d rows of %s were left out as bad when it was scored", deltas.num_left_out, source.path)
