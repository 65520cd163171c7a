"""CORE: ours compared with nanochat's own evaluation, on the same model and questions.

    git clone https://github.com/karpathy/nanochat ../nanochat
    python -m bench core --nanochat=../nanochat --data=eval_bundle --model=out/base --limit=12

nanochat's evaluate_example reads the rows of each file and runs the model in transformers. "same" counts the
questions that both sides find right, or both find wrong. nanochat stops at a question whose tokens do not
begin with those of its text alone; such questions are counted as "refused".
"""

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.measure import BenchConfig, text_table
from configurator import UserError, require_positive
from evals.benchmarks import benchmark_rows
from evals.likelihood import opening_id
from evals.lm import LM
from evals.tasks import core

KINDS = {"choices": "multiple_choice", "context_options": "schema", "continuation": "language_modeling"}


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    nanochat: str = "../nanochat"  # a clone of nanochat
    data: str = "eval_bundle"  # folder with the files of CORE
    model: str = "out/base"  # model folder or out_dir
    limit: int = 12  # number of questions per task

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "limit")


def import_nanochat(folder: str) -> ModuleType:
    """nanochat's file core_eval.py. UserError if the folder has none."""
    path = Path(folder, "nanochat", "core_eval.py")
    if not path.is_file():
        raise UserError(f"nanochat={folder}: no file nanochat/core_eval.py in it")
    spec = importlib.util.spec_from_file_location("core_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NanochatTokenizer:
    """A tokenizer of ours with the two methods that nanochat calls."""

    def __init__(self, lm: LM):
        self.lm = lm

    def get_bos_token_id(self) -> int:
        return opening_id(self.lm.tokenizer)

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self.lm.tokenizer.encode(text)] for text in texts]


class NanochatModel:
    """The model in transformers, called as nanochat calls its own."""

    def __init__(self, lm: LM):
        import transformers
        peer = transformers.AutoModelForCausalLM.from_pretrained(str(lm.folder), dtype=torch.float32)
        self.model = peer.eval()
        self.max_seq_len, self.vocab_size = lm.model.config.block_size, lm.tokenizer.vocab_size

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits[..., :self.vocab_size]


def their_answers(nanochat: ModuleType, lm: LM, name: str, rows: list[dict[str, Any]]) -> list[bool | None]:
    """Whether nanochat finds each row right; None if it refuses the row."""
    setting = core.SETTINGS[name]
    task = {"task_type": next(KINDS[key] for key in KINDS if key in rows[0]), "num_fewshot": setting.shots,
            "continuation_delimiter": f"{setting.before} "}
    model, tokenizer = NanochatModel(lm), NanochatTokenizer(lm)
    answers: list[bool | None] = []
    for index in range(len(rows)):
        try:
            found = nanochat.evaluate_example(index, model, tokenizer, rows, "cpu", task)
            answers.append(bool(found[0] if isinstance(found, tuple) else found))
        except AssertionError:
            answers.append(None)
    return answers


def measure(cfg: Config) -> dict[str, Any]:
    """Both sides on each task of CORE that has a file."""
    nanochat, lm, results = import_nanochat(cfg.nanochat), LM(cfg.model, "cpu"), {}
    files = {path.stem: path for path in sorted(Path(cfg.data).rglob("*.jsonl"))}
    for name, questions in core.load(cfg.data, cfg.limit, None).items():
        rows = list(benchmark_rows(files[core.SETTINGS[name].file]))
        random.Random(1337).shuffle(rows)
        ours = [answer["right"] == 1 for answer in core.score_task(lm, questions).answers]
        theirs = their_answers(nanochat, lm, name, rows[:cfg.limit])
        pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[1] is not None]
        results[name] = {"questions": len(ours), "same": sum(one == two for one, two in pairs),
                         "right": sum(ours), "refused": theirs.count(None)}
    return {"model": cfg.model, "limit": cfg.limit, "tasks": results}


def report(results: dict[str, Any]) -> str:
    """One line per task, and the sums."""
    tasks = results["tasks"]
    keys = ("questions", "same", "right", "refused")
    lines = [[name, *(str(task[key]) for key in keys)] for name, task in tasks.items()]
    return text_table(["task", *keys], [*lines, ["all", *(
        str(sum(task[key] for task in tasks.values())) for key in keys)]])
