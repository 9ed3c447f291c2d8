"""Scenes, and questions about them whose answers are exact and whose visual words are known.

A scene is one or two different things on a 2 x 2 grid. An answer is a sentence frame that the question alone
determines, around the few words that only the picture tells; these `Turn.spans` are the truth against which CAL's delta
is scored as a detector. Frames repeat no word of the question: a model this small would spend the demo's minutes on
learning to copy.

Everything is drawn so that the question alone is of no use: places, counts, yes and no, groups and things are
uniform, whatever is asked about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cal_train.demo.concepts import CONCEPTS, HELD_OUT_CONCEPTS, TRAIN_CONCEPTS, Concept

ROWS = COLUMNS = 2
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two")
NOTHING = "nothing"
PATCHES_PER_CELL = 2
"""Along each side: the tower cuts a 56 px picture into 4 x 4 patches."""


@dataclass(frozen=True)
class Scene:
    """What is in each cell, in reading order; None is empty. ``seed`` fixes how it is drawn."""

    id: str
    cells: tuple[Concept | None, ...]
    subject: Concept
    seed: int

    @property
    def things(self) -> dict[int, Concept]:
        """Return the things by their cell, in reading order."""
        return {cell: concept for cell, concept in enumerate(self.cells) if concept is not None}


@dataclass(frozen=True)
class Turn:
    """One question with its answer. ``spans`` are the character ranges of ``answer`` that only the image tells."""

    type: str
    question: str
    answer: str
    spans: tuple[tuple[int, int], ...]


def sample_scene(
    rng: np.random.Generator,
    scene_id: str,
    subjects: Sequence[Concept] = TRAIN_CONCEPTS,
    others: Sequence[Concept] = TRAIN_CONCEPTS,
) -> Scene:
    """Return a scene with a subject and, in half of them, another thing; each in a cell of its own."""
    subject = subjects[int(rng.integers(len(subjects)))]
    pool = [concept for concept in others if concept != subject]
    things = [subject, *(pool[i] for i in rng.choice(len(pool), int(rng.integers(len(NUMBERS))), replace=False))]
    cells: list[Concept | None] = [None] * (ROWS * COLUMNS)
    for cell, thing in zip(rng.permutation(len(cells)), things, strict=False):
        cells[cell] = thing
    return Scene(scene_id, tuple(cells), subject, int(rng.integers(2**31)))


def caption(scene: Scene) -> str:
    """Return the scene in words, thing by thing in reading order (stage 1)."""
    return ", ".join(f"{PLACES[cell]} a {concept.word}" for cell, concept in scene.things.items()) + "."


def picture_in_words(scene: Scene) -> list[str]:
    """Return one word for each patch of the picture, in reading order: what is seen there, or `NOTHING`."""
    words = [NOTHING if concept is None else concept.word for concept in scene.cells]
    rows = [words[start : start + COLUMNS] for start in range(0, len(words), COLUMNS)]
    return [word for row in rows for _ in range(PATCHES_PER_CELL) for word in row for _ in range(PATCHES_PER_CELL)]


def caption_spans(scene: Scene) -> tuple[tuple[int, int], ...]:
    """Return the character ranges of places and words in `caption`: only the image tells them."""
    spans, end = [], 0
    for cell, concept in scene.things.items():
        for lead, text in (("", PLACES[cell]), (" a ", concept.word)):
            start = end + len(lead)
            end = start + len(text)
            spans.append((start, end))
        end += len(", ")
    return tuple(spans)


def _turn(type_: str, question: str, before: str, visual: str, after: str) -> Turn:
    """Return a turn whose answer is ``before + visual + after``, with the visual part's span."""
    return Turn(type_, question, before + visual + after, ((len(before), len(before) + len(visual)),))


def _name(scene: Scene, rng: np.random.Generator, cell: int) -> Turn:
    return _turn("name", f"What is in the {PLACES[cell]}?", "There is a ", scene.things[cell].word, " in that place.")


def _kind(scene: Scene, rng: np.random.Generator, cell: int) -> Turn:
    question = f"What kind of thing is in the {PLACES[cell]}?"
    return _turn("kind", question, "It is one of the ", scene.things[cell].group, ".")


def _place(scene: Scene, rng: np.random.Generator, cell: int) -> Turn:
    return _turn("place", f"Where is the {scene.things[cell].word}?", "You can find it in the ", PLACES[cell], ".")


def _count(scene: Scene, rng: np.random.Generator, cell: int) -> Turn:
    return _turn("count", "How many things are there?", "I can see ", NUMBERS[len(scene.things) - 1], " of them.")


def _presence(scene: Scene, rng: np.random.Generator, cell: int) -> Turn:
    asked, is_there = scene.things[cell], rng.random() < 0.5
    if not is_there:
        asked = _absent(scene, asked, rng)
    return presence_turn(asked, is_there)


def presence_turn(asked: Concept, is_there: bool) -> Turn:
    """Return the question whether a thing is there, with its answer."""
    question = f"Is there a {asked.word}?"
    if is_there:
        return _turn("presence", question, "", "Yes", ", there is one in the picture.")
    return _turn("presence", question, "", "No", ", there is none in the picture.")


def _absent(scene: Scene, present: Concept, rng: np.random.Generator) -> Concept:
    """Return a thing that is not in the scene; half of them from the group of one that is (POPE's hard negatives).

    It is held out exactly if ``present`` is, so that "held out" does not mean "no".
    """
    pool = [c for c in CONCEPTS if c.held_out == present.held_out and c not in scene.cells]
    same_group = [c for c in pool if c.group == present.group]
    pool = same_group if same_group and rng.random() < 0.5 else pool
    return pool[rng.integers(len(pool))]


_ASK: dict[str, Callable[[Scene, np.random.Generator, int], Turn]] = {
    "name": _name,
    "kind": _kind,
    "place": _place,
    "count": _count,
    "presence": _presence,
}
QUESTION_TYPES = tuple(_ASK)
TRAINING_SHARES = {"name": 0.4, "kind": 0.2, "place": 0.2, "count": 0.05, "presence": 0.15}
"""How often each type is asked in training. Names are what takes a small model longest, so they get the most steps."""


def ask(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return one question of each type, in random order, each about one of the things."""
    cells = list(scene.things)
    turns = [make(scene, rng, cells[int(rng.integers(len(cells)))]) for make in _ASK.values()]
    return [turns[i] for i in rng.permutation(len(turns))]


def ask_for_training(scene: Scene, rng: np.random.Generator, num_questions: int) -> list[Turn]:
    """Return up to ``num_questions`` different questions, their types drawn by `TRAINING_SHARES`."""
    cells, turns = list(scene.things), {}
    for type_ in rng.choice(QUESTION_TYPES, num_questions, p=[TRAINING_SHARES[name] for name in QUESTION_TYPES]):
        turn = _ASK[type_](scene, rng, cells[int(rng.integers(len(cells)))])
        turns.setdefault(turn.question, turn)
    return list(turns.values())


def ask_about_subject(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return one question of each type about the subject itself (the test with held-out concepts)."""
    return [make(scene, rng, scene.cells.index(scene.subject)) for make in _ASK.values()]


def sample_held_out_scene(rng: np.random.Generator, scene_id: str) -> Scene:
    """Return a scene whose subject is a held-out concept, alone or beside a trained one."""
    return sample_scene(rng, scene_id, HELD_OUT_CONCEPTS)
