"""Streamed training: the losses of map-style data in the same order, and a resume that nobody can tell."""

import json
import logging
import re
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import Sampler

from cal_train.data.dataset import build_dataset
from cal_train.data.examples import SampleEncoder
from cal_train.train import run as run_module
from cal_train.train import run_data
from cal_train.types import DropCount


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


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="padded", marks=pytest.mark.slow),
        pytest.param(
            ("--packing", "true", "--cal", "true", "--gradient_accumulation_steps", "2"), id="packed-with-cal"
        ),
    ],
)
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


SAVING = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "10")
WITH_ALL = (*SAVING, "--packing", "true", "--cal", "true", "--dataloader_num_workers", "1")


@pytest.fixture(scope="module")
def straight(tiny_run):
    """A streamed run of two epochs of six steps that was never interrupted."""
    return tiny_run("--data_path", str(as_shards(tiny_run.root)), *STREAM, *WITH_ALL)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="mid-epoch", marks=pytest.mark.slow),
        pytest.param(6, id="epoch-end", marks=pytest.mark.slow),
        pytest.param(8, id="second-epoch"),
    ],
)
def test_a_resumed_stream_ends_bit_for_bit_the_same(streamed, straight, weights_of, step):
    resumed = streamed(*WITH_ALL, "--resume_from_checkpoint", str(straight / f"checkpoint-{step}"))
    assert resumed != straight
    assert losses_of(resumed) == losses_of(straight) and len(losses_of(straight)) == 12
    expected = weights_of(straight)
    assert all(torch.equal(weights_of(resumed)[name], value) for name, value in expected.items())


@pytest.fixture
def encoded_ids(monkeypatch):
    """The ids of the rows that are made into examples, in order."""
    ids, original = [], SampleEncoder.encode
    monkeypatch.setattr(
        SampleEncoder, "encode", lambda self, sample, *rest: ids.append(sample.id) or original(self, sample, *rest)
    )
    return ids


def test_with_ignore_data_skip_a_resumed_run_begins_its_epoch_anew(streamed, encoded_ids):
    first = streamed(*SAVING)
    straight = encoded_ids[:]
    assert len(straight) == 48 and set(straight[:24]) == set(straight[24:])
    encoded_ids.clear()
    resume = (*SAVING, "--resume_from_checkpoint", str(first / "checkpoint-8"))
    second = streamed(*resume, "--ignore_data_skip", "true")
    assert encoded_ids == straight[24:40]  # the four steps that are left, from the beginning of the second epoch
    assert len(losses_of(second)) == 12

    resume = ("--resume_from_checkpoint", str(second / "checkpoint-10"))
    with pytest.raises(ValueError, match=r"batch 2 of epoch 1, but its 10 steps.*batch 4 of.*ignore_data_skip: true"):
        streamed(*resume)
    encoded_ids.clear()
    assert losses_of(streamed(*resume, "--ignore_data_skip", "true"))[:10] == losses_of(second)[:10]
    assert encoded_ids == straight[24:32]


def test_a_resume_does_not_read_again_what_was_trained(streamed, tmp_path, encoded_ids):
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
    encoded_ids.clear()
    streamed(*saving, "--num_train_epochs", "1", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-3"))
    assert len(encoded_ids) == len(set(encoded_ids)) == 24 - 3 * 4


def test_a_position_of_another_layout_is_refused_and_says_what_differs(streamed, tmp_path):
    run = streamed("--save_strategy", "steps", "--save_steps", "3", "--output_dir", str(tmp_path / "run"))
    resume = ("--output_dir", str(run), "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"num_workers 0, this run has 1.*ignore_data_skip"):
        streamed(*resume, "--dataloader_num_workers", "1")
    position = run / "checkpoint-12" / "stream.json"
    position.write_text("[]".ljust(position.stat().st_size))  # of another size, the checkpoint would be passed by
    with pytest.raises(ValueError, match=re.escape("stream.json is not a position")):
        streamed(*resume)


def test_a_checkpoint_of_a_run_without_streaming_is_refused(tiny_run, streamed):
    run = tiny_run("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1")
    changed = (
        "--resume_changes",
        '["data_path", "streaming", "shuffle_pool", "max_steps", "num_train_epochs", "data_files"]',
    )
    with pytest.raises(ValueError, match=r"has no stream\.json: it is of a run without streaming"):
        streamed("--resume_from_checkpoint", str(run / "checkpoint-1"), *changed)


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


def test_no_command_is_advised_at_the_end_that_reads_single_files(caplog, tmp_path):
    recipe = SimpleNamespace(
        training=SimpleNamespace(output_dir=str(tmp_path)),
        model=SimpleNamespace(lora_enable=False, stage="finetune"),
        data=SimpleNamespace(streaming=True, data_path="shards"),
    )
    with caplog.at_level(logging.INFO, logger="cal_train"):
        run_module.report_end(SimpleNamespace(dropped=DropCount()), recipe)
    assert str(tmp_path) in caplog.text and "cal-train score" not in caplog.text


def talk(i):
    return [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"a red square {i}"}]
