import io
import json

import numpy as np
import pytest
from rich.console import Console

from cal_train.demo.compare import (
    Answers,
    area_under_curve,
    compare,
    markdown_of,
    paired_interval,
    table_of,
    write_results,
)


def answers(types, scenes, is_right, blind=None):
    right = np.array(is_right, bool)
    blind = np.zeros(len(right), bool) if blind is None else np.array(blind, bool)
    return Answers(np.array(types), np.array(scenes), right, blind)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    wins = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert area_under_curve(score, positive) == pytest.approx(np.mean(wins), abs=1e-12)


def test_auc_of_a_perfect_and_of_an_inverted_detector():
    positive = np.array([True, True, False, False])
    assert area_under_curve(np.array([4.0, 3, 2, 1]), positive) == 1
    assert area_under_curve(np.array([1.0, 2, 3, 4]), positive) == 0


def test_auc_without_negatives_is_refused():
    with pytest.raises(ValueError, match="2 positives, 0 negatives"):
        area_under_curve(np.ones(2), np.ones(2, bool))


def test_interval_has_no_width_when_every_scene_gains_the_same():
    low, high = paired_interval(np.zeros(20, bool), np.ones(20, bool), np.repeat(np.arange(10), 2))
    assert (low, high) == (1.0, 1.0)


def test_interval_of_one_question_per_scene_matches_the_normal_approximation():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.5, rng.random(400) < 0.6
    low, high = paired_interval(a, b, np.arange(400))
    gain = b.astype(float) - a
    half = 1.96 * gain.std(ddof=1) / 20
    assert low == pytest.approx(gain.mean() - half, abs=0.01)
    assert high == pytest.approx(gain.mean() + half, abs=0.01)


def test_interval_is_wider_when_the_answers_of_a_scene_go_together():
    rng = np.random.default_rng(2)
    a, b = rng.random(50) < 0.5, rng.random(50) < 0.5
    one = paired_interval(a, b, np.arange(50))
    copied = paired_interval(np.repeat(a, 6), np.repeat(b, 6), np.repeat(np.arange(50), 6))
    alone = paired_interval(np.repeat(a, 6), np.repeat(b, 6), np.arange(300))
    assert np.ptp(copied) == pytest.approx(np.ptp(one), rel=0.05)  # copies of an answer tell nothing new
    assert np.ptp(alone) < 0.6 * np.ptp(copied)


def test_accuracies_per_type_are_the_shares_worked_by_hand():
    types, scenes = ["name", "name", "place", "name"], ["a", "b", "b", "c"]
    baseline = answers(types, scenes, [1, 0, 1, 0], blind=[0, 0, 1, 0])
    cal = answers(types, scenes, [1, 1, 0, 0])
    name, place, every = compare("s", baseline, cal)
    assert (name.type, name.num_questions) == ("name", 3)
    assert (name.baseline, name.cal, name.difference) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert (place.baseline, place.cal, place.baseline_blind) == (1, 0, 1)
    assert (every.type, every.num_questions, every.difference) == ("all", 4, 0)
    assert every.low <= every.difference <= every.high


def test_runs_over_different_questions_are_refused():
    a = answers(["name"], ["a"], [1])
    with pytest.raises(ValueError, match="different questions of s"):
        compare("s", a, answers(["place"], ["a"], [1]))


def test_results_are_written_as_measured(tmp_path):
    lines = compare("s", answers(["name"], ["a"], [1]), answers(["name"], ["a"], [0]))
    write_results(tmp_path, lines, {"s": 0.75})
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["auc_of_delta"] == {"s": 0.75}
    assert result["accuracy"][0]["baseline"] == 1.0 and result["accuracy"][0]["cal"] == 0.0
    text = (tmp_path / "results.md").read_text()
    assert text == markdown_of(lines, {"s": 0.75})
    assert "| s | name | 1 | 100.0 | 0.0 | -100.0 | [-100.0, -100.0] | 0.0 | 0.0 |" in text
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table_of(lines))
    assert "-100.0" in console.export_text()
