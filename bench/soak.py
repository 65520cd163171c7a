"""Kill a training run at random moments, again and again, and compare it with a run that was never killed.

    python -m bench.soak --kills=30                    # half a minute
    python -m bench.soak --kills=1000 --json=docs/results/soak.json

A tiny run on real text saves after every step, so many kills (SIGKILL: no cleanup is possible) hit a save.
The run is restarted until it is done. It must then have the same losses, weights and optimizer state, bit for
bit, as the run that was never killed. Then the next run begins. Each start is a fork of this process, which
has already imported torch. Exit code 1 if any run differs.
"""

import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import train
from bench.measure import run_benchmark
from configurator import UserError, run_script
from formats.checkpoint import newest_verified, step_folders
from formats.files import read_jsonl
from prepare import PrepareConfig, prepare

TINY_RUN = """--n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=2 --intermediate_size=128 --block_size=64
    --global_batch_size=8 --micro_batch_size=4 --dropout=0.1 --max_steps=40 --log_interval=1 --save_interval=1
    --eval_interval=10 --eval_tokens=1024 --sample_tokens=0 --device=cpu""".split()


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    kills: int = 30  # total number of kills
    source: str = "pystdlib"  # the text, in any form that prepare.py reads
    json: str | None = None  # also write the counts to this file


def fork_train(argv: list[str], log: Path) -> int:
    """Start train.main(argv) in a fork of this process; returns the process id of the fork."""
    child = os.fork()
    if child:
        return child
    with open(log, "a", encoding="utf-8") as file:  # takes stdout and stderr
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        train.main(argv)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def kill_after(seconds: float, child: int) -> bool:
    """Kill a child after some seconds; False if it was done before. UserError if the child failed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            if status:
                raise UserError(f"a run ended with status {status}")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def outcome(out_dir: Path) -> dict[str, Any]:
    """The losses of a finished run by step, and the weights and optimizer state of its last checkpoint.

    Tensors become lists of numbers, which hold every bit of a finite number, so outcomes compare with ==.
    """
    losses = [(event["step"], event[key]) for event in read_jsonl(out_dir / "metrics.jsonl")
              for key in ("loss", "val_loss") if key in event]
    folder = newest_verified(out_dir, print)
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True)["optimizer"]
    tensors = {f"{name}.{key}": torch.as_tensor(value).tolist()
               for name, entry in state.items() for key, value in entry.items()}
    return {"losses": losses, "weights": (folder / "model.safetensors").read_bytes(), **tensors}


def soak(cfg: SoakConfig, folder: Path) -> dict[str, int]:
    """Train and kill runs until there were cfg.kills kills. UserError if a run fails to start again."""
    prepare(PrepareConfig(source=cfg.source, out=str(folder / "data"), vocab_size=500, num_proc=1,
                          max_tokens=300_000))
    argv = [*TINY_RUN, f"--dataset={folder / 'data'}"]
    begin = time.monotonic()
    kill_after(600, fork_train([*argv, f"--out_dir={folder / 'whole'}"], folder / "log"))
    span, expected = time.monotonic() - begin, outcome(folder / "whole")
    moments = random.Random(0)
    counts = {"kills": 0, "kills_inside_a_save": 0, "runs": 0, "runs_that_differ": 0}
    with tqdm(total=cfg.kills, unit="kill", disable=not sys.stderr.isatty(), leave=False) as bar:
        while counts["kills"] < cfg.kills:
            out = folder / f"run_{counts['runs']}"
            run = [*argv, f"--out_dir={out}"]
            while kill_after(moments.uniform(0, span / 2), fork_train(run, folder / "log")):
                counts["kills"] += 1
                counts["kills_inside_a_save"] += any(out.glob(".step_*.tmp"))
                bar.update()
            counts["runs"] += 1
            counts["runs_that_differ"] += outcome(out) != expected
            assert len(step_folders(out)) <= 3, "old checkpoints pile up"
    return counts


def measure(cfg: SoakConfig) -> dict[str, int]:
    """The counts of `soak`. If a run fails, prints the end of its log."""
    torch.set_num_threads(1)  # a fork does not have the OpenMP threads of its parent
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return soak(cfg, Path(scratch))
        except UserError:
            log = Path(scratch) / "log"
            print(log.read_text(encoding="utf-8")[-2000:] if log.exists() else "", file=sys.stderr)
            raise


def report(counts: dict[str, int]) -> str:
    return "   ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def main(argv: list[str]) -> int:
    counts = run_benchmark("bench.soak", SoakConfig, measure, report, argv, __doc__)
    return int(counts["runs_that_differ"] > 0)


if __name__ == "__main__":
    run_script(main)
