"""Patch info mining against a plain loop over patches, which makes every key and value."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cal_train.models.mgm.mining import PatchInfoMining, full_size_rows

WIDTH, CHANNELS = 6, (3, 4, 5, 6)


def full_map(stages):
    """All stages of one image at the size of the first, concatenated."""
    size = stages[0].shape[-2:]
    return torch.cat([F.interpolate(s[None], size=size, mode="bilinear", align_corners=False)[0] for s in stages])


def naive_mining(layers, patches, feature_map):
    """What one tile's patches (N, N, W) find in a map (C, M, M): one patch, one area, all keys and values."""
    state = layers.state_dict()

    def layer(name, x):
        x = F.layer_norm(x, x.shape[-1:], state[f"{name}_norm.weight"], state[f"{name}_norm.bias"], 1e-5)
        return x @ state[f"{name}_proj.weight"].T + state[f"{name}_proj.bias"]

    side = patches.shape[0]
    cells = feature_map.shape[-1] // side
    found = torch.zeros_like(patches)
    for r in range(side):
        for c in range(side):
            area = feature_map[:, r * cells : (r + 1) * cells, c * cells : (c + 1) * cells].flatten(1).T
            query, keys, values = layer("query", patches[r, c]), layer("key", area), layer("value", area)
            scores = torch.stack([query @ key for key in keys]) / WIDTH**0.5
            weights = scores.exp() / scores.exp().sum()
            found[r, c] = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return found


def inputs(side=4, map_side=16, num_images=2):
    generator = torch.Generator().manual_seed(0)
    layers = PatchInfoMining(WIDTH, sum(CHANNELS), chunk_size=10**6).double()
    for parameter in layers.parameters():  # norms that do something
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    patches = torch.randn(num_images, side, side, WIDTH, generator=generator, dtype=torch.float64)
    stages = tuple(
        torch.randn(num_images, c, map_side >> k, map_side >> k, generator=generator, dtype=torch.float64) * 3 + k
        for k, c in enumerate(CHANNELS)
    )
    return layers, patches, stages


@pytest.mark.parametrize(("side", "map_side", "shrink"), [(2, 16, 1), (4, 16, 1), (8, 16, 1), (2, 16, 2), (3, 24, 2)])
@torch.no_grad()
def test_mining_is_a_loop_over_patches(side, map_side, shrink):
    layers, patches, stages = inputs(side, map_side)
    found = layers(patches, stages, shrink)
    for i in range(len(patches)):
        whole = full_map([stage[i] for stage in stages])
        if shrink == 2:  # bilinear halving is the mean of 2 x 2 cells
            whole = whole.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
        torch.testing.assert_close(found[i], naive_mining(layers, patches[i], whole), rtol=1e-9, atol=1e-9)


def naive_gradients(layers, patches, stages):
    twin = copy.deepcopy(layers)
    leaves = [x.clone().requires_grad_() for x in (patches, *stages)]
    named = dict(twin.named_parameters())

    class Layers:
        @staticmethod
        def state_dict():
            return named

    outputs = []
    for i in range(len(patches)):
        outputs.append(_differentiable_naive(Layers, leaves[0][i], full_map([stage[i] for stage in leaves[1:]])))
    torch.stack(outputs).square().sum().backward()
    return {name: p.grad for name, p in named.items()}, [leaf.grad for leaf in leaves]


def _differentiable_naive(layers, patches, feature_map):
    side = patches.shape[0]
    cells = feature_map.shape[-1] // side
    rows = []
    for r in range(side):
        row = []
        for c in range(side):
            area = feature_map[:, r * cells : (r + 1) * cells, c * cells : (c + 1) * cells]
            row.append(naive_mining(layers, patches[r : r + 1, c : c + 1], area)[0, 0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 4, 10**6])
def test_gradients_are_those_of_the_loop(chunk_size):
    layers, patches, stages = inputs()
    expected, expected_inputs = naive_gradients(layers, patches, stages)
    layers.chunk_size = chunk_size
    leaves = [x.clone().requires_grad_() for x in (patches, *stages)]
    layers(leaves[0], tuple(leaves[1:])).square().sum().backward()
    for name, parameter in layers.named_parameters():
        scale = expected[name].abs().max() + 1
        torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, rtol=1e-9, atol=1e-9, msg=name)
    for leaf, gradient in zip(leaves, expected_inputs, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_every_chunk_size_gives_the_same():
    layers, patches, stages = inputs(side=8)
    whole = layers(patches, stages)
    for chunk_size in (1, 8, 17, 24, 40, 64, 128):
        layers.chunk_size = chunk_size
        torch.testing.assert_close(layers(patches, stages), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampled_strips_are_bit_for_bit_those_of_the_whole_map(dtype):
    stages = [stage[0].to(dtype) for stage in inputs(map_side=32)[2]]
    whole = torch.cat([stages[0], *(full_map([stages[0].float(), s.float()])[3:].to(dtype) for s in stages[1:])])
    for start in range(0, 32, 4):
        for stop in range(start + 4, 33, 4):
            assert torch.equal(full_size_rows(stages, start, stop), whole[:, start:stop]), (start, stop)


def test_no_gradient_no_checkpoint_and_one_per_chunk_otherwise(monkeypatch):
    calls = []

    def counted(function, *arguments, **options):
        calls.append(options)
        return function(*arguments)

    monkeypatch.setattr("cal_train.models.mgm.mining.checkpoint", counted)
    layers, patches, stages = inputs(side=4)
    layers.chunk_size = 4
    with torch.no_grad():
        layers(patches, stages)
    assert not calls
    layers(patches, stages)
    assert len(calls) == 2 * 4  # images x rows
    calls.clear()
    layers.chunk_size = 10**6
    layers(patches, stages)
    assert not calls
