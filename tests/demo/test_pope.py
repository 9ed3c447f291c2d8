from collections import Counter

import numpy as np
import pytest

from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.pope import pope_rows
from cal_train.demo.scenes import QUESTION_TYPES, ask
from cal_train.demo.splits import new_scenes
from cal_train.evals.lmms import scene_tasks

GROUPS = {concept.word: concept.group for concept in CONCEPTS}


@pytest.fixture(scope="module")
def scenes():
    return {scene.id: scene for scene in new_scenes(200)}


@pytest.fixture(scope="module")
def rows(scenes):
    return pope_rows(list(scenes.values()))


def asked(row):
    return row["question"].removeprefix("Is there a ").removesuffix("?")


def there(scenes, row):
    return {thing.word for thing in scenes[row["scene"]].cells if thing}


def negatives(rows):
    return [row for row in rows if row["words"] == "No"]


def test_yes_and_no_are_true_and_balanced_in_every_scene(scenes, rows):
    assert list(rows) == ["random", "popular", "adversarial"]
    for found in rows.values():
        assert len(found) == 400
        assert all((asked(row) in there(scenes, row)) == (row["words"] == "Yes") for row in found)
        assert all(a["scene"] == b["scene"] for a, b in zip(found[::2], found[1::2], strict=True))
        assert [row["words"] for row in found] == ["Yes", "No"] * 200
    yes = [[row for row in found if row["words"] == "Yes"] for found in rows.values()]
    assert yes[0] == yes[1] == yes[2]


def test_negatives_are_of_the_kind_that_is_said(scenes, rows):
    seen = Counter(word for scene in scenes.values() for word in {t.word for t in scene.cells if t})
    popular = {asked(row) for row in negatives(rows["popular"])}
    assert len(popular) == 8
    assert min(seen[word] for word in popular) >= max(n for word, n in seen.items() if word not in popular)
    for row in negatives(rows["adversarial"]):
        assert GROUPS[asked(row)] in {GROUPS[word] for word in there(scenes, row)}
    random = Counter(asked(row) for row in negatives(rows["random"]))
    assert len(random) == 24 and max(random.values()) < 30  # 200 draws of 24
    assert not {c.word for c in CONCEPTS if c.held_out} & set(random)


def test_the_questions_are_worded_as_in_training(scenes, rows):
    turns = [turn for n, scene in enumerate(scenes.values()) for turn in ask(scene, np.random.default_rng(n))]
    frames = {(turn.question.split()[:3].__str__(), turn.answer) for turn in turns if turn.type == QUESTION_TYPES[-1]}
    ours = {(row["question"].split()[:3].__str__(), row["answer"]) for found in rows.values() for row in found}
    assert ours == frames and len(ours) == 2


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("truth", (1.0, 1.0, 1.0, 1.0, 0.5)),
        ("Yes", (0.5, 0.5, 1.0, 2 / 3, 1.0)),
        ("No", (0.5, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_who_knows_is_right_and_who_answers_blind_is_right_in_half(rows, says, expected):
    for found in rows.values():
        scores = [scene_tasks.process_presence(row, [row["answer"] if says == "truth" else says]) for row in found]
        pairs = [score["f1"] for score in scores]
        whole_set = (scene_tasks.precision, scene_tasks.recall, scene_tasks.f1, scene_tasks.yes_ratio)
        assert (np.mean([s["accuracy"] for s in scores]), *(f(pairs) for f in whole_set)) == pytest.approx(expected)
