"""How far a run is, how fast and how well: what is logged, added up on the device and read once an interval.

    meter = Meter(model, run, scaler)
    meter.add(step, sums, count, tokens, norm)            # after each step; waits for nothing
    event = meter.read(progress, rate, context=4096)      # once an interval; NotFinite stops the run
    print(log_line(event, total))
"""

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.run import Run

# Dense bfloat16 peaks of the makers' datasheets, in FLOP/s, by a part of torch's device name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # input tokens so far, over all ranks
    seconds: float = 0.0  # of training, without evaluation and saving
    rollbacks: int = 0  # times the run went back to a checkpoint; each halves the learning rate


class NotFinite(Exception):
    """The gradient or the loss of step `step` (from 0) was not finite; all ranks raise it together."""

    def __init__(self, step: int):
        self.step = step


class Meter:
    """Adds up the metrics on the device, and reads them once an interval."""

    def __init__(self, model: nn.Module, run: Run, scaler: torch.amp.GradScaler):
        self.model, self.run, self.scaler = model, run, scaler
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}  # of the steps that had the metric
        self.bad_step = torch.full((), -1, device=self.run.device)  # the first with a gradient not finite
        self.tokens, self.idle, self.begin = 0.0, 0.0, time.perf_counter()

    def add(self, step: int, sums: dict[str, Tensor], count: float, tokens: float, norm: Tensor) -> None:
        """Add step `step` (from 0)."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.bad_step = torch.where((self.bad_step < 0) & ~norm.isfinite(), step, self.bad_step)
        self.tokens, self.norm = self.tokens + tokens, norm

    def read(self, progress: Progress, rate: float, context: int) -> dict[str, float]:
        """The training event of the interval, for metrics.jsonl. NotFinite if something was not finite."""
        sums = self.run.sum_tensors(list(self.sums.values()))
        self.require_finite(progress.step, sums)
        seconds = time.perf_counter() - self.begin - self.idle
        progress.seconds += seconds
        speed = self.tokens / seconds
        event = {"step": progress.step}
        event |= {name: value / max(self.counts[name], 1)
                  for name, value in zip(self.sums, sums, strict=True)}
        event |= {"lr": rate, "grad_norm": self.norm.item(), "tokens": progress.tokens,
                  "tokens_per_second": speed, "mfu": self.utilization(speed, context),
                  "memory_gb": memory_gb(self.run.device), "seconds": progress.seconds}
        self.restart()
        return event

    def require_finite(self, finished: int, sums: list[float] = ()) -> None:
        """NotFinite, on all ranks alike, if a sum, or a gradient of the `finished` steps, is not finite.

        The float16 scaler tries ever larger scales, so there a gradient may overflow now and then; it is lost
        only when scaling down to 1 has not helped.
        """
        bad_step = self.bad_step.item()
        overflows = self.scaler.get_scale() < 1 if self.scaler.is_enabled() else bad_step >= 0
        if overflows or not all(map(math.isfinite, sums)):
            raise NotFinite(bad_step if bad_step >= 0 else finished - 1)

    def utilization(self, speed: float, context: int) -> float | None:
        """Model FLOPs utilization: the share of the GPUs' datasheet peak, or None where no peak is known."""
        if self.run.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.run.device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
        return speed * self.model.flops_per_token(context) / (peak * self.run.world_size) if peak else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        begin = time.perf_counter()
        yield
        self.idle += time.perf_counter() - begin


def memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: of the GPU, or of this whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB


def step_text(step: int, total: int) -> str:
    return f"step {step:>{len(f'{total:,}')},}/{total:,}"


def log_line(event: dict[str, Any], total: int) -> str:
    """An event of training on one line; metrics with a / in their name are in metrics.jsonl only."""
    metrics = list(event)[1:list(event).index("lr")]
    others = "".join(f"{name} {event[name]:6.3f}  " for name in metrics if name != "loss" and "/" not in name)
    loss = f"loss {event['loss']:7.4f}  " if "loss" in event else ""
    used = f"  mfu {event['mfu']:5.1%}" if event["mfu"] is not None else ""
    return (f"{step_text(event['step'], total)}  {loss}{others}lr {event['lr']:.2e}  "
            f"norm {event['grad_norm']:6.3f}  {event['tokens_per_second']:>9,.0f} tok/s{used}  "
            f"{event['memory_gb']:5.2f} GB  {event['seconds']:,.0f} s")
