import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cal_train.conf import DataArguments
from cal_train.data.collate import DROPPED_ROW_ID, Collator
from cal_train.data.dataset import VlmDataset, build_dataset, build_eval_dataset
from cal_train.data.examples import images_to_front
from cal_train.data.sampling import ModalityLengthSampler, ShuffledSampler, modality_grouped_order
from cal_train.data.sources import Source, draw_rows, training_sources
from cal_train.testing import tiny_processor, write_tiny_data
from cal_train.types import IGNORE_INDEX, Message, Problem

NUM_ROWS = 16


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"), NUM_ROWS)


@pytest.fixture
def dataset(data_path) -> VlmDataset:
    return make_dataset(data_path)


def make_dataset(data_path: Path, weight: float = 1.0, **options) -> VlmDataset:
    source = Source(data_path, data_path.parent / "images", weight)
    return VlmDataset([source], tiny_processor(), "vicuna_v1", 2048, **options)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def text_row(text: str = "a", **row) -> dict:
    return {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}], **row}


# --- examples


def test_example_carries_ids_labels_and_one_pixel_tensor_per_image(dataset):
    example = dataset[0]
    image_token = dataset.processor.image_token_id
    assert example["sample_id"] == "row-0"
    assert example["input_ids"].dtype == example["labels"].dtype == torch.int64
    assert example["pixel_values"].shape == (1, 3, 28, 28) and example["pixel_values"].dtype == torch.float32
    assert (example["input_ids"] == image_token).sum() == 4
    assert "pixel_values" not in dataset[3]  # every fourth row is text only


def test_pixels_are_those_of_the_processor_on_the_same_file(dataset, data_path):
    from PIL import Image

    image = Image.open(data_path.parent / "images" / "0.png").convert("RGB")
    oracle = dataset.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(dataset[0]["pixel_values"], oracle)


def test_bad_row_comes_out_as_its_problem(data_path, tmp_path):
    rows = json.loads(data_path.read_text())[:4]
    rows[1]["image"] = "none.png"
    (tmp_path / "broken.png").write_bytes((data_path.parent / "images" / "2.png").read_bytes()[:60])
    rows[2]["image"] = "broken.png"
    for k in (0, 1):
        (tmp_path / f"{k}.png").write_bytes((data_path.parent / "images" / f"{k}.png").read_bytes())
    path = write_rows(tmp_path / "rows.json", rows)
    dataset = VlmDataset([Source(path)], tiny_processor(), "vicuna_v1", 2048)
    items = [dataset[i] for i in range(4)]
    assert [isinstance(item, Problem) for item in items] == [False, True, True, False]
    assert "does not exist" in items[1].problem and "cannot be read" in items[2].problem
    assert [(p.file, p.row, p.id) for p in items[1:3]] == [(str(path), 1, "row-1"), (str(path), 2, "row-2")]


def test_turns_that_the_template_refuses_are_a_bad_row(data_path):
    dataset = VlmDataset([Source(data_path, data_path.parent / "images")], tiny_processor(), "plain", 2048)
    assert isinstance(dataset[0], dict)
    assert "exactly one user turn" in dataset[2].problem  # row 2 has two questions


def test_row_longer_than_the_limit_is_a_bad_row(data_path):
    source = Source(data_path, data_path.parent / "images")
    dataset = VlmDataset([source], tiny_processor(), "vicuna_v1", 20)
    assert "longer than the limit" in dataset[0].problem
    assert "no supervised token" in dataset[3].problem


def test_cached_features_take_the_place_of_pixels_and_set_the_placeholders(data_path):
    features = torch.arange(6 * 8, dtype=torch.float32).reshape(6, 8)
    dataset = make_dataset(data_path, load_features=lambda image: features)
    example = dataset[0]
    assert "pixel_values" not in example
    assert torch.equal(example["vision_features"], features[None])
    assert (example["input_ids"] == dataset.processor.image_token_id).sum() == 6


def test_row_whose_image_is_not_cached_falls_back_to_pixels(data_path):
    example = make_dataset(data_path, load_features=lambda image: None)[0]
    assert "vision_features" not in example and example["pixel_values"].shape == (1, 3, 28, 28)


def test_images_to_front_moves_each_mark_before_its_own_turn():
    moved = images_to_front(
        [
            Message("user", "is this <image> or <image> it?"),
            Message("assistant", "a"),
            Message("user", "<image>"),
            Message("assistant", " b"),
        ]
    )
    assert [message.content for message in moved] == ["<image>\n<image>\nis this  or  it?", "a", "<image>", " b"]


def test_image_position_front_changes_what_is_tokenized(tmp_path, data_path):
    row = json.loads(data_path.read_text())[0]
    row["conversations"][0]["value"] = "what is <image> this?"
    path = write_rows(tmp_path / "rows.json", [row])
    keep, front = (
        VlmDataset([Source(path, data_path.parent / "images")], tiny_processor(), "vicuna_v1", 2048, position)[0]
        for position in ("keep", "front")
    )
    first = [int((e["input_ids"] == 4).nonzero()[0]) for e in (keep, front)]
    assert first[0] > first[1] and keep["sample_id"] == front["sample_id"]


def test_iter_images_gives_every_image_and_leaves_bad_rows_out(tmp_path, data_path):
    rows = json.loads(data_path.read_text())[:4]
    rows[0]["image"] = "none.png"
    dataset = VlmDataset(
        [Source(write_rows(tmp_path / "rows.json", rows), data_path.parent / "images")], tiny_processor(), "chatml", 99
    )
    assert [image.name for image in dataset.iter_images()] == ["1.png", "2.png"]


# --- mixture


def test_whole_weights_give_every_row_that_often_and_fractions_a_draw_without_replacement():
    rng = np.random.default_rng(0)
    assert Counter(draw_rows(10, 2.0, rng).tolist()) == Counter({i: 2 for i in range(10)})
    half = draw_rows(10, 0.5, rng)
    assert len(half) == len(set(half.tolist())) == 5
    counts = Counter(draw_rows(10, 2.3, rng).tolist())
    assert len(counts) == 10 and sorted(counts.values()) == [2] * 7 + [3] * 3


def test_fractional_draw_depends_on_seed_and_epoch_alone_and_keeps_the_length(data_path):
    a, b, other = (make_dataset(data_path, 0.5, seed=seed) for seed in (3, 3, 4))

    def epoch(dataset: VlmDataset, number: int) -> list[int]:
        dataset.set_epoch(number)
        return [dataset.load_sample(i).row for i in range(len(dataset))]

    b.set_epoch(7)
    first, second = epoch(a, 0), epoch(a, 1)
    assert len(first) == len(second) == 8 and first != second
    assert epoch(a, 0) == first == epoch(b, 0) != epoch(other, 0)


def test_sources_keep_their_own_root_and_weight(tmp_path, data_path):
    texts = write_rows(tmp_path / "texts.json", [text_row(), text_row()])
    options = DataArguments(
        data=[
            {"path": str(data_path), "image_root": str(data_path.parent / "images")},
            {"path": str(texts), "weight": 3},
        ],
        template="chatml",
    )
    dataset = build_dataset(options, tiny_processor())
    assert len(dataset) == NUM_ROWS + 6
    assert not any(isinstance(dataset[i], Problem) for i in range(len(dataset)))
    assert dataset.sources[1].root == tmp_path


def test_image_root_defaults_to_the_folder_of_the_data_file(tmp_path):
    assert training_sources(DataArguments(data_path=str(tmp_path / "x.json")))[0].root == tmp_path


def test_eval_set_uses_the_same_options(data_path):
    options = DataArguments(data_path="unused", image_folder=str(data_path.parent / "images"), template="chatml")
    assert build_eval_dataset(options, tiny_processor()) is None
    options = dataclasses.replace(options, eval_data_path=str(data_path), model_max_length=7)
    assert build_eval_dataset(options, tiny_processor()).max_length == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "exactly one of data_path and data"),
        ({"data_path": "x", "data": [{"path": "y"}]}, "exactly one of data_path and data"),
        ({"data": []}, "list of sources"),
        ({"data": [{"path": "y", "wieght": 2}]}, r"data\[0\]"),
        ({"data": [{"path": "y"}, {"weight": 2}]}, r"data\[1\]"),
        ({"data": [{"path": "y", "weight": "much"}]}, "'much' is not a number"),
    ],
)
def test_malformed_data_options_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        training_sources(DataArguments(**options))


@pytest.mark.parametrize("weight", [0, -1, 0.01])
def test_mixture_without_rows_is_refused(data_path, weight):
    with pytest.raises(ValueError, match=r"not positive|no rows"):
        make_dataset(data_path, weight)


def test_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        VlmDataset([Source(write_rows(tmp_path / "rows.json", []))], tiny_processor(), "chatml", 99)
    with pytest.raises(ValueError, match="no data"):
        VlmDataset([], tiny_processor(), "chatml", 99)


def test_template_that_does_not_fit_is_refused_before_any_row_is_read(tmp_path):
    with pytest.raises(ValueError, match="template 'chat'"):
        VlmDataset([Source(tmp_path / "unread.json")], tiny_processor(), "chat", 99)


def test_repeated_ids_and_leading_answers_are_warned_about_with_counts(tmp_path, caplog):
    leading = text_row(id="c")
    leading["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    rows = [text_row(id="a"), text_row(id="b"), text_row(id="a"), text_row(id="a"), leading]
    VlmDataset([Source(write_rows(tmp_path / "rows.json", rows))], tiny_processor(), "chatml", 99)
    assert "2 rows repeat the id of another row ('a' occurs 3 times)" in caplog.text
    assert "1 rows begin with an assistant turn" in caplog.text


def test_lengths_are_words_plus_image_tokens_and_negative_for_text_only(tmp_path, data_path):
    rows = [json.loads(data_path.read_text())[0], text_row("two words"), {"id": "bad"}]
    parts = [{"type": "image"}, {"type": "text", "text": "three word question"}]
    rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]})
    path = write_rows(tmp_path / "rows.json", rows)
    dataset = VlmDataset([Source(path, data_path.parent / "images")], tiny_processor(), "chatml", 99)
    # row 0: "<image> what is in the image?" and "a COLOUR THING on a COLOUR THING background."
    assert dataset.lengths.tolist() == [6 + 8 + 4, -3, -1, 4 + 4]


# --- batches


def test_batch_is_padded_on_the_right(dataset):
    items = [dataset[i] for i in (0, 2, 3)]
    batch = Collator(pad_token_id=0)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for k, item in enumerate(items):
        n = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][k, :n], item["input_ids"]) and (batch["input_ids"][k, n:] == 0).all()
        assert torch.equal(batch["labels"][k, :n], item["labels"]) and (batch["labels"][k, n:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][k].tolist() == [1] * n + [0] * (longest - n)
    assert torch.equal(batch["pixel_values"], torch.cat([items[0]["pixel_values"], items[1]["pixel_values"]]))
    assert batch["sample_ids"] == ["row-0", "row-2", "row-3"] and batch["dropped"] == []
    assert batch["attention_mask"].dtype == torch.int64


def test_text_only_batch_has_no_pixel_values(dataset):
    assert "pixel_values" not in Collator(0)([dataset[3], dataset[7]])


def test_bad_rows_leave_the_batch_and_are_listed(dataset):
    problem = Problem("data.json", 5, "row-5", "broken", "Mend it")
    batch = Collator(0)([dataset[0], problem, dataset[3]])
    assert batch["sample_ids"] == ["row-0", "row-3"] and batch["dropped"] == [problem]


def test_batch_of_bad_rows_only_is_one_row_without_labels():
    problem = Problem("data.json", 5, "row-5", "broken", "Mend it")
    batch = Collator(pad_token_id=9)([problem, problem])
    assert batch["input_ids"].tolist() == [[9]] and batch["attention_mask"].tolist() == [[1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]] and batch["sample_ids"] == [DROPPED_ROW_ID]
    assert len(batch["dropped"]) == 2 and "pixel_values" not in batch


def test_batch_of_pixels_and_cached_features_is_refused(dataset, data_path):
    cached = make_dataset(data_path, load_features=lambda image: torch.zeros(4, 8))
    assert Collator(0)([cached[0], cached[1]])["vision_features"].shape == (2, 4, 8)
    with pytest.raises(ValueError, match=r"row-1.*not in the feature cache"):
        Collator(0)([cached[0], dataset[1]])


def test_worker_processes_return_the_same_batches(dataset):
    alone, workers = (
        list(DataLoader(dataset, 4, sampler=ShuffledSampler(dataset, 1), collate_fn=Collator(0), num_workers=n))
        for n in (0, 2)
    )
    assert len(alone) == 4
    for a, b in zip(alone, workers, strict=True):
        assert a["sample_ids"] == b["sample_ids"] and torch.equal(a["input_ids"], b["input_ids"])


# --- order


def test_shuffled_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(dataset):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShuffledSampler(dataset, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(NUM_ROWS))
    assert order(0, 0) == order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_sampler_sets_the_epoch_of_the_data_set(data_path):
    dataset = make_dataset(data_path, 0.5)
    rows = [dataset.load_sample(i).row for i in range(len(dataset))]
    ShuffledSampler(dataset).set_epoch(5)
    expected = make_dataset(data_path, 0.5)
    expected.set_epoch(5)
    redrawn = [dataset.load_sample(i).row for i in range(len(dataset))]
    assert redrawn == [expected.load_sample(i).row for i in range(len(expected))] != rows


@pytest.mark.parametrize(("num_images", "num_texts"), [(40, 24), (37, 9), (3, 2), (16, 0), (0, 11), (32, 8)])
def test_megabatches_are_of_one_kind_and_sorted_and_cover_every_row_once(num_images, num_texts):
    size = 8
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 500, num_images), -rng.integers(1, 500, num_texts)])
    rng.shuffle(lengths)
    order = modality_grouped_order(lengths, size, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(num_images + num_texts))
    full = num_images // size + num_texts // size
    blocks = [lengths[order[k * size : (k + 1) * size]] for k in range(full)] + [lengths[order[full * size :]]]
    for block in blocks[:full]:
        assert (block > 0).all() or (block < 0).all()
    for block in blocks:
        assert (np.diff(np.abs(block)) <= 0).all()
    assert len(blocks[-1]) == num_images % size + num_texts % size


def test_modality_order_depends_on_seed_and_epoch_alone(dataset):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ModalityLengthSampler(dataset, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert len(ModalityLengthSampler(dataset, 4)) == NUM_ROWS
    assert order(0, 0) == order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    kinds = ["pixel_values" in dataset[i] for i in order(0, 0)]
    assert all(len(set(kinds[k : k + 4])) == 1 for k in range(0, NUM_ROWS, 4))
