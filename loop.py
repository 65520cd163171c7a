"""The training loop: one `fit` for every stage, on one process or many, that stops and resumes at any step.

    with start_run(cfg, given) as run:
        fit(cfg, model, batches_at, loss_fn, evaluate, run)

A stage brings its data: `batches_at(step)`, a pure function of the step that returns this rank's micro-
batches; its mathematics: `loss_fn(model, batch)`, a *sum* over the units that the batch counts, with metrics
that are sums too; and `evaluate(model, last)`. The loop adds sums and counts over micro-batches and ranks and
divides once, so that gradients depend neither on the micro-batch size nor on the number of processes. It
knows no stage by name.

Writes out_dir/step_*/ (formats/checkpoint.py) and metrics.jsonl (training/run.py; the keys:
training/stages.py). Many processes come from torchrun: parallel=ddp gives each a copy of the model,
parallel=fsdp (FSDP2, arXiv 2304.11277) a shard of it. Left out: tensor and pipeline parallelism."""

import dataclasses
import math
import pickle
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import UserError
from formats import checkpoint
from formats.files import write_json
from formats.hf import find_folder
from modeling.devices import DTYPES, gather_full, to_device
from training.metrics import Meter, NotFinite, Progress, log_line, step_text
from training.optim import (
    learning_rate_at,
    load_optimizer_state,
    make_optimizers,
    multipliers,
    multipliers_text,
    optimizer_state,
    set_learning_rate,
)
from training.run import Run, start_run
from training.stages import RunConfig, Stage, plan_stages, stage_at, stage_configs

__all__ = ["Run", "RunConfig", "fit", "plan_stages", "stage_at", "stage_configs", "start_run"]

CHECKPOINT_BYTES = 12  # a parameter, at most: the weight and AdamW's two moments in float32


def fit(cfg: RunConfig, model: nn.Module, batches_at: Callable[[int], list[dict]],
        loss_fn: Callable[[nn.Module, dict], tuple[Tensor, dict[str, Tensor]]],
        evaluate: Callable[[nn.Module, bool], dict[str, float]], run: Run) -> dict[str, float]:
    """Train `model` from its newest checkpoint, or the start, to the last step; returns the last evaluation.

    batches_at(step): this rank's micro-batches, dicts of CPU tensors and "count", the units their loss sums
    over. loss_fn(model, batch): (summed loss that carries the gradient, {name: summed metric}).
    evaluate(model, last): metrics over all ranks, which all take part; "val_loss" chooses the best
    checkpoint. A model on the meta device gets its memory and weights here. Returns {} if the run was
    finished before. Saves and leaves by SystemExit on SIGINT (130) and SIGTERM (0). Raises UserError if the
    gradient is not finite, cfg.max_rollbacks times excepted.
    """
    folder = newest_checkpoint(run)
    size = CHECKPOINT_BYTES * model.num_saved()
    run.run_on_rank0(lambda: checkpoint.require_space(run.out_dir, size))
    place(model, cfg, run, folder)
    while True:
        try:
            return train_on(folder, cfg, model, batches_at, loss_fn, evaluate, run)
        except NotFinite as fault:
            folder = roll_back(fault.step, cfg, model, batches_at, run)


def train_on(folder: Path | None, cfg: RunConfig, model: nn.Module, batches_at: Callable, loss_fn: Callable,
             evaluate: Callable, run: Run) -> dict[str, float]:
    """`fit`, for a model that has the weights of the checkpoint `folder`. Raises NotFinite."""
    stages = plan_stages(cfg)
    total = stages[-1].last
    progress, saved = load_state(folder)
    progress.rollbacks = run.rollbacks = max(progress.rollbacks, run.rollbacks)
    saved_step = progress.step if folder else -1
    set_context(model, stages, max(progress.step - 1, 0))
    run.run_on_rank0(lambda: run.truncate_log(progress.step))
    if folder:
        run.print(f"resumed   from {folder}")
    dtype = training_dtype(cfg, run)
    autocasts = dtype != torch.float32 and not isinstance(model, FSDPModule)
    amp = torch.autocast(run.device.type, dtype, enabled=autocasts)
    scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
    if saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    stage, optimizers, results = None, [], {}
    meter = Meter(model, run, scaler)

    def measure() -> dict[str, float]:
        """Evaluate, log, and point to this checkpoint if it is the best."""
        with meter.paused(), amp, torch.no_grad():
            found = evaluate(model.eval(), progress.step == total)
        if isinstance(model, FSDPModule):
            model.reshard()  # without a backward pass behind it, FSDP2 would leave the root gathered
        model.train()
        note_best(found, progress, run, cfg.keep_checkpoints)
        run.log({"step": progress.step, **found})  # last: what is in the log is done
        figures = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        run.print(f"{step_text(progress.step, total)}  {figures}")
        return found

    evaluated = run.run_on_rank0(lambda: run.last_event("val_loss").get("step") == progress.step)
    if folder and is_due(progress.step, cfg.eval_interval, stages) and not evaluated:
        results = measure()  # the run was stopped between saving and evaluating
    if progress.step >= total and not results:
        run.print(f"finished  {run.out_dir} is at step {progress.step:,} (a larger max_steps goes on)")
    hidden = run.rank > 0 or not sys.stderr.isatty()
    with (run.signals(), ThreadPoolExecutor(1) as pool,
          tqdm(total=total, initial=progress.step, unit="step", disable=hidden, leave=False) as bar):
        upcoming = pool.submit(batches_at, progress.step) if progress.step < total else None
        model.train()
        while progress.step < total:
            if stage is not stage_at(stages, progress.step):
                stage = stage_at(stages, progress.step)
                state = saved.pop("optimizer", None) or optimizer_state(model, optimizers)
                forward, optimizers = enter_stage(stages, stage, model, run)
                if not stage.begin == stage.first == progress.step:  # a new schedule starts with new state
                    load_optimizer_state(model, optimizers, state)
                del state
            batches, count, tokens, stop_signal = next_batches(upcoming, run)
            if progress.step + 1 < total:
                upcoming = pool.submit(batches_at, progress.step + 1)
            if stop_signal:
                if saved_step != progress.step:
                    meter.require_finite(progress.step)
                    save(model, optimizers, scaler, progress, run, cfg.keep_checkpoints)
                run.print(f"stopped   at step {progress.step:,}, saved; the same command goes on")
                raise SystemExit(130 if stop_signal == signal.SIGINT else 0)
            set_context(model, stages, progress.step)
            # Dropout, too, is a function of (seed, step, rank), so that nothing random has to be saved.
            torch.manual_seed(zlib.crc32(f"{cfg.seed}/{progress.step}/{run.rank}".encode()))
            rate = learning_rate_at(stage.cfg, progress.step - stage.begin, stage.end - stage.begin)
            rate *= 0.5 ** progress.rollbacks
            set_learning_rate(optimizers, rate)
            sums = backward(forward, batches, loss_fn, amp, scaler, run.world_size / max(count, 1), run)
            norm = update(model, optimizers, scaler, stage.cfg.grad_clip)
            meter.add(progress.step, sums, count, tokens, norm)
            progress.step += 1
            progress.tokens += int(tokens)
            bar.update()
            if is_due(progress.step, cfg.log_interval, stages):
                event = meter.read(progress, rate, batches[0].get("paths", batches[0]["input_ids"]).shape[1])
                run.log(event)
                run.print(log_line(event, total))
            if is_due(progress.step, cfg.save_interval, stages):
                with meter.paused():
                    meter.require_finite(progress.step)
                    save(model, optimizers, scaler, progress, run, cfg.keep_checkpoints,
                         *names_of_end(stages, progress.step))
                    saved_step = progress.step
            if is_due(progress.step, cfg.eval_interval, stages):
                results = measure()  # after saving: an evaluation that fails must not cost the run
    return results


def is_due(step: int, interval: int, stages: list[Stage]) -> bool:
    """Whether what comes every `interval` steps (0: never), and at the end of a stage, comes after `step`."""
    return any(step == stage.last for stage in stages) or (interval > 0 and step % interval == 0)


def names_of_end(stages: list[Stage], step: int) -> list[str]:
    """["stage_2"] where the second of several stages ends after `step` steps: its checkpoint then stays."""
    return [f"stage_{number}" for number, stage in enumerate(stages, 1)
            if stage.last == step and len(stages) > 1]


def next_batches(upcoming: Future, run: Run) -> tuple[list[dict], float, float, int]:
    """This rank's micro-batches, and over all ranks: units, input tokens, the signal that came to one (or 0).

    Here all ranks learn, before the step, what any of them met: a signal, or a fault of its data, which then
    all raise.
    """
    fault = upcoming.exception()  # waits for it
    batches = [] if fault else [pinned(batch, run.device) for batch in upcoming.result()]
    count, tokens, interrupted, terminated, faults = run.sum([
        sum(batch["count"] for batch in batches),
        sum(batch["input_ids"].numel() for batch in batches),
        run.stop_signal == signal.SIGINT,
        run.stop_signal == signal.SIGTERM,
        fault is not None])
    if faults:
        everyones = run.gather(fault)
        raise fault or next(filter(None, everyones))
    return batches, count, tokens, signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0


def roll_back(step: int, cfg: RunConfig, model: nn.Module, batches_at: Callable, run: Run) -> Path:
    """Write down the batch of a step that was not finite, and load the newest checkpoint; returns its folder.

    From there the run goes on at half the learning rate. UserError where there is no checkpoint, or
    cfg.max_rollbacks are used up.
    """
    batches = run.gather([{key: value.tolist() if isinstance(value, Tensor) else value
                           for key, value in batch.items()} for batch in batches_at(step)])
    dump = run.out_dir / f"not_finite_{step:06d}.json"
    run.run_on_rank0(lambda: write_json(dump, {"step": step, "batches_of_ranks": batches}))
    folder = newest_checkpoint(run)
    if folder is None or run.rollbacks >= cfg.max_rollbacks:
        raise UserError(f"the loss or its gradient was not finite in step {step:,} (its batch: {dump}); the "
                        "last checkpoint is intact. --max_rollbacks=3 goes on from it at half the learning "
                        "rate; a lower --learning_rate or --dtype=float32, in another out_dir, may help, too")
    run.rollbacks += 1
    at = checkpoint.folder_step(folder)
    run.run_on_rank0(lambda: run.truncate_log(at))
    run.log({"step": at, "rollbacks": run.rollbacks, "not_finite_step": step})
    run.print(f"rollback  {run.rollbacks}/{cfg.max_rollbacks}: step {step:,} was not finite (its batch: "
              f"{dump}); on from {folder} at {0.5 ** run.rollbacks:g} of the learning rate")
    model.load(folder)
    return folder


# ---- One step ---------------------------------------------------------------------------------------------

def backward(forward: nn.Module, batches: list[dict], loss_fn: Callable, amp: Any, scaler: Any, scale: float,
             run: Run) -> dict[str, Tensor]:
    """Accumulate the gradient of scale * (sum of the losses); returns the summed metrics.

    scale is world_size / count, because DDP and FSDP average over the ranks what has to be a sum.
    """
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        synchronize_gradients(forward, number == len(batches) - 1)  # DDP looks at it in the forward pass
        batch = to_device(batch, run.device)
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

    A gradient that is not finite anywhere changes nothing: all optimizers get the flag as `found_inf`, on the
    device, as torch's GradScaler would hand each the one of its own parameters; so nobody waits for it here.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = gather_full(nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    return norm


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch in page-locked memory, from which copies to a GPU do not block; elsewhere as it is."""
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}


# ---- The model on its devices -----------------------------------------------------------------------------

def place(model: nn.Module, cfg: RunConfig, run: Run, folder: Path | None) -> None:
    """Shard the model if asked, give a meta one its memory, and its weights, compile its blocks if asked.

    The weights are those of the checkpoint `folder`, else of cfg.init_from, else random; a model that already
    has weights keeps them unless there is a checkpoint.
    """
    blocks, on_meta = model.model["layers"], next(model.parameters()).is_meta
    if cfg.parallel == "fsdp" and run.world_size > 1:
        mesh = init_device_mesh(run.device.type, (run.world_size,))
        # Inputs are not cast, so that rotary tables stay float32.
        policy = MixedPrecisionPolicy(param_dtype=training_dtype(cfg, run), cast_forward_inputs=False,
                                      reduce_dtype=DTYPES[cfg.reduce_dtype])
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)
    if on_meta and folder is None and cfg.init_from is None:
        model.materialize(run.device, cfg.seed)
    else:
        model.to_empty(device=run.device) if on_meta else model.to(run.device)
        if folder or on_meta:
            model.load(folder or find_folder(cfg.init_from))
    model.checkpoint_activations = cfg.activation_checkpointing
    if compiles(cfg, model, run):
        for block in blocks:
            block.compile()  # in place: no wrapper, so no prefix in the parameters' names


def compiles(cfg: RunConfig, model: nn.Module, run: Run) -> bool:
    """Whether the run compiles the model's blocks: as cfg.compile says, else on a GPU where it pays.

    It costs about a minute, which is little in a run of more than 1e16 FLOPs, half a minute of a fast GPU.
    """
    T = model.config.block_size
    work = plan_stages(cfg)[-1].last * cfg.global_batch_size * T * model.flops_per_token(T)
    return cfg.compile if cfg.compile is not None else run.device.type == "cuda" and work > 1e16


def training_dtype(cfg: RunConfig, run: Run) -> torch.dtype:
    return DTYPES[cfg.dtype or ("bfloat16" if run.device.type == "cuda" else "float32")]


def set_context(model: nn.Module, stages: list[Stage], step: int) -> None:
    """Give the model the rotary positions of step `step`, where the stages change them."""
    changed, stage = set().union(*(each.changes for each in stages)), stage_at(stages, step)
    if "rope_scaling" in changed:
        model.reconfigure(rope_scaling=stage.cfg.rope_scaling)
    if "rope_theta" in changed:
        model.reconfigure(rope_theta=stage.rope_theta_at(step))


def enter_stage(stages: list[Stage], stage: Stage, model: nn.Module,
                run: Run) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Train the parameters that the stage trains; returns what to call, and its optimizers."""
    number = stages.index(stage) + 1
    if len(stages) > 1:
        changes = "  ".join(f"{key}={value}" for key, value in stage.changes.items())
        run.print(f"stage     {number}/{len(stages)}: steps {stage.first:,}-{stage.last:,}  {changes}")
    if stage.cfg.lr_multipliers:
        table = multipliers(model, stage.cfg.lr_multipliers)
        run.print(multipliers_text(table))
        run.run_on_rank0(lambda: write_json(run.out_dir / f"lr_multipliers_{number}.json", table))
    optimizers = make_optimizers(model, stage.cfg)
    if run.world_size == 1 or isinstance(model, FSDPModule):
        return model, optimizers
    # A new wrapper for each stage, because DDP looks only once at which parameters are trained.
    ids = [run.device] if run.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False), optimizers


# ---- Checkpoints ------------------------------------------------------------------------------------------

def save(model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: Any, progress: Progress, run: Run,
         keep: int, *names: str) -> None:
    """Write the checkpoint of progress.step; checkpoints.json calls it "last", and by these names as well.

    All ranks gather, rank 0 writes.
    """
    writes = run.rank == 0
    gathered = ((name, gather_full(parameter.detach())) for name, parameter in model.named_parameters())
    parameters = {name: tensor.cpu() if writes else None for name, tensor in gathered}
    state = {"progress": dataclasses.asdict(progress), "scaler": scaler.state_dict(),
             "optimizer": optimizer_state(model, optimizers, keep=writes)}

    def write(folder: Path) -> None:
        model.save_pretrained(folder, parameters, run.tokenizer.end_ids if run.tokenizer else None)
        if run.tokenizer:
            run.tokenizer.save(folder)
        (folder / "trainer").mkdir()
        torch.save(state, folder / "trainer" / "state.pt")

    def write_and_point() -> None:
        folder = checkpoint.write_checkpoint(run.out_dir, progress.step, write)
        checkpoint.update_pointers(run.out_dir, keep, **dict.fromkeys(("last", *names), folder.name))

    run.run_on_rank0(write_and_point)


def newest_checkpoint(run: Run) -> Path | None:
    """The newest one whose files are all intact. All ranks call it."""
    return run.run_on_rank0(lambda: checkpoint.newest_verified(run.out_dir, run.print))


def load_state(folder: Path | None) -> tuple[Progress, dict[str, Any]]:
    """What `save` put beside the weights: how far the run is, and the optimizers' state by parameter name."""
    if folder is None:
        return Progress(), {}
    path = folder / "trainer" / "state.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than numbers, and is not loaded: {error}") from None
    return Progress(**saved.pop("progress")), saved


def note_best(results: dict[str, float], progress: Progress, run: Run, keep: int) -> None:
    """Point "best" to this step's checkpoint, where there is one, if its val_loss is the lowest yet."""
    name, loss = f"step_{progress.step:06d}", results.get("val_loss", math.inf)
    best = checkpoint.read_pointers(run.out_dir).get("best_val_loss", math.inf)
    if run.rank == 0 and loss < best and (run.out_dir / name).is_dir():
        checkpoint.update_pointers(run.out_dir, keep, best=name, best_val_loss=loss)
