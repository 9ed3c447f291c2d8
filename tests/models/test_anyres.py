"""LLaVA-NeXT's grids and token counts against the original rule, written here from its description."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from cal_train.data.images import count_image_tokens, image_inputs
from cal_train.models.anyres import check_grid, check_grids, original_grid
from cal_train.models.llava_next import image_embeds, vision_features
from cal_train.testing import tiny_vlm

# The original configuration: (width, height).
ORIGINAL = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
HUGGING_FACE = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # read as (height, width)


def original_choice(width, height):
    """The grid (width, height): most pixels kept, then least wasted, then first in the list."""
    best, most, least = None, 0, math.inf
    for grid_width, grid_height in ORIGINAL:
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = grid_width * grid_height - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (grid_width, grid_height), kept, wasted
    return best


def original_num_tokens(width, height, grid, rounded=False):
    """576 tokens of the whole image, and the unpadded map with one newline per row.

    The original cuts ``int(side * scale)``; transformers first rounds to 7 digits (``rounded``).
    """
    columns, rows = grid[0] // 336 * 24, grid[1] // 336 * 24
    if width / height > columns / rows:
        exact = height * (columns / width)
        rows -= (rows - int(round(exact, 7) if rounded else exact)) // 2 * 2
    else:
        exact = width * (rows / height)
        columns -= (columns - int(round(exact, 7) if rounded else exact)) // 2 * 2
    return 576 + rows * (columns + 1)


def random_sizes(count, seed=0):
    """Widths and heights: a third small, a third large, a third long and thin or with simple ratios."""
    rng = np.random.default_rng(seed)
    small = rng.integers(20, 800, (count // 3, 2))
    large = rng.integers(300, 4000, (count // 3, 2))
    rest = count - len(small) - len(large)
    sides, ratios = rng.integers(20, 700, rest), rng.integers(1, 7, (rest, 2))
    return np.concatenate([small, large, sides[:, None] * ratios]).tolist()


@pytest.fixture(scope="module")
def large_processor():
    """A processor of released size: 336 px tiles of 24 x 24 patches. No weights are made."""
    from transformers import CLIPVisionConfig

    from cal_train.models.layout import build_config, build_processor
    from cal_train.testing import tiny_configs, tiny_image_processor, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    text, _ = tiny_configs(tokenizer)
    config = build_config("llava_next", text, CLIPVisionConfig(image_size=336, patch_size=14), 4, -2)
    return build_processor("llava_next", config, tiny_image_processor(), tokenizer, None)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_our_order_makes_transformers_choose_as_the_original(large_processor, count):
    ours, num_grids, num_counts, by_hf = original_grid(336), 0, 0, 0
    assert large_processor.image_processor.image_grid_pinpoints == ours
    sizes = random_sizes(count)
    counts = count_image_tokens(large_processor, [(height, width) for width, height in sizes])
    for (width, height), produced in zip(sizes, counts, strict=True):
        expected = original_choice(width, height)
        num_grids += select_best_resolution((height, width), ours) != expected[::-1]
        by_hf += select_best_resolution((height, width), HUGGING_FACE) != expected[::-1]
        if produced != original_num_tokens(width, height, expected):
            num_counts += 1
            assert produced == original_num_tokens(width, height, expected, rounded=True), (width, height)
    print(f"grids: {num_grids} differ with our order, {by_hf} with transformers'; token counts: {num_counts} differ")
    assert num_grids == 0
    assert by_hf > count // 1000  # the order matters
    assert num_counts <= count // 1000


@pytest.mark.parametrize(
    ("size", "num_tokens"), [((336, 336), 1176), ((640, 480), 2340), ((1920, 1080), 1948), ((1000, 1000), 2928)]
)
def test_known_token_counts(large_processor, size, num_tokens):
    assert count_image_tokens(large_processor, [size[::-1]]) == [num_tokens]


def original_tiles(image):
    """The image squashed to a tile, then the tiles of it fitted into its grid on black, row by row; 8-bit RGB."""
    size = original_choice(*image.size)
    canvas, scales = Image.new("RGB", size), [room / side for room, side in zip(size, image.size, strict=True)]
    # the side that fills the grid is exact, the other one is rounded up
    fitted = [min(math.ceil(side * min(scales)), room) for side, room in zip(image.size, size, strict=True)]
    tightest = scales.index(min(scales))
    fitted[tightest] = size[tightest]
    canvas.paste(image.resize(fitted), [(room - side) // 2 for room, side in zip(size, fitted, strict=True)])
    corners = [(x, y) for y in range(0, size[1], 336) for x in range(0, size[0], 336)]
    return [image.resize((336, 336)), *(canvas.crop((x, y, x + 336, y + 336)) for x, y in corners)]


@pytest.mark.parametrize(("width", "height"), [(640, 480), (189, 299), (100, 900), (333, 777), (20, 400), (37, 50)])
def test_tiles_are_those_of_the_original(large_processor, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tiles = np.stack([np.asarray(tile) for tile in original_tiles(image)])
    mean, std = (np.array(getattr(large_processor.image_processor, name)) for name in ("image_mean", "image_std"))
    expected = torch.from_numpy(((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    torch.testing.assert_close(image_inputs(large_processor, [image])[0]["pixel_values"], expected)


def check_counts(sizes):
    """Predicted count = what the real processor and the real packing make of an image of that size."""
    model, processor = tiny_vlm("llava_next")
    for height, width in sizes:
        image = Image.new("RGB", (width, height))
        inputs, (predicted,) = image_inputs(processor, [image])
        with torch.no_grad():
            features = vision_features(model, inputs)
            assert len(image_embeds(model, features, inputs)) == predicted, (height, width)


def thin_and_small(count):
    rng = np.random.default_rng(1)
    sizes = np.concatenate([rng.integers(2, 300, (count // 2, 2)), rng.integers(100, 700, (count - count // 2, 2))])
    return [(h, w) for h, w in sizes.tolist() if max(h, w) <= 30 * min(h, w)]


def test_predicted_counts_are_produced_on_200_sizes():
    check_counts(thin_and_small(200))


@pytest.mark.slow
def test_predicted_counts_are_produced_on_2000_sizes():
    sizes = thin_and_small(2100)
    assert len(sizes) >= 2000
    check_counts(sizes)


def test_embeddings_equal_those_of_transformers():
    model, processor = tiny_vlm("llava_next")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 90), (77, 20), (56, 56))
    ]
    inputs, counts = image_inputs(processor, images)
    with torch.no_grad():
        ours = image_embeds(model, vision_features(model, inputs), inputs)
        theirs = model.get_image_features(**inputs).pooler_output
    assert [len(embeds) for embeds in theirs] == counts
    assert torch.equal(ours, torch.cat(theirs))


def test_an_image_so_thin_that_its_map_vanishes_keeps_the_tokens_of_the_whole_image():
    check_counts([(2, 400), (400, 2), (1, 1), (1, 4000)])
    _, processor = tiny_vlm("llava_next")
    assert count_image_tokens(processor, [(2, 400)]) == [4]


def test_a_grid_that_tiles_do_not_fill_is_refused():
    assert check_grid([(56, 28)], 28) == [[56, 28]]
    for wrong in ([[56, 30]], [[56]], [[0, 28]], []):
        with pytest.raises(ValueError, match="grid pinpoint"):
            check_grid(wrong, 28)


def test_grids_of_model_and_processor_must_be_equal_and_transformers_order_is_announced(caplog):
    model, processor = tiny_vlm("llava_next")
    with caplog.at_level(logging.WARNING, logger="cal_train"):
        check_grids(model.config, processor, "DIR")
        assert not caplog.records
        theirs = [[side // 12 for side in pinpoint] for pinpoint in HUGGING_FACE]
        model.config.image_grid_pinpoints = theirs
        with pytest.raises(ValueError, match="make them equal"):
            check_grids(model.config, processor, "DIR")
        processor.image_processor.image_grid_pinpoints = theirs
        check_grids(model.config, processor, "DIR")
    assert len(caplog.records) == 1 and str(original_grid(28)) in caplog.text
    assert model.config.image_grid_pinpoints == theirs  # nothing is changed silently


def test_tiles_that_do_not_match_the_sizes_are_an_error():
    model, processor = tiny_vlm("llava_next")
    inputs, _ = image_inputs(processor, [Image.new("RGB", (40, 90))])
    features = vision_features(model, inputs)
    with pytest.raises(ValueError, match="1 images make 2 tiles, but the model expects"):
        image_embeds(model, features[:2], inputs)
