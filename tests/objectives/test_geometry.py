"""Meters against closed forms and double loops."""

import math

import numpy as np
import pytest
import torch

from cal_train.objectives.geometry import alignment, effective_rank, geometry, modality_gap, uniformity

EYE = torch.eye(4, dtype=torch.float64)


def test_alignment_of_equal_orthogonal_and_opposite_pairs():
    for second, expected in ((EYE * 3, 0), (EYE.roll(1, 0), 2), (-EYE, 4)):
        assert alignment(EYE, second).item() == pytest.approx(expected, abs=1e-12)


def test_uniformity_by_a_double_loop_and_in_closed_form():
    rows = np.random.default_rng(0).normal(size=(9, 5))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    terms = [math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(9) for j in range(9) if i != j]
    assert uniformity(torch.tensor(rows)).item() == pytest.approx(math.log(np.mean(terms)), abs=1e-12)
    assert uniformity(EYE).item() == pytest.approx(-4, abs=1e-12)  # every squared distance is 2
    assert uniformity(torch.ones(3, 4)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.ones(1, 4)).item() == 0


def test_the_gap_is_the_distance_of_the_centroids():
    assert modality_gap(EYE, EYE[[2, 0, 3, 1]] * 5).item() == pytest.approx(0, abs=1e-12)
    assert modality_gap(EYE[:1], EYE[1:2]).item() == pytest.approx(math.sqrt(2), abs=1e-12)
    assert modality_gap(EYE[:2], -EYE[:2]).item() == pytest.approx(math.sqrt(2), abs=1e-12)


def test_the_effective_rank_counts_equal_directions():
    for k in (2, 3, 4):
        simplex = torch.eye(k, dtype=torch.float64)  # centred: k - 1 equal singular values
        assert effective_rank(simplex).item() == pytest.approx(k - 1, abs=1e-9)
    line = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-9)
    assert effective_rank(torch.ones(5, 3)).item() == 0


def test_meters_ignore_length_take_bf16_and_have_no_gradient():
    images = torch.randn(6, 8, requires_grad=True)
    texts = torch.randn(6, 8)
    meters = geometry(images, texts)
    scaled = geometry(images * 7, texts * 0.1)
    for name, value in meters.items():
        assert value.ndim == 0 and not value.requires_grad
        assert value.item() == pytest.approx(scaled[name].item(), abs=1e-4), name
    assert all(value.isfinite() for value in geometry(images.bfloat16(), texts.bfloat16()).values())
