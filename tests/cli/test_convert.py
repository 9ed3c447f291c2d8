"""The verb ``convert`` says what became of the weights."""

import json

import pytest
from transformers import AutoModelForImageTextToText

from cal_train.cli.main import main
from cal_train.testing import write_tiny_vlm


def test_convert_prints_every_group_of_weights_and_where_it_wrote(tmp_path, capsys):
    source, out = write_tiny_vlm(tmp_path / "vlm"), tmp_path / "original"
    arguments = ["convert", "--from", str(source), "--output", str(out), "--to", "original", "--vision_tower", "zoo/x"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "model.mm_projector.0." in printed and f"wrote {out}" in printed
    num_weights = len(AutoModelForImageTextToText.from_pretrained(source).state_dict())
    moved = json.loads((out / "conversion.json").read_text())["moved"]
    assert sum(entry["weights"] for entry in moved) == num_weights


def test_a_folder_that_cannot_be_converted_is_one_message(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main(["convert", "--from", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "gpt2" in error and "Traceback" not in error
    with pytest.raises(SystemExit):
        main(["convert", "--from", str(tmp_path)])
