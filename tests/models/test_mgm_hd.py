"""MGM-HD: the weights of an MGM, five times the tokens."""

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cal_train.models.mgm_hd import for_grid, with_grid
from cal_train.testing import write_tiny_vlm


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("mgm") / "pretrain", family="mgm")


def test_an_image_is_twice_as_large_and_makes_five_times_the_tokens_from_the_same_weights(stage_one):
    plain_processor = AutoProcessor.from_pretrained(stage_one, backend="pil")
    config = with_grid(AutoConfig.from_pretrained(stage_one), 2, str(stage_one))
    processor = for_grid(config, plain_processor)
    image = Image.effect_noise((50, 30), 60).convert("RGB")
    plain, batch = (
        each(images=[image], text="USER: <image> what?", return_tensors="pt") for each in (plain_processor, processor)
    )
    side = plain["pixel_values"].shape[-1]
    assert plain["pixel_values"].shape == (1, 1, 3, side, side)
    assert batch["pixel_values"].shape == (1, 5, 3, side, side)
    assert batch["high_res_pixel_values"].shape[-1] == 2 * plain["high_res_pixel_values"].shape[-1]
    num_tokens = [int((inputs["input_ids"] == processor.image_token_id).sum()) for inputs in (plain, batch)]
    assert num_tokens[1] == 5 * num_tokens[0] > 0
    assert processor.chat_template == plain_processor.chat_template
    model, info = AutoModelForImageTextToText.from_pretrained(stage_one, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(**batch).logits).all()  # raises if features and placeholders differ


def test_there_and_back_is_the_same_configuration(stage_one):
    config = AutoConfig.from_pretrained(stage_one)
    back = with_grid(with_grid(config, 2, "here"), 1, "here")
    assert back.to_dict() == config.to_dict()


def test_another_family_has_no_grid(tmp_path):
    llava = write_tiny_vlm(tmp_path / "llava")
    with pytest.raises(ValueError, match="image_grid is an option of MGM, and here is a 'llava' model"):
        with_grid(AutoConfig.from_pretrained(llava), 2, "here")
