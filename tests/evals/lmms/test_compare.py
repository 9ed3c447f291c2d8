import json

import numpy as np
import pytest

from cal_train.cli.main import main
from cal_train.evals.lmms.compare import compare_folders
from cal_train.evals.lmms.results import metrics_of, read_results, sample_record, score_of, write_results
from cal_train.evals.paired import mcnemar, paired_interval, verdict


def folder(path, scores, key="k", metric="acc", **task):
    """A results folder with one task whose documents have these scores."""
    values = {"metrics": {metric: 0.5}, "higher_is_better": {}, "num_documents": len(scores), "prompt": {}}
    values |= {"generation": {}, **task}
    rows = [{"doc_id": n, "key": f"{key}{n}", "scores": {metric: float(s)}} for n, s in enumerate(scores)]
    summary = {"suite": "s", "model": "m", "tasks": {"toy": values}, "settings": {}, "versions": {}}
    write_results(path, summary, {"toy": rows})
    return path


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (1, 5, 2 * (1 + 6) / 64),  # C(6,0) + C(6,1) of 2^6, both sides
        (0, 3, 2 / 8),
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_the_binomial_worked_by_hand(only_first, only_second, p):
    first = np.array([1] * only_first + [0] * only_second + [1, 1, 0])
    second = np.array([0] * only_first + [1] * only_second + [1, 1, 0])
    found = mcnemar(first, second)
    assert (found.num_only_first, found.num_only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_thousands_is_finite():
    first, second = np.zeros(20_000), np.ones(20_000)
    assert mcnemar(first, second).p_value == 0.0  # 2^-19999 is below the smallest float
    assert mcnemar(first, first).p_value == 1.0


def test_mcnemar_refuses_scores_between():
    with pytest.raises(ValueError, match="right"):
        mcnemar(np.array([0.3]), np.array([1.0]))


@pytest.mark.parametrize("questions_per_picture", [1, 3])
def test_the_interval_covers_a_known_difference_as_often_as_it_says(questions_per_picture):
    rng, hits, repeats, num_pictures = np.random.default_rng(0), 0, 300, 120
    truth = 0.1  # both right 0.55, only the second 0.14, only the first 0.04, none 0.27
    for seed in range(repeats):
        outcome = rng.choice(4, num_pictures, p=[0.55, 0.14, 0.04, 0.27]).repeat(questions_per_picture)
        groups = np.arange(num_pictures).repeat(questions_per_picture)
        first, second = np.isin(outcome, (0, 2)), np.isin(outcome, (0, 1))
        low, high = paired_interval(first, second, groups, seed, num_resamples=400)
        hits += low <= truth <= high
    # 95 % of 300 within 2.5 standard errors; resampling the runs apart would cover 99.9 %, each question 74 % of three
    assert 0.9185 <= hits / repeats <= 0.9815, hits / repeats


def test_drawing_in_blocks_changes_nothing(monkeypatch):
    from cal_train.evals import paired

    rng = np.random.default_rng(1)
    first, second = rng.random(50), rng.random(50)
    whole = paired_interval(first, second, np.arange(50), num_resamples=100)
    monkeypatch.setattr(paired, "_DRAWS_AT_ONCE", 50 * 7)
    # the mean of 50 in float64
    assert paired_interval(first, second, np.arange(50), num_resamples=100) == pytest.approx(whole, abs=1e-12)


def test_the_verdict_knows_which_way_is_better():
    assert verdict(0.1, 0.05, 0.2) == "the second is better"
    assert verdict(0.1, 0.05, 0.2, is_higher_better=False) == "the second is worse"
    assert verdict(-0.1, -0.2, -0.05) == "the second is worse"
    assert verdict(0.1, -0.01, 0.2).startswith("no difference is shown")


def test_two_folders_are_compared_document_by_document(tmp_path):
    first = folder(tmp_path / "a", [0] * 40 + [1] * 60)
    second = folder(tmp_path / "b", [1] * 30 + [0] * 10 + [1] * 60)
    ((line,), left_out) = compare_folders(first, second)
    assert (line.first, line.second, line.num_documents) == (0.6, 0.9, 100)
    assert line.difference == pytest.approx(0.3) and line.low < 0.3 < line.high and line.low > 0.2
    assert (line.only_first, line.only_second) == (0, 30) and line.p_value == pytest.approx(2 / 2**30)
    assert line.verdict == "the second is better" and left_out == []


def test_scores_between_have_an_interval_but_no_mcnemar(tmp_path):
    a, b = folder(tmp_path / "a", [0.3, 0.5, 1.0]), folder(tmp_path / "b", [0.6, 0.5, 1.0])
    ((line,), _) = compare_folders(a, b)
    assert line.p_value is None and line.difference == pytest.approx(0.1)


def test_other_prompts_are_said(tmp_path):
    a, b = folder(tmp_path / "a", [0, 1]), folder(tmp_path / "b", [0, 1], prompt={"ocr": True})
    assert "task toy: prompt differs" in compare_folders(a, b)[1][0]


@pytest.mark.parametrize(
    ("scores", "key", "message"),
    [([0, 1, 1], "k", "2 documents against 3"), ([0, 1], "other", "document 0 differs")],
)
def test_runs_on_other_documents_are_refused(tmp_path, scores, key, message):
    a, b = folder(tmp_path / "a", [0, 1]), folder(tmp_path / "b", scores, key)
    with pytest.raises(ValueError, match=message):
        compare_folders(a, b)


def test_an_empty_results_folder_is_one_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    a = folder(tmp_path / "a", [0, 1])
    assert main(["eval", "compare", str(a), str(tmp_path / "empty")]) == 2
    assert "has no results.json: give the --output of a finished cal-train eval" in capsys.readouterr().err
    (a / "samples" / "toy.jsonl").unlink()
    with pytest.raises(ValueError, match=r"toy\.jsonl is missing or damaged"):
        read_results(a)


def test_compare_writes_json_and_markdown(tmp_path, capsys):
    a, b = folder(tmp_path / "a", [0] * 20), folder(tmp_path / "b", [1] * 20)
    assert main(["eval", "compare", str(a), str(b), "--write", str(tmp_path / "out")]) == 0
    assert "toy, acc: the second is better" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out/compare.json").read_text())
    assert record["difference"] == 1.0 and record["only_second"] == 20
    assert "| toy | acc | 20 | 0.0000 | 1.0000 |" in (tmp_path / "out/compare.md").read_text()


def test_scores_of_documents_and_metrics_of_tasks_are_told_apart():
    assert [score_of(v) for v in (1, True, 0.5, {"score": 1.0}, {"overall": 0}, {"pred": "x"}, "x")] == [
        1.0, 1.0, 0.5, 1.0, 0.0, None, None,
    ]  # fmt: skip
    row = {"alias": "toy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": 0.25, "submission,none": None}
    assert metrics_of(row) == {"acc": 0.5, "acc,strict": 0.25}
    sample = {"doc_id": 3, "doc": {"a": 1}, "target": "t", "arguments": [{"x": 1}, "q"], "resps": [["r"]]}
    sample |= {"filtered_resps": ["r"], "token_counts": [None], "doc_hash": "0", "acc": 1.0}
    record = sample_record(sample)
    assert (record["question"], record["answer"], record["scores"]) == ("q", "r", {"acc": 1.0})
    assert record["key"] != sample_record(sample | {"target": "u"})["key"]
