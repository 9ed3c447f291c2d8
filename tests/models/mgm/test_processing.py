"""Image processor and processor of MGM: shapes, order, interpolation and placeholders."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from cal_train.data.images import apply_aspect_ratio, count_image_tokens
from cal_train.models.mgm.image_processing import MGMImageProcessor
from cal_train.models.mgm.processing import MGMProcessor
from cal_train.testing import tiny_tokenizer

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def image_processor(size=128, **options):
    return MGMImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=MEAN,
        image_std=STD,
        **{"image_size": 28, **options},
    )


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def interpolated(image, size):
    """Bilinear, by the definition: corners not aligned, no antialiasing."""
    side = image.shape[-1]
    position = ((np.arange(size) + 0.5) * side / size - 0.5).clip(0, side - 1)
    low = np.floor(position).astype(int)
    high, share = np.minimum(low + 1, side - 1), position - low
    rows = image[:, low] * (1 - share)[:, None] + image[:, high] * share[:, None]
    return rows[:, :, low] * (1 - share) + rows[:, :, high] * share


@pytest.mark.parametrize(("width", "height"), [(90, 60), (40, 200), (128, 128), (2, 3)])
@pytest.mark.parametrize("do_pad", [False, True])
def test_high_res_image_is_clips_and_tiles_are_interpolated_from_it(width, height, do_pad):
    image = picture(width, height)
    made = image_processor(image_grid=2, image_global=True, do_pad=do_pad)(images=[image], return_tensors="pt")
    if do_pad:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, image_mean=MEAN, image_std=STD
    )
    high_res = clip(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made["high_res_pixel_values"], high_res)
    large = interpolated(high_res[0].double().numpy(), 56)
    tiles = [large[:, :28, :28], large[:, :28, 28:], large[:, 28:, :28], large[:, 28:, 28:], interpolated(large, 28)]
    assert made["pixel_values"].shape == (1, 5, 3, 28, 28)
    torch.testing.assert_close(made["pixel_values"][0].double(), torch.tensor(np.stack(tiles)), rtol=1e-4, atol=1e-4)


def test_tiles_of_a_position_coded_image_are_in_reading_order():
    shade = np.zeros((128, 128, 3), dtype=np.uint8)
    for i, (top, left) in enumerate([(0, 0), (0, 64), (64, 0), (64, 64)]):
        shade[top : top + 64, left : left + 64] = 60 * i
    processor = image_processor(image_grid=2, image_global=True, do_normalize=False)
    tiles = processor(images=[Image.fromarray(shade)], return_tensors="pt")["pixel_values"][0]
    assert [round(float(tile[0, 14, 14]) * 255 / 60) for tile in tiles[:4]] == [0, 1, 2, 3]
    corners = [(7, 7), (7, 21), (21, 7), (21, 21)]
    assert [round(float(tiles[4, 0, y, x]) * 255 / 60) for y, x in corners] == [0, 1, 2, 3]


def test_without_a_grid_there_is_one_tile():
    made = image_processor(size=64)(images=[picture(50, 70), picture(30, 20)], return_tensors="pt")
    assert made["pixel_values"].shape == (2, 1, 3, 28, 28)
    assert made["high_res_pixel_values"].shape == (2, 3, 64, 64)
    half = interpolated(made["high_res_pixel_values"][1].double().numpy(), 28)
    torch.testing.assert_close(made["pixel_values"][1, 0].double(), torch.tensor(half), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "num_tokens"), [({}, 4), ({"image_grid": 2, "image_global": True}, 20)])
def test_every_image_takes_the_same_placeholders(options, num_tokens):
    processor = MGMProcessor(image_processor(**options), tiny_tokenizer(), patch_size=14)
    sizes = [(60, 90), (200, 40), (28, 28)]
    made = processor(
        text=["<image> and <image>", "a red dog <image>"],
        images=[[picture(w, h) for h, w in sizes[:2]], [picture(*sizes[2][::-1])]],
        return_tensors="pt",
        padding=True,
    )
    assert (made["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * num_tokens, num_tokens]
    assert len(made["pixel_values"]) == len(made["high_res_pixel_values"]) == 3
    assert count_image_tokens(processor, sizes) == [num_tokens] * 3


def test_released_sizes_take_576_and_2880_placeholders():
    for grid, has_global, expected in [(1, False, 576), (2, True, 2880)]:
        images = MGMImageProcessor(image_grid=grid, image_global=has_global)
        assert MGMProcessor(images, tiny_tokenizer()).num_image_tokens == expected


def test_more_images_than_marks_are_refused():
    processor = MGMProcessor(image_processor(), tiny_tokenizer(), patch_size=14)
    with pytest.raises(ValueError, match="1 <image> tokens and 2 images"):
        processor(text="<image>", images=[picture(30, 30), picture(30, 30)])


def test_the_way_to_make_a_square_can_be_chosen():
    processor = MGMProcessor(image_processor(), tiny_tokenizer(), patch_size=14)
    apply_aspect_ratio(processor, "pad")
    assert processor.image_processor.do_pad is True
    apply_aspect_ratio(processor, "square")
    assert processor.image_processor.do_pad is False


@pytest.mark.parametrize(("width", "height"), [(1, 4000), (4000, 1)])
def test_a_hair_is_padded_but_not_cropped(width, height):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels: one side is more than 200 times the other"):
        image_processor()(images=[picture(width, height)])
    made = image_processor(do_pad=True)(images=[picture(width, height)], return_tensors="pt")
    assert made["pixel_values"].isfinite().all()
