"""``preview --cal`` against deltas worked out by hand."""

import json
import re

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.cli.main import main
from cal_train.data.preview import Preview, Segment
from cal_train.evals.terminal_map import to_heat_map
from cal_train.testing import write_tiny_data, write_tiny_vlm

PROMPT = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT: "
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_tiny_vlm(folder / "model")
    data = write_tiny_data(folder, 4)
    rows = json.loads(data.read_text())
    data.write_text(json.dumps([row | {"conversations": row["conversations"][:2]} for row in rows]))
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\ndata_path: {data}\nimage_folder: {folder / 'images'}\n"
        f"output_dir: {folder / 'out'}\ncal_low: 0.0\ncal_high: 0.05\n"
    )
    return folder


def deltas_by_hand(place, row):
    """Logit differences of the answer's tokens, with the image's tokens hidden by the mask."""
    processor = AutoProcessor.from_pretrained(place / "model", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(place / "model", dtype=torch.float32).eval()
    question, answer = (turn["value"] for turn in row["conversations"])
    text = PROMPT.format(question) + answer + "</s>"
    image = Image.open(place / "images" / row["image"])
    inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    ids = inputs["input_ids"]
    num_labels = len(processor.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]) + 1
    hidden = (ids != model.config.image_token_id).long()
    with torch.no_grad():
        seen = model(**inputs).logits[0]
        unseen = model(**inputs | {"attention_mask": hidden}, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
    return (seen - unseen)[-num_labels - 1 : -1].gather(1, ids[0, -num_labels:, None])[:, 0].tolist()


def shown_rows(out):
    """The table's (delta, clamp) of every token, row by row."""
    numbers = r"(-?\d+\.\d\d)"
    rows = []
    for block in out.split("weight  clamp")[1:]:
        found = re.findall(rf"{numbers} +{numbers} +{numbers} +{numbers} *(low|high)?", block)
        rows.append([(float(entry[2]), entry[4]) for entry in found])
    return rows


def test_every_answer_token_has_its_delta_and_its_clamp(place, capsys):
    assert main(["preview", str(place / "recipe.yaml"), "--rows", "3", "--cal"]) == 0
    out = capsys.readouterr().out
    data = json.loads((place / "data.json").read_text())
    rows = shown_rows(out)
    assert len(rows) == 3
    signs = []
    for row, shown in zip(data[:3], rows, strict=True):
        if "image" not in row:
            assert {delta for delta, _ in shown} == {0.0}
            signs += ["-"] * len(shown)
            continue
        expected = deltas_by_hand(place, row)
        assert [delta for delta, _ in shown] == pytest.approx(expected, abs=0.0051)
        assert max(map(abs, expected)) > 0.05
        for delta, (_, clamp) in zip(expected, shown, strict=True):
            assert clamp == ("low" if delta <= 0 else "high" if delta >= 0.05 else "")
            signs.append("-" if delta <= 0 else "#" if delta >= 0.05 else "+")
    assert re.findall(r"\[([-+#])\]", out)[3:] == signs  # the first three are the legend's
    assert len(set(signs)) == 3


def test_a_text_row_says_that_nothing_was_taken_away(place, tmp_path, capsys):
    turns = [{"from": "human", "value": "a dog?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "t", "conversations": turns}]))
    assert main(["preview", str(place / "recipe.yaml"), "--cal", "--data_path", str(tmp_path / "data.json")]) == 0
    assert "no image: nothing is taken away" in " ".join(capsys.readouterr().out.split())


def test_another_model_shows_its_own_deltas_and_a_bad_row_its_problem(place, tmp_path, capsys):
    write_tiny_vlm(tmp_path / "other", seed=1)
    rows = json.loads((place / "data.json").read_text())
    rows[1]["image"] = "none.png"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    command = [
        "preview",
        str(place / "recipe.yaml"),
        "--rows",
        "2",
        "--cal",
        "--data_path",
        str(tmp_path / "data.json"),
    ]
    assert main([*command, "--model", str(place / "model")]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--model", str(tmp_path / "other")]) == 0
    second = capsys.readouterr().out
    assert len(shown_rows(first)) == 1 and shown_rows(first) != shown_rows(second)
    assert "none.png does not exist" in "".join(first.split("\n")) or "does not exist" in first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "x"], "add --cal"),
        (["--cal", "--html", "page.html"], "score and report"),
        (["--cal", "--cal_strategy", "uniform"], "takes no image away"),
        (["--cal", "--model", "nowhere"], "does not exist"),
    ],
)
def test_wrong_options_are_one_message(place, capsys, options, message):
    assert main(["preview", str(place / "recipe.yaml"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_cal_no_model_is_needed(place, capsys):
    assert main(["preview", str(place / "recipe.yaml"), "--rows", "1", "--cal", "false"]) == 0
    assert "supervised (has a label)" in capsys.readouterr().out


def rendered(has_colours, tokens, deltas):
    preview = Preview("t", "c", (Segment("q", "prompt"), *(Segment(token, "supervised") for token in tokens)))
    delta = torch.tensor(deltas)
    scores = {"logit_with": delta, "logit_without": 0 * delta, "delta": delta, "weight": delta}
    console = Console(width=120, force_terminal=has_colours, color_system="truecolor" if has_colours else None)
    with console.capture() as captured:
        console.print(to_heat_map([(preview, scores)], 1.0, 5.0, has_colours))
    return captured.get()


def test_colours_go_with_delta_and_stop_at_the_limits():
    out = rendered(True, ["aa", "bb", "cc", "dd", "ee"], [-9.0, 0.0, 3.0, 5.0, 80.0])
    colours = [
        re.search(rf"48;2;(\d+);(\d+);(\d+)m{token}\x1b", out).groups() for token in ("aa", "bb", "cc", "dd", "ee")
    ]
    assert colours[0] == colours[1] and colours[3] == colours[4] and len(set(colours)) == 3
    greens = [int(green) for _, green, _ in colours]
    assert greens[1] > greens[2] > greens[3]  # from yellow to dark red


def test_what_steers_a_terminal_is_written_out():
    out = rendered(False, ["\x1b[2J", "\u202eevil"], [0.0, 2.0])
    assert "\x1b" not in out and "\u202e" not in out and "[U+001B][2J[-]" in out and "[U+202E]evil[+]" in out
