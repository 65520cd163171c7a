"""Measure ourselves beside named peers on this machine, and print one table.

    python -m tools.bench train --nanogpt=../nanoGPT      # an optimizer step; also --size=124m --device=cuda
    python -m tools.bench generate --nanogpt=../nanoGPT   # greedy decoding
    python -m tools.bench loss                            # the loss head: time and memory
    python -m tools.bench load --nanogpt=../nanoGPT       # a batch from disk; opening 10 GB
    python -m tools.bench prepare                         # text -> shards, against encode_batch_fast
    python -m tools.bench base --rounds=3                 # the default run, seeds 1 to 3, beside gzip and xz

Arms run in turn, once a round, so that a machine whose speed drifts drifts for all of them; medians and
spreads are over rounds. That both sides compute the same is checked before anything is timed. --json=FILE
keeps the figures, with the command, the machine and the versions.
"""

import importlib
from pathlib import Path

import torch

from configurator import UserError, configure, run_script
from parts.shards import write_json
from tools.bench.config import BenchConfig
from tools.bench.machine import table, versions

SUBJECTS = ("train", "generate", "loss", "load", "prepare", "base")


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in SUBJECTS:
        raise UserError(f"say what to measure: python -m tools.bench {'|'.join(SUBJECTS)}")
    cfg, _ = configure(BenchConfig, argv[1:], usage=__doc__)
    torch.set_num_threads(cfg.threads)
    subject = importlib.import_module(f"tools.bench.{argv[0]}")
    result = subject.measure(cfg)
    print(subject.report(result) if hasattr(subject, "report") else table(result))
    if cfg.json:
        command = f"python -m tools.bench {' '.join(argv)}"
        write_json(Path(cfg.json), {"command": command, "versions": versions(torch.device(cfg.device)), **result})
    return 0


if __name__ == "__main__":
    run_script(main)
