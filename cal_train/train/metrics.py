"""What the log shows besides the loss: sums are kept per rank, reduced once per log line, divided at the end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cal_train.cal.strategies import TokenWeighting
from cal_train.train.flop_count import FlopCount


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


class LogWindow:
    """What one rank has done since the last log line.

    Args:
        device: Where sums are kept, so that nothing waits for the device until a line is written.
        weighting: None for plain training.
        ablated_clock: Runs during CAL's extra pass.

    Attributes:
        flops: Counts operations, once there is one.
    """

    def __init__(self, device: torch.device, weighting: TokenWeighting | None, ablated_clock: Stopwatch):
        self.device = device
        self.weighting = weighting
        self.ablated_clock = ablated_clock
        self.flops: FlopCount | None = None
        self.start(0)

    def start(self, global_step: int) -> None:
        """Forget everything and start the clock, before optimizer step ``global_step + 1``."""
        self._num_tokens = torch.zeros((), dtype=torch.long, device=self.device)
        self._num_positions = 0
        self._weight_sums = torch.zeros(len(WEIGHT_SUMS), device=self.device)
        self.data_wait_seconds = 0.0
        if self.flops is not None:
            self.flops.reset()
        self._started, self._first_step = time.perf_counter(), global_step

    def leave_out(self, seconds: float) -> None:
        """Take time that did not go into training, for an evaluation, out of the window."""
        self._started += seconds

    def add(self, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        """Count a micro-batch whose loss is finite."""
        self._num_tokens += inputs["attention_mask"].sum()
        self._num_positions += inputs["attention_mask"].numel()
        if self.flops is not None:
            self.flops.add(inputs)
        if self.weighting is not None and "delta" in outputs:
            self._weight_sums += weight_sums(self.weighting, outputs["delta"], outputs["weight"])

    def report(
        self, global_step: int, counts: Mapping[str, float], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Return the numbers of a log line and start the next window; every rank must call it.

        Args:
            global_step: Optimizer steps so far.
            counts: Of this rank and the whole run; their sums over ranks are logged beside the rest.
            sum_over_ranks: Adds up a tensor over ranks.
        """
        seconds = time.perf_counter() - self._started
        own = torch.tensor([float(self._num_tokens), self._num_positions, *counts.values()], device=self.device)
        num_tokens, num_positions, *sums = sum_over_ranks(own).tolist()
        report = {
            "tokens_per_second": num_tokens / seconds,
            "padding_share": 1 - num_tokens / max(num_positions, 1),
            "data_wait_share": self.data_wait_seconds / seconds,
            **dict(zip(counts, sums, strict=True)),
            **self._throughput(seconds, sum_over_ranks),
        }
        if self.weighting is not None and self.weighting.ablation is not None:
            num_steps = max(global_step - self._first_step, 1)
            report |= weight_report(sum_over_ranks(self._weight_sums), num_steps)
            report["cal/overhead"] = self.ablated_clock.read_and_reset() / seconds
        self.start(global_step)
        return report

    def _throughput(self, seconds: float, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the useful operations per second of a device, the mean over ranks, and their share of its peak."""
        if self.flops is None:
            return {}
        own = torch.tensor([self.flops.useful, self.flops.ablated, 1.0], device=self.device)
        useful, ablated, num_ranks = sum_over_ranks(own).tolist()
        per_second = useful / seconds / num_ranks
        report = {"tflops_per_second": per_second / 1e12}
        if self.flops.peak is not None:
            report["mfu"] = per_second / self.flops.peak
        if ablated:
            report["cal/flops_share"] = ablated / useful
        return report
