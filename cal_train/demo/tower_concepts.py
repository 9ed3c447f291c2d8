"""What the pictures of the towers' demo show, what they are called, and which of it is kept out of training."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HELD_OUT_ONE_IN = 5
NUM_KEYWORDS = 4

_LEFT_OUT = frozenset(
    {"symbol", "sign", "clock", "schedule", "arrow", "zodiac", "smile", "sad", "happy", "japanese", "chinese", "hand"}
    | {"blue-square", "purple-square", "orange-square", "red-square", "geometric", "squared", "shape", "fingers"}
)
"""Keywords of what cannot be told apart at the size of the demo, or is named by convention: clocks, signs, smileys."""


@dataclass(frozen=True)
class PictureConcept:
    """One drawable thing: the code point of its emoji, its English name, keywords, and its split."""

    code_point: str
    name: str
    keywords: tuple[str, ...]
    held_out: bool

    @property
    def captions(self) -> tuple[str, ...]:
        """Return several captions; the first is the name alone, and all of them contain it."""
        named = (self.name, f"a picture of {self.name}")
        return named + tuple(f"{self.name}, {keyword}" for keyword in self.keywords)


def choose_concepts(words: Mapping[str, Sequence[str]], drawn: Collection[str]) -> tuple[PictureConcept, ...]:
    """Return the concepts of the demo in the order of their code points.

    Args:
        words: Emoji -> its name and then keywords, words joined by underscores.
        drawn: Code points (upper-case hexadecimal) of which there are drawings in every style.

    Raises:
        ValueError: If two concepts have the same name.
    """
    concepts = []
    for emoji, (name, *keywords) in words.items():
        code_point = "-".join(f"{ord(c):04X}" for c in emoji.replace("\ufe0f", ""))
        is_plain = "-" not in code_point and all(c.isalpha() or c in "_ " for c in name)
        if not is_plain or code_point not in drawn or _LEFT_OUT & set(keywords):
            continue
        plain = tuple(word for word in map(_spaced, keywords) if word.replace(" ", "").isalpha())
        concepts.append(PictureConcept(code_point, _spaced(name), plain[:NUM_KEYWORDS], is_held_out(code_point)))
    names = [concept.name for concept in concepts]
    if len(set(names)) != len(names):
        raise ValueError(f"names occur twice: {sorted({name for name in names if names.count(name) > 1})}")
    return tuple(sorted(concepts, key=lambda concept: concept.code_point))


def is_held_out(code_point: str) -> bool:
    """Return the split of a concept: by a hash of its code point, so that it does not depend on what else is drawn."""
    digest = hashlib.blake2b(code_point.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _spaced(words: Any) -> str:
    return " ".join(str(words).replace("_", " ").split())
