"""GradCache: the gradient of a large contrastive batch, in the memory of a small one.

With features f of all chunks, sums s of the terms within samples and parameters p of the objective, the loss is
L(f, s, p). Pass 1 makes f and s of each chunk without a graph; L is taken once, with f, s and p as leaves; pass 2 makes
each chunk again, with the same random numbers, and backpropagates the surrogate

    sum <f_chunk, dL/df_chunk>  +  sum s_chunk dL/ds_chunk,

plus, with each of n chunks, ``sum <p, dL/dp> / n``: what scale, bias and projections get from the comparison itself.
(ZeRO-3 wants every parameter in the first of several backward passes, DDP in the last.) The sums s are leaves like the
features, so that a mean over tokens is divided by the count of the whole batch.

Differs from Gao et al. 2021, arXiv:2101.06983: terms within samples, parameters of the loss, and every random number
(patch dropout, masks) are covered. Costs one more forward pass of everything.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cal_train.objectives.base import Features, Term, total_loss
from cal_train.objectives.gather import Ranks
from cal_train.train.tower_model import Batch, TowerModel, encode_pairs, objective_of

RunStep = Callable[..., Any]
"""The wrapped model: ``run(step, *arguments)`` runs a step inside the root's forward."""


@dataclass(frozen=True)
class RngState:
    """State of torch's random numbers, on the CPU and on the device of a batch."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RngState":
        """Return the current state."""
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the random numbers of this state inside ``with``; go on as before behind it."""
        with torch.random.fork_rng(devices=[self.device] if self.on_device is not None else []):
            torch.set_rng_state(self.cpu)
            if self.on_device is not None:
                torch.cuda.set_rng_state(self.on_device, self.device)
            yield


@dataclass(frozen=True)
class Chunk:
    """A part of a batch with all that leaves it: features and the terms within samples, as leaves of the loss."""

    batch: Batch
    rng: RngState
    images: Features
    texts: Features
    terms: dict[str, Term]
    metrics: dict[str, Tensor]


def grad_cache_step(
    model: TowerModel,
    batch: Batch,
    chunk_size: int,
    ranks: Ranks,
    run: RunStep,
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
    scale: float = 1.0,
) -> dict[str, Any]:
    """Add the gradient of a whole batch to every parameter, chunk by chunk, and return what `whole_step` returns.

    Args:
        model: The bare model.
        batch: The batch of this rank.
        chunk_size: Pairs that are held with a graph at a time. Ranks must bring equally many chunks.
        ranks: The ranks of the run.
        run: The model as it is wrapped for training.
        backward: Backpropagates a scalar, as ``accelerator.backward``.
        no_sync: Inside it, gradients are not yet exchanged between ranks.
        scale: Factor of the gradient, 1 / accumulation steps.

    Returns:
        ``loss``, ``parts``, ``metrics``, ``images`` and ``texts``, all detached.
    """
    with torch.no_grad():
        chunks = [first_pass(run, part) for part in split_batch(batch, chunk_size)]
    loss, parts = model(loss_of_chunks, chunks, ranks)  # the bare model: no engine looks at this backward pass
    of_objective = [p for p in model.objective.parameters() if p.requires_grad]
    cached = gradients(loss * scale, [*leaves(chunks), *of_objective])
    own = [(p, cached[id(p)] / len(chunks)) for p in of_objective if id(p) in cached]
    for i, chunk in enumerate(chunks):
        is_last = i == len(chunks) - 1
        with chunk.rng.replayed(), contextlib.nullcontext() if is_last else no_sync():
            # bound, for ZeRO-3 takes parameters among the root's arguments for activations and frees them too early
            backward(run(functools.partial(surrogate, chunk=chunk, cached=cached, own=own)))
    return {
        "loss": loss.detach(),
        "parts": parts,
        "metrics": mean_metrics([chunk.metrics for chunk in chunks]),
        "images": joined([chunk.images for chunk in chunks]),
        "texts": joined([chunk.texts for chunk in chunks]),
    }


def split_batch(batch: Batch, chunk_size: int) -> list[Batch]:
    """Return the batch in chunks of ``chunk_size`` rows; the last may be shorter."""
    num_rows = len(batch["pixel_values"])
    starts = range(0, num_rows, chunk_size)
    return [{name: value[start : start + chunk_size] for name, value in batch.items()} for start in starts]


def first_pass(run: RunStep, batch: Batch) -> Chunk:
    """Encode a chunk without a graph; its features and term sums become leaves."""
    rng = RngState.now(batch["pixel_values"].device)
    images, texts, terms, metrics = run(encode_pairs, batch)
    leaf_terms = {name: Term(_leaf(term.sum), term.weight) for name, term in terms.items()}
    return Chunk(batch, rng, _leaves(images), _leaves(texts), leaf_terms, metrics)


def loss_of_chunks(model: TowerModel, chunks: list[Chunk], ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of all chunks together as a function of their leaves and of the objective's parameters."""
    objective = objective_of(model)
    images, texts = joined([c.images for c in chunks]), joined([c.texts for c in chunks])
    with torch.enable_grad():
        terms = objective.contrast(images, texts, ranks)
        for name in chunks[0].terms:
            parts = [chunk.terms[name] for chunk in chunks]
            terms[name] = Term(sum((p.sum for p in parts[1:]), parts[0].sum), sum(p.weight for p in parts))
        return total_loss(terms, objective.loss_weights, ranks)


def surrogate(
    model: TowerModel, chunk: Chunk, cached: Mapping[int, Tensor], own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return the scalar whose gradient is the chunk's share of the whole gradient."""
    images, texts, terms, _ = encode_pairs(model, chunk.batch)
    made = [(images[name], leaf) for name, leaf in chunk.images.items() if name in images]
    made += [(texts[name], leaf) for name, leaf in chunk.texts.items()]
    made += [(terms[name].sum, term.sum) for name, term in chunk.terms.items()]
    pairs = [*((value, cached[id(leaf)]) for value, leaf in made if id(leaf) in cached), *own]
    return torch.stack([(value * gradient).sum() for value, gradient in pairs]).sum()


def gradients(loss: Tensor, inputs: list[Tensor]) -> dict[int, Tensor]:
    """Return the gradient by ``id`` of every input that the loss depends on."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return {id(leaf): gradient for leaf, gradient in zip(inputs, found, strict=True) if gradient is not None}


def leaves(chunks: list[Chunk]) -> list[Tensor]:
    """Return all that the loss is differentiated by, the objective's parameters aside."""
    values = [v for chunk in chunks for v in (*chunk.images.values(), *chunk.texts.values())]
    values += [term.sum for chunk in chunks for term in chunk.terms.values()]
    return [value for value in values if value.requires_grad]


def joined(features: list[Features]) -> Features:
    """Return the features of all chunks behind each other."""
    return {name: torch.cat([part[name] for part in features]) for name in features[0]}


def mean_metrics(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over chunks."""
    return {name: torch.stack([part[name] for part in metrics]).mean(0) for name in metrics[0]}


def _leaves(features: Features) -> Features:
    return {name: _leaf(feature) for name, feature in features.items()}


def _leaf(value: Tensor) -> Tensor:
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() else value
