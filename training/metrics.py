"""Training metrics: added up on the device, read once per log interval.

    metrics = Metrics(model, run, scaler)
    metrics.add(step, sums, count, tokens, norm)            # after each step; never waits for the device
    event = metrics.read(progress, rate, context=4096)      # once per interval; raises NotFinite
    print(log_line(event, total))

Reading a number from a GPU waits until the GPU has computed it. So sums stay on the device between log lines.
The events become lines of metrics.jsonl (training/run.py).
"""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import GPT
from training.run import Run

# Dense bfloat16 peaks from the makers' datasheets, in FLOP/s, by a part of torch's device name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Progress:
    """How far a run is. Saved in every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # input tokens so far, over all ranks
    seconds: float = 0.0  # training time, without evaluating and saving
    rollbacks: int = 0  # times the run returned to a checkpoint; each one halves the learning rate
    bad_step: int = -1  # the newest step (from 0) that was not finite
    expert_load: Tensor | None = None  # of the last step: each expert's share of the tokens (modeling/moe.py)


class NotFinite(Exception):
    """The loss or the gradient of step `step` (from 0) was not finite. All ranks raise it together."""

    def __init__(self, step: int):
        self.step = step


def memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: of the GPU since the last call, or of this process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB


class Metrics:
    """Sums of metrics on the device, for one log interval at a time."""

    def __init__(self, model: GPT, run: Run, scaler: torch.amp.GradScaler):
        self.model, self.run, self.scaler = model, run, scaler
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}  # units of the steps that had the metric
        self.bad_step = torch.full((), -1, device=self.run.device)  # first step with a bad gradient, or -1
        self.tokens, self.idle, self.begin = 0.0, 0.0, time.perf_counter()

    def add(self, step: int, sums: dict[str, Tensor], count: float, tokens: float, norm: Tensor) -> None:
        """Add the metrics of step `step` (from 0). count: its units over all ranks; norm: the gradient's."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.bad_step = torch.where((self.bad_step < 0) & ~norm.isfinite(), step, self.bad_step)
        self.tokens, self.norm = self.tokens + tokens, norm

    def read(self, progress: Progress, rate: float, context: float) -> dict[str, Any]:
        """The interval's event for metrics.jsonl; starts the next interval. Raises NotFinite."""
        # One copy for all sums, because each copy waits for the device.
        sums = self.run.sum(torch.stack([value.float() for value in self.sums.values()]).cpu().tolist())
        self.require_finite(progress.step, sums)
        seconds = self.seconds(progress) - progress.seconds
        progress.seconds += seconds
        speed = self.tokens / seconds
        event: dict[str, Any] = {"step": progress.step}
        event |= {name: value / max(self.counts[name], 1)
                  for name, value in zip(self.sums, sums, strict=True)}
        event |= {"lr": rate, "grad_norm": self.norm.item(), "tokens": progress.tokens,
                  "tokens_per_second": speed, "mfu": self.utilization(speed, context),
                  "memory_gb": memory_gb(self.run.device), "seconds": progress.seconds}
        self.restart()
        return event

    def seconds(self, progress: Progress) -> float:
        """The training time of the run until now, with the part of an interval that is not read yet."""
        return progress.seconds + time.perf_counter() - self.begin - self.idle

    def require_finite(self, finished: int, sums: Sequence[float] = ()) -> None:
        """Raise NotFinite, on all ranks, if a sum or a gradient of the `finished` steps is not finite.

        The float16 scaler tries ever larger scales, so a gradient overflows now and then and its step is
        skipped. That is an error only after scaling down to below 1 has not helped.
        """
        bad_step = int(self.bad_step.item())
        overflows = self.scaler.get_scale() < 1 if self.scaler.is_enabled() else bad_step >= 0
        if overflows or not all(map(math.isfinite, sums)):
            raise NotFinite(bad_step if bad_step >= 0 else finished - 1)

    def utilization(self, speed: float, context: float) -> float | None:
        """Model FLOPs utilization, 0 to 1 of the GPUs' peak; None on a CPU and on an unknown GPU.

        speed: tokens per second over all ranks. context: tokens that a sequence has.
        """
        if self.run.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.run.device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
        return speed * self.model.flops_per_token(context) / (peak * self.run.world_size) if peak else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        begin = time.perf_counter()
        yield
        self.idle += time.perf_counter() - begin


def step_text(step: int, total: int) -> str:
    """step_text(50, 1200) is "step    50/1,200"."""
    return f"step {step:>{len(f'{total:,}')},}/{total:,}"


def duration(seconds: float) -> str:
    """A time in the unit that needs two or three digits: "253 s", "17 min", "5.2 h"."""
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_left(event: dict[str, Any], total: int) -> float:
    """Seconds of training until step `total`, at the speed of this event and the tokens per step so far."""
    tokens = (total - event["step"]) * event["tokens"] / event["step"]
    return tokens / max(event["tokens_per_second"], 1e-9)


def log_line(event: dict[str, Any], total: int, left_out: Collection[str] = ()) -> str:
    """A training event on one line, without the metrics `left_out`. "loss/dpo" is printed as "dpo"."""
    metrics = list(event)[1:list(event).index("lr")]  # between "step" and "lr"
    others = "".join(f"{name.rpartition('/')[2]} {event[name]:6.3f}  " for name in metrics
                     if name != "loss" and name not in left_out)
    loss = f"loss {event['loss']:7.4f}  " if "loss" in event else ""
    used = f"  mfu {event['mfu']:5.1%}" if event["mfu"] is not None else ""
    return (f"{step_text(event['step'], total)}  {loss}{others}lr {event['lr']:.2e}  "
            f"norm {event['grad_norm']:6.3f}  {event['tokens_per_second']:>9,.0f} tok/s{used}  "
            f"{event['memory_gb']:5.2f} GB  {duration(event['seconds'])}  "
            f"eta {duration(time_left(event, total))}")
