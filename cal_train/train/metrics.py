"""What the log shows besides the loss: sums are kept per rank, reduced once per log line, divided at the end."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cal_train.cal.strategies import TokenWeighting


@dataclass
class Stopwatch:
    """Adds up the seconds spent inside ``with``. On CUDA by events, so that nothing waits until they are read."""

    device: torch.device
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _start: float | torch.cuda.Event = 0.0

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        start, end = self._start, self._now()
        if isinstance(start, float) and isinstance(end, float):
            self._seconds += end - start
        elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._events.append((start, end))

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read_and_reset(self) -> float:
        """Return the seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


WEIGHT_SUMS = ("labels", "weight", "weight_squared", "low", "high", "delta")


def weight_sums(weighting: TokenWeighting, delta_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the sums of `WEIGHT_SUMS` over label tokens: what `weight_report` needs, (6,) float32."""
    return torch.stack(
        [
            torch.tensor(float(len(weight_N)), device=weight_N.device),
            weight_N.sum(),
            weight_N.square().sum(),
            (delta_N <= weighting.low).sum(),
            (delta_N >= weighting.high).sum(),
            delta_N.sum(),
        ]
    ).float()


def weight_report(sums: Tensor, num_steps: int) -> dict[str, float]:
    """Return the ``cal/*`` numbers of a log line from sums over ``num_steps`` optimizer steps and all ranks.

    ``share_low`` and ``share_high`` are the shares of label tokens whose delta lies at or outside the clamp limits,
    before smoothing; ``effective_tokens`` is (sum w)^2 / sum w^2 per optimizer step.
    """
    labels, weight, weight_squared, low, high, delta = sums.double().tolist()
    if labels == 0:
        return {}
    return {
        "cal/weight_mean": weight / labels,
        "cal/share_low": low / labels,
        "cal/share_high": high / labels,
        "cal/delta_mean": delta / labels,
        "cal/effective_tokens": weight**2 / weight_squared / num_steps if weight_squared else 0.0,
    }


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of each part by its name in the log; groups are named ``PART/...``."""
    groups = [group for group in optimizer.param_groups if "name" in group]
    return {f"learning_rate/{group['name'].split('/')[0]}": group["lr"] for group in groups}
