"""The evaluator from files to numbers, and the same towers behind CLIP_benchmark's two methods."""

import types

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil

from cal_train.data.pair_batches import CaptionEncoder
from cal_train.data.pair_images import EvaluationTransform
from cal_train.data.pair_set import read_pair_set
from cal_train.data.pairs import PairSource
from cal_train.evals.clip_benchmark import BenchmarkModel, BenchmarkTokenizer, register
from cal_train.evals.towers import TowerEvaluator, class_labels
from cal_train.objectives.families import OBJECTIVES
from cal_train.testing import tiny_tokenizer, tiny_two_tower
from cal_train.towers.outputs import TowerOutputs
from cal_train.train.tower_checkpoint import save_tower_model
from cal_train.train.tower_model import TowerModel
from cal_train.train.tower_parts import Processors

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColorTowers(nn.Module):
    """Towers that see the mean colour of an image, and whether a text names a colour first or last."""

    def __init__(self, tokenizer):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        # A word has other ids behind a space.
        self.names = [(tokenizer(name)["input_ids"], tokenizer(f" {name}")["input_ids"]) for name in COLORS]
        self.was_training = []

    def forward(self, pixel_values=None, input_ids=None, text_mask=None, visible_patches=None):
        self.was_training.append(self.training)
        if pixel_values is not None:
            patches = pixel_values.flatten(2).transpose(1, 2)
            return TowerOutputs(image_pooled=patches.mean(1), patch_tokens=patches)
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids, text_mask, strict=True)]
        known = [
            [float(row[: len(first)] == first or row[-len(last) :] == last) for first, last in self.names]
            for row in rows
        ]
        return TowerOutputs(text_pooled=torch.tensor(known))


class ColorObjective(nn.Module):
    def image_features(self, outputs):
        return {"image_embeds": outputs.image_pooled}

    def text_features(self, outputs):
        return {"text_embeds": outputs.text_pooled}

    def score(self, images, texts):
        return images["image_embeds"] @ texts["text_embeds"].T


@pytest.fixture
def processor():
    return CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


@pytest.fixture
def evaluator(processor):
    tokenizer = tiny_tokenizer()
    encoder = CaptionEncoder(tokenizer, 16)
    transform = EvaluationTransform(processor)
    return TowerEvaluator(ColorTowers(tokenizer), ColorObjective(), encoder, transform, batch_size=2, tile_size=(2, 2))


def color_pairs(folder, captions, shades=(255, 200)):
    lines = ["image\tcaption"]
    for name, color in COLORS.items():
        for shade in shades:
            Image.new("RGB", (10, 12), tuple(c * shade // 255 for c in color)).save(folder / f"{name}{shade}.png")
            lines += [f"{name}{shade}.png\t{caption.format(name)}" for caption in captions]
    (folder / "p.tsv").write_text("\n".join(lines))
    return read_pair_set([PairSource(str(folder / "p.tsv"))])


def test_retrieval_from_files_finds_every_pair(tmp_path, evaluator):
    pairs = color_pairs(tmp_path, ["{} dog", "a {}"], shades=(255,))
    assert len(pairs.images) == 3 and len(pairs.captions) == 6
    found = evaluator.retrieval(pairs, ks=(1,))
    assert found == {"image_to_text/recall@1": 1.0, "text_to_image/recall@1": 1.0}


def test_two_images_with_the_same_captions_are_told_apart_by_the_score_alone(tmp_path, evaluator):
    found = evaluator.retrieval(color_pairs(tmp_path, ["{} dog"]), ks=(1, 2))
    # Brighter images win; of image to text the twin's caption ties and counts as wrong.
    assert found["image_to_text/recall@1"] == 0 and found["image_to_text/recall@2"] == 1
    assert found["text_to_image/recall@1"] == 0.5 and found["text_to_image/recall@2"] == 1


def test_zero_shot_and_linear_probe_from_files(tmp_path, evaluator):
    pairs = color_pairs(tmp_path, ["{}"])
    report = evaluator.zero_shot(pairs, list(COLORS), ["a {}", "{} cat"])
    assert report == {"accuracy@1": 1.0, "mean_per_class_recall": 1.0}
    shuffled = evaluator.zero_shot(pairs, ["blue", "red", "green"], ["a {}"])
    assert shuffled["accuracy@1"] == 1.0, "the order of the class names does not matter"
    assert evaluator.linear_probe(pairs, pairs, list(COLORS))["accuracy"] == 1.0
    with pytest.raises(ValueError, match="'red' is not one of the class names"):
        class_labels(pairs, ["dog"])
    with pytest.raises(ValueError, match="twice"):
        class_labels(pairs, ["red", "red"])


def test_towers_are_evaluated_without_gradient_and_get_their_mode_back(tmp_path, evaluator):
    evaluator.towers.train()
    evaluator.objective.eval()
    features = evaluator.image_features(color_pairs(tmp_path, ["{}"]))
    assert not any(evaluator.towers.was_training) and not features["image_embeds"].requires_grad
    assert evaluator.towers.training and not evaluator.objective.training


def test_clip_benchmark_sees_the_same_embeddings(tmp_path, evaluator, processor):
    pairs = color_pairs(tmp_path, ["{} dog"])
    model, tokenize = BenchmarkModel(evaluator.towers, evaluator.objective), BenchmarkTokenizer(evaluator.encoder)
    transform = EvaluationTransform(processor)
    images = torch.stack([transform(Image.open(pair.image)) for pair in pairs.images])
    torch.testing.assert_close(model.encode_image(images), evaluator.image_features(pairs)["image_embeds"])
    embeds = model.encode_text(tokenize(list(pairs.captions)).to("cpu"))
    torch.testing.assert_close(embeds, evaluator.text_features(pairs.captions)["text_embeds"])
    assert tokenize("red").shape == (1, 2, 16)


def test_a_run_folder_is_loaded_the_way_clip_benchmark_loads_models(tmp_path):
    towers = tiny_two_tower()
    options = {"embed_dim": 8}
    trained = TowerModel(towers, OBJECTIVES["clip"](towers.shape, **options)).eval()
    save_tower_model(trained, "clip", options, tmp_path)
    sized = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    Processors(sized, tiny_tokenizer()).save(tmp_path)

    models = types.SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=["open_clip"])
    register(models)
    register(models)
    assert models.MODEL_TYPES == ["open_clip", "cal_train"]
    load = models.TYPE2FUNC["cal_train"]
    model, transform, tokenize = load(model_name=str(tmp_path), pretrained="", cache_dir=None, device="cpu")
    pixels = transform(Image.new("RGB", (20, 30), (200, 10, 90)))[None]
    expected = trained.objective.image_features(towers(pixel_values=pixels))["image_embeds"]
    torch.testing.assert_close(model.encode_image(pixels), expected)
    ids = torch.tensor([[5, 7, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    expected = trained.objective.text_features(towers(input_ids=ids, text_mask=mask.bool()))["text_embeds"]
    torch.testing.assert_close(model.encode_text(torch.stack([ids, mask], 1)), expected)
    assert tokenize(["a dog"]).shape == (1, 2, towers.shape.context_length)


def test_objectives_without_a_single_vector_are_refused_by_the_adapter(evaluator):
    class Tokens(ColorObjective):
        def image_features(self, outputs):
            return {"patch_embeds": outputs.patch_tokens}

    model = BenchmarkModel(evaluator.towers, Tokens())
    with pytest.raises(ValueError, match=r"Tokens has no single vector .*patch_embeds"):
        model.encode_image(torch.zeros(1, 3, 8, 8))


def test_the_mask_travels_with_the_ids_even_if_padding_is_the_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokens = BenchmarkTokenizer(CaptionEncoder(tokenizer, 6))(["0</s>", "0"])
    assert tokens[:, 1].tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_evaluated_by_the_same_code(name, tmp_path, processor):
    pooling = "cls_appended" if name in ("coca", "sycoca") else "eos"
    towers = tiny_two_tower(text_pooling=pooling, num_mixture_tokens=3 if name == "llip" else 0)
    objective = OBJECTIVES[name](towers.shape, embed_dim=8)
    encoder = CaptionEncoder(tiny_tokenizer(), 12)

    class SmallIds(nn.Module):
        """The tiny text tower has 64 ids."""

        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, pixel_values=None, input_ids=None, text_mask=None):
            ids = None if input_ids is None else (input_ids % 60 + 1) * text_mask
            return self.towers(pixel_values=pixel_values, input_ids=ids, text_mask=text_mask)

    sized = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    found = TowerEvaluator(SmallIds(), objective, encoder, EvaluationTransform(sized), tile_size=(4, 2))
    pairs = color_pairs(tmp_path, ["{}"])
    recall = found.retrieval(pairs, ks=(6,))
    assert recall == {"image_to_text/recall@6": 1.0, "text_to_image/recall@6": 1.0}
    assert 0 <= found.zero_shot(pairs, list(COLORS), ["a {}", "{} dog"])["accuracy@1"] <= 1
