"""The probe against the equations that its optimum solves."""

import numpy as np
import pytest
import torch

from cal_train.evals.linear_probe import fit_probe, linear_probe


def blobs(count, noise, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])
    return torch.tensor(centres[labels] + noise * rng.normal(size=(count, 4))), torch.tensor(labels)


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_gradient_of_the_penalised_likelihood_is_zero_at_the_fit(strength):
    features, labels = blobs(80, 2.0)
    probe = fit_probe(features, labels, 3, strength)
    x = features.numpy()
    x = (x - x.mean(0)) / x.std(0)
    logits = x @ probe.weight.numpy().T + probe.bias.numpy()
    softmax = np.exp(logits - logits.max(1, keepdims=True))
    residual = softmax / softmax.sum(1, keepdims=True) - np.eye(3)[labels.numpy()]
    gradient = residual.T @ x / len(x) + strength * probe.weight.numpy()
    assert np.abs(gradient).max() < 1e-6 and np.abs(residual.mean(0)).max() < 1e-6


def test_without_information_the_logits_are_the_log_frequencies():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = fit_probe(torch.zeros(10, 4), labels, 3, 1.0)(torch.zeros(1, 4))
    np.testing.assert_allclose(logits.softmax(1).numpy()[0], [0.6, 0.3, 0.1], atol=1e-6)


def test_scaling_and_shifting_features_changes_nothing():
    features, labels = blobs(60, 1.0)
    moved = features * torch.tensor([1e3, 1e-3, 1, 7]) + 100
    torch.testing.assert_close(fit_probe(moved, labels, 3, 0.1)(moved), fit_probe(features, labels, 3, 0.1)(features))


def test_separated_classes_are_learned_and_shuffled_labels_are_not():
    train, train_labels = blobs(150, 0.3)
    test, test_labels = blobs(90, 0.3, seed=1)
    assert linear_probe(train, train_labels, test, test_labels)["accuracy"] == 1.0
    shuffled = train_labels[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train, shuffled, test, test_labels)["accuracy"] < 0.7


def test_the_strength_is_chosen_without_looking_at_the_test_rows():
    train, train_labels = blobs(60, 3.0)
    first = linear_probe(train, train_labels, train[:5], train_labels[:5])
    second = linear_probe(train, train_labels, -train[:5], train_labels[:5])
    assert first["strength"] == second["strength"] and first["validation_accuracy"] == second["validation_accuracy"]


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="labels 0 to 3 for 3 classes"):
        fit_probe(torch.zeros(2, 2), torch.tensor([0, 3]), 3, 1.0)
    with pytest.raises(ValueError, match="2 feature rows and 1 labels"):
        fit_probe(torch.zeros(2, 2), torch.tensor([0]), 3, 1.0)
    with pytest.raises(ValueError, match="cannot be split"):
        linear_probe(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0]))
