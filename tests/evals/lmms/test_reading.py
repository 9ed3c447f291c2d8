"""The reading suite: its pictures are read back by comparing shapes, with nothing of the suite's own code."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

from cal_train.cli.main import main
from cal_train.evals.lmms import reading, scene_tasks
from cal_train.evals.lmms.results import read_results

ROOT = Path(__file__).parents[3]
TASKS = ("word", "number", "among")
SHAPE = (200, 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of ``eval/`` with the tables where its task files look for them."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "eval", root / "eval")
    reading.write_reading_tables(root / reading.READING_TABLES)
    return root


@pytest.fixture(scope="module")
def tables(place):
    return {task: rows_of(place / reading.READING_TABLES / f"{task}.parquet") for task in TASKS}


def rows_of(path):
    rows = pq.read_table(path).to_pylist()
    return [{**row, "image": opened(row["image"]["bytes"])} for row in rows]


def opened(png):
    from io import BytesIO

    return Image.open(BytesIO(png))


def ink_asked_for(picture, question):
    """Return how much each pixel (H, W) belongs to the text in question: by its hue, its third, or at all."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    third, channels = len(pixels) // 3, {"red": 0, "green": 1, "blue": 2}
    asked = question.rstrip("?").split()[-1]
    if asked in channels:
        own = channels[asked]
        return np.clip(pixels[..., own] - np.delete(pixels, own, 2).max(2), 0, None)
    ink = np.abs(pixels - pixels[0, 0]).max(2)
    start = {"top": 0, "middle": third, "bottom": 2 * third}.get(asked)
    return ink if start is None else ink[start : start + third]


def shape_of(ink):
    """Return the form of a text without its size, place and colour, and its width over its height."""
    ys, xs = np.nonzero(ink > 0.4 * ink.max())
    cut = ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    form = np.asarray(Image.fromarray(cut.astype(np.float32)).resize(SHAPE, Image.Resampling.BILINEAR)).ravel()
    form = form - form.mean()
    return form / np.linalg.norm(form), cut.shape[1] / cut.shape[0]


def shapes_of(texts, size):
    """Return forms (N, pixels) and widths over heights (N,) of texts set alone, white on black."""
    found = []
    for text in texts:
        page = Image.new("L", (300, 120))
        ImageDraw.Draw(page).text((40, 40), text, fill=255, font=ImageFont.load_default(size))
        found.append(shape_of(np.asarray(page).astype(float)))
    return np.stack([form for form, _ in found]), np.array([ratio for _, ratio in found])


class Reader:
    """Answers with the text whose shape, in one of the sizes, is most like that of the ink in question."""

    def __init__(self, texts):
        sizes = (12, 18, 28, 44)
        self.texts = list(texts) * len(sizes)
        self.forms, self.ratios = map(np.concatenate, zip(*(shapes_of(texts, size) for size in sizes), strict=True))

    def read(self, picture, question):
        form, ratio = shape_of(ink_asked_for(picture, question))
        return self.texts[int(np.argmax(self.forms @ form - np.abs(np.log(self.ratios / ratio))))]


@pytest.fixture(scope="module")
def readers(tables):
    return {task: Reader(sorted({row["answer"] for row in rows})) for task, rows in tables.items()}


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_can_be_read_off_its_picture(tables, readers, task):
    rows = tables[task]
    wrong = [
        (row["id"], row["size"], row["answer"], said)
        for row in rows
        if (said := readers[task].read(row["image"], row["question"])) != row["answer"]
    ]
    assert len(rows) == 192 and not wrong


def test_equal_seeds_give_equal_files_and_another_seed_other_pictures(place, tables, tmp_path):
    reading.write_reading_tables(tmp_path / "again")
    for task in TASKS:
        first = pq.read_table(place / reading.READING_TABLES / f"{task}.parquet")
        assert pq.read_table(tmp_path / f"again/{task}.parquet").equals(first)
    reading.write_reading_tables(tmp_path / "other", seed=1)
    other = rows_of(tmp_path / "other/among.parquet")
    assert all(a["image"].tobytes() != b["image"].tobytes() for a, b in zip(tables["among"], other, strict=True))


def test_sizes_and_conditions_are_as_said_and_balanced(tables):
    for task, num_groups in (("word", 12), ("number", 12), ("among", 8)):
        counts = Counter((row["size"], row["condition"]) for row in tables[task])
        assert len(counts) == num_groups and set(counts.values()) == {192 // num_groups}
    heights = {size: [] for size in (12, 18, 28, 44)}
    greys = {"dark": set(), "light": set(), "faint": set()}
    for row in tables["number"]:  # all digits are of one height
        pixels = np.asarray(row["image"].convert("L")).astype(int)
        paper, ink = pixels[0, 0], np.abs(pixels - pixels[0, 0])
        greys[row["condition"]].add(int(pixels.flat[ink.argmax()]) - int(paper))
        lines = np.nonzero((ink > 0.5 * ink.max()).any(1))[0]
        heights[row["size"]].append(int(lines.max() - lines.min()) + 1)
    means = [np.mean(found) / size for size, found in heights.items()]
    assert all(0.6 < share < 0.85 for share in means), means  # a digit is about 0.7 of its font's size
    assert all(grey < -150 for grey in greys["dark"]) and all(grey > 150 for grey in greys["light"])
    assert all(-60 < grey < -20 for grey in greys["faint"])


def scored(rows, answer):
    found = [reading.process_results(row, [answer(row)]) for row in rows]
    return {name: np.mean([row[name] for row in found if name in row]) for name in {n for row in found for n in row}}


def test_who_answers_without_looking_is_right_by_chance(tables):
    for task in ("word", "among"):
        for word in reading.WORDS:  # whatever is always said
            assert scored(tables[task], lambda row, word=word: word)["exact_match"] == pytest.approx(1 / 48)
    assert max(Counter(row["answer"] for row in tables["number"]).values()) == 1


def test_who_reads_but_does_not_heed_the_question_is_right_in_a_third(tables):
    asks_place = [row for row in tables["among"] if row["condition"] == "place"]
    for question in ("Which word is at the top?", "Which word is in the middle?", "Which word is at the bottom?"):
        assert [row["question"] for row in asks_place].count(question) == len(asks_place) / 3
    asks_colour = [row["question"] for row in tables["among"] if row["condition"] == "colour"]
    shares = [count / len(asks_colour) for count in Counter(asks_colour).values()]
    assert len(shares) == 3 and max(shares) < 0.5


@pytest.mark.parametrize(
    ("said", "exact", "holds"),
    [
        ("River.", 1, 1),
        (' "RIVER"\n', 1, 1),
        ("The word is river.", 0, 1),
        ("rivers", 0, 0),
        ("stone, river and cloud", 0, 0),  # everything that is there is no answer
        ("stone", 0, 0),
        ("", 0, 0),
    ],
)
def test_answers_are_scored_by_their_words(said, exact, holds):
    doc = {"answer": "river", "others": ["stone", "cloud"], "size": 12, "condition": "place"}
    scores = reading.process_results(doc, [said])
    assert scores == {
        "exact_match": exact, "has_answer": holds, "exact_match_12px": exact, "exact_match_place": exact,
    }  # fmt: skip


def test_numbers_may_have_marks_between_their_digits():
    doc = {"answer": "12345", "others": [], "size": 12, "condition": "dark"}
    assert reading.process_results(doc, ["12,345."])["exact_match"] == 1
    assert reading.process_results(doc, ["1234"])["exact_match"] == 0


@pytest.mark.slow  # lmms-eval takes its time to import
@pytest.mark.filterwarnings("ignore")  # of lmms-eval's dependencies
def test_through_lmms_eval_a_reader_is_always_right_and_a_blind_model_is_not(place, readers, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: the reading tasks are NOT run")
    from lmms_eval.api.model import lmms

    from cal_train.evals.lmms import run

    class Answering(lmms):
        """Sees picture and prompt, as a model does, never the answer."""

        looks = True

        def generate_until(self, requests):
            answers = []
            for context, _, doc_to_visual, doc_id, task, split in (request.args for request in requests):
                (picture,) = doc_to_visual(self.task_dict[task][split][doc_id])
                question, request = context.split("\n")
                assert request == "Answer the question using a single word or phrase."
                answers.append(
                    readers[task.removeprefix("reading_")].read(picture, question) if self.looks else "stone"
                )
            return answers

        def loglikelihood(self, requests):
            raise NotImplementedError

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

    monkeypatch.setattr(run, "check_model_folder", lambda folder: None)
    monkeypatch.setattr(run, "_load", lambda *_: model)
    shutil.rmtree(place / reading.READING_TABLES)  # set-up is the command's
    command = ["eval", "--model", "m", "--suite", str(place / "eval/suites/reading.yaml"), "--output"]
    model = Answering()
    assert main([*command, str(tmp_path / "sees")]) == 0
    tasks = read_results(tmp_path / "sees")[0]["tasks"]
    found = {name: (len(task["metrics"]), task["num_documents"]) for name, task in tasks.items()}
    assert found == {"reading_word": (9, 192), "reading_number": (9, 192), "reading_among": (8, 192)}
    assert {value for task in tasks.values() for value in task["metrics"].values()} == {1.0}
    model = Answering()
    model.looks = False
    assert main([*command, str(tmp_path / "blind")]) == 0
    tasks = read_results(tmp_path / "blind")[0]["tasks"]
    scores = {name: task["metrics"]["exact_match"] for name, task in tasks.items()}
    assert scores == pytest.approx({"reading_word": 1 / 48, "reading_number": 0, "reading_among": 1 / 48})


def test_the_prompt_is_question_and_request(tables):
    around = {"pre_prompt": "", "post_prompt": "\nShort."}
    assert scene_tasks.doc_to_text(tables["word"][0], around) == "What word is written in the picture?\nShort."
