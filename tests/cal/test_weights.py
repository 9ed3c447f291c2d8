import pytest
import torch

from cal_train.cal.strategies import STRATEGIES, TokenWeighting, resolve_weighting, token_weights
from cal_train.cal.weights import cal_weights, mean_one_per_row, shuffle_within_rows


def oracle_labels(delta, mask, low, high, window):
    """Plain Python, float64, straight from the definition."""
    weights = [[0.0] * len(row) for row in mask]
    for b, row in enumerate(mask):
        where = [t for t, is_label in enumerate(row) if is_label]
        clamped = [min(max(delta[b][t], low), high) for t in where]
        for i, t in enumerate(where):
            near = clamped[max(i - window // 2, 0) : i + window // 2 + 1]
            weights[b][t] = sum(near) / len(near)
    return torch.tensor(weights, dtype=torch.float64)


def oracle_flat(delta, mask, low, high, window):
    """As the reference code: over the flattened batch, whatever lies at unlabelled positions."""
    clamped = [min(max(d, low), high) for row in delta for d in row]
    smooth = []
    for i in range(len(clamped)):
        near = clamped[max(i - window // 2, 0) : i + window // 2 + 1]
        smooth.append(sum(near) / len(near))
    return torch.tensor(smooth, dtype=torch.float64).reshape(len(mask), -1) * torch.tensor(mask)


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize(("scope", "oracle"), [("labels", oracle_labels), ("flat", oracle_flat)])
def test_weights_equal_the_definition_in_plain_python(scope, oracle, window):
    delta = torch.randn(5, 17, dtype=torch.float64) * 4
    mask = torch.rand(5, 17) < 0.4
    mask[3] = False
    ours = cal_weights(delta, mask, low=1, high=5, window=window, scope=scope)
    expected = oracle(delta.tolist(), mask.tolist(), 1.0, 5.0, window)
    assert ours.dtype == torch.float32
    assert (ours.double() - expected).abs().max() < 1e-6


def test_worked_example_of_the_docstring():
    delta = torch.tensor([[0.0, 0.2, 7.0, 9.0, 3.0]])
    mask = torch.tensor([[False, True, False, True, True]])
    assert cal_weights(delta, mask)[0].tolist() == [0, 3, 0, 3, 4]


def test_reference_smoothing_dilutes_a_one_token_answer_and_ours_does_not():
    delta, mask = torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([[False, True, False]])
    assert cal_weights(delta, mask, scope="labels")[0, 1] == 5
    assert cal_weights(delta, mask, scope="flat")[0, 1] == pytest.approx(7 / 3)


def test_labels_scope_never_looks_across_rows_or_at_unlabelled_positions():
    mask = torch.tensor([[False, True, True], [True, True, False]])
    delta = torch.tensor([[2.0, 3.0, 4.0], [2.0, 2.0, 2.0]])
    changed = torch.tensor([[99.0, 3.0, 4.0], [2.0, 2.0, 99.0]])
    assert torch.equal(cal_weights(delta, mask), cal_weights(changed, mask))
    assert cal_weights(delta, mask)[1, 0] == 2


def test_no_gradient_flows_into_the_weights():
    delta = torch.randn(2, 4, requires_grad=True)
    assert not cal_weights(delta, torch.ones(2, 4, dtype=torch.bool)).requires_grad


def test_empty_batch_and_batch_without_labels():
    assert cal_weights(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), scope="flat").shape == (2, 0)
    assert cal_weights(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).sum() == 0


@pytest.mark.parametrize("bad", [{"window": 2}, {"window": 0}, {"low": 6.0}, {"low": -1.0}, {"scope": "rows"}])
def test_settings_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"cal_window|cal_low|scope"):
        cal_weights(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), **bad)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 4\)"):
        cal_weights(torch.zeros(1, 3), torch.ones(1, 4, dtype=torch.bool))


def test_sample_normaliser_gives_mean_one_per_sample_and_zero_for_zero_weights():
    rows = torch.tensor([0, 0, 0, 2, 2])
    ours = mean_one_per_row(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]), rows, num_rows=3)
    assert ours.tolist() == [0.5, 1.0, 1.5, 0.0, 0.0]


def test_random_control_keeps_the_histogram_of_every_sample():
    rows = torch.tensor([0] * 5 + [1] * 7 + [4])
    weights = torch.rand(13)
    shuffled = shuffle_within_rows(weights, rows)
    assert not torch.equal(shuffled, weights)
    for row in (0, 1, 4):
        assert torch.equal(shuffled[rows == row].sort().values, weights[rows == row].sort().values)


def test_presets_are_the_paper_and_the_reference_and_options_override_them():
    assert STRATEGIES["cal"] == TokenWeighting("remove", "labels", "sample", 1.0, 5.0, 3)
    assert STRATEGIES["cal_reference"] == TokenWeighting("mask", "flat", "micro_batch", 1.0, 5.0, 3)
    assert resolve_weighting("cal_reference", ablation="remove").ablation == "remove"
    assert resolve_weighting("uniform", ablation="mask").ablation is None
    with pytest.raises(ValueError, match=r"cal_strategy 'cla'.*cal_reference"):
        resolve_weighting("cla")


def test_uniform_weights_are_one():
    mask = torch.tensor([[True, False, True]])
    assert token_weights(STRATEGIES["uniform"], torch.randn(1, 3), mask).tolist() == [1, 1]
