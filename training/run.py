"""What a run is: its processes, its folder and its log. What it is told stands in training/stages.py.

    run = start_run(cfg, given)              # joins torchrun's group, claims out_dir, refuses changed keys
    run.identify(data=sha256)                # ... and changed data
    run.print(...); run.log({"step": 10, "loss": 3.2}); run.sum([count])

Writes out_dir/run.json (the configuration) and out_dir/metrics.jsonl. loop.py does the training.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from configurator import UserError, differences
from formats.checkpoint import clean_tmp, read_pointers, remove_checkpoints, step_folders
from formats.files import lock_path, path_in_errors, read_jsonl, write_json
from modeling.devices import device_name, emulates_bfloat16, pick_device
from training.stages import RESUMABLE_CHANGES, stage_configs


@dataclass
class Run:
    """One process of a run. Only rank 0 prints, logs and writes. Leaving `with run:` gives out_dir free."""

    out_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    tokenizer: Any = None  # saved with every checkpoint
    wandb: Any = None
    lock: int | None = None  # `lock_path` of out_dir, while this process holds it
    stop_signal: int = 0  # SIGINT or SIGTERM once one came: the loop saves and leaves after the step
    rollbacks: int = 0  # times this process went back to a checkpoint

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def release(self) -> None:
        """Let other processes use out_dir."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def print(self, text: str = "") -> None:
        """To stdout, above a progress bar if there is one."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to metrics.jsonl, unrounded, and mirror it to wandb."""
        if self.rank == 0:
            path = self.out_dir / "metrics.jsonl"
            with path_in_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
            if self.wandb is not None:
                self.wandb.log({k: v for k, v in event.items() if k != "step"}, step=event["step"])

    def truncate_log(self, step: int) -> None:
        """Forget the events after `step`: a resumed run makes them again."""
        path = self.out_dir / "metrics.jsonl"
        if self.rank == 0 and path.is_file():
            kept = "".join(json.dumps(event) + "\n" for event in self.events() if event["step"] <= step)
            beside = path.with_suffix(".tmp")
            with path_in_errors(path):
                beside.write_text(kept, encoding="utf-8")
                os.replace(beside, path)

    def events(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without what a kill or a power cut left of a line."""
        return [event for event in read_jsonl(self.out_dir / "metrics.jsonl")
                if isinstance(event.get("step"), int)]

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

    def write_run_json(self, cfg: Any, **identity: Any) -> None:
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

        self.run_on_rank0(compare_and_write)

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
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


def start_run(cfg: Any, provenance: dict[str, str]) -> Run:
    """Join the process group, claim out_dir, and print what differs from the defaults.

    given: where each explicit key comes from (`configure`). Raises UserError where out_dir holds another run
    or is in use, where the device is missing, or where keys contradict each other or the number of ranks.
    """
    if cfg.stages and "max_steps" in provenance:
        raise UserError(f"{provenance['max_steps']}: max_steps is the sum of the stages' and cannot be given")
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
    run.run_on_rank0(lambda: claim_folder(cfg, run))
    if run.device.type == "cuda" and cfg.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # what little runs in float32 beside bfloat16 may use TF32
    if cfg.wandb and run.rank == 0:
        run.wandb = start_wandb(cfg)
    changed = "  ".join(f"{key}={value}" for key, value in differences(cfg).items())
    run.print(f"run       {cfg.out_dir} on {run.world_size} x {device_name(run.device)}"
              + (f"\nchanged   {changed}" if changed else ""))
    if cfg.dtype == "bfloat16" and emulates_bfloat16(run.device):
        run.print("note      this CPU has no bfloat16 units: float32 is some ten times as fast")
    return run


def claim_folder(cfg: Any, run: Run) -> None:
    """Lock out_dir, and compare the run in it, if there is one, with this configuration. Rank 0 only."""
    run.out_dir.mkdir(parents=True, exist_ok=True)
    run.lock = lock_path(run.out_dir / ".lock")
    if run.lock is None:
        raise UserError(f"out_dir={cfg.out_dir}: another process is training here")
    try:
        clean_tmp(run.out_dir)
        if (run.out_dir / "meta.json").exists():
            raise UserError(f"out_dir={cfg.out_dir}: holds a data set; a run needs a folder of its own")
        if not cfg.overwrite:
            read_pointers(run.out_dir)
            compare_with_before(cfg, run.out_dir)
    except BaseException:
        run.release()
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
        free = (RESUMABLE_CHANGES - {"max_steps"} if shrinks else RESUMABLE_CHANGES) | cfg.resume_free
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
