"""Make preference pairs from a model's own answers to the embedded problems: a right one and a wrong one.

    python -m tools.make_pairs --model=out/sft --out=data/own_pairs.jsonl
    python prepare.py --kind=preference --source=data/own_pairs.jsonl --tokenizer=out/sft --out=data/own_pairs

Samples several answers to each problem of the train split and checks them (dataset/problems.py). A problem
that the model always or never solves makes no pair. The rejected answers are mistakes that this model makes,
in its own words, so DPO can remove them.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from configurator import UserError, configure, require_positive, run_script
from dataset.problems import FAMILIES, Problem, is_right, problems, prompt_of
from formats import hf
from formats.chat_format import require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.generate import Sampling
from model import GPT
from modeling.devices import pick_device


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Sampling):
    model: str = "out/sft"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    out: str = "data/own_pairs.jsonl"  # write the pairs to this file, as JSON lines
    families: str = "add,subtract,multiply,story"  # families of problems, separated by commas
    count: int = 1000  # number of problems
    samples: int = 4  # answers per problem
    temperature: float = 1.0  # of the answers
    max_new_tokens: int = 100  # most tokens of an answer
    batch_size: int = 128  # answers that are generated together
    device: str | None = None  # cpu, cuda, mps; None is the best one available

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "count", "samples", "max_new_tokens", "batch_size")
        if unknown := set(self.families.split(",")) - FAMILIES.keys():
            raise UserError(f"families={self.families}: no family {min(unknown)!r}; there are "
                            f"{', '.join(FAMILIES)}")


def make_pair(problem: Problem, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of the file from the first right and the first wrong answer; [] if one of them is missing."""
    # A message in the data cannot be cut off or malformed, so such an answer is not used.
    usable = [message for message in answers
              if not {"cut", "malformed"} & message.keys() and message["content"]]
    chosen = [message for message in usable if is_right(problem, message)][:1]
    rejected = [message for message in usable if not is_right(problem, message)][:1]
    if not chosen or not rejected:
        return []
    return [{"prompt": prompt_of(problem), "chosen": chosen, "rejected": rejected, "family": problem.family}]


def make_pairs(cfg: PairsConfig, assistant: Assistant) -> tuple[list[dict[str, Any]], float]:
    """The rows of the file, and the share of right answers."""
    selected = list(islice(problems("train", cfg.seed, tuple(cfg.families.split(","))), cfg.count))
    work = [number for number in range(len(selected)) for _ in range(cfg.samples)]  # a problem per answer
    answers: list[list[dict[str, Any]]] = [[] for _ in selected]
    for first in range(0, len(work), cfg.batch_size):
        batch = work[first:first + cfg.batch_size]
        replies = assistant.reply([prompt_of(selected[number]) for number in batch], first=first)
        for number, reply in zip(batch, replies, strict=True):
            answers[number].append(reply[-1])
    rows, right = [], 0
    for problem, messages in zip(selected, answers, strict=True):
        rows += make_pair(problem, messages)
        right += sum(is_right(problem, message) for message in messages)
    return rows, right / len(work)


def main(argv: list[str]) -> int:
    cfg, _ = configure(PairsConfig, argv, usage=__doc__)
    folder = hf.find_folder(cfg.model)
    tokenizer = Tokenizer.load(folder)
    require_chat(tokenizer, cfg.model)
    model = GPT.from_pretrained(folder, pick_device(cfg.device)).eval()
    rows, right = make_pairs(cfg, Assistant(model, tokenizer, cfg, cfg.max_new_tokens))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    by_family = "  ".join(f"{name} {count:,}" for name, count in Counter(r["family"] for r in rows).items())
    print(f"{cfg.out}: {len(rows):,} pairs from {cfg.count:,} problems ({by_family}); {100 * right:.1f} % of "
          f"{cfg.count * cfg.samples:,} answers were right", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
