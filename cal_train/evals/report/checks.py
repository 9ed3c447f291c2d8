"""What a score file gives away about a wrong template, shifted labels, truncation, or an image that is not seen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cal_train.evals.report.scores import ScoredRow
from cal_train.evals.report.summary import Summary

_ROLE_MARKS = ("<|im_start|>", "USER:", "ASSISTANT:", "<image>", "<|start_header_id|>", "<start_of_turn>")
_MOST = 0.9
_MANY = 10  # samples, below which what most have in common may be chance


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong, in a sentence, and what to look at."""

    problem: str
    cure: str


def find_problems(rows: Sequence[ScoredRow], summary: Summary, max_length: int | None = None) -> list[Finding]:
    """Return what looks wrong in a score file, the gravest first; an empty list is no proof that all is right.

    Args:
        rows: The samples.
        summary: Of the same samples.
        max_length: Tokens per row that the samples were cut to, if known.
    """
    found = [*_image_problems(rows, summary), *_label_problems(rows), *_truncation_problems(rows, max_length)]
    if summary.share_low > _MOST:
        found.append(
            Finding(
                f"{summary.share_low:.0%} of the label tokens lie at or below the lower limit, so nearly all weights "
                "are equal and CAL changes little",
                "Normal at the start of training; otherwise lower cal_low, or check that the images fit the answers",
            )
        )
    return found


def _image_problems(rows: Sequence[ScoredRow], summary: Summary) -> list[Finding]:
    found = []
    if all(abs(row.delta).max(initial=0) < 1e-6 for row in rows):
        found.append(
            Finding(
                "the image changes no logit at all",
                "Are there <image> marks in the prompts, and does the model have a trained projector?",
            )
        )
    num_without = sum(row.num_image_tokens == 0 for row in rows)
    if num_without:
        found.append(
            Finding(
                f"{num_without} of {len(rows)} samples have no image tokens",
                "Fine for text-only rows; otherwise their <image> mark or image path is missing",
            )
        )
    if summary.delta_mean < 0:
        found.append(
            Finding(
                f"the image speaks against the answers: mean delta {summary.delta_mean:.2f}",
                "Are the images those of these answers (image_root, row order)? Is the model trained?",
            )
        )
    return found


def _label_problems(rows: Sequence[ScoredRow]) -> list[Finding]:
    found = []
    for mark in _ROLE_MARKS:
        example = next((row for row in rows if mark in "".join(row.tokens)), None)
        if example is not None:
            found.append(
                Finding(
                    f"{mark!r} is among the label tokens of sample {example.id!r}: the template trains its own marks",
                    "Choose the template that fits the data and the model, and look at cal-train preview",
                )
            )
    num_twice = sum(row.begins_twice for row in rows)
    if num_twice:
        found.append(
            Finding(
                f"{num_twice} of {len(rows)} samples begin with the same token twice, probably the begin token",
                "Take one of the two out of the chat template or the data, and look at cal-train preview",
            )
        )
    firsts = Counter(row.tokens[0] for row in rows if row.tokens)
    token, count = firsts.most_common(1)[0] if firsts else ("", 0)
    if len(rows) >= _MANY and count > _MOST * len(rows) and not any(character.isalnum() for character in token):
        found.append(
            Finding(
                f"{count} of {len(rows)} answers begin with {token!r}",
                "The labels may begin one token early (shifted), or the template supervises the end of its header",
            )
        )
    return found


def _truncation_problems(rows: Sequence[ScoredRow], max_length: int | None) -> list[Finding]:
    found = []
    num_full = sum(row.num_tokens >= max_length for row in rows) if max_length else 0
    if num_full:
        found.append(
            Finding(
                f"{num_full} of {len(rows)} samples fill model_max_length ({max_length}): their ends are probably cut",
                "Raise --model_max_length; images take tokens too",
            )
        )
    lasts = Counter(row.tokens[-1] for row in rows if row.tokens)
    token, count = lasts.most_common(1)[0] if lasts else ("", 0)
    is_mark = token.startswith("<") and token.endswith(">")
    if is_mark and len(rows) >= _MANY and len(rows) / 2 < count < len(rows):
        found.append(
            Finding(
                f"{len(rows) - count} of {len(rows)} answers do not end with {token!r} like the others",
                "They were cut at model_max_length, or come through another template",
            )
        )
    return found
