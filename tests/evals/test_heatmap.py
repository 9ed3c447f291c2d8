import numpy as np
import pytest
from PIL import Image

from cal_train.evals.heatmap import ScoredSample, draw_heat_map


def test_a_high_delta_is_drawn_in_another_colour_than_a_low_one(tmp_path):
    image = Image.new("RGB", (20, 20), "blue")
    pictures = []
    for delta in (0.0, 5.0):
        sample = ScoredSample(image, "What is in the $picture?", [" a", " fox", "\n", "</s>"], [0.0, delta, 0.0, 0.0])
        pictures.append(np.asarray(Image.open(draw_heat_map([sample], tmp_path / f"{delta}.png")).convert("RGB")))
    changed = (pictures[0] != pictures[1]).any(-1)
    assert 0 < changed.mean() < 0.1  # only the box of one token
    red, green, blue = pictures[1][changed].astype(float).mean(0)
    assert red > max(green, blue)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        draw_heat_map([], tmp_path / "x.png")
