"""Crops and normalisation against torchvision and the image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as vision
from transformers import CLIPImageProcessorPil

from cal_train.data.pair_images import EvaluationTransform, random_box, training_transform


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def processor(size=16, **options):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def test_a_crop_is_torchvisions_resized_crop_normalised(image):
    transform = training_transform(processor(), 0.5)
    for seed in range(5):
        left, top, width, height = random_box(60, 40, 0.5, np.random.default_rng(seed))
        resized = vision.functional.resized_crop(image, top, left, height, width, [16, 16], InterpolationMode.BICUBIC)
        expected = vision.functional.normalize(
            vision.functional.to_dtype(vision.functional.to_image(resized), torch.float32, scale=True),
            processor().image_mean,
            processor().image_std,
        )
        result = transform(image, np.random.default_rng(seed))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    blank = torch.zeros(3, 90, 120)
    theirs = np.array([vision.RandomResizedCrop.make_params(vision.RandomResizedCrop(8, scale=(0.3, 1.0)), [blank])[k]
                       for _ in range(1500) for k in ("left", "top", "width", "height")]).reshape(-1, 4)  # fmt: skip
    rng = np.random.default_rng(0)
    ours = np.array([random_box(120, 90, 0.3, rng) for _ in range(1500)])
    spread = theirs.std(0) / np.sqrt(1500)
    # Difference of two means of 1,500 draws: standard deviation 1.4 times that of one; five of them.
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * 1.4 * spread).all(), (ours.mean(0), theirs.mean(0))
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 0.1).all()


@pytest.mark.parametrize(("width", "height"), [(60, 40), (1, 1), (200, 2), (2, 200), (7, 5)])
def test_boxes_lie_inside_and_keep_the_area(width, height):
    rng = np.random.default_rng(1)
    for _ in range(200):
        left, top, box_width, box_height = random_box(width, height, 0.5, rng)
        assert 0 <= left <= left + box_width <= width and 0 <= top <= top + box_height <= height
        assert box_width >= 1 and box_height >= 1
    if (width, height) == (200, 2):
        assert (left, top, box_width, box_height) == (98, 0, 3, 2), "nothing fits: the centre at the ratio 4 : 3"
    if (width, height) == (60, 40):
        shares = [np.prod(random_box(60, 40, 0.9, rng)[2:]) / 2400 for _ in range(200)]
        assert min(shares) > 0.85, "0.9, less rounding and the centred fallback"


def test_evaluation_is_the_image_processor(image):
    expected = processor()(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(EvaluationTransform(processor())(image), expected) and expected.shape == (3, 16, 16)


def test_training_and_evaluation_agree_where_nothing_is_cropped_or_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    trained = training_transform(processor()).normalize(image)
    torch.testing.assert_close(trained, EvaluationTransform(processor())(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": False}, "no square images"),
        ({"do_normalize": False}, "does not rescale and normalise"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training_transform(processor(**options))


def test_a_processor_with_one_size_and_no_crop_is_taken():
    square = CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False)
    assert training_transform(square).size == 12
