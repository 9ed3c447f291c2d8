"""Sizes from headers, and the true number of image tokens of each row before any batch is made."""

import io

import numpy as np
import pytest
from PIL import Image

from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.image_sizes import add_sizes, read_sizes, size_key, write_sizes
from cal_train.data.images import DEFAULT_LIMITS, apply_aspect_ratio
from cal_train.data.sources import Source
from cal_train.testing import tiny_processor, tiny_vlm, write_tiny_image_rows


@pytest.fixture(scope="module")
def processor():
    return tiny_vlm("llava_next")[1]


@pytest.fixture
def data(tmp_path):
    return write_tiny_image_rows(tmp_path, num_rows=8)


def dataset_of(data, processor):
    return VlmDataset([Source(data, data.parent / "images")], processor, "vicuna_v1", 4096)


def test_lengths_are_words_plus_the_image_tokens_that_each_row_really_gets(data, processor):
    dataset = dataset_of(data, processor)
    lengths = dataset.lengths
    for i in range(len(dataset)):
        num_image_tokens = int((dataset[i]["input_ids"] == processor.image_token_id).sum())
        words = sum(len(message.content.split()) for message in dataset.load_sample(i).messages)
        assert abs(lengths[i]) == words + num_image_tokens
        assert (lengths[i] > 0) == (num_image_tokens > 0)
    assert len(set(lengths[lengths > 0].tolist())) > 3


def test_of_a_fixed_number_of_tokens_no_image_is_touched(data, monkeypatch):
    monkeypatch.setattr("cal_train.data.image_sizes.read_size", lambda *_: pytest.fail("a header was read"))
    assert (dataset_of(data, tiny_processor()).lengths > 0).sum() == 6


def test_headers_are_read_once_and_again_when_a_file_changes(data, processor, tmp_path, monkeypatch):
    file = tmp_path / "kept" / "image_sizes.npz"
    first = dataset_of(data, processor)
    first.measure(file)
    read = []
    monkeypatch.setattr("cal_train.data.image_sizes.read_size", lambda image, limits: read.append(image) or (20, 160))
    again = dataset_of(data, processor)
    again.measure(file)
    assert read == [] and np.array_equal(again.lengths, first.lengths)
    changed = data.parent / "images" / "1-0.png"
    Image.new("RGB", (160, 20)).save(changed)
    again.measure(file)
    assert read == [changed]


def test_broken_and_missing_images_count_as_nothing_and_are_reported_when_read(data, processor):
    (data.parent / "images" / "1-0.png").write_bytes(b"not an image")
    (data.parent / "images" / "5-0.png").unlink()
    dataset = dataset_of(data, processor)
    lengths = dataset.lengths
    for i, name in ((1, "1-0.png"), (5, "5-0.png")):
        assert lengths[i] == sum(len(message["value"].split()) for message in dataset.rows[0][i]["conversations"])
        assert name in str(dataset[i])


def test_sizes_of_bytes_and_files_survive_the_file(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    images = [path, buffer.getvalue(), b"broken", path]
    sizes = {}
    assert add_sizes(sizes, [(size_key(image, DEFAULT_LIMITS), image) for image in images], DEFAULT_LIMITS, False) == 3
    assert [sizes[size_key(image, DEFAULT_LIMITS)] for image in images] == [(20, 30), (20, 30), (0, 0), (20, 30)]
    write_sizes(tmp_path / "sizes.npz", sizes)
    assert read_sizes(tmp_path / "sizes.npz") == sizes
    assert read_sizes(tmp_path / "none.npz") == {}
    (tmp_path / "sizes.npz").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="is damaged"):
        read_sizes(tmp_path / "sizes.npz")


def test_a_batch_holds_the_tiles_of_all_images_in_order_and_their_sizes(data, processor):
    dataset = dataset_of(data, processor)
    items = [dataset[i] for i in (3, 0, 6)]  # three images, none, two
    batch = Collator(0)(items)
    sizes = []
    for row, count in ((3, 3), (6, 2)):
        for k in range(count):
            with Image.open(data.parent / "images" / f"{row}-{k}.png") as image:
                sizes.append([image.height, image.width])
    assert batch["image_sizes"].tolist() == sizes
    tiles = []
    for row, count in ((3, 3), (6, 2)):
        for k in range(count):
            image = Image.open(data.parent / "images" / f"{row}-{k}.png").convert("RGB")
            tiles += list(processor.image_processor(images=[image], return_tensors="np")["pixel_values"][0])
    assert np.array_equal(batch["pixel_values"].numpy(), np.stack(tiles))


def test_more_images_than_marks_are_refused_with_row_and_cure(tmp_path, processor):
    data = write_tiny_image_rows(tmp_path, num_rows=4)
    data.write_text(data.read_text().replace("<image>\\n<image>\\n what", "<image>\\n what"))
    problem = dataset_of(data, processor)[2]
    assert problem.row == 2 and "image" in problem.problem and problem.cure


def test_extreme_and_tiny_images_are_refused_with_row_and_cure(data, processor):
    for size, why in (((1, 4000), "side"), ((2, 1000), "more than 200 times"), ((1, 1), "min_image_side")):
        Image.new("RGB", size).save(data.parent / "images" / "1-0.png")
        problem = dataset_of(data, processor)[1]
        assert problem.row == 1 and why in problem.problem and "Replace the image" in problem.cure


def test_anyres_is_for_processors_that_tile_and_the_other_choices_are_not(processor):
    apply_aspect_ratio(processor, "anyres")
    for mode in ("pad", "square"):
        with pytest.raises(ValueError, match="tiles images"):
            apply_aspect_ratio(processor, mode)
    with pytest.raises(ValueError, match="does not tile images"):
        apply_aspect_ratio(tiny_processor(), "anyres")
