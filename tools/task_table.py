"""Fine-tune a model on tasks, and compare that with its own answers without training, in one table.

    python -m tools.task_table --model=MODEL --tasks=sst2,cola,gsm8k --data=../benchmarks --seeds=3
    python -m tools.task_table --model=MODEL --tasks=sst2 --methods=zero,lora --sft="--max_steps=100"

Methods: zero asks each question alone, few after worked examples, lora trains an adapter, full all weights.
Runs prepare.py --task, sft.py and eval.py --chat=True as processes. Each run has a folder under out_dir, so
the same command continues a table that was stopped. Writes table.md and table.json there after each task.

--data is a folder with files such as sst2_train.tsv and sst2_dev.tsv; without it the hub is read. zero and
few have one run, since their prompts are fixed. A cell is the mean over the seeds with its range, and the
standard error over the questions (the mean of the seeds'). Left out: mawps, which has no test questions.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configurator import configure, require, require_positive, run_script
from evals.benchmarks import find
from formats.files import write_json, write_text
from formats.markdown import table
from tools.arms import mean_and_range, run_arms, run_eval, run_once, run_process, split

HUB = {**{name: f"hf:nyu-mll/glue:{name}:train" for name in ("sst2", "cola", "rte")},
       "gsm8k": "hf:openai/gsm8k:main:train", "summarize": "hf:abisee/cnn_dailymail:3.0.0:train"}
METHODS = {"zero": False, "few": False, "lora": True, "full": True}  # whether they train


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    model: str = "out/sft"  # model folder, out_dir, .gguf or hub id
    tasks: str = "sst2"  # sst2, cola, rte, gsm8k, summarize, separated by commas
    methods: str = "zero,few,lora,full"  # some of these, separated by commas
    data: str = ""  # folder with the files of training and test questions; "" reads the hub
    seeds: int = 3  # training runs of lora and of full, with the seeds 1, 2, ..
    shots: int = 8  # worked examples of few
    limit: int = 500  # largest number of test questions per task
    max_tokens: int | None = None  # training tokens per task; None takes all rows
    sft: str = "--block_size=256 --max_steps=200 --optimizer=adamw --weight_decay=0"  # arguments of sft.py
    lora: str = "--lora_rank=16 --lora_alpha=32 --learning_rate=5e-4"  # more arguments of it for lora
    full: str = "--learning_rate=3e-5"  # more arguments of it for full
    out_dir: str = "out/tasks"  # all runs are written here
    threads: int | None = None  # OpenMP threads of each process; None takes every core

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "shots", "limit", "max_tokens")
        for key, known in (("tasks", HUB), ("methods", METHODS)):
            require(self, key, set(getattr(self, key).split(",")) <= set(known), f"some of {','.join(known)}")


def run_method(cfg: TableConfig, task: str, method: str, seed: int) -> dict[str, Any]:
    """The figures of a task by a method, after training if the method trains."""
    folder, model = Path(cfg.out_dir) / task / f"{method}_{seed}", cfg.model
    if METHODS[method]:
        more = cfg.lora if method == "lora" else cfg.full
        run_once("sft.py", [f"--init_from={model}", f"--dataset={folder.parent / 'data'}", f"--seed={seed}",
                            "--eval_interval=0", *split(cfg.sft), *split(more)],
                 folder, threads=cfg.threads)
        model = str(folder)
    shots = cfg.shots if method == "few" else 0
    return run_eval([f"--model={model}", f"--tasks={task}", f"--limit={cfg.limit}", f"--data={cfg.data}",
                     f"--shots={shots}", "--chat=True"], folder / "eval", cfg.threads)[task]


def prepare_task(cfg: TableConfig, task: str) -> None:
    """Tokenize the training rows of a task, unless that is done."""
    source = ",".join(map(str, find(cfg.data, f"{task}_train"))) if cfg.data else HUB[task]
    run_process("prepare.py", ["--kind=chat", f"--task={task}", f"--source={source}",
                               f"--max_tokens={cfg.max_tokens}", f"--tokenizer={cfg.model}",
                               f"--out={Path(cfg.out_dir) / task / 'data'}"])


def cell(runs: list[dict[str, Any]], key: str) -> str:
    """A figure over the seeds: the mean, the range, and the standard error over the questions."""
    if not all(key in run for run in runs):  # such as "truncated", which is there if a prompt was cut
        return "-"
    error = statistics.mean(run[key]["stderr"] for run in runs)
    return f"{mean_and_range([run[key]['value'] for run in runs])} ± {error:.3f}"


def main(argv: list[str]) -> None:
    cfg, _ = configure(TableConfig, argv, usage=__doc__)
    methods, rows, figures = cfg.methods.split(","), [], {}
    for task in cfg.tasks.split(","):
        if any(METHODS[name] for name in methods):
            prepare_task(cfg, task)
        runs = figures[task] = {}
        for name in methods:
            seeds = range(1, 1 + (cfg.seeds if METHODS[name] else 1))
            runs |= run_arms({name: partial(run_method, cfg, task, name)}, seeds)
        rows += [[task, key, figure["n"], *(cell(runs[name], key) for name in methods)]
                 for key, figure in runs[methods[0]][0].items()]
        text = table(["task", "figure", "n", *methods], rows)
        write_text(Path(cfg.out_dir) / "table.md", text + "\n")
        write_json(Path(cfg.out_dir) / "table.json", figures)
    print(text)


if __name__ == "__main__":
    run_script(main)
