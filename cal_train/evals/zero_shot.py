"""Zero-shot classification: each class is the average of prompt templates filled with its name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cal_train.evals.score_tiles import Features, Score, num_rows, score_tiles

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")
"""A few neutral templates for data without their own."""

_NORMALIZED_BEFORE_MEAN = {"text_embeds": True, "queries": False}
"""How a text feature is averaged over templates. Llip averages its queries as they are, everybody the embeddings on the
unit sphere (CLIP, section 3.1.4; facebookresearch/Llip). Features of tokens have no mean: scores are averaged."""


def prompts(class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Return one text per class and template, the templates of a class behind each other.

    Raises:
        ValueError: If there is no template, or one without exactly one ``{}``.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} does not say where the class name goes: write one {{}}")
    if not templates or not class_names:
        raise ValueError("zero-shot classification needs at least one template and one class name")
    return [template.replace("{}", name) for name in class_names for template in templates]


def class_features(texts: Features, num_templates: int) -> dict[str, Tensor] | None:
    """Return one set of text features per class, or None if these features cannot be averaged.

    Args:
        texts: Features of the texts of `prompts`, (classes * templates, ...).
        num_templates: Texts of a class.
    """
    if not set(texts) <= set(_NORMALIZED_BEFORE_MEAN):
        return None
    means = {}
    for name, feature in texts.items():
        feature = F.normalize(feature, dim=-1) if _NORMALIZED_BEFORE_MEAN[name] else feature
        means[name] = feature.unflatten(0, (-1, num_templates)).mean(1)
    return means


@torch.no_grad()
def class_scores(
    images: Features,
    texts: Features,
    num_templates: int,
    score: Score,
    average: Callable[[Features, int], Features | None] = class_features,
    tile_images: int = 256,
) -> Tensor:
    """Return the score of every image for every class, (I, C) on the CPU.

    Args:
        images: Features of I images.
        texts: Features of the texts of `prompts`.
        num_templates: Texts of a class.
        score: Scores of a tile.
        average: Makes features of classes from features of prompts. Where it returns None the *scores* of a class's
            templates are averaged (FILIP, section 4.2), at the cost of scoring each template.
        tile_images: Images scored at a time.

    Raises:
        ValueError: If the texts are no whole number of classes.
    """
    if num_rows(texts) % num_templates:
        raise ValueError(f"{num_rows(texts)} texts are no multiple of {num_templates} templates")
    classes = average(texts, num_templates)
    columns = texts if classes is None else classes
    tiles = score_tiles(images, columns, score, (tile_images, num_rows(columns)))
    if classes is not None:
        return torch.cat([tile.scores.cpu() for tile in tiles])
    return torch.cat([tile.scores.unflatten(1, (-1, num_templates)).mean(2).cpu() for tile in tiles])


def classification_report(scores_IC: Tensor, labels_I: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return the shares of images whose class is among the first k, and the mean recall of the classes that occur.

    A wrong class with exactly the score of the right one comes first. A k that is not below the number of classes is
    left out: everything would be a hit.

    Raises:
        ValueError: If labels and scores do not fit.
    """
    num_images, num_classes = scores_IC.shape
    if labels_I.shape != (num_images,) or (
        num_images and not 0 <= int(labels_I.min()) <= int(labels_I.max()) < num_classes
    ):
        raise ValueError(f"labels {tuple(labels_I.shape)} do not fit {num_images} images and {num_classes} classes")
    if not num_images:
        raise ValueError("no images to classify")
    right_I1 = scores_IC.gather(1, labels_I[:, None])
    rank_I = (scores_IC >= right_I1).sum(1) - 1  # the right class itself is not before itself
    report = {f"accuracy@{k}": (rank_I < k).double().mean().item() for k in ks if k < num_classes}
    hits_C = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels_I, (rank_I < 1).double())
    counts_C = torch.bincount(labels_I, minlength=num_classes)
    return report | {"mean_per_class_recall": (hits_C / counts_C)[counts_C > 0].mean().item()}
