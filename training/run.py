"""One run: its processes, its folder and its log.

    with start_run(cfg) as run:      # joins torchrun's group, locks out_dir, refuses changed keys
        run.write_run_json(cfg, data.tokens(), data=data.hashes())     # ... and refuses changed data
        run.print("text"); run.log({"step": 10, "loss": 3.2}); run.sum([count])

Writes out_dir/run.json (the configuration) and out_dir/metrics.jsonl (the log). The log can be mirrored to
Weights & Biases and TensorBoard. The keys of the configuration are in training/config.py; the training itself
is in loop.py.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, differences, optional_import, version
from formats import hf
from formats.checkpoint import clean_tmp, read_pointers, read_run, remove_checkpoints, step_folders
from formats.files import content_errors, lock_path, path_in_errors, read_jsonl, write_json, write_text
from formats.model_card import commit
from formats.peft import is_adapter
from formats.tokenizer import Tokenizer
from modeling.devices import device_name, emulates_bfloat16, pick_device, use_threads
from training.config import RESUMABLE_CHANGES, RunConfig
from training.stages import stage_configs

ROOT = Path(__file__).resolve().parent.parent  # the folder of the code


@dataclass
class Run:
    """One process of a run. Only rank 0 prints, logs and writes. Leaving `with run:` unlocks out_dir."""

    out_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    tokenizer: Tokenizer | None = None  # saved with every checkpoint
    wandb: Any = None  # rank 0's Weights & Biases run
    writer_class: Any = None  # torch's SummaryWriter with tensorboard=True
    tensorboard: Any = None  # rank 0's SummaryWriter, from `truncate_log` on
    lock: int | None = None  # `lock_path` of out_dir, while this process holds it
    stop_signal: int = 0  # SIGINT or SIGTERM after one arrived; the loop then saves and exits
    on_end: str | None = None  # the user's command, for `run_on_end`

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any = None, error: BaseException | None = None, trace: Any = None) -> None:
        self.release()
        if self.on_end and self.rank == 0:
            self.run_on_end(error)

    def run_on_end(self, error: BaseException | None) -> None:
        """Run the user's own command, cfg.on_end, with the run's outcome in environment variables."""
        outcome = "finished"
        if error is not None:
            outcome = "stopped" if isinstance(error, SystemExit | KeyboardInterrupt) else "failed"
        values = {"OUT_DIR": self.out_dir, "OUTCOME": outcome, "ERROR": error if outcome == "failed" else "",
                  "STEP": self.last_event("step").get("step", 0),
                  "VAL_LOSS": self.last_event("val_loss").get("val_loss", "")}
        names = {f"NANOLLAMA_{name}": str(value) for name, value in values.items()}
        code = subprocess.run(str(self.on_end), shell=True, env=os.environ | names).returncode
        if code:
            self.print(f"note      on_end: the command ended with exit code {code}")

    def release(self) -> None:
        """Unlock out_dir for other processes."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def print(self, text: str = "") -> None:
        """Print to stdout, above a progress bar if there is one. Other ranks print nothing.

        If nobody reads stdout any more, the run stops as after SIGTERM.
        """
        if self.rank == 0:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # Ctrl-C also ends the reader of `| tee log`: save first, then leave
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self.stop_signal = self.stop_signal or signal.SIGTERM

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl, unrounded, and mirror it to wandb and TensorBoard."""
        if self.rank == 0:
            path = self.out_dir / "metrics.jsonl"
            with path_in_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            if self.wandb is not None:
                self.wandb.log(event)  # "step" is its x axis (start_wandb)
            if self.tensorboard is not None:
                for key, value in event.items():
                    if key != "step" and value is not None:
                        self.tensorboard.add_scalar(key, value, event["step"])
                self.tensorboard.flush()

    def truncate_log(self, step: int) -> None:
        """Delete the events after `step`, because a resumed run computes them again. Rank 0 calls it."""
        if self.writer_class is not None:  # purge_step makes TensorBoard hide what an earlier writer wrote
            self.tensorboard = self.writer_class(str(self.out_dir / "tensorboard"), purge_step=step + 1)
        path = self.out_dir / "metrics.jsonl"
        if path.is_file():
            write_text(path, "".join(json.dumps(event) + "\n" for event in self.events()
                                     if event["step"] <= step))

    def events(self) -> list[dict[str, Any]]:
        """The events of metrics.jsonl. A line that a kill or a power cut left incomplete is skipped."""
        return [event for event in read_jsonl(self.out_dir / "metrics.jsonl") if "step" in event]

    def last_event(self, key: str) -> dict[str, Any]:
        """The newest event of metrics.jsonl that has `key`, or {}."""
        return next((event for event in reversed(self.events()) if key in event), {})

    @property
    def quoted(self) -> str:
        """out_dir for a shell command."""
        return shlex.quote(str(self.out_dir))

    def next_stage(self, script: str, default: str) -> str:
        """The command that continues with this run's model. default: the script's own init_from."""
        if str(self.out_dir) == default:
            return f"python {script}"
        out_dir = shlex.quote(f"{self.out_dir}_{Path(script).stem}")
        return f"python {script} --init_from={self.quoted} --out_dir={out_dir}"

    def sum(self, values: list[float]) -> list[float]:
        """Sum numbers over all ranks, in float64 on the CPU, so that nothing waits for the accelerator."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """[rank 0's value, rank 1's value, ...]. All ranks call it."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def write_run_json(self, cfg: RunConfig, dataset_tokens: dict[str, int], **identity: Any) -> None:
        """Write run.json: the configuration as the user gave it, and what else must not change on a resume.

        dataset_tokens: training tokens per data folder, for the reader. identity: hashes of the data and of
        other models that the run reads. Raises UserError if out_dir holds a run with another identity, or if
        wandb or TensorBoard cannot start. Call it after all other checks, because it carries out
        overwrite=True.
        """
        def compare_and_write() -> None:
            old: dict[str, Any] = {}
            if can_resume(self.out_dir) and not cfg.overwrite:
                old = read_run(self.out_dir)
                # An old run lacks the hashes that were added since.
                refuse_changes(self.out_dir, identity | old["identity"], identity)
            content = {"config": dataclasses.asdict(cfg), "identity": identity, "versions": {
                "python": sys.version.split()[0], "torch": torch.__version__},
                "version": version(), "commit": commit(), "dataset_tokens": dataset_tokens}
            if cfg.tensorboard:
                self.writer_class = optional_import("torch.utils.tensorboard", "tensorboard=True",
                                                    "tensorboard").SummaryWriter
            # A resume without wandb keeps the entry, for a later one with it.
            wandb_run = old.get("wandb", {})
            if cfg.wandb:
                self.wandb = start_wandb(cfg, wandb_run)
                url = None if self.wandb.offline else self.wandb.url
                wandb_run = {"id": self.wandb.id, "url": url}
            if cfg.overwrite:
                remove_checkpoints(self.out_dir)
            write_json(self.out_dir / "run.json", content | ({"wandb": wandb_run} if wandb_run else {}))

        self.run_on_rank0(compare_and_write)

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
        """Call work() on rank 0 while the others wait. All ranks return its result or raise its UserError.

        An OSError becomes a UserError, so that all ranks raise it and the message is printed once.
        """
        result: Any = None
        fault: UserError | None = None
        if self.rank == 0:
            try:
                result = work()
            except (UserError, OSError) as error:
                fault = UserError(str(error))
        result, fault = self.gather((result, fault))[0]
        if fault is not None:
            raise fault
        return result

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM only set `stop_signal`. A second SIGINT interrupts at once."""
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


# ---- Starting a run ---------------------------------------------------------------------------------------

def can_resume(out_dir: Path) -> bool:
    """Whether out_dir holds a run with a checkpoint. Before the first checkpoint a run may still change."""
    return (out_dir / "run.json").is_file() and bool(step_folders(out_dir))


def refuse_changes(out_dir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises UserError with every key whose value has changed."""
    changed = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted(old.keys() | new.keys())
               if old.get(key) != new.get(key)]
    if changed:
        raise UserError(f"out_dir={out_dir}: holds a run with other settings: {'; '.join(changed)} "
                        "(use another --out_dir=, or --overwrite=True to start over)")


def refuse_changed_keys(cfg: RunConfig, out_dir: Path) -> None:
    """Raises UserError if out_dir holds a run that this configuration would change."""
    with content_errors("stages", "cannot be saved as JSON"):
        new = json.loads(json.dumps(dataclasses.asdict(cfg)))  # as run.json spells it: tuples become lists
    if can_resume(out_dir):
        # An old run lacks the keys that were added since. Their defaults are what it did.
        defaults = json.loads(json.dumps(dataclasses.asdict(type(cfg)())))
        old = defaults | read_run(out_dir)["config"]
        free = RESUMABLE_CHANGES | cfg.resume_free
        lists_steps = any(entry.get("steps") or entry.get("epochs") for entry in cfg.stages)
        before = old["max_steps"]
        if isinstance(before, int | float) and new["max_steps"] < before and not lists_steps:
            free = free - {"max_steps"}  # max_steps may only grow
        refuse_changes(out_dir, {k: v for k, v in old.items() if k not in free},
                       {k: v for k, v in new.items() if k not in free})


def require_own_folder(cfg: RunConfig, out_dir: Path) -> None:
    """Raises UserError if out_dir is a model or a data set, or contains a model that a new run would read.

    A new run removes checkpoints from out_dir, at the start (overwrite=True) or later (keep_checkpoints).
    """
    if (out_dir / "meta.json").exists():
        raise UserError(f"out_dir={cfg.out_dir}: holds a data set; a run needs a folder of its own")
    if can_resume(out_dir) and not cfg.overwrite:
        return  # not a new run
    if hf.is_model(out_dir):
        raise UserError(f"out_dir={cfg.out_dir}: holds a model; a run needs a folder of its own")
    for key in cfg.model_keys:
        if source := getattr(cfg, key):
            folder = hf.find_folder(source)
            for model in [folder, *([hf.base_folder(folder)] if is_adapter(folder) else [])]:
                # With symlinks resolved and unresolved: either may be deleted.
                if any(out_dir.samefile(parent) for path in (model.absolute(), model.resolve())
                       for parent in path.parents):
                    raise UserError(f"out_dir={cfg.out_dir}: holds the model of {key}={source}; "
                                    "give another --out_dir")


def claim_folder(cfg: RunConfig, run: Run) -> None:
    """Make and lock out_dir, and compare this configuration with the run in it, if there is one. Rank 0 only.

    Raises UserError if that is not possible, or if out_dir is no place for a run.
    """
    out_dir = run.out_dir
    if out_dir.resolve() in {Path("/"), Path.home().resolve(), ROOT, *ROOT.parents}:
        raise UserError(f"out_dir={out_dir}: a run needs a folder of its own, such as out/base")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file, or a place where we may not write
        raise UserError(f"out_dir={out_dir}: this folder cannot be made ({error.strerror})") from None
    run.lock = lock_path(out_dir / ".lock")
    if run.lock is None:
        raise UserError(f"out_dir={out_dir}: another process is training here")
    try:
        require_own_folder(cfg, out_dir)
        clean_tmp(out_dir)
        if not cfg.overwrite:
            read_pointers(out_dir)  # raises UserError if checkpoints.json is damaged
            refuse_changed_keys(cfg, out_dir)
    except BaseException:
        run.release()
        raise


def join_processes(cfg: RunConfig, run: Run) -> None:
    """Join the process group of torchrun, and set the run's rank and world size."""
    if cfg.parallel == "none" and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(f"parallel=none: torchrun started {os.environ['WORLD_SIZE']} processes; "
                        "use parallel=ddp or fsdp")
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    run.rank, run.world_size = dist.get_rank(), dist.get_world_size()


def check_ranks(cfg: RunConfig, run: Run) -> None:
    """Raises UserError for keys that do not fit the number of ranks."""
    for stage in stage_configs(cfg):
        if stage.global_batch_size % (stage.micro_batch_size * run.world_size):
            share, rest = divmod(stage.global_batch_size, run.world_size)
            fits = f" (--micro_batch_size={math.gcd(share, stage.micro_batch_size)} fits)" if not rest else ""
            raise UserError(f"global_batch_size={stage.global_batch_size}: must be a multiple of "
                            f"micro_batch_size x ranks = {stage.micro_batch_size} x {run.world_size}{fits}")
    if cfg.dtype == "float16" and cfg.parallel == "fsdp" and run.world_size > 1:
        raise UserError("dtype=float16: torch's scaler does not work with parallel=fsdp; use bfloat16")


def start_wandb(cfg: RunConfig, old: dict[str, Any]) -> Any:
    """Start a Weights & Biases run, or continue that of run.json: old is its {"id", "url"}.

    Raises UserError if the package or the account is missing.
    """
    wandb = optional_import("wandb", "wandb=True")
    # One run per out_dir: wandb keeps the id over restarts of this program.
    identifier = old.get("id") or secrets.token_hex(4)
    try:
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_name or Path(cfg.out_dir).name,
                         dir=cfg.out_dir, config=dataclasses.asdict(cfg), id=identifier, resume="allow")
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"wandb=True: {reason} (WANDB_MODE=offline logs without an account)") from None
    # wandb drops events whose own step counter does not grow. After a rollback ours goes back, so it is a
    # metric like the others, and the x axis of all of them.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def start_run(cfg: RunConfig) -> Run:
    """Join the process group, lock out_dir, and print which keys differ from their defaults.

    Raises UserError if out_dir is in use or holds another run, if the device is missing, or if keys
    contradict each other or the number of ranks.
    """
    run = Run(Path(cfg.out_dir), pick_device(cfg.device), on_end=cfg.on_end)
    if "RANK" in os.environ:  # set by torchrun
        join_processes(cfg, run)
    check_ranks(cfg, run)
    run.run_on_rank0(lambda: claim_folder(cfg, run))
    if run.device.type == "cuda" and cfg.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # the few float32 products of a bfloat16 run may use TF32
    note = use_threads(cfg.threads) if run.device.type == "cpu" else ""
    run.print(f"run       {cfg.out_dir} on {run.world_size} x {device_name(run.device)}")
    if changed := differences(cfg):
        run.print("changed   " + "  ".join(f"{key}={value}" for key, value in changed.items()))
    if note:
        run.print(f"note      {note}")
    if cfg.dtype == "bfloat16" and emulates_bfloat16(run.device):
        run.print("note      this CPU has no bfloat16 units: float32 is about ten times as fast")
    return run
