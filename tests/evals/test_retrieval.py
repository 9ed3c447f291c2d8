"""Recall and classification against brute force in numpy."""

import numpy as np
import pytest
import torch

from cal_train.evals.retrieval import retrieval_ranks, retrieval_recall
from cal_train.evals.score_tiles import join, num_rows, score_tiles
from cal_train.evals.zero_shot import class_features, class_scores, classification_report, prompts


def brute_force_recall(scores, owners, k):
    """Sort pessimistically: at equal scores wrong candidates first."""
    image_hits = []
    for i in range(scores.shape[0]):
        order = sorted(range(scores.shape[1]), key=lambda t: (-scores[i, t], owners[t] == i))
        image_hits.append(any(owners[t] == i for t in order[:k]))
    text_hits = []
    for t in range(scores.shape[1]):
        order = sorted(range(scores.shape[0]), key=lambda i: (-scores[i, t], owners[t] == i))
        text_hits.append(owners[t] in order[:k])
    return np.mean(image_hits), np.mean(text_hits)


def matrix_score(matrix):
    """Features are the numbers of rows and columns; a score is looked up."""
    return lambda images, texts: matrix[images["n"]][:, texts["n"]]


def numbers(count):
    return {"n": torch.arange(count)}


@pytest.mark.parametrize("tile_size", [(3, 4), (1, 1), (100, 100), (5, 2)])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_recall_is_that_of_sorting_everything(tile_size, levels, is_sorted):
    rng = np.random.default_rng(levels)
    owners = np.concatenate([np.arange(11), rng.integers(0, 11, 20)])  # every image has 1 to several captions
    owners = np.sort(owners) if is_sorted else rng.permutation(owners)
    scores = rng.integers(0, levels, (11, 31)).astype(np.float64)  # few levels: many ties
    found = retrieval_recall(
        numbers(11), numbers(31), torch.tensor(owners), matrix_score(torch.tensor(scores)), (1, 3, 5, 10), tile_size
    )
    for k in (1, 3, 5, 10):
        by_image, by_text = brute_force_recall(scores, owners, k)
        assert found[f"image_to_text/recall@{k}"] == pytest.approx(by_image, abs=1e-12)
        assert found[f"text_to_image/recall@{k}"] == pytest.approx(by_text, abs=1e-12)


def test_a_model_that_scores_everything_alike_has_no_hits():
    found = retrieval_recall(numbers(6), numbers(6), torch.arange(6), matrix_score(torch.zeros(6, 6)), (1, 5))
    assert set(found.values()) == {0.0}


def test_pairs_outside_of_a_shortlist_are_misses():
    scores = torch.eye(4)
    scores[0] = scores[:, 1] = -torch.inf
    image_rank, text_rank = retrieval_ranks(numbers(4), numbers(4), torch.arange(4), matrix_score(scores))
    assert image_rank.tolist() == [3, 3, 0, 0] and text_rank.tolist() == [3, 3, 0, 0]


def test_each_tile_without_a_right_pair_is_computed_once():
    calls = []

    def score(images, texts):
        calls.append((images["n"][0].item(), texts["n"][0].item()))
        return torch.rand(len(images["n"]), len(texts["n"]))

    retrieval_ranks(numbers(8), numbers(8), torch.arange(8), score, (2, 2))
    assert len(calls) == 16 + 4 and len(set(calls)) == 16


@pytest.mark.parametrize(
    ("owners", "message"),
    [([0, 0, 1], "image 2 has no text"), ([0, 1, 3], "outside of the 3 images"), ([0, 1], "does not match 3 texts")],
)
def test_captions_that_do_not_fit_the_images_are_refused(owners, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(numbers(3), numbers(3), torch.tensor(owners), matrix_score(torch.zeros(3, 3)))


def test_a_score_that_is_not_a_number_stops_the_evaluation_and_names_the_pair():
    scores = torch.zeros(5, 5)
    scores[3, 4] = torch.nan
    with pytest.raises(ValueError, match="image 3 and text 4"):
        list(score_tiles(numbers(5), numbers(5), matrix_score(scores), (2, 2)))


def test_features_of_unequal_length_and_empty_sets_are_refused():
    with pytest.raises(ValueError, match="unequal length"):
        num_rows({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="empty"):
        join([])


def cosine_score(images, texts):
    unit = torch.nn.functional.normalize
    return unit(images["image_embeds"], dim=-1) @ unit(texts["text_embeds"], dim=-1).T


def test_class_scores_are_cosines_with_the_mean_of_normalised_templates():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(7, 5)), rng.normal(size=(6, 5)) * np.array([1, 50, 1, 1, 9, 1])[:, None]
    unit_images = images / np.linalg.norm(images, axis=1, keepdims=True)
    means = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).reshape(3, 2, 5).mean(1)
    expected = unit_images @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    found = class_scores(
        {"image_embeds": torch.tensor(images)}, {"text_embeds": torch.tensor(texts)}, 2, cosine_score, tile_images=3
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_queries_are_averaged_as_they_are_and_embeddings_on_the_sphere():
    queries, embeds = torch.tensor([[[2.0, 0]], [[0, 4.0]]]), torch.tensor([[5.0, 0], [0, 1.0]])
    found = class_features({"queries": queries, "text_embeds": embeds}, 2)
    assert found["queries"].tolist() == [[[1.0, 2.0]]] and found["text_embeds"].tolist() == [[0.5, 0.5]]


def test_features_of_tokens_are_not_averaged_but_their_scores_are():
    scores = torch.rand(4, 6)
    texts = {"token_embeds": torch.arange(6)}
    found = class_scores(numbers(4), texts, 3, lambda i, t: scores[i["n"]][:, t["token_embeds"]], tile_images=2)
    torch.testing.assert_close(found, scores.reshape(4, 2, 3).mean(2))


def test_a_classification_report_by_hand():
    scores = torch.tensor([[3.0, 1, 0], [0, 2.0, 1], [1, 1, 0], [0, 1, 2]])
    labels = torch.tensor([0, 2, 0, 1])  # right; second; tied with a wrong class: second; second
    report = classification_report(scores, labels, ks=(1, 2, 5))
    assert report == {"accuracy@1": 0.25, "accuracy@2": 1.0, "mean_per_class_recall": pytest.approx((0.5 + 0 + 0) / 3)}


def test_prompts_are_grouped_by_class_and_templates_checked():
    assert prompts(["a", "b{}"], ["x {}", "{} y"]) == ["x a", "a y", "x b{}", "b{} y"]
    with pytest.raises(ValueError, match="does not say where"):
        prompts(["a"], ["no place"])
    with pytest.raises(ValueError, match="at least one"):
        prompts([], ["{}"])
    with pytest.raises(ValueError, match="no multiple of 2"):
        class_scores({}, {"text_embeds": torch.zeros(3, 2)}, 2, cosine_score)
