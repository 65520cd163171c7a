"""Measure ourselves beside named peers on this machine, and print one table.

    python -m bench train --nanogpt=../nanoGPT     # an optimizer step, beside nanoGPT and transformers
    python -m bench generate --batch_size=8        # greedy tokens a second
    python -m bench loss                           # the loss head: time and memory
    python -m bench load                           # fetching a batch, opening 10 GB
    python -m bench prepare --rounds=9 --json=docs/results/bench_prepare.json
    python -m bench decontaminate --sets=FILES     # what looking for evaluation items costs it
    python -m bench base --rounds=3                # the default run, seeds 1 to 3, beside gzip and xz
    python -m bench sft                            # a step of fine-tuning, beside TRL; and dpo
    python -m bench distill                        # a step of distillation, beside TRL and full logits
    python -m bench cache                          # a cached teacher's files, beside HDF5 with gzip
    python -m bench serve --model=out/dpo          # what is exported: speed, memory, size, perplexity
    python -m bench eval --data=../data            # MMLU, beside lm-evaluation-harness
    python -m bench train --help                   # the keys of each

Arms that are timed run in turn, once a round; medians and spreads are over rounds. That both sides do the
same work is checked before anything is timed, and nothing is timed where it fails. transformers and TRL come
from requirements-dev.txt; nanoGPT is read from the folder that --nanogpt names, and left out without it.
"""

import sys
from pathlib import Path

from bench import base, cache, decontaminate, distill, eval, generate, load, loss, post, prepare, serve, train
from bench.measure import PeerConfig, versions
from configurator import UserError, configure, run_script
from formats.files import write_json

SUBJECTS = {"train": train, "generate": generate, "loss": loss, "load": load, "prepare": prepare,
            "decontaminate": decontaminate, "base": base, "sft": post, "dpo": post, "distill": distill,
            "cache": cache, "serve": serve, "eval": eval}


def main(argv: list[str]) -> int:
    """Each subject's file has Config, measure(cfg) -> figures and report(figures) -> text."""
    if not argv or argv[0] not in SUBJECTS:
        usage = f"python -m bench {'|'.join(SUBJECTS)}"
        if {"--help", "-h"} & set(argv):
            print(f"{__doc__.strip()}\n\n{usage} --key=value")
            return 0
        raise UserError(f"say what to measure: {usage}")
    subject = SUBJECTS[argv[0]]
    cfg, _ = configure(subject.Config, argv[1:], usage=subject.__doc__)
    figures = subject.measure(cfg, argv[0]) if subject is post else subject.measure(cfg)
    print(subject.report(figures))
    if cfg.json:
        machine = versions(cfg.device, cfg.threads) if isinstance(cfg, PeerConfig) else versions()
        command = f"python -m bench {' '.join(argv)}"
        write_json(Path(cfg.json), {"command": command, "versions": machine, **figures})
    return 0


if __name__ == "__main__":
    sys.argv[0] = "bench"  # what an error message begins with
    run_script(main)
