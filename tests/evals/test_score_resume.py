import json
import shutil

import pytest
import torch

from cal_train.cal.strategies import STRATEGIES
from cal_train.cli.main import main
from cal_train.evals import score as score_module
from cal_train.evals.score import score_file
from cal_train.testing import write_tiny_data, write_tiny_vlm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    write_tiny_vlm(root / "vlm")
    write_tiny_data(root / "data", num_rows=11)
    return root


class Killed(Exception):
    pass


def score(tiny, output, strategy="cal", **options):
    data = options.pop("data", tiny / "data" / "data.json")
    model = options.pop("model", tiny / "vlm")
    images = tiny / "data" / "images"
    return score_file(model, data, images, output, STRATEGIES[strategy], **{"batch_size": 2, **options})


def kill_at_batch(monkeypatch, number):
    """Make the model die at its n-th batch from now; return the list of batches that were asked for."""
    seen, original = [], score_module.score_batches

    def dying(model, loader, weighting):
        for batch, scores in original(model, loader, weighting):
            seen.append(batch["sample_ids"])
            if len(seen) == number:
                raise Killed
            yield batch, scores

    monkeypatch.setattr(score_module, "score_batches", dying)
    return seen


@pytest.mark.parametrize("strategy", ["cal", "cal_reference", "random"])
def test_a_run_that_was_killed_twice_ends_with_the_file_of_an_undisturbed_one(tiny, tmp_path, monkeypatch, strategy):
    assert score(tiny, tmp_path / "whole.jsonl", strategy) == 11
    output = tmp_path / "stopped.jsonl"
    for batch in (3, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_batch(patch, batch)
            score(tiny, output, strategy)
        assert not output.exists()
        with output.with_name("stopped.jsonl.part").open("a") as file:
            file.write('{"id": "half a ro')  # what a killed process leaves behind its last complete batch
    with monkeypatch.context() as patch:
        batches = kill_at_batch(patch, -1)
        assert score(tiny, output, strategy) == 11
    assert [id for batch in batches for id in batch] == [f"row-{i}" for i in range(6, 11)]  # 4 + 2 were kept
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.jsonl{end}" for name in ("whole", "stopped") for end in ("", ".about.json")
    }


def test_dropped_rows_count_across_a_restart(tiny, tmp_path, monkeypatch, caplog):
    rows = json.loads((tiny / "data" / "data.json").read_text())
    for i in (0, 9):
        rows[i] = {"id": f"broken-{i}", "conversations": []}
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    for limit in (1, 1):  # the second bad row is one too many, whether or not the first is met again
        with pytest.raises(ValueError, match=r"broken-9.*[\n].*2 bad rows"):
            score(tiny, tmp_path / "out.jsonl", data=tmp_path / "bad.json", max_bad_samples=limit)
    assert score(tiny, tmp_path / "out.jsonl", data=tmp_path / "bad.json", max_bad_samples=2) == 9
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        f"row-{i}" for i in range(11) if i not in (0, 9)
    ]
    assert "broken-0" in caplog.text and "broken-9" in caplog.text


@pytest.mark.parametrize("change", ["model", "data", "length", "weighting", "batch size"])
def test_what_was_begun_with_other_ingredients_is_refused_by_name(tiny, tmp_path, monkeypatch, change):
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_batch(patch, 2)
        score(tiny, output)
    other, strategy = {}, "cal"
    if change == "model":
        shutil.copytree(tiny / "vlm", tmp_path / "vlm")
        weights = tmp_path / "vlm" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        other, named = {"model": tmp_path / "vlm"}, "model_sha256"
    elif change == "data":
        text = (tiny / "data" / "data.json").read_text()
        (tmp_path / "data.json").write_text(text.replace("row-10", "row-ten"))
        other, named = {"data": tmp_path / "data.json"}, "data_sha256"
    elif change == "length":
        other, named = {"max_length": 512}, "max_length was 2048, is 512"
    elif change == "batch size":
        other, named = {"batch_size": 3}, "batch_size was 2, is 3"
    else:
        strategy, named = "cal_reference", "weighting"
    before = (tmp_path / "out.jsonl.part").read_bytes()
    with pytest.raises(ValueError, match=named) as refusal:
        score(tiny, output, strategy, **other)
    assert "delete" in str(refusal.value)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before


def test_a_damaged_note_or_a_part_that_lost_rows_is_refused(tiny, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_batch(patch, 3)
        score(tiny, output)
    (tmp_path / "out.jsonl.part").write_text("")
    with pytest.raises(ValueError, match="shorter"):
        score(tiny, output)
    (tmp_path / "out.jsonl.part.json").write_text('{"about": {}}')
    with pytest.raises(ValueError, match=r"damaged.*progress"):
        score(tiny, output)


def test_a_finished_file_says_what_it_is_of(tiny, tmp_path):
    arguments = ["score", "--model", str(tiny / "vlm"), "--data", str(tiny / "data" / "data.json"), "--image_root",
                 str(tiny / "data" / "images"), "--output", str(tmp_path / "s.jsonl"), "--cal_high", "7"]  # fmt: skip
    assert main(arguments) == 0
    about = json.loads((tmp_path / "s.jsonl.about.json").read_text())
    assert about["weighting"]["high"] == 7
    assert about["paths"]["image_root"] == str((tiny / "data" / "images").resolve())
    assert len(about["tokenizer_sha256"]) == 64


def test_scoring_leaves_the_callers_random_numbers_alone(tiny, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    score(tiny, tmp_path / "s.jsonl")
    assert torch.equal(torch.rand(1), expected)
