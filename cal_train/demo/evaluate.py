"""What ``cal-train eval`` and ``cal-train score`` found about a model of the demo, by split and type of question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cal_train.demo.compare import ALL, Answers, area_under_curve
from cal_train.demo.scenes import QUESTION_TYPES
from cal_train.demo.splits import TEST_SPLITS
from cal_train.evals.lmms.results import read_results
from cal_train.folders import from_folder

_TASK_OF_SPLIT = {"heldout_scenes": "demo", "heldout_concepts": "demo_concepts", "heldout_style": "demo_style"}


@dataclass(frozen=True)
class Deltas:
    """Delta of the answer tokens (end marks included) of a split, N in all.

    ``delta`` (N,) target logit with minus without the image; ``is_visual`` (N,) bool: the token belongs to what only
    the picture tells; ``types`` (N,) str: the type of the token's question.
    """

    delta: np.ndarray
    is_visual: np.ndarray
    types: np.ndarray


def tasks_of(split: str) -> list[str]:
    """Return the tasks of lmms-eval that ask a split's questions, by type of question."""
    return [f"{_TASK_OF_SPLIT[split]}_{type_}" for type_ in QUESTION_TYPES]


def blind_split(split: str) -> str:
    """Return the split whose questions are the same ones: without pictures the style of drawing is no difference."""
    return "heldout_scenes" if split == "heldout_style" else split


def read_answers(split: str, data: Path, seen: Path, blind: Path) -> Answers:
    """Return which answers of a split are the reference sentence, word for word.

    Args:
        split: One of `TEST_SPLITS`.
        data: Its file, its truth beside it.
        seen: Results folder of ``cal-train eval``.
        blind: The same with ``--without_image true``.

    Raises:
        ValueError: If a folder has no such results, or they are of other questions.
    """
    truth = json.loads(data.with_suffix(".truth.json").read_text(encoding="utf-8"))
    rows = json.loads(data.read_text(encoding="utf-8"))
    columns: dict[str, list] = {name: [] for name in Answers.__dataclass_fields__}
    found = {"is_right": (seen, split), "is_right_blind": (blind, blind_split(split))}
    samples = {column: read_results(folder)[1] for column, (folder, _) in found.items()}
    for type_, *tasks in zip(QUESTION_TYPES, *(tasks_of(of) for _, of in found.values()), strict=True):
        asked = [row for row in rows if truth[row["id"]][0]["type"] == type_]
        columns["types"] += [type_] * len(asked)
        columns["scenes"] += [truth[row["id"]][0]["scene"] for row in asked]
        for (column, (folder, _)), task in zip(found.items(), tasks, strict=True):
            answered = samples[column].get(task, [])
            if [sample["target"] for sample in answered] != [row["conversations"][-1]["value"] for row in asked]:
                raise ValueError(f"{folder}, task {task}: the answers are to other questions than those of {data}")
            columns[column] += [sample["answer"].strip() == sample["target"] for sample in answered]
    return Answers(**{name: np.array(column) for name, column in columns.items()})


def pooled(runs: Sequence[Answers]) -> Answers:
    """Return the answers of several seeds as one; a scene's answers of all seeds stay together."""
    return Answers(**{name: np.concatenate([getattr(run, name) for run in runs]) for name in vars(runs[0])})


def write_scored_rows(path: Path, files: Mapping[str, Path], num_scenes: int) -> None:
    """Write the questions about the first scenes of all held-out splits as one data file.

    Args:
        path: Data file to write. Its images are relative to the folder of the splits, its ids are ``SPLIT/ID``.
        files: The splits' files by name, all in one folder.
        num_scenes: Scenes of each split.
    """
    chosen = []
    for split in (split for split in TEST_SPLITS if split in files):
        rows = json.loads(files[split].read_text(encoding="utf-8"))[: num_scenes * len(QUESTION_TYPES)]
        chosen += [row | {"id": f"{split}/{row['id']}"} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen), encoding="utf-8")


def read_deltas(scores: Path, data: Path, files: Mapping[str, Path], model: Path) -> dict[str, Deltas]:
    """Return the deltas of each split from a score file.

    Args:
        scores: Of `cal_train.evals.score`.
        data: Of `write_scored_rows`.
        files: The splits' files by name, their truth beside them.
        model: Folder of the scored model, for its tokenizer.
    """
    tokenizer = from_folder(AutoTokenizer, model)
    answers = {row["id"]: row["conversations"][-1]["value"] for row in json.loads(data.read_text(encoding="utf-8"))}
    truth = {
        split: json.loads(file.with_suffix(".truth.json").read_text(encoding="utf-8"))
        for split, file in files.items()
        if split in TEST_SPLITS
    }
    columns: dict[str, tuple[list, list, list]] = {split: ([], [], []) for split in truth}
    for line in scores.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        split, _, row_id = record["id"].partition("/")
        (turn,) = truth[split][row_id]
        ids = [record["input_ids"][position] for position in record["label_positions"]]
        delta, is_visual, types = columns[split]
        delta += record["delta"]
        is_visual += visual_tokens(tokenizer, answers[record["id"]], turn["spans"], ids)
        types += [turn["type"]] * len(ids)
    return {split: Deltas(*map(np.array, found)) for split, found in columns.items()}


def detection(runs: Sequence[Deltas]) -> dict[str, float]:
    """Return delta's AUC as a detector of what only the picture tells, over all answer tokens and by question type.

    Several runs (seeds) count as one.
    """
    delta, is_visual, types = (
        np.concatenate([getattr(run, name) for run in runs]) for name in ("delta", "is_visual", "types")
    )
    by_type = {ALL: area_under_curve(delta, is_visual)}
    for type_ in (type_ for type_ in QUESTION_TYPES if type_ in types):
        chosen = types == type_
        by_type[type_] = area_under_curve(delta[chosen], is_visual[chosen])
    return by_type


def visual_tokens(
    tokenizer: PreTrainedTokenizerBase, answer: str, spans: list[tuple[int, int]], label_ids: list[int]
) -> list[bool]:
    """Return for each label token whether it overlaps a visual span of the answer.

    Raises:
        ValueError: If the labels are not the answer's tokens, with at most marks behind them.
    """
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if ids != label_ids[: len(ids)]:
        raise ValueError(f"labels {label_ids} are not the tokens {ids} of the answer {answer!r}")
    marks = [False] * (len(label_ids) - len(ids))
    return [any(start < b and a < end for a, b in spans) for start, end in offsets] + marks
