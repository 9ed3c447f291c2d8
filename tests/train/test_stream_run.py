"""Streamed training: the losses of map-style data in the same order, and a resume that nobody can tell."""

import json
import re

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import Sampler

from cal_train.data.dataset import build_dataset
from cal_train.train import run as run_module
from cal_train.train import run_data


def as_shards(root):
    """The tiny run's rows as Parquet shards, images inside; the folder is made once."""
    folder = root / "shards"
    if folder.exists():
        return folder
    folder.mkdir()
    rows = json.loads((root / "data" / "data.json").read_text())
    for k in range(0, len(rows), 7):
        table = [
            {
                "id": row["id"],
                "conversations": row["conversations"],
                "image": {"bytes": (root / "data" / "images" / row["image"]).read_bytes()} if "image" in row else None,
            }
            for row in rows[k : k + 7]
        ]
        parquet.write_table(pa.Table.from_pylist(table), folder / f"{k:03}.parquet", row_group_size=3)
    return folder


STREAM = ("--streaming", "true", "--shuffle_pool", "8", "--max_steps", "-1", "--num_train_epochs", "2")


@pytest.fixture
def streamed(tiny_run):
    folder = as_shards(tiny_run.root)
    return lambda *options: tiny_run("--data_path", str(folder), *STREAM, *options)


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


class Fixed(Sampler):
    """The rows of a stream, by id, as a sampler of a map-style data set."""

    def __init__(self, epochs):
        self.epochs, self.epoch = epochs, 0

    def __len__(self):
        return len(self.epochs[0])

    def __iter__(self):
        return iter(self.epochs[self.epoch])

    def set_epoch(self, epoch):
        self.epoch = epoch


@pytest.mark.parametrize("options", [(), ("--packing", "true", "--cal", "true", "--gradient_accumulation_steps", "2")])
def test_streamed_training_has_the_losses_of_map_style_data_in_the_same_order(
    tiny_run, streamed, monkeypatch, weights_of, options
):
    seen, original = [], run_data.StreamLoader.__iter__

    def noted(self):
        seen.append([])
        for batch in original(self):
            seen[-1].extend(batch.sample_ids)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(run_data.StreamLoader, "__iter__", noted)
        stream = streamed(*options)
    assert [len(set(epoch)) for epoch in seen] == [24, 24] and seen[0] != seen[1]

    def fixed_rows(recipe, processor, collate):
        dataset = build_dataset(recipe.data, processor)
        number = {dataset.load_sample(i).id: i for i in range(len(dataset))}
        return run_data.TrainingRows(24, dataset, Fixed([[number[id] for id in epoch] for epoch in seen]))

    monkeypatch.setattr(run_module, "training_rows", fixed_rows)
    whole = tiny_run("--max_steps", "-1", "--num_train_epochs", "2", *options)
    assert len(losses_of(stream)) == (6 if options else 12)
    assert losses_of(stream) == losses_of(whole)
    first, second = weights_of(stream), weights_of(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("step", [2, 6, 8], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_a_resumed_stream_ends_bit_for_bit_the_same(streamed, weights_of, tmp_path, step):
    options = ("--packing", "true", "--cal", "true", "--dataloader_num_workers", "1")
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "10")
    straight = streamed(*options, *saving, "--output_dir", str(tmp_path / "run"))
    expected, losses = weights_of(straight), losses_of(straight)
    for file in [*straight.glob("*.safetensors"), *straight.glob("*.json")]:
        file.unlink()
    resumed = streamed(
        *options,
        *saving,
        "--output_dir",
        str(straight),
        "--resume_from_checkpoint",
        str(straight / f"checkpoint-{step}"),
    )
    assert losses_of(resumed) == losses and len(losses) == 12
    assert all(torch.equal(weights_of(resumed)[name], value) for name, value in expected.items())


def test_a_resume_does_not_read_again_what_was_trained(streamed, tmp_path, monkeypatch):
    saving = (
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--output_dir",
        str(tmp_path / "run"),
        "--shuffle_pool",
        "4",
    )
    streamed(*saving, "--num_train_epochs", "1")
    from cal_train.data.examples import SampleEncoder

    read, original = [], SampleEncoder.encode
    monkeypatch.setattr(
        SampleEncoder, "encode", lambda self, sample, *rest: read.append(sample.id) or original(self, sample, *rest)
    )
    streamed(*saving, "--num_train_epochs", "1", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3"))
    assert len(read) == len(set(read)) == 24 - 3 * 4


def test_a_position_of_another_layout_is_refused_and_says_what_differs(streamed, tmp_path):
    run = streamed("--save_strategy", "steps", "--save_steps", "3", "--output_dir", str(tmp_path / "run"))
    resume = ("--output_dir", str(run), "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"num_workers 0, this run has 1.*ignore_data_skip"):
        streamed(*resume, "--dataloader_num_workers", "1")
    (newest,) = [path for path in run.glob("checkpoint-12")]
    (newest / "stream.json").write_text("[]")
    with pytest.raises(ValueError, match=re.escape("stream.json is not a position")):
        streamed(*resume)
    (newest / "stream.json").unlink()
    with pytest.raises(ValueError, match=re.escape("has no stream.json")):
        streamed(*resume)


def test_bad_rows_are_dropped_and_counted_once_as_with_map_style_data(tiny_run, tmp_path):
    good = [{"id": f"r{i}", "conversations": talk(i), "image": None} for i in range(7)]
    bad = {
        "id": "bad",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, talk(0)[1]],
        "image": {"bytes": b"x"},
    }
    parquet.write_table(pa.Table.from_pylist([bad, *good]), tmp_path / "p.parquet")
    options = ("--data_path", str(tmp_path / "p.parquet"), *STREAM)
    with pytest.raises(
        ValueError, match=r"(?s)p.parquet, row 0 \(id 'bad'\).*1 bad rows, max_bad_samples is 0.*check_data"
    ):
        tiny_run(*options)
    run = tiny_run(*options, "--max_bad_samples", "1")
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [line["dropped_rows"] for line in history if "dropped_rows" in line][-1] == 1


def talk(i):
    return [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"a red square {i}"}]
