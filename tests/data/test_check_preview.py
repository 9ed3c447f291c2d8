import argparse
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cal_train.cli import check_data, preview
from cal_train.data.check import CheckReport, check_source
from cal_train.data.dataset import VlmDataset
from cal_train.data.images import DEFAULT_LIMITS
from cal_train.data.preview import Preview, Segment, preview_sample, to_html, to_terminal, token_segments
from cal_train.data.sources import Source
from cal_train.testing import tiny_processor, tiny_tokenizer, write_tiny_data, write_tiny_vlm
from cal_train.types import IGNORE_INDEX, BadSampleError


@pytest.fixture
def data_path(tmp_path) -> Path:
    return write_tiny_data(tmp_path, 8)


@pytest.fixture
def recipe(tmp_path, data_path) -> Path:
    write_tiny_vlm(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndata_path: {data_path}\n"
        f"image_folder: {tmp_path / 'images'}\noutput_dir: {tmp_path / 'out'}\n"
    )
    return path


def edit(data_path: Path, **changes: dict) -> None:
    rows = json.loads(data_path.read_text())
    for number, change in changes.items():
        rows[int(number[1:])] |= change
    data_path.write_text(json.dumps(rows))


def preview_row(dataset: VlmDataset, i: int) -> Preview:
    try:
        return preview_sample(dataset.load_sample(i), dataset.encoder)
    except BadSampleError as error:
        return preview_sample(error.problem, dataset.encoder)


def run_check(path: Path, image_root: Path | None = None, options: tuple[str, ...] = ()) -> int:
    return check_data.run(
        argparse.Namespace(path=str(path), image_root=image_root and str(image_root), options=list(options))
    )


def test_good_recipe_passes_and_its_counts_are_right(recipe, capsys):
    assert run_check(recipe) == 0
    out = capsys.readouterr().out
    assert "8 rows, 0 would fail; 6 images, 2 text-only rows, 0 repeated ids" in out
    assert "0 rows truncated" in out


def test_counts_equal_those_of_the_data_set_itself(data_path, tmp_path):
    dataset = VlmDataset([Source(data_path, tmp_path / "images")], tiny_processor(), "vicuna_v1", 90)
    report = CheckReport()
    check_source(report, dataset.sources[0], dataset.rows[0], dataset.summaries[0], DEFAULT_LIMITS, dataset.encoder)
    whole = VlmDataset([Source(data_path, tmp_path / "images")], tiny_processor(), "vicuna_v1", 2048)
    lengths = [len(whole[i]["input_ids"]) for i in range(8)]
    assert report.num_supervised == sum(int((dataset[i]["labels"] != IGNORE_INDEX).sum()) for i in range(8))
    assert report.num_truncated == sum(length > 90 for length in lengths) > 0
    assert report.num_cut == sum(max(0, length - 90) for length in lengths)


def test_bad_rows_are_listed_with_place_and_cure_and_the_exit_code_is_1(recipe, data_path, capsys):
    Image.new("RGB", (1, 1)).save(data_path.parent / "images" / "tiny.png")
    edit(data_path, r1={"image": "none.png"}, r2={"image": "tiny.png"}, r4={"conversations": []}, r5={"id": "row-0"})
    assert run_check(recipe) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "8 rows, 3 would fail" in out and "1 repeated ids" in out
    for expected in ("does not exist", "min_image_side", "'conversations' is empty", "add the file", "data.json"):
        assert expected.lower() in out.lower()


def test_too_long_row_fails_only_where_a_recipe_sets_the_limit(recipe, data_path):
    recipe.write_text(recipe.read_text() + "model_max_length: 30\n")
    assert run_check(recipe) == 1
    assert run_check(data_path, data_path.parent / "images") == 0


def test_an_option_on_the_command_line_overrides_the_recipe(recipe, data_path):
    assert run_check(recipe) == 0
    assert run_check(recipe, options=("--model_max_length", "30")) == 1
    with pytest.raises(ValueError, match="--model_max_length is an option of a recipe"):
        run_check(data_path, data_path.parent / "images", ("--model_max_length", "30"))


def test_data_file_on_its_own_is_checked_against_its_image_root(data_path, capsys):
    assert run_check(data_path, data_path.parent / "images") == 0
    assert "not checked" in capsys.readouterr().out
    assert run_check(data_path) == 1  # the images are not in the folder of the file


def test_image_root_beside_a_recipe_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="goes with a data file"):
        run_check(recipe, tmp_path)


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
def test_segments_spell_out_the_text_with_images_collapsed(data_path, tmp_path, kind):
    tokenizer = tiny_tokenizer(kind)
    dataset = VlmDataset([Source(data_path, tmp_path / "images")], tiny_processor(tokenizer), "chatml", 2048)
    example = dataset.encoder.tokenize(dataset.load_sample(0), [4])
    segments = token_segments(example, tokenizer)
    answer = json.loads(data_path.read_text())[0]["conversations"][1]["value"]
    assert "".join(s.text for s in segments if s.kind == "supervised") == answer + "<|im_end|>"
    assert [s.text for s in segments if s.kind == "image"] == ["<image \u00d74>"]
    assert "what is in the image?" in "".join(s.text for s in segments if s.kind == "prompt")
    assert len(segments) == len(example.input_ids) - 3


def test_html_escapes_what_the_data_says(data_path, tmp_path):
    evil = "<script>alert(1)</script>"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": evil}]
    edit(data_path, r3={"conversations": turns, "id": evil}, r0={"image": evil})
    dataset = VlmDataset([Source(data_path, tmp_path / "images")], tiny_processor(), "chatml", 2048)
    whole_token = Preview("title", "counts", (Segment(evil, "supervised"),))
    page = to_html([preview_row(dataset, 0), preview_row(dataset, 3), whole_token])
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(page)
    assert set(tags) == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span"}
    assert "".join(texts).count(evil) == 4  # a missing image, an id, an answer's tokens, one token
    assert "http" not in page  # self-contained


def test_bad_row_is_shown_with_its_problem(data_path, tmp_path):
    edit(data_path, r0={"image": "none.png"})
    dataset = VlmDataset([Source(data_path, tmp_path / "images")], tiny_processor(), "chatml", 2048)
    previews = [preview_row(dataset, 0)]
    assert "does not exist" in to_terminal(previews).plain and "does not exist" in to_html(previews)


def test_preview_verb_shows_rows_and_writes_a_page(recipe, tmp_path, capsys):
    assert preview.run(argparse.Namespace(recipe=str(recipe), rows=2, html=None, model=None, options=[])) == 0
    out = capsys.readouterr().out
    assert "row-0" in out and "row-1" in out and "row-2" not in out and "<image \u00d74>" in out
    page = tmp_path / "page.html"
    assert preview.run(argparse.Namespace(recipe=str(recipe), rows=99, html=str(page), model=None, options=[])) == 0
    assert page.read_text(encoding="utf-8").count("<h2>") == 8


def test_preview_of_no_rows_is_refused(recipe):
    with pytest.raises(ValueError, match="at least 1"):
        preview.run(argparse.Namespace(recipe=str(recipe), rows=0, html=None, model=None, options=[]))
