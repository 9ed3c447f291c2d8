import unicodedata
from collections import Counter

import numpy as np
import pytest

from cal_train.demo.concepts import CONCEPTS, GROUPS, HELD_OUT_CONCEPTS, TRAIN_CONCEPTS
from cal_train.demo.scenes import (
    NUMBERS,
    PLACES,
    QUESTION_TYPES,
    ask,
    ask_about_subject,
    caption,
    caption_spans,
    sample_held_out_scene,
    sample_scene,
)

GRID = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
STEP = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def talks():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, f"s{i}") for i in range(2000)]
    return [(scene, ask(scene, rng)) for scene in scenes]


def words_at(scene):
    """The scene as {(row, column): word}, from the places' names alone."""
    return {GRID[place]: concept.word for place, concept in zip(PLACES, scene.cells, strict=True)}


def visual(turn):
    return " ".join(turn.answer[a:b] for a, b in turn.spans)


def true_answer(scene, turn):
    """What is true, worked out from the question's text and the grid, by another way than the program's."""
    at, asked = words_at(scene), turn.question.rstrip("?")
    plural_of = {c.plural: c.word for c in CONCEPTS}
    group_of = {c.word: c.group for c in CONCEPTS}
    if turn.type == "name":
        return at[GRID[asked.removeprefix("What is in the ")]]
    if turn.type == "kind":
        return group_of[at[GRID[asked.removeprefix("What kind of thing is in the ")]]]
    if turn.type == "place":
        (cell,) = [cell for cell, word in at.items() if word == asked.removeprefix("Where is the ")]
        return next(name for name, place in GRID.items() if place == cell)
    if turn.type == "count":
        word = plural_of[asked.removeprefix("How many ").removesuffix(" are there")]
        return {1: "one", 2: "two", 3: "three"}[list(at.values()).count(word)]
    if turn.type == "presence":
        return "Yes" if asked.removeprefix("Is there a ") in at.values() else "No"
    phrase = next(p for p in STEP if f"What is {p} the " in turn.question)
    anchor = asked.removeprefix(f"What is {phrase} the ")
    (cell,) = [cell for cell, word in at.items() if word == anchor]
    return at[cell[0] + STEP[phrase][0], cell[1] + STEP[phrase][1]]


def test_every_answer_is_true_and_its_span_covers_exactly_the_true_words(talks):
    checked = Counter()
    for scene, turns in talks:
        for turn in turns:
            assert visual(turn) == true_answer(scene, turn), (scene, turn)
            checked[turn.type] += 1
    assert set(checked) == set(QUESTION_TYPES) and min(checked.values()) == 2000


def test_what_is_outside_the_spans_follows_from_the_question_and_the_visual_words(talks):
    frames = {}
    for _, turns in talks:
        for turn in turns:
            key = (turn.question, visual(turn))
            assert frames.setdefault(key, turn.answer) == turn.answer


def test_the_text_before_a_span_follows_from_the_question_alone(talks):
    before = {}
    for _, turns in talks:
        for turn in turns:
            text = turn.answer[: turn.spans[0][0]]
            assert before.setdefault(turn.question, text) == text


@pytest.mark.parametrize(
    ("type_", "num_answers"), [("place", 4), ("count", 3), ("presence", 2), ("kind", 8), ("name", 40), ("relation", 40)]
)
def test_answers_are_balanced_so_that_the_best_guess_is_near_chance(talks, type_, num_answers):
    answers = Counter(visual(turn) for _, turns in talks for turn in turns if turn.type == type_)
    best_guess = answers.most_common(1)[0][1] / sum(answers.values())
    expected = 1 / num_answers
    four_sigma = 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert len(answers) == num_answers
    assert best_guess < expected + four_sigma + 0.005, answers


@pytest.mark.parametrize("type_", ["place", "count", "presence"])
def test_the_word_asked_about_does_not_tell_the_answer(talks, type_):
    by_question = {}
    for _, turns in talks:
        for turn in turns:
            if turn.type == type_:
                by_question.setdefault(turn.question, Counter())[visual(turn)] += 1
    num_answers = {"place": 4, "count": 3, "presence": 2}[type_]
    # the share of right guesses of someone who learnt the best guess per question on the same rows; overfitted, so
    # a margin over chance that shrinks with rows per question (2000 / 40 = 50 each)
    guess = sum(counts.most_common(1)[0][1] for counts in by_question.values()) / 2000
    assert guess < 1 / num_answers + 0.12, guess


def test_captions_name_every_cell_and_their_spans_are_the_words():
    scene = sample_scene(np.random.default_rng(3), "s")
    text = caption(scene)
    assert [text[a:b] for a, b in caption_spans(scene)] == [c.word for c in scene.cells]
    for place, concept in zip(PLACES, scene.cells, strict=True):
        assert f"{place} a {concept.word}" in text


def test_training_scenes_hold_no_held_out_concept_and_questions_ask_for_none(talks):
    held_out = {w for c in HELD_OUT_CONCEPTS for w in (c.word, c.plural)}
    for scene, turns in talks:
        assert not any(c.held_out for c in scene.cells)
        assert not held_out & {w.strip(".,?") for t in turns for w in f"{t.question} {t.answer}".split()}


def test_held_out_scenes_have_one_held_out_subject_and_every_question_is_true():
    rng = np.random.default_rng(1)
    yes_no = Counter()
    for i in range(500):
        scene = sample_held_out_scene(rng, f"h{i}")
        assert {c.word for c in scene.cells if c.held_out} == {scene.subject.word}
        turns = ask_about_subject(scene, rng)
        assert len({t.type for t in turns}) == len(turns) >= 4
        for turn in turns:
            assert visual(turn) == true_answer(scene, turn)
        yes_no += Counter(visual(t) for t in turns if t.type == "presence")
        # "no" is asked about held-out words too: else being held out would mean "yes"
        (asked,) = [t.question.removeprefix("Is there a ").rstrip("?") for t in turns if t.type == "presence"]
        assert next(c for c in CONCEPTS if c.word == asked).held_out
    assert abs(yes_no["Yes"] - yes_no["No"]) < 100  # 4 sigma of a fair coin is 89


def test_scenes_and_questions_are_fixed_by_the_seed():
    def make(seed):
        rng = np.random.default_rng(seed)
        return [(s, ask(s, rng)) for s in (sample_scene(rng, "s") for _ in range(5))]

    assert make(7) == make(7) != make(8)


def test_every_word_fits_its_code_point_and_starts_with_a_consonant():
    other_names = {"hat": "TOP HAT", "car": "AUTOMOBILE", "piano": "MUSICAL KEYBOARD"}
    for concept in CONCEPTS:
        name = unicodedata.name(chr(int(concept.code_point, 16)))
        assert concept.word.upper() in name.replace("KIWIFRUIT", "KIWI") or name == other_names[concept.word], name
        assert concept.word[0] not in "aeiou"
    words = [c.word for c in CONCEPTS] + [c.plural for c in CONCEPTS]
    assert len(set(words)) == len(words) and len({c.code_point for c in CONCEPTS}) == len(CONCEPTS)


def test_every_group_has_as_many_trained_and_as_many_held_out_concepts():
    for concepts in (TRAIN_CONCEPTS, HELD_OUT_CONCEPTS):
        assert len(set(Counter(c.group for c in concepts).values())) == 1
        assert {c.group for c in concepts} == set(GROUPS)
    assert len(NUMBERS) == 3
