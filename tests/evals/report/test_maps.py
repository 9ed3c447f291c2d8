"""Maps on the page and as pictures: the right samples, the right model, the right numbers."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from cal_train.cal.strategies import resolve_weighting
from cal_train.cli.main import main
from cal_train.data.processor import load_processor
from cal_train.evals.report.build import gather
from cal_train.evals.report.map_pictures import strongest_words, word_map
from cal_train.evals.report.maps import MapRequest, add_maps
from cal_train.evals.report.page import PageContent, ScoredModel, payload, render_page, visible_text
from cal_train.evals.report.scores import ScoredRow
from cal_train.evals.report.summary import surprises
from cal_train.evals.score import score_file
from cal_train.evals.sight.sample import sample_sight
from cal_train.evals.sight.values import SampleSight, View
from cal_train.testing import write_tiny_vlm

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u202egnp'
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250), (0, 250, 250)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A data set of plain colours, one row of text alone first, scored by two tiny models: their folder."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [{"id": "text", "conversations": turns("what?", "a dog")}]
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 40), colour).save(folder / f"{i}.png")
        answer = "a red dog" if i % 2 else "a circle"
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns("<image>\nwhat is it?", answer)})
    (folder / "data.json").write_text(json.dumps(rows))
    for name, seed in (("baseline", 0), ("cal", 1)):
        write_tiny_vlm(folder / name, seed=seed)
        score_file(folder / name, folder / "data.json", None, folder / f"{name}.jsonl", resolve_weighting("cal"))
    return folder


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def both(folder):
    return [folder / "baseline.jsonl", folder / "cal.jsonl"]


def test_half_of_the_samples_with_maps_are_the_most_surprising_and_half_the_first(scored):
    content = add_maps(gather(both(scored)), MapRequest(4))
    by_surprise = [int(i) for i in np.argsort(-surprises(content.models[0].rows)) if i != 0]  # 0 has no image
    expected = set(by_surprise[:2])
    expected |= set([i for i in range(1, 7) if i not in expected][:2])
    assert set(content.maps) == expected and all(len(sights) == 2 for sights in content.maps.values())
    for i, sights in content.maps.items():
        for sight in sights:
            assert len(sight.attention) == len(content.models[0].rows[i].tokens)
            np.testing.assert_allclose(sight.views[0].picture.mean((0, 1)), COLOURS[i - 1], atol=1)


def test_each_models_maps_are_its_own_and_are_those_of_the_scored_ids(scored):
    content = add_maps(gather(both(scored)), MapRequest(1, [0]))
    (i,) = content.maps
    record = json.loads((scored / "cal.jsonl").read_text().splitlines()[i])
    expected = sample_sight(
        AutoModelForImageTextToText.from_pretrained(scored / "cal", dtype=torch.float32).eval(),
        load_processor(scored / "cal"),
        [Image.open(scored / f"{i - 1}.png")],
        np.array(record["input_ids"]),
        np.array(record["label_positions"]),
        [0],
    )
    np.testing.assert_allclose(content.maps[i][1].attention, expected.attention, atol=1e-7)
    assert np.abs(content.maps[i][0].attention - expected.attention).max() > 1e-4
    assert content.map_layers == (0, 0)


def test_more_maps_than_images_are_all_of_them_and_the_page_says_so(scored):
    content = add_maps(gather(both(scored)[:1]), MapRequest(100))
    assert sorted(content.maps) == list(range(1, 7))
    assert any("Only 6 samples" in note for note in content.notes)


@pytest.mark.parametrize(
    ("break_it", "request_of", "message"),
    [
        (lambda about: about["paths"].update(model="/nowhere/at/all"), {}, "the model /nowhere/at/all of .* not there"),
        (lambda about: about.update(model_sha256="0" * 64), {}, "is not the model that was scored"),
        (lambda about: about["paths"].pop("model"), {}, "names no model"),
        (lambda about: None, {"models": ["a", "b"]}, "2 models, 1 score files"),
        (lambda about: None, {"models": ["baseline"]}, "is not the model that was scored"),
        (lambda about: None, {"layers": [5]}, "layers 5 to 5: the language model has layers 0 to 1"),
    ],
)
def test_a_model_that_cannot_make_the_maps_is_an_error_with_its_cure(
    scored, tmp_path, monkeypatch, break_it, request_of, message
):
    monkeypatch.chdir(scored)
    about = json.loads((scored / "cal.jsonl.about.json").read_text())
    break_it(about)
    (tmp_path / "cal.jsonl").write_bytes((scored / "cal.jsonl").read_bytes())
    (tmp_path / "cal.jsonl.about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        add_maps(gather([tmp_path / "cal.jsonl"]), MapRequest(2, **request_of))


def test_scores_without_a_note_need_the_model_by_name_and_the_page_says_that_it_is_on_trust(scored, tmp_path):
    (tmp_path / "cal.jsonl").write_bytes((scored / "cal.jsonl").read_bytes())
    content = gather([tmp_path / "cal.jsonl"])
    with pytest.raises(ValueError, match="names no model"):
        add_maps(content, MapRequest(2))
    with pytest.raises(ValueError, match="no sample has an image that can be opened"):
        add_maps(content, MapRequest(2, models=[scored / "cal"]))
    output, png = tmp_path / "p.html", tmp_path / "png"
    named = ["--data", str(scored / "data.json"), "--model", str(scored / "cal"), "--maps", "2", "--png", str(png)]
    assert main(["report", str(tmp_path / "cal.jsonl"), "--output", str(output), *named]) == 0
    assert "which its score file cannot confirm" in output.read_text()
    drawn = sorted(path.name for path in png.glob("*_[0-9].png"))
    assert len(drawn) == 4 and [name.startswith("attention_") for name in drawn] == [True, True, False, False]
    for name in drawn:
        with Image.open(png / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--maps", "-1"], "--maps -1"),
        (["--model", "x"], "belong to it"),
        (["--map_layers", "0:1"], "belong to it"),
        (["--maps", "1", "--map_layers", "3"], "--map_layers '3'"),
        (["--maps", "1", "--map_layers", "3:1"], "--map_layers '3:1'"),
    ],
)
def test_options_that_make_no_sense_are_refused(scored, tmp_path, capsys, options, message):
    assert main(["report", str(scored / "cal.jsonl"), "--output", str(tmp_path / "p.html"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def hand_made(words=(" sky", " fox", " fox", "<0x0A>")):
    """Two label tokens, four image tokens, one of which is no patch."""
    attention = np.array([[0.1, 0.2, 0.05, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    picture = np.full((8, 12, 3), 90, np.uint8)
    view = View(0, "whole", picture, np.array([[0, 1, 2], [-1, -1, -1]]))
    delta = np.array([1.0, 7.0], np.float32)
    row = ScoredRow("a", (" a", " fox"), np.array([5, 6]), delta, 0 * delta, delta, delta, 9)
    sight = SampleSight([view], attention, words, np.array([0.5, 0.25, 0.125, 0.0], np.float32))
    return PageContent("t", [ScoredModel("m", [row])], 1.0, 5.0, [], {}, {}, [], maps={0: [sight]})


def test_the_page_carries_shares_bytes_words_and_the_picture_as_the_tower_saw_it():
    data = payload(hand_made(), 1)
    (record,) = data["samples"][0]["maps"]
    assert list(base64.b64decode(record["attention"])) == [128, 255, 64, 0, 0, 0, 0, 0]  # of the strongest, in 255ths
    assert record["peaks"] == [0.2, 0.0] and record["totals"] == [0.35, 0.0]
    assert [data["words"][k] for k in record["words"]] == [" sky", " fox", " fox", "<0x0A>"]
    assert record["readable"] == 0.75 and record["legible"] == [1, 1, 1, 0]
    assert record["cosines"] == [0.5, 0.25, 0.12, 0]
    (view,) = record["views"]
    assert (view["rows"], view["columns"], view["tokens"]) == (2, 3, [0, 1, 2, -1, -1, -1])
    picture = Image.open(io.BytesIO(base64.b64decode(data["pictures"][view["picture"]].split(",")[1])))
    assert picture.size == (12, 8) and abs(np.asarray(picture).astype(int) - 90).max() <= 2


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))


def test_a_hostile_word_of_the_vocabulary_adds_no_element():
    hostile, clean = hand_made((HOSTILE, " fox", " fox", "x")), hand_made()
    assert Tags(render_page(hostile)).tags == Tags(render_page(clean)).tags
    assert payload(hostile, 1)["words"][0] == visible_text(HOSTILE) != HOSTILE


def test_a_words_map_is_the_mean_over_its_tokens_laid_over_its_patches():
    (sight,) = hand_made().maps[0]
    expected = [[0.05, 0.1, 0.025], [np.nan] * 3]
    np.testing.assert_allclose(word_map(sight, sight.views[0], (0, 2)), expected, atol=1e-7)


def test_the_words_that_are_drawn_are_those_that_the_image_helps_most():
    tokens = (" the", " dru", "m", ".", " is", " red", " and", " two", "<|im_end|>")
    delta = np.array([0.0, 1.0, 9.0, 50.0, 4.0, 5.0, 0.5, 3.0, 60.0], np.float32)
    row = ScoredRow("a", tokens, np.arange(9) + 4, delta, delta, delta, delta, 20)
    assert strongest_words(row) == [(1, 3), (4, 5), (5, 6), (7, 8)]
