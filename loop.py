"""The training loop: one `fit` for every kind of training, on one process or many.

    with start_run(cfg) as run:
        fit(cfg, model, batches_at, loss_fn, evaluate, run)

A script brings three functions. `batches_at(step)` returns this rank's micro-batches and depends on the step
alone. `loss_fn(model, batch)` returns a *sum* over the units that the batch counts, and metrics that are sums
too. `evaluate(model, last)` returns validation metrics. The loop adds sums and counts over micro-batches and
ranks, and divides once. So the gradient does not depend on the micro-batch size or on the number of ranks:

    2 ranks x 2 micro-batches with 3, 5 and 2, 6 target tokens:     loss = (sum of all 16 losses) / 16
    (the mean of four means would give the tokens of small micro-batches a larger weight)

One step is: data, forward and backward passes, clipping, update; and when they are due: log, save, evaluate.
A run can be stopped or killed at any step. The same command continues it from its newest checkpoint, and it
computes the same numbers as a run that was never stopped.

Writes out_dir/step_*/ (formats/checkpoint.py), out_dir/metrics.jsonl (training/run.py) and out_dir/loss.png
(training/curves.py). torchrun starts several processes. With parallel=ddp each has a copy of the model, with
parallel=fsdp (FSDP2, arXiv 2304.11277) a shard of it. Left out: tensor and pipeline parallelism.
"""

import dataclasses
import math
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import UserError
from formats import checkpoint
from formats.files import content_errors, write_json
from formats.hf import find_folder
from model import GPT
from modeling import moe
from modeling.devices import DTYPES, gather_full, pick_dtype, to_device
from training import curves, optim
from training.config import RunConfig
from training.metrics import Metrics, NotFinite, Progress, log_line, memory_gb, step_text
from training.run import Run, start_run
from training.stages import Stage, plan_stages, stage_at, stage_configs

__all__ = ["Run", "RunConfig", "fit", "plan_stages", "stage_at", "stage_configs", "start_run"]

# A batch has "input_ids", "count" (the units that its loss sums over) and "context" (tokens of its longest
# sequence or, if documents are masked, the mean over tokens of their documents' lengths; for the FLOPs). Its
# other keys are private to batches_at and loss_fn.
Batch = dict[str, Any]
BatchesAt = Callable[[int], list[Batch]]
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
Evaluate = Callable[[GPT, bool], dict[str, float]]

CHECKPOINT_BYTES = 12  # per parameter, at most: the weight and AdamW's two moments, 4 bytes each


class TrainState:
    """What changes while a run trains. A checkpoint saves the part that cannot be computed again."""

    def __init__(self, cfg: RunConfig, model: GPT, run: Run):
        self.cfg, self.model, self.run = cfg, model, run
        self.stages = plan_stages(cfg)
        self.total = self.stages[-1].last  # steps of the whole run
        # In a checkpoint: how far the run is, the state of the optimizers, and the loss scale below.
        self.progress = Progress()
        self.saved_optimizer: dict[str, dict[str, Any]] = {}  # the checkpoint's, until enter_stage loads it
        self.saved_step = -1  # step of the newest checkpoint; -1 before the first one
        # Not in a checkpoint: enter_stage makes these at the beginning of every stage.
        self.stage: Stage | None = None
        self.forward: nn.Module = model  # what loss_fn calls: the model, or DDP's wrapper around it
        self.optimizers: list[torch.optim.Optimizer] = []
        # Mixed precision: matrix products run in `dtype`, the weights and their updates stay in float32.
        # FSDP does that itself, since it casts the weights that it gathers.
        dtype = pick_dtype(cfg.dtype, run.device)
        autocasts = dtype != torch.float32 and not isinstance(model, FSDPModule)
        self.autocast = torch.autocast(run.device.type, dtype, enabled=autocasts)
        # float16 has a small range: the loss is scaled up, so that small gradients do not become 0, and the
        # gradients are scaled down again before the update. Without float16 the scaler does nothing.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
        self.metrics = Metrics(model, run, self.scaler)


@dataclasses.dataclass
class StepData:
    """The data of one step, and whether to stop before it."""

    batches: list[Batch]  # this rank's micro-batches
    count: float  # units over all ranks
    tokens: float  # input tokens over all ranks
    stop_signal: int  # SIGINT or SIGTERM if one has reached any rank, else 0


# ---- One step ---------------------------------------------------------------------------------------------

def prefetch(pool: ThreadPoolExecutor, batches_at: BatchesAt, step: int, total: int) -> Future:
    """Let a thread make the batches of `step`. After the last step, the Future is empty and never read."""
    return pool.submit(batches_at, step) if step < total else Future()


def next_batches(upcoming: Future, run: Run) -> StepData:
    """Wait for the batches, and exchange counts and signals with the other ranks.

    All ranks must leave before the same step: one that leaves alone lets the others wait forever. So every
    rank learns here whether a signal reached any rank. If a rank's data failed, all raise its exception.
    """
    fault = upcoming.exception()  # waits for the thread
    batches = [] if fault else upcoming.result()
    if run.device.type == "cuda":  # copies from page-locked memory do not block
        batches = [{key: value.pin_memory() if isinstance(value, Tensor) else value
                    for key, value in batch.items()} for batch in batches]
    # One exchange for everything; on a single process `run.sum` returns the numbers as they are.
    count, tokens, interrupted, terminated, faults = run.sum([
        sum(batch["count"] for batch in batches),
        sum(batch["input_ids"].numel() for batch in batches),
        run.stop_signal == signal.SIGINT,
        run.stop_signal == signal.SIGTERM,
        fault is not None])
    if faults:
        # A rank whose own data is fine raises what the first faulty rank has raised.
        everyones = run.gather(fault)
        raise fault or next(filter(None, everyones))
    stop_signal = 0
    if interrupted or terminated:
        stop_signal = signal.SIGINT if interrupted else signal.SIGTERM
    return StepData(batches, count, tokens, stop_signal)


def synchronize_gradients(forward: nn.Module, now: bool) -> None:
    """Set whether the next backward pass sums the gradients over the ranks, or leaves that to a later one."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = now
    elif isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(now)


def backward(state: TrainState, batches: list[Batch], loss_fn: LossFn, scale: float) -> dict[str, Tensor]:
    """Accumulate the gradient of scale * (sum of the losses). Returns the summed metrics, on the device."""
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        # One exchange per step, with the last micro-batch. DDP reads the flag in the forward pass already.
        synchronize_gradients(state.forward, number == len(batches) - 1)
        batch = to_device(batch, state.run.device)
        with state.autocast:
            loss, metrics = loss_fn(state.forward, batch)
        # The graph of this micro-batch is freed here: memory does not grow with the number of micro-batches.
        state.scaler.scale(loss * scale).backward()
        # No .item(): reading a number would make the CPU wait for the device.
        for name, value in metrics.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums


def update(model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler,
           clip: float) -> Tensor:
    """Clip by the global norm (0: do not clip) and step. Returns the norm before clipping, a device scalar.

    If the gradient is not finite anywhere, no parameter changes. GradScaler would decide that per optimizer;
    here one bad entry stops them all.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)  # the clipping limit is for true gradients
    norm = optim.clip_gradients(list(model.parameters()), clip)  # the same number on every rank
    optim.skip_if(optimizers, ~norm.isfinite())  # stays on the device: the CPU does not wait for it
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()  # sets gradients to None, so the next backward pass allocates instead of adding
    scaler.update()
    return norm


def follows_rollback(state: TrainState, step: int) -> bool:
    """Whether the lower rate and clip of a rollback hold in this step."""
    progress, length = state.progress, state.cfg.rollback_steps
    return progress.rollbacks > 0 and (length is None or step <= progress.bad_step + length)


def scheduled_rate(state: TrainState, step: int) -> float:
    """The learning rate of a step. Every rollback halves it."""
    # Schedule steps count from the start of the run, or of the stage that restarts the schedule.
    stage = stage_at(state.stages, step)
    rate = optim.learning_rate_at(stage.cfg, step - stage.begin, stage.end - stage.begin)
    return rate * 0.5 ** state.progress.rollbacks if follows_rollback(state, step) else rate


def train_step(state: TrainState, data: StepData, loss_fn: LossFn) -> None:
    """One optimizer step: forward and backward passes, clipping, update, metrics."""
    cfg, run, progress = state.cfg, state.run, state.progress
    stage = stage_at(state.stages, progress.step)
    set_rope(state.model, state.stages, progress.step)
    # Dropout, too, is a function of (seed, step, rank), so no random state has to be saved.
    torch.manual_seed(zlib.crc32(f"{cfg.seed}/{progress.step}/{run.rank}".encode()))
    optim.set_learning_rate(state.optimizers, scheduled_rate(state, progress.step))
    # We want the gradient of (sum of all losses) / count. DDP and FSDP average over the ranks: that divides
    # by world_size as well, so multiply by it.
    scale = run.world_size / max(data.count, 1)
    loss_scale = state.scaler.scale(torch.full((), scale, device=run.device))
    moe.begin_step(state.model, loss_scale, progress.expert_load)
    sums = backward(state, data.batches, loss_fn, scale)
    clip = stage.cfg.grad_clip
    if cfg.rollback_grad_clip is not None and follows_rollback(state, progress.step):
        clip = cfg.rollback_grad_clip
    norm = update(state.model, state.optimizers, state.scaler, clip)
    progress.expert_load, shares = moe.end_step(state.model)
    sums |= {name: share / scale for name, share in shares.items()}  # for the log, which divides by the count
    state.metrics.add(progress.step, sums, data.count, data.tokens, norm)
    progress.step += 1
    progress.tokens += int(data.tokens)


# ---- The model on its devices -----------------------------------------------------------------------------

def compiles(cfg: RunConfig, model: GPT, run: Run) -> bool:
    """Whether to compile the model's blocks: cfg.compile, or by default on a GPU if it pays.

    Compiling takes about a minute, so short runs are not compiled. The limit, 1e16 FLOPs, is 25 s at 40 % of
    an H200's peak (989 TFLOP/s), and minutes for a small model, which does not reach this speed.
    """
    if cfg.compile is not None:
        return cfg.compile
    stages = plan_stages(cfg)
    T = max(stage.cfg.block_size for stage in stages)
    work = stages[-1].last * cfg.global_batch_size * T * model.flops_per_token(T)
    return run.device.type == "cuda" and work > 1e16


def shard(model: GPT, cfg: RunConfig, run: Run) -> None:
    """Give each rank its shard of every parameter (FSDP2). A block is gathered while it computes."""
    mesh = init_device_mesh(run.device.type, (run.world_size,))  # one dimension: all ranks share the shards
    # cast_forward_inputs=False keeps the rotary tables in float32.
    policy = MixedPrecisionPolicy(pick_dtype(cfg.dtype, run.device), DTYPES[cfg.reduce_dtype],
                                  cast_forward_inputs=False)
    # Every block on its own, so that only one or two are gathered at a time; then what is left: the tables.
    for module in (*model.model["layers"].children(), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard_after_forward)


def place(model: GPT, cfg: RunConfig, run: Run, folder: Path | None) -> None:
    """Put the model on its device: shard it, give it memory and weights, compile its blocks.

    The weights come from the checkpoint `folder`. Without one, a model on the meta device gets those of
    cfg.init_from, or random weights; a model that already has weights keeps them.
    """
    on_meta = next(model.parameters()).is_meta
    if cfg.parallel == "fsdp" and run.world_size > 1:
        shard(model, cfg, run)  # on the meta device, so that no rank ever holds the full model
    source = folder or (cfg.init_from if on_meta else None)
    if on_meta and source is None:
        model.materialize(run.device, cfg.seed)
    else:
        model.to_empty(device=run.device) if on_meta else model.to(run.device)
    if source:
        model.load(folder or find_folder(source))
    model.checkpoint_activations = cfg.activation_checkpointing
    if compiles(cfg, model, run):
        for block in model.model["layers"].children():
            block.compile()  # in place: no wrapper, so no prefix in the parameters' names


def set_rope(model: GPT, stages: list[Stage], step: int) -> None:
    """Give the model the rotary positions of step `step`, if the stages change them."""
    # If one stage changes them, all stages set them: the next one has to go back to the run's own.
    changed, stage = set().union(*(each.changes for each in stages)), stage_at(stages, step)
    if "rope_scaling" in changed:
        model.reconfigure(rope_scaling=stage.cfg.rope_scaling)
    if "rope_theta" in changed:
        model.reconfigure(rope_theta=stage.rope_theta_at(step))


# ---- Stages -----------------------------------------------------------------------------------------------

def is_due(step: int, interval: int, stages: list[Stage]) -> bool:
    """Whether an action is due after `step` steps: every `interval` steps (0 is never), after every stage."""
    return any(step == stage.last for stage in stages) or (interval > 0 and step % interval == 0)


def enter_stage(state: TrainState) -> None:
    """Make the optimizers of the stage that begins or continues at this step.

    They take over the optimizer state of the stage before, unless a new schedule starts here.
    """
    model, run, stages, step = state.model, state.run, state.stages, state.progress.step
    stage = stage_at(stages, step)
    number = stages.index(stage) + 1
    if len(stages) > 1:
        changes = "  ".join(f"{key}={value}" for key, value in stage.changes.items())
        run.print(f"stage     {number}/{len(stages)}: steps {stage.first:,}-{stage.last:,}  {changes}")
    # Which parameter learns at which rate: printed in short, written down in full.
    table = optim.multipliers(model, stage.cfg.lr_multipliers)
    if set(table.values()) != {1.0}:
        run.print(optim.multipliers_text(table))
        run.run_on_rank0(lambda: write_json(run.out_dir / f"lr_multipliers_{number}.json", table))
    # After a resume the state comes from the checkpoint, else from the optimizers of the stage before.
    before = state.saved_optimizer or optim.optimizer_state(model, state.optimizers)
    state.saved_optimizer = {}
    state.stage, state.optimizers = stage, optim.make_optimizers(model, stage.cfg)
    if not stage.begin == stage.first == step:
        optim.load_optimizer_state(model, state.optimizers, before)
    # DDP looks only once at which parameters are trained, so every stage needs a new wrapper.
    if run.world_size > 1 and not isinstance(model, FSDPModule):
        ids = [run.device] if run.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 has another name for broadcast_buffers, which 2.12 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            state.forward = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


# ---- Checkpoints ------------------------------------------------------------------------------------------

def newest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint whose files are all intact. All ranks call it."""
    return run.run_on_rank0(lambda: checkpoint.newest_verified(run.out_dir, run.print))


def save_on_rank0(state: TrainState, parameters: dict[str, Tensor], trainer_state: dict[str, Any]) -> None:
    """Rank 0's part of `save`: write the folder, then point to it."""
    model, run, step = state.model, state.run, state.progress.step

    def write(folder: Path) -> None:
        model.save_pretrained(folder, parameters, run.tokenizer.end_ids if run.tokenizer else None)
        if run.tokenizer:
            run.tokenizer.save(folder)
        (folder / "trainer").mkdir()
        torch.save(trainer_state, folder / "trainer" / "state.pt")

    # The pointers move after the folder is complete: at any instant, "last" is a whole checkpoint.
    point_to(state, checkpoint.write_checkpoint(run.out_dir, step, write))


def point_to(state: TrainState, folder: Path) -> None:
    """Name the checkpoint of this step in checkpoints.json. Rank 0 calls it."""
    names = ["last", *(f"stage_{number}" for number, stage in enumerate(state.stages, 1)
                       if stage.last == state.progress.step and len(state.stages) > 1)]
    checkpoint.update_pointers(state.run.out_dir, state.cfg.keep_checkpoints,
                               **dict.fromkeys(names, folder.name))


def save(state: TrainState) -> None:
    """Write the checkpoint of this step. All ranks gather their shards, rank 0 writes.

    checkpoints.json calls it "last". If it ends the second of several stages, it is called "stage_2" as well
    and is never deleted.
    """
    model, run, step = state.model, state.run, state.progress.step
    with state.metrics.paused():
        state.metrics.require_finite(step)  # never save weights that a bad step has reached
        writes = run.rank == 0
        # A generator: one gathered tensor at a time is in the GPU's memory. Other ranks drop it.
        gathered = ((name, gather_full(parameter.detach())) for name, parameter in model.named_parameters())
        parameters: dict[str, Any] = {name: tensor.cpu() if writes else None for name, tensor in gathered}
        trainer_state = {"progress": dataclasses.asdict(state.progress), "scaler": state.scaler.state_dict(),
                         "optimizer": optim.optimizer_state(model, state.optimizers, keep=writes)}
        run.run_on_rank0(lambda: save_on_rank0(state, parameters, trainer_state))
    state.saved_step = step


def resume(cfg: RunConfig, model: GPT, run: Run, folder: Path | None, before: Progress) -> TrainState:
    """The state of the checkpoint `folder`, or of step 0 for None. The model already has the weights.

    before: the progress at a rollback, which the checkpoint does not know of.
    """
    state = TrainState(cfg, model, run)
    if folder:
        path = folder / "trainer" / "state.pt"
        with content_errors(path, "holds more than numbers, so it is not loaded"):
            saved = torch.load(path, map_location="cpu", weights_only=True)  # executes no code from the file
        state.progress, state.saved_optimizer = Progress(**saved["progress"]), saved["optimizer"]
        state.saved_step = state.progress.step
        state.scaler.load_state_dict(saved["scaler"])  # does nothing without dtype=float16
    state.progress.rollbacks = max(state.progress.rollbacks, before.rollbacks)
    state.progress.bad_step = max(state.progress.bad_step, before.bad_step)
    set_rope(model, state.stages, max(state.progress.step - 1, 0))
    # The log may be ahead of the checkpoint: those steps are computed and logged again.
    run.run_on_rank0(lambda: run.truncate_log(state.saved_step))  # -1 without a checkpoint: all of it
    if folder:
        # A kill may come between writing the folder and its pointers.
        run.run_on_rank0(lambda: point_to(state, folder))
        run.print(f"resumed   from {folder}")
    return state


def save_and_exit(state: TrainState, stop_signal: int) -> NoReturn:
    """Stop after a signal: exit code 130 for SIGINT (Ctrl-C), 0 for SIGTERM (a job's time limit)."""
    if state.saved_step != state.progress.step:
        save(state)
    state.run.print(f"stopped   at step {state.progress.step:,}, saved; the same command continues the run")
    raise SystemExit(130 if stop_signal == signal.SIGINT else 0)


def roll_back(state: TrainState, step: int, batches_at: BatchesAt) -> Path:
    """Write down the batch of a step that was not finite, and load the newest checkpoint. Returns its folder.

    From there the run continues at half the learning rate. Raises UserError if there is no checkpoint or
    cfg.max_rollbacks are used up.
    """
    cfg, run, progress = state.cfg, state.run, state.progress
    # The data is a function of the step, so the batch that broke the run can be made again.
    batches = run.gather([{key: value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
                           for key, value in batch.items()} for batch in batches_at(step)])
    dump = run.out_dir / f"not_finite_{step:06d}.json"
    run.run_on_rank0(lambda: write_json(dump, {"step": step, "batches_of_ranks": batches}))
    folder = newest_checkpoint(run)
    fault = f"the loss or its gradient was not finite in step {step:,} (its batch: {dump})"
    remedy = "A lower --learning_rate or --dtype=float32, in another out_dir, may help"
    if folder is None:
        raise UserError(f"{fault}; there is no checkpoint to return to. {remedy}")
    if progress.rollbacks >= cfg.max_rollbacks:
        raise UserError(f"{fault}; {folder} is intact. --max_rollbacks={progress.rollbacks + 3} continues "
                        f"from it at half the learning rate. {remedy} too")
    progress.rollbacks, progress.bad_step = progress.rollbacks + 1, step
    saved_step = checkpoint.folder_step(folder)
    run.run_on_rank0(lambda: run.truncate_log(saved_step))
    run.log({"step": saved_step, "rollbacks": progress.rollbacks, "not_finite_step": step})
    run.print(f"rollback  {progress.rollbacks}/{cfg.max_rollbacks}: step {step:,} was not finite (its batch: "
              f"{dump}); continues from {folder} at {0.5 ** progress.rollbacks:g} of the learning rate")
    state.model.load(folder)
    return folder


# ---- Logging and evaluation -------------------------------------------------------------------------------

def log_metrics(state: TrainState, context: float) -> None:
    """Log and print the metrics since the last log line. context: tokens per sequence, for the MFU."""
    rate = scheduled_rate(state, state.progress.step - 1)  # of the step that has just ended
    event = state.metrics.read(state.progress, rate, context)
    state.run.log(event)
    state.run.print(log_line(event, state.total, state.cfg.log_line_without))


def note_best(state: TrainState, results: dict[str, float]) -> None:
    """Point "best" to this step's checkpoint, if there is one and its val_loss is the lowest so far."""
    # eval_interval may be shorter than save_interval; an evaluation without a checkpoint cannot be the best.
    run, name, loss = state.run, f"step_{state.progress.step:06d}", results.get("val_loss", math.inf)
    # Read it from the file, because an earlier process of the same run may have made the best checkpoint.
    best = checkpoint.read_pointers(run.out_dir).get("best_val_loss", math.inf)
    if run.rank == 0 and loss < best and (run.out_dir / name).is_dir():
        checkpoint.update_pointers(run.out_dir, state.cfg.keep_checkpoints, best=name, best_val_loss=loss)


def measure(state: TrainState, evaluate: Evaluate) -> dict[str, float]:
    """Evaluate, point to this checkpoint if it is the best, log, print and draw. Returns the results."""
    model, run, step = state.model, state.run, state.progress.step
    event = {"step": step, "seconds": state.metrics.seconds(state.progress)}
    with state.metrics.paused():
        begin = time.perf_counter()
        with state.autocast, torch.no_grad():
            results = evaluate(model.eval(), step == state.total)
        if isinstance(model, FSDPModule):
            model.reshard()  # FSDP2 does that in the backward pass, which an evaluation does not have
        model.train()
        note_best(state, results)
        event |= {"eval_seconds": time.perf_counter() - begin, "memory_gb": memory_gb(run.device)}
        run.log(event | results)  # last: missed_evaluation takes a logged evaluation as finished
        text = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
        run.print(f"{step_text(step, state.total)}  {text}")
        curves.redraw(run)
    return results


def is_out_of_patience(state: TrainState) -> bool:
    """Whether the newest cfg.patience evaluations all have no lower val_loss than an earlier one."""
    def is_over() -> bool:
        losses = [event["val_loss"] for event in state.run.events() if "val_loss" in event]
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= state.cfg.patience

    return state.cfg.patience > 0 and state.run.run_on_rank0(is_over)


def note_longer_schedule(state: TrainState) -> None:
    """Print a line if a larger max_steps has stretched a decaying schedule, so that the rate rises again."""
    run, step = state.run, state.progress.step
    event = run.last_event("lr") if run.rank == 0 else {}
    if event and step < state.total and scheduled_rate(state, event["step"] - 1) > 1.000001 * event["lr"]:
        run.print(f"note      the schedule now ends at step {state.total:,}: the learning rate rises again, "
                  f"from {event['lr']:.2e} to {scheduled_rate(state, step):.2e}")


def missed_evaluation(state: TrainState) -> bool:
    """Whether the run was stopped after it saved this step and before it evaluated it."""
    run, step = state.run, state.progress.step
    if state.saved_step < 0 or not is_due(step, state.cfg.eval_interval, state.stages):
        return False
    return run.run_on_rank0(lambda: run.last_event("val_loss").get("step") != step)


# ---- The loop ---------------------------------------------------------------------------------------------

def catch_up(state: TrainState, evaluate: Evaluate) -> dict[str, float]:
    """Before the first step, do what a stopped run has missed, or print that the run is finished."""
    results: dict[str, float] = {}
    if state.total == 0 and state.saved_step < 0:  # max_steps=0: the model as it starts
        save(state)
    if missed_evaluation(state):
        results = measure(state, evaluate)
    if state.progress.step >= state.total and not results:
        state.run.print(f"finished  {state.run.out_dir} is at step {state.progress.step:,} (a larger "
                        "max_steps continues it)")
    return results


def train(state: TrainState, batches_at: BatchesAt, loss_fn: LossFn, evaluate: Evaluate) -> dict[str, float]:
    """Train from `state` to the last step. Returns the last evaluation. Raises NotFinite."""
    cfg, run, progress, stages = state.cfg, state.run, state.progress, state.stages
    results = catch_up(state, evaluate)
    is_over = is_out_of_patience(state)  # True at once if a run that stopped early is started again
    hide_bar = run.rank > 0 or not sys.stderr.isatty()
    with run.signals(), ThreadPoolExecutor(1) as pool, tqdm(
            total=state.total, initial=progress.step, unit="step", disable=hide_bar, leave=False) as bar:
        upcoming = prefetch(pool, batches_at, progress.step, state.total)
        state.model.train()
        while progress.step < state.total and not is_over:
            # Stage: each one has its own optimizers, since it may train other parameters at other rates.
            if state.stage is not stage_at(stages, progress.step):
                enter_stage(state)
            # Data: take this step's batches, and let the thread make the next ones while the device computes.
            data = next_batches(upcoming, run)
            upcoming = prefetch(pool, batches_at, progress.step + 1, state.total)
            # Signals: after Ctrl-C, or at a job's time limit, all ranks save and leave before the same step.
            if data.stop_signal:
                save_and_exit(state, data.stop_signal)
            # Learn: forward and backward passes over the micro-batches, then one optimizer step.
            train_step(state, data, loss_fn)
            bar.update()
            # Report: reading the metrics is the only time that the CPU waits for the device.
            if is_due(progress.step, cfg.log_interval, stages):
                log_metrics(state, data.batches[0]["context"])
            # Save before evaluating: an evaluation that fails must not cost the steps that led to it.
            if is_due(progress.step, cfg.save_interval, stages):
                save(state)
            if is_due(progress.step, cfg.eval_interval, stages):
                results = measure(state, evaluate)
                is_over = is_out_of_patience(state)
    if is_over and progress.step < state.total:
        if state.saved_step != progress.step:
            save(state)
        run.print(f"stopped   early, at step {progress.step:,}: no lower val_loss in {cfg.patience} "
                  "evaluations (a larger patience continues)")
    return results


def fit(cfg: RunConfig, model: GPT, batches_at: BatchesAt, loss_fn: LossFn, evaluate: Evaluate,
        run: Run) -> dict[str, float]:
    """Train `model` from its newest checkpoint, or from the start, to the last step.

    batches_at(step): this rank's micro-batches, dicts of CPU tensors with the keys of `Batch`.
    loss_fn(model, batch): (summed loss, which carries the gradient; {name: summed metric}).
    evaluate(model, last): metrics over all ranks, which all take part; "val_loss" decides which is the best.

    A model on the meta device gets its memory and weights here. Returns the last evaluation, or {} if the run
    was already finished. SIGINT and SIGTERM save and raise SystemExit (130 and 0). Raises UserError if the
    loss is not finite, after cfg.max_rollbacks attempts to continue from a checkpoint.
    """
    folder = newest_checkpoint(run)
    # A disk that is too small should stop the run now, not after hours of training.
    size = CHECKPOINT_BYTES * model.num_saved()
    run.run_on_rank0(lambda: checkpoint.require_space(run.out_dir, size))
    place(model, cfg, run, folder)
    # Once through, unless a loss is not finite: then again from the newest checkpoint, at a lower rate.
    progress = Progress()
    while True:
        state = resume(cfg, model, run, folder, progress)
        note_longer_schedule(state)
        try:
            return train(state, batches_at, loss_fn, evaluate)
        except NotFinite as fault:
            folder, progress = roll_back(state, fault.step, batches_at), state.progress
