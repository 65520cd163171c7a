"""What a run is: the keys all its kinds share, its stages, its processes, its folder and its log.

    stages = plan(cfg)                       # one, or those the config file lists
    run = start_run(cfg, given)              # joins torchrun's group, claims out_dir, refuses changed keys
    run.identify(data=sha256)                # ... and changed data
    run.print(...); run.log({"step": 10, "loss": 3.2}); run.sum([count])

Writes out_dir/run.json (the configuration) and out_dir/metrics.jsonl. loop.py does the training.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from configurator import UserError, conform, differences, override
from model import GPTConfig
from parts.checkpoint import read_pointers, remove_checkpoints, step_folders, sweep
from parts.shards import naming, write_json


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The keys of every stage. The defaults are those of the run that `python train.py` does."""

    out_dir: str = "out/base"  # checkpoints and logs go here; the same command again continues the run
    init_from: str | None = None  # model folder, out_dir or hub id to start from; None: random weights
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    seed: int = 1337  # of the weights, the order of the data, and dropout
    device: str | None = None  # cpu, cuda, cuda:1, mps; None: the best there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # computing; None: bfloat16 on cuda
    compile: bool | None = None  # torch.compile each block; None: on cuda, if the run is long enough
    parallel: Literal["none", "ddp", "fsdp"] = "ddp"  # how torchrun's processes share the work
    reshard_after_forward: bool = True  # fsdp: gather a block's weights twice a step, to save memory
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # fsdp: in which gradients travel and are summed
    activation_checkpointing: bool = False  # recompute blocks in the backward pass, to save memory
    global_batch_size: int = 16  # sequences a step, over all ranks
    micro_batch_size: int = 16  # sequences a rank puts through the model at a time
    max_steps: int = 550  # optimizer steps; where stages are listed, their sum counts instead
    learning_rate: float = 6e-3  # peak
    min_lr: float = 0.0  # at the end of the decay
    warmup_steps: int | None = None  # None: 2 % of max_steps
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "linear"  # wsd: warmup, stable, linear decay
    decay_steps: int | None = None  # of wsd; None: 30 % of max_steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, AdamW for the rest
    beta1: float = 0.9  # of AdamW, and the momentum of Muon
    beta2: float = 0.98  # of AdamW
    weight_decay: float = 0.2  # on matrices
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    lr_multipliers: dict = field(default_factory=dict)  # {regex of names: factor}, first match, 0 freezes
    stages: list = field(default_factory=list)  # [dict(steps=.. or epochs=.., key=value, ..), ..]
    eval_interval: int = 275  # steps between evaluations; 0: only at the end of a stage
    eval_tokens: int | None = None  # validation tokens of an evaluation, always the first ones; None: all
    save_interval: int = 275  # steps between checkpoints; 0: only at the end of a stage
    keep_checkpoints: int = 2  # the newest ones; the best, and those that end a stage, stay as well
    max_rollbacks: int = 0  # times to go back to a checkpoint, at half the rate, from a loss not finite
    log_interval: int = 10  # steps between log lines
    wandb: bool = False  # mirror the log to Weights & Biases
    wandb_project: str = "nanollama"  # its project
    run_name: str | None = None  # its name there; None: the name of out_dir
    overwrite: bool = False  # delete what is in out_dir and start anew

    fixed = frozenset()  # a script's own keys that no stage can change; not a key itself, as the next is none
    operational = frozenset()  # a script's own keys that may differ when a run is resumed

    def __post_init__(self) -> None:
        """UserError for a value outside its range."""
        for key in ("global_batch_size", "micro_batch_size", "max_steps", "learning_rate", "keep_checkpoints",
                    "log_interval"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: must be positive")
        for key in ("min_lr", "weight_decay", "grad_clip", "eval_interval", "save_interval", "seed",
                    "warmup_steps", "decay_steps", "eval_tokens", "max_rollbacks"):
            if getattr(self, key) is not None and getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: must not be negative")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 0 and below 1")


# These may differ when a run is resumed: they change where, how fast and how long it runs, and of what it
# computes the rounding at most (bfloat16 on a GPU); a larger max_steps stretches the schedule.
OPERATIONAL = {"device", "parallel", "micro_batch_size", "compile", "reshard_after_forward",
               "activation_checkpointing", "max_steps", "eval_interval", "save_interval", "keep_checkpoints",
               "max_rollbacks", "log_interval", "wandb", "wandb_project", "run_name", "out_dir", "overwrite"}
# What a stage may change, of the keys above and of the architecture; the keys of its own script are free.
OF_A_STAGE = {"dataset", "global_batch_size", "micro_batch_size", "learning_rate", "min_lr", "warmup_steps",
              "schedule", "decay_steps", "beta1", "beta2", "weight_decay", "grad_clip", "lr_multipliers",
              "block_size", "rope_theta", "rope_scaling"}


# ---- Stages: keys that change during a run ----------------------------------------------------------------

@dataclass(frozen=True)
class Stage:
    """Steps `first` up to, not including, `last`, under `cfg`. Its schedule spans steps `begin` to `end`."""

    cfg: Any
    changes: dict[str, Any]
    first: int
    last: int
    begin: int
    end: int

    def rope_theta_at(self, step: int) -> float:
        """The rotary base of step `step`, counted from 0 over the run; a pair moves geometrically."""
        ends = self.changes.get("rope_theta")
        if not isinstance(ends, tuple | list):
            return self.cfg.rope_theta
        # Step k of n (from 0) has start^(1 - x) end^x with x = (k + 1) / n: the stage's last step has exactly
        # `end`, where start (end / start)^x would miss it by rounding, and the next stage goes on from there.
        share = (step + 1 - self.first) / (self.last - self.first)
        return ends[0] ** (1 - share) * ends[1] ** share


def plan(cfg: Any) -> list[Stage]:
    """The stages of a run; one of max_steps where none are listed. UserError for what a stage cannot say."""
    if not cfg.stages:
        return [Stage(cfg, {}, 0, cfg.max_steps, 0, cfg.max_steps)]
    stages, begins, first = [], [0], 0
    for number, entry in enumerate(cfg.stages):
        stage_cfg, changes = stage_config(cfg, number)
        if type(entry["steps"]) is not int or not 0 < entry["steps"] < 2**63:
            raise UserError(f"stages[{number}]: steps={entry['steps']}: must be a positive whole number")
        if entry.get("restart") and first:
            begins.append(first)
        stages.append(Stage(stage_cfg, changes, first, first + entry["steps"], begins[-1], 0))
        first += entry["steps"]
    ends = [*begins[1:], first]
    return [dataclasses.replace(stage, end=ends[begins.index(stage.begin)]) for stage in stages]


def stage_configs(cfg: Any) -> list[Any]:
    """The configuration of each stage; `cfg` itself where none are listed."""
    return [stage_config(cfg, number)[0] for number in range(len(cfg.stages))] or [cfg]


def stage_config(cfg: Any, number: int) -> tuple[Any, dict[str, Any]]:
    """The configuration inside stages[number], and the keys it changes."""
    entry = cfg.stages[number]
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry) or \
            ("steps" in entry) == ("epochs" in entry):
        raise UserError(f"stages[{number}]: must be a dict with steps or epochs, as dict(steps=100, ..)")
    changes = {key: value for key, value in entry.items() if key not in ("steps", "epochs", "restart")}
    common = {each.name for schema in (RunConfig, GPTConfig) for each in dataclasses.fields(schema)}
    if fixed := (common - OF_A_STAGE | cfg.fixed) & changes.keys():
        raise UserError(f"stages[{number}]: {min(fixed)} cannot change during a run")
    if {"rope_theta", "rope_scaling"} & changes.keys() and getattr(cfg, "position", None) == "learned":
        raise UserError(f"stages[{number}]: position=learned has no rotary base to change")
    values, theta = dict(changes), changes.get("rope_theta")
    if isinstance(theta, tuple | list):
        values["rope_theta"] = ramp(theta, f"stages[{number}]")[1]
    return override(cfg, values, f"stages[{number}]"), changes


def ramp(theta: tuple | list, place: str) -> tuple[float, float]:
    """The two ends of a stage's rotary base. UserError unless they are two positive, finite numbers."""
    try:
        start, end = (conform(each, float) for each in theta)
    except (TypeError, ValueError):
        start = end = 0.0
    if min(start, end) <= 0:
        raise UserError(f"{place}: rope_theta={theta}: a ramp is two positive numbers")
    return start, end


def with_steps(cfg: Any, steps_in_epoch: Callable[[Any], float]) -> Any:
    """`cfg` with every stage's epochs turned into steps; steps_in_epoch(stage's cfg): how many one takes."""
    stages = []
    for number, entry in enumerate(cfg.stages):
        stage_cfg, _ = stage_config(cfg, number)
        if "epochs" in entry:
            if not isinstance(entry["epochs"], int | float) or not 0 < entry["epochs"] < 2**31:
                raise UserError(f"stages[{number}]: epochs={entry['epochs']}: must be a positive number")
            steps = max(1, round(entry["epochs"] * steps_in_epoch(stage_cfg)))
            entry = {key: value for key, value in entry.items() if key != "epochs"} | {"steps": steps}
        stages.append(entry)
    return dataclasses.replace(cfg, stages=stages)


def stage_at(stages: list[Stage], step: int) -> Stage:
    return next(stage for stage in stages if step < stage.last)


# ---- The run: this process's place, the folder, the log ---------------------------------------------------

@dataclass
class Run:
    """One process of a run. Only rank 0 prints, logs and writes. Leaving `with run:` gives out_dir free."""

    out_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    tokenizer: Any = None  # saved with every checkpoint
    wandb: Any = None
    lock: Any = None  # the open file whose lock says that out_dir is taken
    stop_signal: int = 0  # SIGINT or SIGTERM once one came: the loop saves and leaves after the step
    rollbacks: int = 0  # times this process went back to a checkpoint

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.lock is not None:
            self.lock.close()

    def print(self, text: str = "") -> None:
        """To stdout, above a progress bar if there is one."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl, unrounded, and mirror it to wandb."""
        if self.rank == 0:
            path = self.out_dir / "metrics.jsonl"
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            if self.wandb is not None:
                self.wandb.log({k: v for k, v in event.items() if k != "step"}, step=event["step"])

    def cut_log(self, step: int) -> None:
        """Forget the events after `step`: a resumed run makes them again."""
        path = self.out_dir / "metrics.jsonl"
        if self.rank == 0 and path.is_file():
            kept = "".join(json.dumps(event) + "\n" for event in self.events() if event["step"] <= step)
            beside = path.with_suffix(".tmp")
            with naming(path):
                beside.write_text(kept, encoding="utf-8")
                os.replace(beside, path)

    def events(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without what a kill or a power cut left of a line."""
        path, events = self.out_dir / "metrics.jsonl", []
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                events += [event] if isinstance(event, dict) and isinstance(event.get("step"), int) else []
        return events

    def last_event(self, key: str) -> dict[str, Any]:
        """The newest event of metrics.jsonl that has `key`, or {}."""
        return next((event for event in reversed(self.events()) if key in event), {})

    def sum(self, values: list[float]) -> list[float]:
        """Sum numbers over all ranks. It runs on the CPU: the accelerator is not waited for."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensors(self, tensors: list[Tensor]) -> list[float]:
        """Sum device scalars over all ranks and read them, which waits for the accelerator."""
        return self.sum(torch.stack([tensor.detach().float() for tensor in tensors]).cpu().tolist())

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, in the order of ranks. Every rank calls it."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def identify(self, cfg: Any, **identity: Any) -> None:
        """Write run.json: the configuration as the user gave it, and what else must be unchanged on resume
        (its data's hash, from which epochs follow).

        Called once all is known to be well; only here does --overwrite=True delete what was there. UserError
        where out_dir holds a run with another identity.
        """
        def compare_and_write() -> None:
            path = self.out_dir / "run.json"
            if cfg.overwrite:
                remove_checkpoints(self.out_dir)
            elif is_bound(self.out_dir):
                refuse_changes(self.out_dir, read_run(path)["identity"], identity)
            write_json(path, {"config": dataclasses.asdict(cfg), "identity": identity, "versions": {
                "python": sys.version.split()[0], "torch": torch.__version__}})

        self.on_first_rank(compare_and_write)

    def on_first_rank(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something while the others wait; all return its result, or raise its user's fault."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome = [work(), None]
            except UserError as error:
                outcome = [None, error]
            except OSError as error:  # all ranks raise it, and one of them tells
                outcome = [None, UserError(str(error))]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        result, fault = outcome
        if fault is not None:
            raise fault
        return result

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM only set `stop_signal`; the second SIGINT interrupts at once."""
        def note(received: int, frame: Any) -> None:
            if received == self.stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = received

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def start_run(cfg: Any, given: dict[str, str]) -> Run:
    """Join the process group, claim out_dir, and print what differs from the defaults.

    given: where each explicit key comes from (`configure`). Raises UserError where out_dir holds another run
    or is in use, where the device is missing, or where keys contradict each other or the number of ranks.
    """
    if cfg.stages and "max_steps" in given:
        raise UserError(f"{given['max_steps']}: max_steps is the sum of the stages' and cannot be given")
    run = Run(Path(cfg.out_dir), pick_device(cfg.device))
    if "RANK" in os.environ:  # torchrun's way to say that there may be others
        if cfg.parallel == "none" and int(os.environ["WORLD_SIZE"]) > 1:
            raise UserError(f"parallel=none: torchrun started {os.environ['WORLD_SIZE']} processes; "
                            "give ddp or fsdp")
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        run.rank, run.world_size = dist.get_rank(), dist.get_world_size()
    for stage in stage_configs(cfg):
        if stage.global_batch_size % (stage.micro_batch_size * run.world_size):
            raise UserError(f"global_batch_size={stage.global_batch_size}: must be a multiple of "
                            f"micro_batch_size x ranks = {stage.micro_batch_size} x {run.world_size}")
    if cfg.dtype == "float16" and cfg.parallel == "fsdp" and run.world_size > 1:
        raise UserError("dtype=float16: torch's scaler does not work with parallel=fsdp; use bfloat16")
    run.on_first_rank(lambda: claim_folder(cfg, run))
    if run.device.type == "cuda" and cfg.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # what little runs in float32 beside bfloat16 may use TF32
    if cfg.wandb and run.rank == 0:
        run.wandb = start_wandb(cfg)
    changed = "  ".join(f"{key}={value}" for key, value in differences(cfg).items())
    run.print(f"run       {cfg.out_dir} on {run.world_size} x {device_name(run.device)}"
              + (f"\nchanged   {changed}" if changed else ""))
    return run


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best there is; under torchrun this rank's GPU. UserError if it is missing."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or best
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: torch knows no such device") from None
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():  # all ranks see it, and one tells
            raise UserError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, this machine "
                            f"has {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= available.get(device.type, 0):
        raise UserError(f"device={device}: not on this machine ({available['cuda']} CUDA devices)")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def claim_folder(cfg: Any, run: Run) -> None:
    """Lock out_dir, and compare the run in it, if there is one, with this configuration. Rank 0 only."""
    run.out_dir.mkdir(parents=True, exist_ok=True)
    run.lock = open(run.out_dir / ".lock", "w")
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however this process ends
        sweep(run.out_dir)
        if (run.out_dir / "meta.json").exists():
            raise UserError(f"out_dir={cfg.out_dir}: holds a data set; a run needs a folder of its own")
        if not cfg.overwrite:
            read_pointers(run.out_dir)
            compare_with_before(cfg, run.out_dir)
    except BlockingIOError:
        raise UserError(f"out_dir={cfg.out_dir}: another process is training here") from None
    except BaseException:
        run.lock.close()
        raise


def compare_with_before(cfg: Any, out_dir: Path) -> None:
    """UserError if run.json holds a run that this configuration would change."""
    try:
        new = json.loads(json.dumps(dataclasses.asdict(cfg)))  # as the file will spell it
    except TypeError as error:
        raise UserError(f"the configuration cannot be written down: {error}") from None
    if is_bound(out_dir):
        # A key that is younger than the run has its default: what the run did before there was a choice.
        defaults = json.loads(json.dumps(dataclasses.asdict(type(cfg)())))
        old = defaults | read_run(out_dir / "run.json")["config"]
        shrinks = new["max_steps"] < old.get("max_steps", 0) and not cfg.stages  # max_steps may only grow
        free = (OPERATIONAL - {"max_steps"} if shrinks else OPERATIONAL) | cfg.operational
        refuse_changes(out_dir, {k: v for k, v in old.items() if k not in free},
                       {k: v for k, v in new.items() if k not in free})


def read_run(path: Path) -> dict[str, Any]:
    """run.json. UserError for one that is damaged, with the way out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content | {"config": dict(content["config"]), "identity": dict(content["identity"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); delete it to go on with the "
                        "configuration given now") from None


def is_bound(out_dir: Path) -> bool:
    """Whether out_dir holds a run that can go on: before its first checkpoint a run may still change."""
    return (out_dir / "run.json").is_file() and bool(step_folders(out_dir))


def refuse_changes(out_dir: str | Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError with every key whose value is not the one it was."""
    changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(old.keys() | new.keys())
               if old.get(key) != new.get(key)]
    if changed:
        raise UserError(f"out_dir={out_dir}: holds a run with other settings: {'; '.join(changed)} "
                        "(--out_dir= starts another run, --overwrite=True this one anew)")


def start_wandb(cfg: Any) -> Any:
    """A wandb run for rank 0. UserError with what is missing."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb=True: needs the package (pip install wandb)") from None
    try:
        return wandb.init(project=cfg.wandb_project, name=cfg.run_name or Path(cfg.out_dir).name,
                          dir=cfg.out_dir, config=dataclasses.asdict(cfg))
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"wandb=True: {reason} (WANDB_MODE=offline logs without an account)") from None
