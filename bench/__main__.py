"""Compare this project with named peers on this machine, and print one table.

    python -m bench train --nanogpt=../nanoGPT     # an optimizer step, compared with nanoGPT and transformers
    python -m bench generate --batch_size=8        # greedy decoding, tokens per second
    python -m bench loss                           # the loss head: time and memory
    python -m bench prepare --rounds=9 --json=docs/results/bench_prepare.json
    python -m bench base --rounds=3                # the default run with seeds 1 to 3, compared with gzip, xz
    python -m bench sft                            # a step of fine-tuning, compared with TRL; also: dpo
    python -m bench distill                        # a step of distillation, compared with TRL and full logits
    python -m bench serve --model=out/dpo          # exported files: speed, memory, size, perplexity
    python -m bench eval --data=../data            # MMLU, compared with lm-evaluation-harness
    python -m bench generated --data=../data       # generated answers, compared with lm-evaluation-harness
    python -m bench core --nanochat=../nanochat    # CORE, compared with nanochat
    python -m bench train --help                   # the keys of one subject

Arms that are timed take turns, once per round; the table shows medians and ranges over the rounds. First each
benchmark checks that both sides compute the same; it stops with an error if they do not. transformers and TRL
come from requirements-dev.txt. nanoGPT is read from the folder --nanogpt, and left out without it.
"""

import functools
import sys

from bench import base, core, distill, eval, generate, generated, loss, post, prepare, serve, train
from bench.measure import run_benchmark
from configurator import UserError, run_script

# {name: (config, measure: config -> results, report: results -> text, usage)}; the results are also the JSON.
SUBJECTS = {name.removeprefix("bench."): (module.Config, module.measure, module.report, module.__doc__)
            for module in (train, generate, loss, prepare, base, distill, serve, eval, generated, core)
            for name in [module.__name__]}
for kind in ("sft", "dpo"):
    SUBJECTS[kind] = (post.Config, functools.partial(post.measure, kind=kind), post.report, post.__doc__)


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in SUBJECTS:
        usage = f"python -m bench {'|'.join(SUBJECTS)}"
        if {"--help", "-h"} & set(argv):
            print(f"{__doc__.strip()}\n\n{usage} --key=value")
            return 0
        raise UserError(f"name what to measure: {usage}")
    config, measure, report, usage = SUBJECTS[argv[0]]
    run_benchmark(f"bench {argv[0]}", config, measure, report, argv[1:], usage)
    return 0


if __name__ == "__main__":
    sys.argv[0] = "bench"  # error messages begin with this name
    run_script(main)
