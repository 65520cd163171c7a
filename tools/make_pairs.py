"""Make preference pairs from a model's own answers to the embedded problems: a right one and a wrong one.

    python -m tools.make_pairs --model=out/sft --out=data/own_pairs.jsonl
    python prepare.py --kind=preference --source=data/own_pairs.jsonl --tokenizer=out/sft --out=data/own_pairs

Samples several answers to each problem of the train split and judges them (evals/judged.py). The judged
answers stay in --cache, where verifier.py finds those that it would sample itself. A problem that the model
always or never solves makes no pair. The rejected answers are mistakes that this model makes, in its own
words, so DPO can remove them.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import configure, require_not_negative, run_script
from dataset.prompts import EMBEDDED
from evals.judged import AnswerKeys, stored_answers
from formats.files import write_text
from modeling.devices import pick_device


@dataclass(frozen=True, kw_only=True)
class PairsConfig(AnswerKeys):
    model: str = "out/sft"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    out: str = "data/own_pairs.jsonl"  # write the pairs to this file, as JSON lines
    cache: str = "data/judged"  # folder of the judged answers
    seed: int = 1337  # of the problems and the answers
    device: str | None = None  # cpu, cuda, mps; None is the best one available

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "seed")


def make_pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The pair of a judged problem's first right and first wrong answer; [] if one of them is missing."""
    # An answer in the data is one message, which cannot be cut off or malformed. Others are not used.
    usable = [answer for answer in row["answers"] for message in answer["messages"][:1]
              if message["content"] and not {"cut", "malformed", "tool_calls"} & message.keys()]
    chosen, rejected = ([answer["messages"] for answer in usable if answer["right"] == right][:1]
                        for right in (True, False))
    return [{"prompt": row["prompt"], "chosen": one, "rejected": other, "family": row["row"]["family"]}
            for one, other in zip(chosen, rejected, strict=False)]


def main(argv: list[str]) -> None:
    cfg, _ = configure(PairsConfig, argv, usage=__doc__)
    rows = stored_answers(Path(cfg.cache), cfg, cfg.model, EMBEDDED, cfg.seed, pick_device(cfg.device))
    pairs = [pair for row in rows for pair in make_pair(row)]
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(cfg.out), "".join(json.dumps(pair) + "\n" for pair in pairs))
    right = sum(answer["right"] for row in rows for answer in row["answers"])
    families = Counter(pair["family"] for pair in pairs)
    by_family = "  ".join(f"{name} {count:,}" for name, count in families.items())
    total = cfg.num_problems * cfg.num_samples
    print(f"{cfg.out}: {len(pairs):,} pairs from {cfg.num_problems:,} problems ({by_family}); "
          f"{100 * right / total:.1f} % of {total:,} answers were right", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
