"""What the task files over the demo's held-out scenes call (``eval/tasks``): question, picture and scores.

A document has ``image``, ``question``, ``answer`` (the reference sentence) and ``words`` (the part of it that only the
picture tells).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SCENE_TABLES = Path(".cache/demo/eval")
"""Where the task files look for the demo's scenes, from the root of the repository."""


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the picture of a document."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question, between what the prompt variant puts before and behind it."""
    around = lmms_eval_specific_kwargs or {}
    return around.get("pre_prompt", "") + doc["question"] + around.get("post_prompt", "")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the answer is the reference sentence, and whether it holds the words that the picture tells."""
    answer = results[0].strip()
    return {"exact_match": float(answer == doc["answer"]), "has_words": float(_holds(answer, doc["words"]))}


def process_presence(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return the scores of a yes-no question as POPE counts them; an answer that is neither is wrong, and a no.

    Source: Li et al. 2023, arXiv:2305.10355. Its metrics need the whole set, so each gets the pair (said, true).
    """
    said = (re.findall(r"[a-z]+", results[0].lower()) or [""])[0]
    true = doc["words"].lower()
    pair = (said == "yes", true == "yes")
    return {"accuracy": float(said == true), **{name: pair for name in ("precision", "recall", "f1", "yes_ratio")}}


def precision(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the share of things said to be there that are there; 0 if none is said to be."""
    return _share([true for said, true in pairs if said])


def recall(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the share of things that are there that are said to be; 0 if there are none."""
    return _share([said for said, true in pairs if true])


def f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the harmonic mean of precision and recall; 0 if both are."""
    both = precision(pairs) + recall(pairs)
    return 2 * precision(pairs) * recall(pairs) / both if both else 0.0


def yes_ratio(pairs: Sequence[tuple[bool, bool]]) -> float:
    """Return the share of questions answered with yes."""
    return _share([said for said, _ in pairs])


def _holds(answer: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words.lower())}\b", answer.lower()) is not None


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
