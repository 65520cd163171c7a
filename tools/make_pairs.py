"""Pairs from a model's own answers to the embedded problems: of a right and a wrong one, the right is chosen.

    python -m tools.make_pairs --model=out/sft --out=data/own_pairs.jsonl
    python prepare.py --kind=preference --source=data/own_pairs.jsonl --tokenizer=out/sft --out=data/own_pairs

Samples several answers to each problem of the train split, and scores them (dataset/problems.py). What the
model always gets right, or never, gives no pair. Such pairs hold the mistakes that the model makes, said in
its own words, which is what DPO can take away.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from configurator import UserError, configure, require_positive, run_script
from dataset.problems import FAMILIES, is_right, problems, prompt_of
from formats import hf
from formats.chat_format import require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.generate import Sampling
from model import GPT
from modeling.devices import pick_device


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Sampling):
    model: str = "out/sft"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    out: str = "data/own_pairs.jsonl"  # the pairs, as JSON lines
    families: str = "add,subtract,multiply,story"  # which problems, with commas between
    count: int = 1000  # problems
    samples: int = 4  # answers to each
    temperature: float = 1.0  # of the answers
    max_new_tokens: int = 100  # of an answer
    batch_size: int = 128  # answers written together
    device: str | None = None  # cpu, cuda, mps; None: the best there is

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "count", "samples", "max_new_tokens", "batch_size")
        if unknown := set(self.families.split(",")) - FAMILIES.keys():
            raise UserError(f"families={self.families}: {min(unknown)!r} is none of {', '.join(FAMILIES)}")


def make_pairs(cfg: PairsConfig, assistant: Assistant) -> tuple[list[dict[str, Any]], float]:
    """The rows of the file, and the share of the answers that were right."""
    asked = list(islice(problems("train", cfg.seed, tuple(cfg.families.split(","))), cfg.count))
    work = [number for number in range(len(asked)) for _ in range(cfg.samples)]
    answers: list[list[dict[str, Any]]] = [[] for _ in asked]
    for first in range(0, len(work), cfg.batch_size):
        batch = work[first:first + cfg.batch_size]
        replies = assistant.reply([prompt_of(asked[number]) for number in batch], first=first)
        for number, reply in zip(batch, replies, strict=True):
            answers[number].append(reply[-1])
    rows, right = [], 0
    for problem, given in zip(asked, answers, strict=True):
        # A cut or malformed answer cannot be written down as a message: it is no side of a pair.
        sides: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for message in given:
            right += is_right(problem, message)
            if not {"cut", "malformed"} & message.keys() and message["content"]:
                sides[is_right(problem, message)].append(message)
        for chosen, rejected in islice(zip(sides[True], sides[False], strict=False), 1):
            rows.append({"prompt": prompt_of(problem), "chosen": [chosen], "rejected": [rejected],
                         "family": problem.family})
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
    print(f"{cfg.out}: {len(rows):,} pairs of {cfg.count:,} problems ({by_family}); {100 * right:.1f} % of "
          f"{cfg.count * cfg.samples:,} answers were right", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
