"""The training loop: one `fit` for every stage, on one process or many, that stops and resumes at any step.

    run = start_run(cfg)
    fit(cfg, model, batches_at, loss_fn, evaluate, run)

A stage brings its data: `batches_at(step)`, a pure function of the step that returns this rank's micro-batches; its
mathematics: `loss_fn(model, batch)`, a *sum* over the units that the batch counts, with metrics that are sums too; and
`evaluate(model, last)`. The loop adds sums and counts over micro-batches and ranks and divides once, so that gradients
depend neither on the micro-batch size nor on the number of processes. It knows no stage by name.

Writes out_dir/step_*/ (parts/checkpoint.py) and metrics.jsonl (parts/run.py, where the keys are as well). Many
processes come from torchrun: parallel=ddp gives each a copy of the model, parallel=fsdp (FSDP2, arXiv 2304.11277) a
shard. Left out: tensor and pipeline parallelism.
"""

import contextlib
import dataclasses
import math
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import UserError
from parts import checkpoint
from parts.hf import find_folder
from parts.optim import (learning_rate_at, load_optimizer_state, make_optimizers, multipliers, optimizer_state,
                         set_learning_rate, whole)
from parts.run import Run, RunConfig, Stage, plan, stage_at, stage_configs, start_run, with_steps

__all__ = ["Run", "RunConfig", "fit", "plan", "stage_at", "stage_configs", "start_run", "with_steps"]

# Dense bfloat16 peaks of the makers' datasheets, in FLOP/s, by a part of torch's device name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12}


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # input tokens so far, over all ranks
    seconds: float = 0.0  # of training, without evaluation and saving


def fit(cfg: RunConfig, model: nn.Module, batches_at: Callable[[int], list[dict]],
        loss_fn: Callable[[nn.Module, dict], tuple[Tensor, dict[str, Tensor]]],
        evaluate: Callable[[nn.Module, bool], dict[str, float]], run: Run) -> dict[str, float]:
    """Train `model` from its newest checkpoint (or the start) to the last step; returns the last evaluation.

    batches_at(step): this rank's micro-batches, dicts of CPU tensors and "count", the units their loss sums over.
    loss_fn(model, batch): (summed loss that carries the gradient, {name: summed metric}).
    evaluate(model, last): metrics over all ranks, every rank taking part; "val_loss" chooses the best checkpoint.
    A model on the meta device gets its memory and weights here. Saves and leaves through SystemExit on SIGINT (130) and
    SIGTERM (0). Raises UserError where the loss or the gradient is no longer finite.
    """
    stages = plan(cfg)
    total = stages[-1].last
    folder = checkpoint.newest_verified(run.out_dir, run.print)
    place(model, cfg, run, folder)
    progress, saved = load_state(folder)
    run.cut_log(progress.step)
    if folder:
        run.print(f"resumed   from {folder}")
    dtype = compute_dtype(cfg, run)
    amp = torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32 and not isinstance(model, FSDPModule))
    scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
    scaler.load_state_dict(saved["scaler"]) if saved.get("scaler") else None
    optimizers: list[torch.optim.Optimizer] = []
    stage, results = None, {}
    meter = Meter(model, run)

    def measure() -> dict[str, float]:
        """Evaluate, log, and note whether this is the best checkpoint."""
        with meter.paused(), amp, torch.no_grad():
            found = evaluate(model.eval(), progress.step == total)
        model.train()
        run.log({"step": progress.step, **found})
        run.print(f"{step_text(progress.step, total)}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
        note_best(found, progress, run, cfg.keep_checkpoints)
        return found

    if folder and is_due(progress.step, cfg.eval_interval, total) and run.last_event("val_loss").get("step") != progress.step:
        results = measure()  # the run was stopped between saving and evaluating
    with (ThreadPoolExecutor(1) as pool,
          tqdm(total=total, initial=progress.step, unit="step", disable=run.rank > 0 or not sys.stderr.isatty(),
               dynamic_ncols=True, leave=False) as bar):
        upcoming = pool.submit(batches_at, progress.step)
        model.train()
        while progress.step < total:
            if stage is not stage_at(stages, progress.step):
                stage = stage_at(stages, progress.step)
                state = saved.get("optimizer") or optimizer_state(model, optimizers)
                forward, optimizers = enter_stage(stages, stage, model, run)
                if not (stage.begin == stage.first == progress.step):  # a schedule that begins anew starts without
                    load_optimizer_state(model, optimizers, state)
                saved.pop("optimizer", None)
            batches = [pinned(batch, run.device) for batch in upcoming.result()]
            if progress.step + 1 < total:
                upcoming = pool.submit(batches_at, progress.step + 1)
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            count, tokens, stop = run.sum([sum(batch["count"] for batch in batches), tokens, bool(run.stop_signal)])
            # Dropout is a function of (seed, step, rank) too, so that nothing random has to be saved.
            torch.manual_seed(zlib.crc32(f"{cfg.seed}/{progress.step}/{run.rank}".encode()))
            rate = learning_rate_at(stage.cfg, progress.step - stage.begin, stage.end - stage.begin)
            set_learning_rate(optimizers, rate)
            sums = backward(forward, batches, loss_fn, amp, scaler, run.world_size / max(count, 1), run)
            norm = update(model, optimizers, scaler, stage.cfg.grad_clip)
            progress.step += 1
            progress.tokens += int(tokens)
            meter.add(sums, count, tokens, norm)
            bar.update()
            if stop or is_due(progress.step, cfg.log_interval, total):
                event = meter.read(progress, rate, batches[0]["input_ids"].shape[1])
                run.log(event)
                run.print(log_line(event, total))
            if stop or is_due(progress.step, cfg.save_interval, total):
                with meter.paused():
                    meter.require_finite()
                    save(model, optimizers, scaler, progress, run, cfg.keep_checkpoints)
            if not stop and is_due(progress.step, cfg.eval_interval, total):
                results = measure()  # after saving: an evaluation that fails must not cost the run
            if stop:
                run.print(f"stopped   at step {progress.step:,}, saved; the same command goes on")
                raise SystemExit(0 if run.stop_signal == signal.SIGTERM else 130)
    return results


def is_due(step: int, interval: int, total: int) -> bool:
    """Whether something done every `interval` steps (0: only at the end) is done after `step` of them."""
    return step == total or (interval > 0 and step % interval == 0)


# ---- One step -------------------------------------------------------------------------------------------------------

def backward(forward: nn.Module, batches: list[dict], loss_fn: Callable, amp: Any, scaler: Any, scale: float,
             run: Run) -> dict[str, Tensor]:
    """Accumulate the gradient of scale * (sum of the losses) over the micro-batches; returns the summed metrics.

    scale is world_size / count, because DDP and FSDP average over ranks what is a sum.
    """
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        synchronize_gradients(forward, number == len(batches) - 1)  # before the forward pass, or DDP does not see it
        batch = {key: value.to(run.device, non_blocking=True) if isinstance(value, Tensor) else value
                 for key, value in batch.items()}
        with amp:
            loss, metrics = loss_fn(forward, batch)
        scaler.scale(loss * scale).backward()
        for name, value in metrics.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums


def synchronize_gradients(forward: nn.Module, now: bool) -> None:
    """Let the next backward pass exchange gradients between ranks, or leave that to a later micro-batch."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = now
    elif isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(now)


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: Any, clip: float) -> Tensor:
    """Clip by the global norm and step; returns the norm before clipping, a device scalar.

    A gradient that is not finite changes nothing: the optimizers get the flag as `found_inf`, on the device, as torch's
    float16 scaler hands it to them, so nobody waits for it here.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip or math.inf))
    for optimizer in optimizers:
        if not scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return norm


class Meter:
    """Adds up what a log line shows, on the device, and reads it once an interval."""

    def __init__(self, model: nn.Module, run: Run):
        self.model, self.run = model, run
        self.sums: dict[str, Tensor] = {}
        self.not_finite = torch.zeros((), device=run.device)  # steps whose gradient was not
        self.norm: Any = None
        self.count, self.tokens, self.idle, self.begin = 0.0, 0.0, 0.0, time.perf_counter()

    def add(self, sums: dict[str, Tensor], count: float, tokens: float, norm: Tensor) -> None:
        self.sums = {name: value + self.sums[name] if name in self.sums else value for name, value in sums.items()}
        self.not_finite += ~norm.isfinite()
        self.count, self.tokens, self.norm = self.count + count, self.tokens + tokens, norm

    def read(self, progress: Progress, rate: float, context: int) -> dict[str, float]:
        """The training event of metrics.jsonl since the last read. UserError if something was not finite."""
        *sums, not_finite = self.run.sum_tensors([*self.sums.values(), self.not_finite])
        if not_finite or not all(map(math.isfinite, sums)):
            self.require_finite(not_finite or 1)
        seconds = time.perf_counter() - self.begin - self.idle
        progress.seconds += seconds
        speed = self.tokens / seconds
        event = {"step": progress.step, **{n: s / max(self.count, 1) for n, s in zip(self.sums, sums, strict=True)},
                 "lr": rate, "grad_norm": self.norm.item(), "tokens": progress.tokens, "tokens_per_second": speed,
                 "mfu": self.utilization(speed, context), "memory_gb": memory_gb(self.run.device),
                 "seconds": progress.seconds}
        self.sums, self.count, self.tokens, self.idle, self.begin = {}, 0.0, 0.0, 0.0, time.perf_counter()
        return event

    def require_finite(self, not_finite: float | None = None) -> None:
        """UserError, on all ranks alike, if any gradient since the start was not finite."""
        if not_finite or self.not_finite.item():
            raise UserError("the loss or its gradient is no longer finite; the last checkpoint is intact. Resume with a "
                            "lower --learning_rate in a new out_dir, or with --dtype=float32")

    def utilization(self, speed: float, context: int) -> float | None:
        """Model FLOPs utilization: the share of the GPUs' datasheet peak; None where no peak is known."""
        name = torch.cuda.get_device_name(self.run.device) if self.run.device.type == "cuda" else ""
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        return speed * self.model.flops_per_token(context) / (peak * self.run.world_size) if peak else None

    @contextlib.contextmanager
    def paused(self) -> Any:
        """What happens inside is not training time."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        begin = time.perf_counter()
        yield
        self.idle += time.perf_counter() - begin


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or of everything on the CPU. GB of 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux KiB


def step_text(step: int, total: int) -> str:
    return f"step {step:>{len(f'{total:,}')},}/{total:,}"


def log_line(event: dict[str, float], total: int) -> str:
    used = f"  mfu {event['mfu']:5.1%}" if event["mfu"] is not None else ""
    return (f"{step_text(event['step'], total)}  loss {event['loss']:7.4f}  lr {event['lr']:.2e}  "
            f"norm {event['grad_norm']:6.3f}  {event['tokens_per_second']:>9,.0f} tok/s{used}  "
            f"{event['memory_gb']:5.2f} GB  {event['seconds']:,.0f} s")


# ---- The model on its devices ---------------------------------------------------------------------------------------

def place(model: nn.Module, cfg: RunConfig, run: Run, folder: Path | None) -> None:
    """Shard if asked, give a meta model its memory, load `folder` (or cfg.init_from, or draw random weights), compile."""
    dtype = compute_dtype(cfg, run)
    if cfg.parallel == "fsdp" and run.world_size > 1:
        mesh = init_device_mesh(run.device.type, (run.world_size,))
        # Inputs are not cast: rotary tables stay float32. Gradients are summed over ranks in float32.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.model["layers"]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    on_meta = next(model.parameters()).is_meta
    if on_meta and folder is None and cfg.init_from is None:
        model.materialize(run.device, cfg.seed)
    else:
        model.to_empty(device=run.device) if on_meta else model.to(run.device)
        if folder or on_meta:
            model.load(folder or find_folder(cfg.init_from))
    model.checkpoint_activations = cfg.activation_checkpointing
    if cfg.compile or (cfg.compile is None and run.device.type == "cuda"):
        for block in model.model["layers"]:
            block.compile()  # in place: no wrapper, so no prefix in parameter names


def compute_dtype(cfg: RunConfig, run: Run) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[cfg.dtype or ("bfloat16" if run.device.type == "cuda" else "float32")]


def enter_stage(stages: list[Stage], stage: Stage, model: nn.Module,
                run: Run) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Set the model's context and trainable parameters to the stage's; returns what to call, and new optimizers."""
    so_far = stages[:stages.index(stage) + 1]
    changed = set().union(*(each.changes for each in stages))
    context = {key: getattr(stage.cfg, key) for key in ("rope_theta", "rope_scaling") if key in changed}
    if "block_size" in changed:  # a context once learned is kept, though later stages may train on shorter rows
        context["block_size"] = max(each.cfg.block_size for each in so_far)
    model.reconfigure(**context)
    optimizers = make_optimizers(model, stage.cfg)
    if len(stages) > 1:
        run.print(f"stage     {len(so_far)} of {len(stages)}: steps {stage.first:,} to {stage.last:,}  "
                  + "  ".join(f"{key}={value}" for key, value in stage.changes.items()))
    if stage.cfg.lr_multipliers:
        run.print(multiplier_table(model, stage.cfg.lr_multipliers))
    if run.world_size == 1 or isinstance(model, FSDPModule):
        return model, optimizers
    # A new wrapper a stage, because DDP looks once at which parameters are trained.
    return DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None,
                                   broadcast_buffers=False), optimizers


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

def save(model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: Any, progress: Progress, run: Run,
         keep: int) -> None:
    """Write the checkpoint of progress.step. All ranks gather, rank 0 writes."""
    parameters = {name: whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}
    state = {"progress": dataclasses.asdict(progress), "optimizer": optimizer_state(model, optimizers),
             "scaler": scaler.state_dict()}

    def write(folder: Path) -> None:
        tokenizer = run.tokenizer
        model.save_pretrained(folder, parameters, tokenizer.eot_id if tokenizer else None)
        if tokenizer:
            tokenizer.save(folder)
        (folder / "trainer").mkdir()
        torch.save(state, folder / "trainer" / "state.pt")

    if run.rank == 0:
        folder = checkpoint.write_checkpoint(run.out_dir, progress.step, write)
        checkpoint.point(run.out_dir, keep, last=folder.name)
    run.barrier()


def load_state(folder: Path | None) -> tuple[Progress, dict[str, Any]]:
    """What `save` put beside the weights: how far the run is, and the optimizers' state by parameter name."""
    if folder is None:
        return Progress(), {}
    saved = torch.load(folder / "trainer" / "state.pt", map_location="cpu", weights_only=True)
    return Progress(**saved.pop("progress")), saved


def note_best(results: dict[str, float], progress: Progress, run: Run, keep: int) -> None:
    """Point "best" to this step's checkpoint, where there is one, if its val_loss is the lowest yet. Rank 0 only."""
    name = f"step_{progress.step:06d}"
    if run.rank == 0 and "val_loss" in results and (run.out_dir / name).is_dir():
        if results["val_loss"] < checkpoint.read_pointers(run.out_dir).get("best_val_loss", math.inf):
            checkpoint.point(run.out_dir, keep, best=name, best_val_loss=results["val_loss"])


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors in page-locked memory, from which copies to a GPU do not block; elsewhere the batch as it is."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
