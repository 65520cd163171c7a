"""Kill a training run at random moments, again and again, and compare it with one that was never killed.

    python -m bench.soak --kills=30                    # half a minute
    python -m bench.soak --kills=1000 --json=docs/results/soak.json

A tiny run on real text saves after every step, so that many kills (SIGKILL: nothing can be cleaned up) hit a
save. It is started again until it is done, and must then have the losses, weights and optimizer state of the
run that was never killed, to the last bit. Then the next run begins. Each start is a fork of this process,
which has imported torch already.
"""

import json
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
from configurator import UserError, configure, run_script
from formats.checkpoint import newest_verified, step_folders
from formats.files import write_json
from prepare import PrepareConfig, prepare

TINY_RUN = """--n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=2 --intermediate_size=128 --block_size=64
    --global_batch_size=8 --micro_batch_size=4 --dropout=0.1 --max_steps=40 --log_interval=1 --save_interval=1
    --eval_interval=10 --eval_tokens=1024 --sample_tokens=0 --device=cpu""".split()


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    kills: int = 30  # times a run is killed, in all
    source: str = "pystdlib"  # the text
    optimizer: str = "muon"  # of the run
    seed: int = 0  # of the moments
    json: str | None = None  # also write the counts here


def forked(words: list[str], log: Path) -> int:
    """Start train.main(words) in a fork of this process; returns its process id."""
    child = os.fork()
    if child:
        return child
    with open(log, "a", encoding="utf-8") as file:  # the child's stdout and stderr
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        train.main(words)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def killed_after(seconds: float, child: int) -> bool:
    """Kill a child after some seconds; False if it was done before. UserError if it failed."""
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


def outcome(out_dir: Path) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """A finished run's losses by step, and the tensors of its last checkpoint's files."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [(event["step"], event[key]) for event in map(json.loads, lines)
              for key in ("loss", "val_loss") if key in event]
    folder = newest_verified(out_dir, print)
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True)["optimizer"]
    tensors = {f"{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}
    return losses, tensors | {"model.safetensors": (folder / "model.safetensors").read_bytes()}


def same(one: tuple, two: tuple) -> bool:
    """Whether two outcomes are equal to the last bit."""
    return one[0] == two[0] and one[1].keys() == two[1].keys() and all(
        torch.equal(a, two[1][key]) if isinstance(a, torch.Tensor) else a == two[1][key]
        for key, a in one[1].items())


def soak(cfg: SoakConfig, folder: Path) -> dict[str, int]:
    """Runs until cfg.kills are reached; what was counted. UserError where a run fails to start again."""
    words = [*TINY_RUN, f"--dataset={folder / 'data'}", f"--optimizer={cfg.optimizer}"]
    begin = time.monotonic()
    killed_after(600, forked([*words, f"--out_dir={folder / 'whole'}"], folder / "log"))
    span, expected = time.monotonic() - begin, outcome(folder / "whole")
    moments = random.Random(cfg.seed)
    counts = {"kills": 0, "kills_inside_a_save": 0, "runs": 0, "runs_that_differ": 0}
    with tqdm(total=cfg.kills, unit="kill", disable=not sys.stderr.isatty(), leave=False) as bar:
        while counts["kills"] < cfg.kills:
            out = folder / f"run_{counts['runs']}"
            child = forked([*words, f"--out_dir={out}"], folder / "log")
            while killed_after(moments.uniform(0, span / 2), child):
                counts["kills"] += 1
                counts["kills_inside_a_save"] += any(out.glob(".step_*.tmp"))
                bar.update()
                child = forked([*words, f"--out_dir={out}"], folder / "log")
            counts["runs"] += 1
            counts["runs_that_differ"] += not same(outcome(out), expected)
            assert len(step_folders(out)) <= 3, "old checkpoints pile up"
    return counts


def main(argv: list[str]) -> int:
    cfg, _ = configure(SoakConfig, argv, usage=__doc__)
    torch.set_num_threads(1)  # a fork does not survive the parent's OpenMP threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            prepare(PrepareConfig(source=cfg.source, out=str(folder / "data"), vocab_size=500, num_proc=1,
                                  max_tokens=300_000))
            counts = soak(cfg, folder)
        except UserError:
            print((folder / "log").read_text(encoding="utf-8")[-2000:], file=sys.stderr)
            raise
    print("   ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    if cfg.json:
        write_json(Path(cfg.json), {"command": f"python -m bench.soak {' '.join(argv)}",
                                    "torch": torch.__version__, **counts})
    return int(counts["runs_that_differ"] > 0)


if __name__ == "__main__":
    run_script(main)
