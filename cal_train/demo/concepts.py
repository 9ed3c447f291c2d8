"""The things that the demo's pictures show, and which of them are kept out of training.

The split is by concept, never by picture: a held-out concept is in no picture of stage 1 or 2, only its word is in the
language model's text. Every word is one common English noun that begins with a consonant, so that the article "a" in
an answer tells nothing about what follows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """One drawable thing: its English word, the code point of its emoji, its group, and its split."""

    word: str
    code_point: str
    group: str
    held_out: bool = False


# Hexadecimal code points; after the bar, the word that is held out.
_GROUPS = {
    "animals": "fox 1F98A, cow 1F404, whale 1F433 | lion 1F981",
    "fruits": "banana 1F34C, strawberry 1F353, pear 1F350 | peach 1F351",
    "vehicles": "car 1F697, bicycle 1F6B2, rocket 1F680 | tractor 1F69C",
    "clothes": "hat 1F3A9, dress 1F457, shirt 1F455 | coat 1F9E5",
    "instruments": "drum 1F941, guitar 1F3B8, piano 1F3B9 | violin 1F3BB",
    "plants": "cactus 1F335, rose 1F339, sunflower 1F33B | tulip 1F337",
    "tools": "hammer 1F528, saw 1FA9A, ladder 1FA9C | wrench 1F527",
    "buildings": "house 1F3E0, castle 1F3F0, tent 26FA | church 26EA",
}


def _parse(group: str, line: str) -> list[Concept]:
    """Return the concepts of one line of the table."""
    concepts = []
    for held_out, part in enumerate(line.split("|")):
        for entry in part.split(","):
            word, code_point = entry.split()
            concepts.append(Concept(word, code_point, group, bool(held_out)))
    return concepts


CONCEPTS: tuple[Concept, ...] = tuple(c for group, line in _GROUPS.items() for c in _parse(group, line))
TRAIN_CONCEPTS: tuple[Concept, ...] = tuple(c for c in CONCEPTS if not c.held_out)
HELD_OUT_CONCEPTS: tuple[Concept, ...] = tuple(c for c in CONCEPTS if c.held_out)
