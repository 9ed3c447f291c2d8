import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cal_train.cal.loss import target_logits, weighted_linear_cross_entropy


def oracle(hidden, weight, labels, token_weights, bias=None, softcap=None):
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return (losses * token_weights).sum(), logits


def problem(dtype=torch.float64, rows=23, vocab=50, width=8):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[min(5, rows - 1)] = -100
    return hidden, weight, bias, labels, torch.rand(rows, generator=generator, dtype=dtype) * 5


@pytest.mark.parametrize("chunk_size", [1, 7, 23, 100, None])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("use_bias", [False, True])
def test_value_and_all_gradients_are_exact(chunk_size, softcap, use_bias):
    hidden, weight, bias, labels, w = problem()
    inputs = (hidden, weight, bias) if use_bias else (hidden, weight)
    expected, _ = oracle(hidden, weight, labels, w, bias if use_bias else None, softcap)
    expected_grads = torch.autograd.grad(expected * 0.37, inputs)
    ours = weighted_linear_cross_entropy(
        hidden, weight, labels, w, bias if use_bias else None, softcap, chunk_size=chunk_size
    )
    grads = torch.autograd.grad(ours * 0.37, inputs)
    assert torch.allclose(ours, expected, rtol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_as_close_as_the_plain_product_in_bfloat16():
    hidden, weight, _, labels, w = problem(torch.bfloat16)
    exact, _ = oracle(hidden.double(), weight.double(), labels, w.double())
    plain = (F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none") * w).sum()
    ours = weighted_linear_cross_entropy(hidden, weight, labels, w)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= abs(plain - exact) + 1e-3 * abs(exact)
    ours.backward()
    assert weight.grad.dtype == torch.bfloat16


def test_under_autocast_it_equals_the_linear_layer_under_autocast():
    hidden, weight, _, labels, w = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none") * w).sum()
        ours = weighted_linear_cross_entropy(hidden, weight, labels, w)
    assert torch.allclose(ours, expected, rtol=1e-6)
    ours.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    hidden, weight, _, labels, w = problem()
    weighted_linear_cross_entropy(hidden, weight.detach(), labels, w).backward()
    expected, _ = oracle(hidden, weight, labels, w)
    assert torch.allclose(hidden.grad, torch.autograd.grad(expected, hidden)[0])


def test_no_labels_give_exactly_zero_and_finite_gradients():
    hidden, weight, *_ = problem()
    empty = weighted_linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    ignored = weighted_linear_cross_entropy(hidden, weight, torch.full((23,), -100), torch.ones(23))
    (empty + ignored).backward()
    assert empty == 0
    assert ignored == 0
    assert weight.grad.abs().max() == 0
    assert hidden.grad.abs().max() == 0


def test_a_second_backward_is_refused_instead_of_wrong():
    hidden, weight, _, labels, w = problem()
    loss = weighted_linear_cross_entropy(hidden, weight, labels, w)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_target_logits_are_the_logits_of_the_targets(softcap):
    hidden, weight, bias, labels, w = problem()
    labels = labels.clamp_min(0)
    _, logits = oracle(hidden, weight, labels, w, bias, softcap)
    ours = target_logits(hidden, weight, labels, bias, softcap)
    assert torch.allclose(ours, logits.gather(1, labels[:, None])[:, 0], rtol=1e-12)


def test_shapes_and_chunk_size_that_do_not_fit_are_refused():
    hidden, weight, _, labels, w = problem()
    with pytest.raises(ValueError, match="do not fit together"):
        weighted_linear_cross_entropy(hidden, weight, labels[:-1], w)
    with pytest.raises(ValueError, match="chunk_size=0"):
        weighted_linear_cross_entropy(hidden, weight, labels, w, chunk_size=0)


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("with_gradient", "products"), [(True, 3), (False, 1)])
def test_without_gradients_only_the_logits_are_multiplied(with_gradient, products):
    hidden, weight, _, labels, w = problem()
    with torch.set_grad_enabled(with_gradient), CountProducts() as counted:
        weighted_linear_cross_entropy(hidden, weight, labels, w)
    assert counted.count == products
