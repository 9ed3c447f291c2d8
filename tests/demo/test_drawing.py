import numpy as np
import pytest
from PIL import Image

from cal_train.demo.concepts import TRAIN_CONCEPTS
from cal_train.demo.drawing import draw, load_sprites
from cal_train.demo.scenes import PLACES, Scene

RED, GREEN, BLUE, YELLOW = TRAIN_CONCEPTS[:4]
COLOURS = {RED: (255, 0, 0), GREEN: (0, 255, 0), BLUE: (0, 0, 255), YELLOW: (255, 255, 0)}
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
    '<rect x="18" y="18" width="36" height="36" fill="{}"/></svg>'
)


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    for concept, colour in COLOURS.items():
        text = SVG.format("#{:02x}{:02x}{:02x}".format(*colour))
        (folder / f"{concept.code_point}.svg").write_text(text)
    return folder


# Where a place is in a picture of 56 px, by its name alone.
HALF = {"top": slice(0, 28), "bottom": slice(28, 56), "left": slice(0, 28), "right": slice(28, 56)}


def quarters_of(pixels):
    return [pixels[tuple(HALF[word] for word in place.split())] for place in PLACES]


def scene(seed=0, cells=(RED, GREEN, BLUE, YELLOW)):
    return Scene("s", cells, RED, seed)


def test_every_thing_is_drawn_in_its_own_quarter_and_nowhere_else(style):
    sprites = load_sprites(style, COLOURS)
    for seed in range(20):
        quarters = quarters_of(np.asarray(draw(scene(seed), sprites, 56)))
        for i, colour in enumerate(COLOURS.values()):
            counts = [int((quarter == colour).all(-1).sum()) for quarter in quarters]
            assert counts[i] > 300 and sum(counts) == counts[i], (seed, counts)


def test_an_empty_cell_shows_the_background_and_nothing_else(style):
    sprites = load_sprites(style, COLOURS)
    for seed in range(20):
        pixels = np.asarray(draw(scene(seed, (RED, None, None, YELLOW)), sprites, 56))
        first, second, third, last = (len(np.unique(q.reshape(-1, 3), axis=0)) for q in quarters_of(pixels))
        assert second == third == 1 and min(first, last) > 1


def test_margins_of_a_drawing_are_cut_so_that_styles_fill_their_cells_alike(style):
    sprite = load_sprites(style, [RED])[RED.word]
    assert sprite.size == (96, 96)
    assert sprite.getchannel("A").getbbox() == (0, 0, 96, 96)  # half of the SVG's width is margin


def test_a_picture_is_fixed_by_its_scene_and_differs_between_seeds(style):
    sprites = load_sprites(style, COLOURS)
    first, again, other = (np.asarray(draw(scene(seed), sprites, 56)) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert Image.fromarray(first).mode == "RGB"


def test_a_missing_drawing_is_named(style):
    missing = TRAIN_CONCEPTS[10]
    with pytest.raises(ValueError, match=f"no drawing of '{missing.word}'"):
        load_sprites(style, [missing])
