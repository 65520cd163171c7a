"""Measure models: tasks in, one table and one results.json out.

    python eval.py --model=out/sft
    python eval.py --model=out/base --compare=out/sft,out/dpo --limit=500
    python eval.py --model=out/sft --tasks=problems,calculator

Tasks (a file each in evals/): problems, the embedded ones without tools, all but the hard; calculator, all
that are arithmetic, with the calculator; hard, products of two three-digit numbers without it, and
hard_calculator with it. Writes <out_dir>/results.json, where every number has its n, standard error and
settings.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import UserError, configure, run_script
from evals import problems
from model import GPT
from parts import hf
from parts.adapters import weights_sha256
from parts.assistant import Assistant
from parts.generate import Sampling
from parts.run import pick_device
from parts.shards import write_json
from parts.tokenizer import Tokenizer

TASKS = {"problems": {}, "calculator": {"calculator": True}, "hard": {"family": "hard"},
         "hard_calculator": {"family": "hard", "calculator": True}}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: str = "out/sft"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    compare: str = ""  # further models, with commas between
    tasks: str = "problems,calculator"  # which, with commas between; all
    limit: int = 500  # questions of a task
    max_new_tokens: int = 120  # of an answer
    batch_size: int = 64  # questions answered together
    out_dir: str | None = None  # where results.json goes; None: beside the model
    device: str | None = None  # cpu, cuda, mps; None: the best there is
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights

    def __post_init__(self) -> None:
        for key in ("limit", "max_new_tokens", "batch_size"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: must be positive")
        if unknown := set(self.task_names) - TASKS.keys():
            raise UserError(f"tasks={self.tasks}: {min(unknown)!r} is none of {', '.join(TASKS)}")

    @property
    def task_names(self) -> list[str]:
        return list(TASKS) if self.tasks == "all" else self.tasks.split(",")

    @property
    def models(self) -> list[str]:
        return [self.model, *filter(None, self.compare.split(","))]


def measure(path: str, cfg: EvalConfig) -> dict[str, Any]:
    """Every task of one model: {"model", "weights_sha256", "tokens_per_second", "tasks": {name: figures}}."""
    folder = hf.find_folder(path)
    model = GPT.from_pretrained(folder, pick_device(cfg.device)).eval().to(getattr(torch, cfg.dtype))
    assistant = Assistant(model, Tokenizer.load(folder), Sampling(temperature=0), cfg.max_new_tokens)
    results, begin = {}, time.perf_counter()
    for name in cfg.task_names:
        settings = TASKS[name]
        found = problems.load(cfg.limit, **settings)
        results[name] = problems.score(assistant, found, settings.get("calculator", False), cfg.batch_size)
    seconds = time.perf_counter() - begin
    return {"model": str(folder), "weights_sha256": weights_sha256(folder),
            "parameters": model.num_parameters(), "tokens_per_second": assistant.tokens / seconds,
            "tasks": results}


def table(results: list[dict[str, Any]], names: list[str]) -> str:
    """A line a model: accuracy and standard error in each task, the share of well-formed answers, speed."""
    width = max(len(each["model"]) for each in results)
    lines = ["model".ljust(width) + "".join(f"{name:>20}" for name in names) + "   well formed    tokens/s"]
    for each in results:
        cells = "".join(f"{100 * task['accuracy']:13.1f} +-{100 * task['stderr']:3.1f} %"
                        for task in each["tasks"].values())
        formed = min(task["well_formed"] for task in each["tasks"].values())
        speed = each["tokens_per_second"]
        lines.append(f"{each['model']:{width}}{cells}{100 * formed:12.1f} %{speed:12,.0f}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    cfg, _ = configure(EvalConfig, argv, usage=__doc__)
    results = [measure(path, cfg) for path in cfg.models]
    print(table(results, cfg.task_names))
    beside = Path(cfg.model) if Path(cfg.model).is_dir() else Path(".")
    out = Path(cfg.out_dir) if cfg.out_dir else beside
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", {"settings": dataclasses.asdict(cfg), "torch": torch.__version__,
                                      "models": results})
    return 0


if __name__ == "__main__":
    run_script(main)
