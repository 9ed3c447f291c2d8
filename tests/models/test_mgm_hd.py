"""MGM-HD's start: the weights of stage 1, five times the tokens."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.models.mgm_hd import write_hd_start
from cal_train.testing import write_tiny_vlm


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    return write_tiny_vlm(tmp_path_factory.mktemp("mgm") / "pretrain", family="mgm")


def encoded(folder):
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    image = Image.effect_noise((50, 30), 60).convert("RGB")
    return processor, processor(images=[image], text="USER: <image> what?", return_tensors="pt")


def test_weights_are_those_of_stage_one(stage_one, tmp_path):
    start = write_hd_start(stage_one, tmp_path / "start")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (start, stage_one))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_image_is_twice_as_large_and_makes_five_times_the_tokens(stage_one, tmp_path):
    start = write_hd_start(stage_one, tmp_path / "start")
    (plain_processor, plain), (processor, batch) = encoded(stage_one), encoded(start)
    side = plain["pixel_values"].shape[-1]
    assert plain["pixel_values"].shape == (1, 1, 3, side, side)
    assert batch["pixel_values"].shape == (1, 5, 3, side, side)
    assert batch["high_res_pixel_values"].shape[-1] == 2 * plain["high_res_pixel_values"].shape[-1]
    num_tokens = [int((inputs["input_ids"] == processor.image_token_id).sum()) for inputs in (plain, batch)]
    assert num_tokens[1] == 5 * num_tokens[0] > 0
    assert processor.chat_template == plain_processor.chat_template
    model = AutoModelForImageTextToText.from_pretrained(start).eval()
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()  # raises if features and placeholders differ in number


def test_what_cannot_become_hd_is_refused(stage_one, tmp_path):
    start = write_hd_start(stage_one, tmp_path / "start")
    llava = write_tiny_vlm(tmp_path / "llava")
    for source, output, message in [
        (tmp_path / "nothing", tmp_path / "a", "holds no model"),
        (stage_one, start, "exists"),
        (start, tmp_path / "b", "image_grid 2 already"),
        (llava, tmp_path / "c", "type 'llava'"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_hd_start(source, output)
    assert not any((tmp_path / name).exists() for name in "abc")
