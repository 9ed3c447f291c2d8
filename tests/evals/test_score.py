import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.cal.weights import cal_weights
from cal_train.cli.main import main
from cal_train.data.dataset import VlmDataset
from cal_train.data.sources import Source
from cal_train.testing import write_tiny_data, write_tiny_vlm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("score")
    write_tiny_vlm(root / "vlm")
    write_tiny_data(root / "data", num_rows=11)
    return root


def score(tiny, *options):
    output = tiny / "scores.jsonl"
    arguments = [
        "score", "--model", str(tiny / "vlm"), "--data", str(tiny / "data" / "data.json"), "--image_root",
        str(tiny / "data" / "images"), "--output", str(output), "--cal_low", "0.01", "--cal_high", "0.1",
    ]  # fmt: skip
    assert main([*arguments, *options]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("ablation", ["remove", "mask"])
def test_scores_equal_plain_transformers_in_float64_row_by_row(tiny, ablation):
    records = score(tiny, "--ablation", ablation, "--batch_size", "4")
    model = AutoModelForImageTextToText.from_pretrained(tiny / "vlm").double()
    processor = AutoProcessor.from_pretrained(tiny / "vlm", backend="pil")
    dataset = VlmDataset([Source(tiny / "data" / "data.json", tiny / "data" / "images")], processor, "chat", 2048)
    assert [record["id"] for record in records] == [f"row-{i}" for i in range(11)]
    for record, row in zip(records, dataset, strict=True):
        ids = torch.tensor(record["input_ids"])
        assert torch.equal(ids, row["input_ids"])
        positions = torch.tensor(record["label_positions"])
        assert torch.equal(positions, (row["labels"] != -100).nonzero()[:, 0])
        inputs = {"input_ids": ids[None]}
        if "pixel_values" in row:
            inputs["pixel_values"] = row["pixel_values"].double()
        with torch.no_grad():
            full = torch.ones_like(ids)[None]
            keys = (ids != model.config.image_token_id).long()[None]
            logits = [model(**inputs, attention_mask=mask).logits[0, positions - 1] for mask in (full, keys)]
        with_image, without_image = (logit.gather(1, ids[positions][:, None])[:, 0] for logit in logits)
        delta = with_image - without_image
        weight = cal_weights(delta[None], torch.ones(1, len(delta), dtype=torch.bool), 0.01, 0.1)[0]
        for name, expected in (
            ("logit_with", with_image), ("logit_without", without_image), ("delta", delta), ("weight", weight),
        ):  # fmt: skip
            assert torch.allclose(torch.tensor(record[name]).double(), expected.double(), atol=1e-4), name
        assert "".join(record["tokens"]).startswith(" a ") or "no" in "".join(record["tokens"])


def test_batch_size_does_not_change_scores(tiny):
    one, many = score(tiny, "--batch_size", "1"), score(tiny, "--batch_size", "11")
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(torch.tensor(a["delta"]), torch.tensor(b["delta"]), atol=1e-5)


def test_a_bad_row_is_named_and_leaves_no_half_written_result(tiny, capsys):
    rows = json.loads((tiny / "data" / "data.json").read_text())
    rows[3] = {"id": "broken", "conversations": [{"from": "robot", "value": "?"}]}
    (tiny / "bad.json").write_text(json.dumps(rows))
    arguments = ["score", "--model", str(tiny / "vlm"), "--data", str(tiny / "bad.json"), "--image_root",
                 str(tiny / "data" / "images"), "--output", str(tiny / "bad.jsonl")]  # fmt: skip
    assert main(arguments) == 2
    assert "row 3" in capsys.readouterr().err
    assert not (tiny / "bad.jsonl").exists()
    assert main([*arguments, "--max_bad_samples", "1"]) == 0
    assert len((tiny / "bad.jsonl").read_text().splitlines()) == 10


def test_a_strategy_without_contrast_is_refused(tiny, capsys):
    from cal_train.cal.strategies import STRATEGIES
    from cal_train.evals.score import score_file

    with pytest.raises(ValueError, match="nothing to score"):
        score_file(tiny / "vlm", tiny / "data" / "data.json", None, tiny / "x.jsonl", STRATEGIES["uniform"])


def test_image_position_moves_the_image_as_in_training(tiny, tmp_path):
    rows = json.loads((tiny / "data" / "data.json").read_text())[:1]
    rows[0]["conversations"][0]["value"] = "what is in the image?\n<image>"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    kept, front = (
        score(tiny, "--data", str(tmp_path / "data.json"), "--image_position", place)[0] for place in ("keep", "front")
    )
    original = score(tiny, "--data", str(tiny / "data" / "data.json"))[0]  # its mark is in front
    assert front["input_ids"] == original["input_ids"] != kept["input_ids"]
