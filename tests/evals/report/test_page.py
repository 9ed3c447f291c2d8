import base64
import hashlib
import html
import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from cal_train.cli.main import main
from cal_train.evals.report import page as page_module
from cal_train.evals.report.page import PageContent, ScoredModel, num_shown, render_page, script_json, visible_text
from cal_train.evals.report.pictures import write_pictures
from cal_train.evals.report.run_folder import ResultTable
from cal_train.evals.report.scores import ScoredRow
from cal_train.types import Message, Sample

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u202egnp.exe\u2028\ud800 {{7*7}} <!--'


def row(id, tokens, delta=None):
    delta = np.array(delta if delta is not None else np.linspace(-2, 8, len(tokens)), np.float32)
    weight = delta.clip(1, 5)
    return ScoredRow(id, tuple(tokens), np.arange(len(tokens)) + 3, 10 + delta, 10 + 0 * delta, delta, weight, 99)


def content(*models, samples=(), tables=(), curves=None, thumbnails=None):
    named = [ScoredModel(f"model {k}", rows) for k, rows in enumerate(models)]
    return PageContent("a title", named, 1.0, 5.0, list(samples), thumbnails or {}, curves or {}, list(tables))


class Page(html.parser.HTMLParser):
    """What a browser's parser sees: elements, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.inside = None
        self.tags, self.scripts, self.attributes, self.policy, self.style = [], [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.attributes += [name for name, _ in attrs]
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]
        if tag == "script":
            self.scripts.append([dict(attrs).get("type"), ""])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data
        if self.inside == "style":
            self.style += data


def hostile_page():
    sample = Sample(HOSTILE, "f", 0, (Message("user", HOSTILE), Message("assistant", "x")))
    table = ResultTable((HOSTILE, "b"), ((HOSTILE, "1"),))
    curves = {HOSTILE: {HOSTILE: [(1, 1.0), (2, 2.0)]}}
    text = content([row(HOSTILE, [" a", HOSTILE])], samples=[sample], tables=[table], curves=curves)
    text.models[0].__dict__["name"] = HOSTILE
    return render_page(text)


def test_hostile_text_adds_no_element_and_arrives_unchanged_but_for_what_steers():
    clean_table, clean_curves = ResultTable(("c", "b"), (("a", "1"),)), {"l": {"r": [(1, 1.0), (2, 2.0)]}}
    clean_rows = [row("a", [" a", " dog"])]
    clean = Page(render_page(content(clean_rows, samples=[None], tables=[clean_table], curves=clean_curves)))
    hostile = Page(hostile_page())
    assert hostile.tags == clean.tags
    assert not [name for name in hostile.attributes if name.startswith("on") or name == "style"]
    data = json.loads(hostile.scripts[0][1])
    assert data["vocabulary"][1] == visible_text(HOSTILE) == data["samples"][0]["id"] == data["samples"][0]["prompt"]
    assert "[U+202E]gnp.exe[U+2028][U+D800]" in data["vocabulary"][1]


def test_the_policy_allows_exactly_the_pages_own_script_and_style():
    page = Page(hostile_page())
    (kind, script) = page.scripts[2]
    assert kind is None and [kind for kind, _ in page.scripts[:2]] == ["application/json"] * 2
    for directive, text in (("script-src", script), ("style-src", page.style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in page.policy
    assert "default-src 'none'" in page.policy and "unsafe" not in page.policy and "http" not in page.policy


def test_the_page_names_no_address():
    text = hostile_page()
    assert not re.findall(r"(?:https?:)?//[a-z]|@import|url\(", text)
    assert "link" not in Page(text).tags


@pytest.mark.parametrize("character", ["<", ">", "&", "\u2028", "\u2029"])
def test_json_for_a_script_holds_no_character_that_could_end_it(character):
    text = script_json([f"a{character}b"])
    assert character not in text and json.loads(text) == [f"a{character}b"]


def test_a_number_that_is_none_cannot_enter_the_page():
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json(float("nan"))


def test_ordinary_text_of_any_script_stays_as_it_is():
    text = "naïve 猫 кот 🦊 שלום\tand\nmore"
    assert visible_text(text) == text


def test_numbers_reach_the_page_in_hundredths_and_gaps_are_marked():
    one = row("a", [" a", "b", "c"], [0.123, 4.567, -1.0])
    one.positions[2] = 9  # another turn
    data = json.loads(Page(render_page(content([one], [one]))).scripts[0][1])
    sample = data["samples"][0]
    assert sample["gaps"] == [2] and len(sample["scores"]) == 2
    assert sample["scores"][0] == [[10.12, 14.57, 9.0], [10.0, 10.0, 10.0], [0.12, 4.57, -1.0], [1.0, 4.57, 1.0]]


def test_a_page_without_scores_has_curves_and_no_samples():
    text = render_page(content(curves={"loss": {"run": [(1, 1.0), (2, 2.0)]}}))
    assert 'id="training"' in text and 'id="samples"' not in text


def test_the_limits_are_kept_and_said(monkeypatch):
    rows = [row(f"r{i}", [" a"] * 4) for i in range(10)]
    monkeypatch.setattr(page_module, "MAX_TOKENS", 20)
    assert num_shown([ScoredModel("x", rows)]) == 5
    assert num_shown([ScoredModel("x", rows), ScoredModel("y", rows)]) == 2
    monkeypatch.setattr(page_module, "MAX_SAMPLES", 3)
    text = render_page(content(rows))
    assert "first 3 of 10 samples" in text
    assert len(json.loads(Page(text).scripts[0][1])["samples"]) == 3
    assert "40 label tokens" in text  # the histogram counts all


def test_the_command_writes_page_and_pictures(tmp_path, capsys):
    record = {
        "id": "a", "input_ids": [1, 2, 3], "label_positions": [1, 2], "tokens": [" fox", "$"], "logit_with": [5.0, 1.0],
        "logit_without": [1.0, 1.0], "delta": [4.0, 0.0], "weight": [4.0, 1.0],
    }  # fmt: skip
    scores = tmp_path / "s.jsonl"
    scores.write_text(json.dumps(record) + "\n")
    output, pictures = tmp_path / "new" / "page.html", tmp_path / "png"
    assert main(["report", str(scores), str(scores), "--output", str(output), "--png", str(pictures)]) == 0
    assert html.unescape(output.read_text()).count("2 label tokens") == 2
    assert {path.name for path in pictures.iterdir()} == {"histogram.png", "heat_map_1.png", "heat_map_2.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    assert main(["report", str(tmp_path / "none"), "--output", str(output)]) == 2
    assert main(["report", *[str(scores)] * 3, "--output", str(output)]) == 2
    assert main(["report", str(scores), "--image_root", "x", "--output", str(output)]) == 2
    errors = capsys.readouterr().err
    assert "does not exist" in errors and "3 paths" in errors and "--data" in errors


def test_curves_are_drawn_too_each_run_in_its_colour_with_or_without_scores(tmp_path):
    def picture_of(curves, *models):
        written = write_pictures(content(*models, curves=curves), tmp_path)
        with Image.open(written[0]) as image:
            red, _, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=int), 2, 0)
        has_blue, has_orange = (blue - red > 50).any(), (red - blue > 50).any()  # all else is grey
        return [path.name for path in written], len(red), (bool(has_blue), bool(has_orange))

    first, second = {"a$": [(1, 0.1), (9, 0.8)]}, {"b": [(1, 0.7), (9, 0.2)]}
    names, height, colours = picture_of({"tiny/name/acc": first})
    assert names == ["curves.png"] and colours == (True, False)
    _, height_of_two_rows, colours = picture_of(dict.fromkeys("pqr", first) | {"s": first | second})
    assert colours == (True, True) and height_of_two_rows > height
    assert picture_of({"q": first}, [row("r", [" a"])])[0] == ["curves.png", "histogram.png", "heat_map.png"]
    with pytest.raises(ValueError, match="there are none"):
        write_pictures(content(), tmp_path)
