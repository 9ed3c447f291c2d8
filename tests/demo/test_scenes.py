import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from cal_train.demo.concepts import CONCEPTS, HELD_OUT_CONCEPTS, TRAIN_CONCEPTS
from cal_train.demo.scenes import (
    PLACES,
    QUESTION_TYPES,
    TRAINING_SHARES,
    ask,
    ask_about_subject,
    ask_for_training,
    caption,
    caption_spans,
    sample_held_out_scene,
    sample_scene,
)

NUM_SCENES = 2000
GRID = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
NUM_ANSWERS = {"name": 24, "kind": 8, "place": 4, "count": 2, "presence": 2}


@pytest.fixture(scope="module")
def talks():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, f"s{i}") for i in range(NUM_SCENES)]
    return [(scene, ask(scene, rng)) for scene in scenes]


@pytest.fixture(scope="module")
def held_out_talks():
    rng = np.random.default_rng(1)
    scenes = [sample_held_out_scene(rng, f"h{i}") for i in range(NUM_SCENES)]
    return [(scene, ask_about_subject(scene, rng)) for scene in scenes]


def words_at(scene):
    """The scene as {(row, column): word}, from the places' names alone."""
    return {GRID[place]: cell.word for place, cell in zip(PLACES, scene.cells, strict=True) if cell}


def visual(turn):
    return " ".join(turn.answer[a:b] for a, b in turn.spans)


def true_answer(scene, turn):
    """What is true, worked out from the question's text and the grid, by another way than the program's."""
    at, asked = words_at(scene), turn.question.rstrip("?")
    if turn.type == "name":
        return at[GRID[asked.removeprefix("What is in the ")]]
    if turn.type == "kind":
        group_of = {c.word: c.group for c in CONCEPTS}
        return group_of[at[GRID[asked.removeprefix("What kind of thing is in the ")]]]
    if turn.type == "place":
        (cell,) = [cell for cell, word in at.items() if word == asked.removeprefix("Where is the ")]
        return next(name for name, place in GRID.items() if place == cell)
    if turn.type == "count":
        assert asked == "How many things are there"
        return {1: "one", 2: "two"}[len(at)]
    assert turn.type == "presence"
    return "Yes" if asked.removeprefix("Is there a ") in at.values() else "No"


def test_a_scene_is_one_thing_or_two_different_ones_anywhere(talks):
    sizes, places = Counter(), Counter()
    for scene, _ in talks:
        words = list(words_at(scene).values())
        assert len(scene.cells) == 4 and len(words) == len(set(words)) and scene.subject.word in words
        sizes[len(words)] += 1
        places[scene.cells.index(scene.subject)] += 1
    assert set(sizes) == {1, 2} and abs(sizes[1] - sizes[2]) < 4 * NUM_SCENES**0.5
    assert max(places.values()) < NUM_SCENES / 4 + 4 * (NUM_SCENES * 3 / 16) ** 0.5 and len(places) == 4


def test_every_answer_is_true_and_its_span_covers_exactly_the_true_words(talks, held_out_talks):
    for talk in (talks, held_out_talks):
        checked = Counter()
        for scene, turns in talk:
            for turn in turns:
                assert visual(turn) == true_answer(scene, turn), (scene, turn)
                checked[turn.type] += 1
        assert checked == dict.fromkeys(QUESTION_TYPES, NUM_SCENES)


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


def test_no_answer_repeats_a_content_word_of_its_question(talks):
    small = {"is", "the", "in", "a", "of", "there", "it", "that"}
    for _, turns in talks:
        for turn in turns:
            question, answer = (set(re.findall("[a-z]+", t.lower())) - small for t in (turn.question, turn.answer))
            assert not question & answer, turn


@pytest.mark.parametrize("type_", QUESTION_TYPES)
def test_answers_are_balanced_so_that_the_best_guess_is_near_chance(talks, type_):
    answers = Counter(visual(turn) for _, turns in talks for turn in turns if turn.type == type_)
    expected = 1 / NUM_ANSWERS[type_]
    four_sigma = 4 * (expected * (1 - expected) / NUM_SCENES) ** 0.5
    assert len(answers) == NUM_ANSWERS[type_]
    assert max(answers.values()) / NUM_SCENES < expected + four_sigma, answers


@pytest.mark.parametrize("type_", QUESTION_TYPES)
@pytest.mark.parametrize("split", ["talks", "held_out_talks"])
def test_what_is_asked_about_does_not_tell_the_answer(request, split, type_):
    counts = {}
    for _, turns in request.getfixturevalue(split):
        for turn in turns:
            if turn.type == type_:
                counts.setdefault(turn.question, Counter())[visual(turn)] += 1
    # Of the held-out concepts the subject alone is asked about: 8 names, one of each group.
    chance = 1 / (8 if type_ == "name" and split == "held_out_talks" else NUM_ANSWERS[type_])
    for question, answers in counts.items():
        n = sum(answers.values())
        assert n > 40, question
        assert answers.most_common(1)[0][1] / n < chance + 4.5 * (chance * (1 - chance) / n) ** 0.5, (question, answers)


def test_half_of_the_absent_things_are_asked_for_beside_a_like_one(talks, held_out_talks):
    """A draw from all absent things alone would hit the group of one in the picture for about 13 %."""
    group_of, alike = {c.word: c.group for c in CONCEPTS}, []
    for scene, turns in talks:
        for turn in turns:
            if turn.type == "presence" and visual(turn) == "No":
                group = group_of[turn.question.removeprefix("Is there a ").rstrip("?")]
                alike.append(group in {thing.group for thing in scene.things.values()})
    assert 0.5 < np.mean(alike) < 0.64  # 1/2 + 1/2 * 13 %, give or take 4 sigma


def test_captions_state_exactly_what_is_where(talks):
    for scene, _ in talks[:200]:
        stated = re.findall(r"(top|bottom) (left|right) a (\w+)", caption(scene))
        assert {GRID[f"{row} {column}"]: word for row, column, word in stated} == words_at(scene)
        assert len(stated) == len(words_at(scene))


def test_caption_spans_are_the_places_and_the_words_and_nothing_else(talks):
    for scene, _ in talks[:200]:
        text, spans = caption(scene), caption_spans(scene)
        expected = [
            part for place, cell in zip(PLACES, scene.cells, strict=True) if cell for part in (place, cell.word)
        ]
        assert [text[a:b] for a, b in spans] == expected
        hidden = text
        for a, b in reversed(spans):
            hidden = hidden[:a] + "*" + hidden[b:]
        assert hidden in ("* a *.", "* a *, * a *.")


def test_training_scenes_hold_no_held_out_concept_and_questions_ask_for_none(talks):
    held_out = {c.word for c in HELD_OUT_CONCEPTS}
    for scene, turns in talks:
        assert not held_out & set(words_at(scene).values())
        assert not held_out & {w.strip(".,?") for t in turns for w in f"{t.question} {t.answer}".split()}
        assert not held_out & set(re.findall("[a-z]+", caption(scene)))


def test_the_one_held_out_thing_of_a_held_out_scene_is_its_subject(held_out_talks):
    held_out = {c.word for c in HELD_OUT_CONCEPTS}
    seen = Counter()
    for scene, turns in held_out_talks:
        assert held_out & set(words_at(scene).values()) == {scene.subject.word}
        seen[scene.subject.word] += 1
        assert next(visual(t) for t in turns if t.type == "name") == scene.subject.word
        # "no" is asked about held-out words too: else being held out would mean "yes"
        (asked,) = [t.question.removeprefix("Is there a ").rstrip("?") for t in turns if t.type == "presence"]
        assert asked in held_out
    assert set(seen) == held_out


def test_scenes_and_questions_are_fixed_by_the_seed():
    def make(seed):
        rng = np.random.default_rng(seed)
        return [(s, ask(s, rng)) for s in (sample_scene(rng, "s") for _ in range(5))]

    assert make(7) == make(7) != make(8)


def test_every_word_fits_its_code_point_and_starts_with_a_consonant():
    other_names = {"car": "AUTOMOBILE", "piano": "MUSICAL KEYBOARD"}
    for concept in CONCEPTS:
        name = unicodedata.name(chr(int(concept.code_point, 16)))
        assert concept.word.upper() in re.findall("[A-Z]+", name) or name == other_names[concept.word], name
        assert concept.word[0] not in "aeiou"
    for field in ("word", "code_point"):
        assert len({getattr(c, field) for c in CONCEPTS}) == len(CONCEPTS) == 32


def test_every_group_has_three_trained_concepts_and_one_held_out():
    assert sorted(Counter(c.group for c in TRAIN_CONCEPTS).values()) == [3] * 8
    assert sorted(Counter(c.group for c in HELD_OUT_CONCEPTS).values()) == [1] * 8
    assert {c.group for c in TRAIN_CONCEPTS} == {c.group for c in HELD_OUT_CONCEPTS}
    assert not set(TRAIN_CONCEPTS) & set(HELD_OUT_CONCEPTS)


def test_training_questions_come_in_their_shares_and_are_true():
    rng, counts = np.random.default_rng(3), Counter()
    for i in range(NUM_SCENES):
        scene = sample_scene(rng, f"t{i}")
        (turn,) = ask_for_training(scene, rng, 1)
        assert visual(turn) == true_answer(scene, turn)
        counts[turn.type] += 1
    assert sum(TRAINING_SHARES.values()) == pytest.approx(1) and set(TRAINING_SHARES) == set(QUESTION_TYPES)
    for type_, share in TRAINING_SHARES.items():
        assert abs(counts[type_] / NUM_SCENES - share) < 4 * (share * (1 - share) / NUM_SCENES) ** 0.5, type_
