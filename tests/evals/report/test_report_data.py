import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from cal_train.evals.report.build import DataPlace, gather
from cal_train.evals.report.charts import CURVE_HEIGHT, CURVE_WIDTH, HISTOGRAM_HEIGHT, curve_chart, histogram_chart
from cal_train.evals.report.checks import find_problems
from cal_train.evals.report.run_folder import parse_markdown, read_source
from cal_train.evals.report.scores import pair_up, read_scores, words_of
from cal_train.evals.report.summary import summarize, surprises
from cal_train.evals.report.words import CLASSES, classes_of


def record(id="a", tokens=(" a", " fox", "</s>"), delta=(0.5, 6.0, 2.0), prompt_length=4, **changed):
    """Return a score record; logits and weights follow from delta, so that each number is another one."""
    n = len(tokens)
    return {
        "id": id,
        "input_ids": list(range(prompt_length + n)),
        "label_positions": list(range(prompt_length, prompt_length + n)),
        "tokens": list(tokens),
        "logit_with": [10 + value for value in delta],
        "logit_without": [10.0] * n,
        "delta": list(delta),
        "weight": [min(max(value, 1), 5) for value in delta],
    } | changed


def write_scores(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def read(tmp_path, *records, image_token_id=None):
    return read_scores(write_scores(tmp_path / "scores.jsonl", *records), image_token_id)


def test_numbers_and_positions_come_through(tmp_path):
    (row,) = read(tmp_path, record(), image_token_id=2)
    assert row.tokens == (" a", " fox", "</s>") and row.num_tokens == 7 and row.num_image_tokens == 1
    assert np.allclose(row.delta, [0.5, 6, 2]) and np.allclose(row.logit_with, [10.5, 16, 12])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "a"}', "no 'label_positions'"),
        ("[1, 2]", "not an object"),
        ("{nonsense", "line 2"),
        (json.dumps(record(delta=(0.5, float("nan"), 1.0))), "delta|logit_with"),
        (json.dumps(record(weight=[1.0])), "weight 1"),
        (json.dumps(record(label_positions=[4, 5, 700])), "outside"),
        (json.dumps(record(weight=[[1], [2], [3]])), "weight is not"),
        (json.dumps(record(tokens=[1, 2, 3])), "not all text"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, reason):
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"line 2: not a score record") as error:
        read_scores(path)
    assert re.search(reason, str(error.value)), error.value


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "scores.jsonl").write_text("")
    with pytest.raises(ValueError, match="no samples"):
        read_scores(tmp_path / "scores.jsonl")


def test_pieces_of_a_word_share_its_class():
    tokens = ("The", " gir", "affe", " has", " 1", "2", " or", " twelve", " legs", ".", "<|im_end|>")
    words = ["".join(tokens[start:end]) for start, end in words_of(tokens)]
    assert words == ["The", " giraffe", " has", " 12", " or", " twelve", " legs", ".", "<|im_end|>"]
    content, number, function, mark = range(4)
    assert classes_of(tokens) == [
        function, content, content, function, number, number, function, number, content, mark, mark,
    ]  # fmt: skip


def test_the_summary_counts_every_label_token_once(tmp_path):
    rows = read(tmp_path, record("a"), record("b", delta=(1.0, 5.0, -3.0)), record("c", delta=(0.0, 40.0, 2.5)))
    summary = summarize(rows, 1.0, 5.0)
    assert summary.num_labels == 9 and summary.num_samples == 3
    assert summary.share_low == pytest.approx(4 / 9)  # 0.5, 1, -3, 0
    assert summary.share_high == pytest.approx(3 / 9)  # 6, 5, 40
    weights = np.array([1, 5, 2, 1, 5, 1, 1, 5, 2.5])
    assert summary.effective_tokens == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert summary.histogram.counts.sum() == 9  # what lies beyond the outermost edges is in the outermost bins
    by_class = dict(zip(CLASSES, summary.histogram.counts.sum(1), strict=True))
    assert by_class == {CLASSES[0]: 3, CLASSES[1]: 0, CLASSES[2]: 3, CLASSES[3]: 3}
    assert summary.histogram.edges[0] < 1 and summary.histogram.edges[-1] > 5


def test_the_sample_with_the_unusual_token_surprises_most(tmp_path):
    usual = [record(f"u{i}", delta=(0.5, 6.0 + i / 10, 2.0)) for i in range(5)]
    rows = read(tmp_path, *usual, record("odd", delta=(0.5, -3.0, 2.0)))
    surprise = surprises(rows)
    assert surprise.argmax() == 5
    assert surprise[5] == pytest.approx(abs(-3.0 - np.median([6, 6.1, 6.2, 6.3, 6.4, -3])), abs=1e-5)


def test_a_pair_of_different_samples_is_refused(tmp_path):
    one = read(tmp_path, record("a"), record("b"))
    pair_up(one, read(tmp_path, record("a", delta=(9, 9, 9)), record("b")), ("x", "y"))
    with pytest.raises(ValueError, match="2 samples and y 1"):
        pair_up(one, read(tmp_path, record("a")), ("x", "y"))
    with pytest.raises(ValueError, match=r"line 2.*'b'.*'c'"):
        pair_up(one, read(tmp_path, record("a"), record("c")), ("x", "y"))
    with pytest.raises(ValueError, match="tokenizer"):
        pair_up(one, read(tmp_path, record("a"), record("b", tokens=(" a", " dog", "</s>"))), ("x", "y"))


def problems(tmp_path, *records, max_length=None, image_token_id=None):
    rows = read(tmp_path, *records, image_token_id=image_token_id)
    return " / ".join(finding.problem for finding in find_problems(rows, summarize(rows, 1, 5), max_length))


def test_healthy_scores_raise_no_finding(tmp_path):
    rows = [record(f"r{i}", tokens=(f" word{i}", " fox", "</s>")) for i in range(12)]
    assert problems(tmp_path, *rows, max_length=2048, image_token_id=1) == ""


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([record(delta=(0.0, 0.0, 0.0))], "changes no logit"),
        ([record(delta=(-1.0, -2.0, -3.0))], "speaks against"),
        ([record(tokens=("ASS", "IST", "ANT: a"))], "'ASSISTANT:' is among the label tokens"),
        ([record(f"r{i}", tokens=("\n", " fox", "</s>")) for i in range(12)], "12 of 12 answers begin with"),
        (
            [record(f"r{i}", tokens=(f"w{i}", " fox", "</s>" if i else " no")) for i in range(12)],
            "1 of 12 answers do not end",
        ),
        ([record(prompt_length=13)], "fill model_max_length"),
        ([record(prompt_length=13, input_ids=[9] * 16)], "no image tokens"),
    ],
)
def test_a_broken_set_up_is_seen(tmp_path, records, expected):
    assert expected in problems(tmp_path, *records, max_length=16, image_token_id=1)


def test_a_curve_reaches_its_corners_and_a_stack_its_height(tmp_path):
    chart = curve_chart("loss", {"run": [(10, 4.0), (20, 1.0), (30, 2.0)]})
    points = [tuple(map(float, point.split(","))) for point in chart.lines[0].points.split()]
    assert points == [
        (0, 0),
        (CURVE_WIDTH / 2, CURVE_HEIGHT),
        (CURVE_WIDTH, pytest.approx(CURVE_HEIGHT * 2 / 3, abs=0.1)),
    ]
    long = curve_chart("loss", {"run": [(i, float(i)) for i in range(5000)]})
    assert len(long.lines[0].points.split()) == 600 and long.last_step == 4999

    summary = summarize(read(tmp_path, record()), 1, 5)
    bars = histogram_chart(summary.histogram, 1, 5).bars
    assert len(bars) == 3 and all(bar.height == HISTOGRAM_HEIGHT for bar in bars)  # one token each, in three bins


def test_a_run_folder_gives_curves_and_tables(tmp_path):
    (tmp_path / "cal").mkdir()
    log = [
        {"step": 1, "loss": 2.0, "epoch": 0.1},
        {"step": 2, "loss": 1.0, "cal/share_low": 0.5},
        {"step": 3, "once": 1},
    ]
    (tmp_path / "cal" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (tmp_path / "results.md").write_text("# x\n| a | b |\n| --- | --- |\n| 1 | <b>2</b> |\n\n| c |\n| - |\n| 3 |\n")
    source = read_source(tmp_path)
    assert source.curves == {"loss": {"cal": [(1, 2.0), (2, 1.0)]}}
    assert [table.header for table in source.tables] == [("a", "b"), ("c",)]
    assert source.tables[0].rows == (("1", "<b>2</b>"),)
    (tmp_path / "results.md").unlink()
    (tmp_path / "results.json").write_text('{"tasks": {"vqa": 0.25, "list": [1]}}')
    assert read_source(tmp_path).tables[0].rows == (("tasks.vqa", "0.25"), ("tasks.list[0]", "1"))


def test_a_folder_with_nothing_in_it_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        read_source(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_source(tmp_path / "nowhere")


def test_a_line_of_dashes_is_needed_for_a_table():
    assert parse_markdown("| a | b |\n| 1 | 2 |\n| 3 | 4 |\n") == []


def write_data(folder, ids, colours):
    folder.mkdir(exist_ok=True)
    rows = []
    for i, (id, colour) in enumerate(zip(ids, colours, strict=True)):
        if colour:
            Image.new("RGB", (400, 200), colour).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\nquestion {i}"}, {"from": "gpt", "value": "a fox"}]
        rows.append({"id": id, "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def test_samples_find_their_rows_past_dropped_ones_and_equal_ids(tmp_path):
    data = write_data(tmp_path / "d", ["x", "dropped", "x", "gone"], ["red", "red", "blue", None])
    scores = write_scores(tmp_path / "scores.jsonl", record("x"), record("x"), record("gone"))
    content = gather([scores], DataPlace(data, None))
    assert [sample and sample.row for sample in content.samples] == [0, 2, None]
    assert len(content.thumbnails) == 2
    assert any("1 samples are not usable" in note for note in content.notes)
    with pytest.raises(ValueError, match="no sample 'y'"):
        gather([write_scores(tmp_path / "other.jsonl", record("y"))], DataPlace(data, None))


def test_few_thumbnails_go_to_surprise_and_to_the_first(tmp_path):
    ids = [f"r{i}" for i in range(8)]
    data = write_data(tmp_path / "d", ids, ["red"] * 8)
    records = [record(id, delta=(0.5, 6.0 - 9 * (id == "r6"), 2.0)) for id in ids]
    content = gather([write_scores(tmp_path / "scores.jsonl", *records)], DataPlace(data, None), max_thumbnails=2)
    assert {path.name for path in content.thumbnails} == {"6.png", "0.png"}
    assert any("2 of 8" in note for note in content.notes)


def test_remembered_data_is_used_only_while_it_is_the_same(tmp_path):
    data = write_data(tmp_path / "d", ["a"], ["red"])
    scores = write_scores(tmp_path / "scores.jsonl", record("a"))
    about = {
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "paths": {"data": str(data), "image_root": str(data.parent)},
        "weighting": {"low": 0.25, "high": 7.0},
    }
    (tmp_path / "scores.jsonl.about.json").write_text(json.dumps(about))
    content = gather([scores])
    assert len(content.thumbnails) == 1 and (content.low, content.high) == (0.25, 7.0)
    data.write_text(data.read_text().replace("question", "Question"))
    content = gather([scores])
    assert not content.thumbnails and "changed" in content.notes[0]
    assert len(gather([scores], DataPlace(data, None)).thumbnails) == 1


def test_a_doubled_begin_token_is_found_in_a_score_file_and_image_tokens_are_none(tmp_path):
    records = record("a", input_ids=[7, 7, 9, 9, 1, 2, 3]), record("b"), record("c", input_ids=[9, 9, 9, 9, 1, 2, 3])
    assert [row.begins_twice for row in read(tmp_path, *records, image_token_id=9)] == [True, False, False]
    assert "1 of 3 samples begin with the same token twice" in problems(tmp_path, *records, image_token_id=9)
