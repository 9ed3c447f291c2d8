"""Meters of an embedding space: how close pairs are, how evenly embeddings spread, how far the modalities lie apart.

All normalise inside, in float32 or the wider type given, and take no gradient. N rows, E shared width.
"""

import math

import torch
from torch import Tensor

from cal_train.objectives.similarity import unit


@torch.no_grad()
def alignment(first_NE: Tensor, second_NE: Tensor) -> Tensor:
    """Return the mean squared distance of pairs on the unit sphere, in [0, 4]; 0 is perfect.

    Source: Wang and Isola 2020, arXiv:2005.10242, with alpha = 2.
    """
    return (unit(first_NE) - unit(second_NE)).square().sum(1).mean()


@torch.no_grad()
def uniformity(embeds_NE: Tensor, t: float = 2.0) -> Tensor:
    """Return log mean exp(-t |x - y|^2) over pairs of different rows, in [-4 t, 0]; lower is more even.

    One row has no pair: the result is 0 then.

    Source: Wang and Isola 2020, arXiv:2005.10242, t = 2.
    """
    unit_NE = unit(embeds_NE)
    num_pairs = len(unit_NE) * (len(unit_NE) - 1) // 2
    if num_pairs == 0:
        return unit_NE.new_zeros(())
    rows, columns = torch.triu_indices(len(unit_NE), len(unit_NE), 1, device=unit_NE.device)
    squared = 2 - 2 * (unit_NE @ unit_NE.T)[rows, columns]
    return torch.logsumexp(-t * squared, 0) - math.log(num_pairs)


@torch.no_grad()
def modality_gap(images_NE: Tensor, texts_ME: Tensor) -> Tensor:
    """Return the distance of the centroids of both modalities on the unit sphere, in [0, 2].

    Source: Liang et al. 2022, arXiv:2203.02053, section 2.
    """
    return (unit(images_NE).mean(0) - unit(texts_ME).mean(0)).norm()


@torch.no_grad()
def effective_rank(embeds_NE: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised singular values of the centred embeddings, in [1, min(N - 1, E)].

    The result is 0 if all rows are equal: there is no direction at all.

    Source: Roy and Vetterli 2007, "The effective rank". Differs: the rows are normalised and centred first.
    """
    unit_NE = unit(embeds_NE)
    values = torch.linalg.svdvals(unit_NE - unit_NE.mean(0))
    if values.sum() <= len(unit_NE) * torch.finfo(values.dtype).eps:
        return values.new_zeros(())
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


def geometry(images_NE: Tensor, texts_NE: Tensor) -> dict[str, Tensor]:
    """Return all meters of N pairs of embeddings by name, for the log."""
    return {
        "alignment": alignment(images_NE, texts_NE),
        "uniformity_images": uniformity(images_NE),
        "uniformity_texts": uniformity(texts_NE),
        "modality_gap": modality_gap(images_NE, texts_NE),
        "effective_rank_images": effective_rank(images_NE),
        "effective_rank_texts": effective_rank(texts_NE),
    }
