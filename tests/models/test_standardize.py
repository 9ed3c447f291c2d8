"""A projector that starts on standardised features."""

import numpy as np
import pytest
import torch
from PIL import Image

from cal_train.models.standardize import MOST_IMAGES, channel_statistics, image_files, standardize_projector
from cal_train.testing import tiny_llava, tiny_processor


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


@torch.no_grad()
def features_by_hand(model, processor, folder):
    """The tower's hidden state of layer -2 without its class token, image by image."""
    rows = []
    for path in sorted(folder.glob("*.png")):
        pixels = processor.image_processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        rows.append(states[-2][0, 1:])
    return torch.cat(rows).double()


@torch.no_grad()
def test_the_first_layer_computes_what_it_did_on_standardised_features(images):
    model, processor = tiny_llava(), tiny_processor()
    features = features_by_hand(model, processor, images)
    first = model.model.multi_modal_projector.linear_1
    expected = torch.nn.functional.linear(
        (features - features.mean(0)) / features.std(0, correction=0), first.weight.double(), first.bias.double()
    )
    before = first(features.float())
    assert standardize_projector(model, processor.image_processor, images) == 40
    after = first(features.float())
    assert (after - expected).abs().max() < 1e-4
    assert (after - before).abs().max() > 0.1


def test_a_channel_that_never_varies_is_not_blown_up():
    tokens = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = 3.0
    mean, deviation = channel_statistics(iter([tokens[:300], tokens[300:]]))
    assert torch.allclose(mean, tokens.double().mean(0))
    assert torch.allclose(deviation[[0, 1, 3]], tokens.double().std(0, correction=0)[[0, 1, 3]])
    assert deviation[2] == pytest.approx(0.01 * float(tokens.double().std(0, correction=0).median()), rel=0.1)


def test_images_are_spread_over_a_large_folder(tmp_path):
    for i in range(MOST_IMAGES + 100):
        (tmp_path / f"{i:04d}.jpg").touch()
    chosen = image_files(tmp_path)
    assert len(chosen) == len(set(chosen)) == MOST_IMAGES
    assert chosen[0].stem == "0000" and int(chosen[-1].stem) >= MOST_IMAGES + 98


def test_a_folder_without_images_and_a_broken_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no image in"):
        image_files(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"broken\.png"):
        standardize_projector(tiny_llava(), tiny_processor().image_processor, tmp_path)
