"""Image tokens that recipes and notes speak of, counted by the processors at the published sizes."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig

from cal_train.cli.recipe import load_recipe
from cal_train.data.images import count_image_tokens
from cal_train.models.layout import build_config, build_processor
from cal_train.testing import tiny_image_processor, tiny_tokenizer

PATCHES = (336 // 14) ** 2  # of a tile of CLIP ViT-L/14 at 336 px
GRIDS_WIDTH_HEIGHT = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
"""In LLaVA-NeXT's order; of equally good grids the original takes the first."""


def published_processor(family, **options):
    tokenizer = tiny_tokenizer()
    aux = ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3]) if family == "mgm" else None
    config = build_config(
        family,
        LlamaConfig(vocab_size=len(tokenizer)),
        CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, image_size=336, patch_size=14),
        image_token_id=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-2,
        aux_config=aux,
        **options,
    )
    return build_processor(family, config, tiny_image_processor(336), tokenizer, None)


def original_next_tokens(width, height):
    """LLaVA-NeXT's count from its description: best grid, unpadded map with a newline per row, and the whole image."""

    def quality(grid):
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(grid[0] * grid[1] - kept)

    grid = max(GRIDS_WIDTH_HEIGHT, key=quality)  # max returns the first of equals
    columns, rows = grid[0] // 14, grid[1] // 14
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(height * columns / width)) // 2)
    else:
        columns -= 2 * ((columns - int(width * rows / height)) // 2)
    return PATCHES + rows * (columns + 1)


def produced(processor, width, height):
    batch = processor(images=[Image.new("RGB", (width, height))], text="<image>")
    return batch["input_ids"][0].count(processor.image_token_id)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(336, 336, 1176), (640, 480, 2340), (1920, 1080, 1948), (1000, 1000, 2928), (189, 299, 1526)],
)
def test_llava_next_makes_the_original_number_of_tokens(width, height, tokens):
    processor = published_processor("llava_next")
    assert original_next_tokens(width, height) == tokens, "the oracle itself, against families known from the original"
    assert count_image_tokens(processor, [(height, width)]) == [tokens]
    assert produced(processor, width, height) == tokens


def test_no_image_takes_more_than_2928_tokens_in_llava_next():
    sides = range(20, 2000, 60)
    sizes = [(height, width) for height in sides for width in sides]
    counts = count_image_tokens(published_processor("llava_next"), sizes)
    assert max(counts) == 2928 == PATCHES + 48 * 49
    assert counts == [original_next_tokens(width, height) for height, width in sizes]


@pytest.mark.parametrize(("grid", "tokens"), [(1, 576), (2, 2880)])
def test_mgm_makes_as_many_tokens_of_any_image(grid, tokens):
    processor = published_processor("mgm", image_grid=grid, image_global=grid == 2)
    assert tokens == PATCHES * (1 if grid == 1 else grid**2 + 1)
    assert count_image_tokens(processor, [(336, 336), (1080, 1920)]) == [tokens, tokens]
    assert produced(processor, 640, 480) == tokens


@pytest.mark.parametrize(
    ("folder", "tokens"),
    [
        ("llava15_7b", 576),
        ("llava_next_7b", 2928),
        ("llava_next_13b", 2928),
        ("mgm_2b", 576),
        ("mgm_7b", 576),
        ("mgm_13b", 576),
        ("mgm_7b_hd", 2880),
        ("mgm_13b_hd", 2880),
    ],
)
def test_recipes_leave_a_thousand_tokens_for_text(folder, tokens):
    path = Path(__file__).parents[1] / "recipes" / folder / "finetune.yaml"
    recipe = load_recipe(path, ["--use_cpu", "true"], will_train=False)
    assert recipe.data.model_max_length - tokens >= 1000
