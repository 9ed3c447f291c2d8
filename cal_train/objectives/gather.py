"""The only collective code of the objectives: exchange of features with exact gradients.

With data parallelism averaging gradients over ranks, a loss over the local rows against features gathered *with*
gradient gives the gradient of the whole batch; gathering without gradient gives another direction and is not offered.
Every exchange with gradient runs once more in the backward pass, so all ranks must build the same graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that share a batch."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks; without gradient."""
        if self.world_size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Return the largest over ranks; without gradient."""
        if self.world_size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def all_gather(self, local: Tensor) -> Tensor:
        """Return the tensors of all ranks behind each other (W * b, ...), with gradient.

        Raises:
            ValueError: If the ranks bring different numbers of rows.
        """
        if self.world_size == 1:
            return local
        self._check_shapes(local)
        return _AllGather.apply(local.contiguous(), self)

    def all_to_all(self, local: Tensor) -> Tensor:
        """Send row r of (W, ...) to rank r, and return what the ranks sent here in their order, with gradient."""
        if self.world_size == 1:
            return local
        return _AllToAll.apply(local.contiguous())

    def ring(self, tensors: Sequence[Tensor], *, is_bidirectional: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of this rank, then those of every other, passed on from neighbour to neighbour.

        Gradients travel back the same way. Integer tensors come along without gradient.

        Args:
            tensors: What travels; the same shapes on all ranks.
            is_bidirectional: Whether tensors travel both ways at once, which halves the number of hops.

        Raises:
            ValueError: If the ranks bring different numbers of rows.
        """
        own = tuple(tensors)
        if self.world_size > 1:
            self._check_shapes(*own)
        yield own
        up = down = own
        num_left = self.world_size - 1
        while num_left > 0:
            if is_bidirectional and num_left > 1:
                arrived = _Shift.apply(self, (1,) * len(own) + (-1,) * len(own), *up, *down)
                up, down = arrived[: len(own)], arrived[len(own) :]
                yield up
                yield down
                num_left -= 2
            else:
                up = _Shift.apply(self, (1,) * len(own), *up)
                yield up
                num_left -= 1

    def _check_shapes(self, *tensors: Tensor) -> None:
        """Refuse before anything is exchanged: mismatched sizes would hang or mix up rows."""
        sizes = torch.tensor([size for tensor in tensors for size in tensor.shape], device=tensors[0].device)
        most, least = self.all_reduce_max(torch.stack([sizes, -sizes])).unbind()
        if torch.equal(most, -least):
            return
        if most[0] != -least[0]:
            raise ValueError(
                f"ranks bring {-int(least[0])} to {int(most[0])} pairs in one step: a contrastive batch must be equal "
                "on all ranks; set dataloader_drop_last"
            )
        raise ValueError(f"ranks bring features of different shapes, {(-least).tolist()} to {most.tolist()}")


ONE_RANK = Ranks()


def current_ranks() -> Ranks:
    """Return the ranks of the default process group; one rank where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ONE_RANK
    return Ranks(dist.get_rank(), dist.get_world_size())


class _AllGather(torch.autograd.Function):
    """Gather; backward sums over ranks what each rank's loss says about this rank's rows."""

    @staticmethod
    def forward(ctx, local: Tensor, ranks: Ranks) -> Tensor:
        ctx.world_size = ranks.world_size
        gathered = [torch.empty_like(local) for _ in range(ranks.world_size)]
        dist.all_gather(gathered, local)
        return torch.cat(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = list(grad.contiguous().chunk(ctx.world_size))
        grad_local = torch.empty_like(parts[0])
        dist.reduce_scatter(grad_local, parts)
        return grad_local, None


class _AllToAll(torch.autograd.Function):
    """Exchange of rows; backward is the same exchange of gradients."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        arrived = torch.empty_like(local)
        dist.all_to_all_single(arrived, local)
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_local = torch.empty_like(grad)
        dist.all_to_all_single(grad_local, grad.contiguous())
        return grad_local


class _Shift(torch.autograd.Function):
    """Every rank hands tensor i to the rank ``steps[i]`` further on; backward hands the gradients back."""

    @staticmethod
    def forward(ctx, ranks: Ranks, steps: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        ctx.back = {i: -steps[i] for i, tensor in enumerate(tensors) if tensor.is_floating_point()}
        arrived = _exchange(ranks, steps, tensors)
        ctx.mark_non_differentiable(*(tensor for i, tensor in enumerate(arrived) if i not in ctx.back))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        arrived = _exchange(ctx.ranks, list(ctx.back.values()), [grads[i] for i in ctx.back])
        by_index = dict(zip(ctx.back, arrived, strict=True))
        return None, None, *(by_index.get(i) for i in range(len(grads)))


def _exchange(ranks: Ranks, steps: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Send each tensor ``step`` ranks up while receiving one of the same shape from ``step`` ranks down."""
    arrived = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    operations = []
    for i, (step, tensor, into) in enumerate(zip(steps, tensors, arrived, strict=True)):
        target, source = (ranks.rank + step) % ranks.world_size, (ranks.rank - step) % ranks.world_size
        operations.append(dist.P2POp(dist.isend, tensor.contiguous(), target, tag=i))
        operations.append(dist.P2POp(dist.irecv, into, source, tag=i))
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return arrived
