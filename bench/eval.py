"""Multiple choice: ours beside lm-evaluation-harness, the same model, questions and prompts.

    python -m bench eval --data=../data --limit=1000                  # MMLU, a random model of 11 M
    python -m bench eval --data=../data --limit=300 --model=out/base \\
        --tasks=mmlu,hellaswag,arc_easy,arc_challenge,truthfulqa

--data is a folder with the benchmarks' files (evals/ has their names). Each arm is a process of its own, one
after the other; lm-evaluation-harness first with few questions at each of --batch_sizes, then with all at the
best. Seconds are CPU time of encoding and computing, without loading packages, model and rows. "agree" are
the questions with the same likeliest choice; those whose two likeliest choices are closer than 1e-4 nats on
either side are counted apart. Texts that only one side asks are an error.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.measure import BenchConfig
from configurator import UserError
from eval import TASKS
from evals.benchmarks import read
from evals.lm import LM
from formats import hf
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig

NEAR_TIE = 1e-4  # nats between the two likeliest choices


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    data: str = "../data"  # folder with the benchmarks' files
    tasks: str = "mmlu"  # which, with commas between
    limit: int = 1000  # questions of a task
    model: str | None = None  # model folder or out_dir; None: a random one of 11 M parameters
    block_size: int = 2048  # context of the random one
    batch_sizes: str = "1,4,16"  # that lm-evaluation-harness may choose from
    threads: int = 1  # of torch
    rounds: int = 1  # times each arm takes its turn

    def __post_init__(self) -> None:
        BenchConfig.__post_init__(self)
        if self.limit <= 0 or self.block_size <= 0 or self.threads <= 0:
            raise UserError("limit, block_size and threads must be positive")
        if not all(word.isdigit() and int(word) for word in self.batch_sizes.split(",")):
            raise UserError(f"batch_sizes={self.batch_sizes}: write them as 1,4,16")


# ---- What a process does ----------------------------------------------------------------------------------

def run_ours(folder: Path, model: str, task: str) -> dict[str, Any]:
    """Our task on the folder's rows."""
    lm = LM(model, "cpu")
    said, seconds, asked = [], {"asking": 0.0}, lm.loglikelihood

    def noted(requests: list[tuple[str, list[str]]]) -> list[list[Any]]:
        begin = time.process_time()
        rows = asked(requests)
        seconds["asking"] += time.process_time() - begin
        said.extend([context, choices, [each.log_prob for each in row]]
                    for (context, choices), row in zip(requests, rows, strict=True))
        return rows

    lm.loglikelihood, begin = noted, time.process_time()
    settings, module = TASKS[task].settings, TASKS[task].module
    result = module.score(lm, module.load(str(folder), 10**9, None, **settings), **settings)
    figures = {key: figure._asdict() for key, figure in result.figures.items()}
    return {"said": said, "seconds": seconds | {"whole": time.process_time() - begin}, "figures": figures}


def run_theirs(folder: Path, model: str, names: list[str], batch_size: int) -> dict[str, Any]:
    """lm-evaluation-harness on the same rows."""
    texts, seconds = harness.answers(model, folder, names, batch_size)
    return {"said": [[*text, value] for text, value in texts.items()], "seconds": seconds}


def work(argv: list[str]) -> int:
    """One arm in this process. argv: the arm, its words; the last one is the file for what it found."""
    arm, folder, model, threads, *words, out = argv
    torch.set_num_threads(int(threads))
    found = (run_ours(Path(folder), model, *words) if arm == "ours" else
             run_theirs(Path(folder), model, words[1:], int(words[0])))
    Path(out).write_text(json.dumps(found))
    return 0


def in_process(cfg: Config, folder: Path, *words: str) -> dict[str, Any]:
    """What an arm found. UserError, with what it said, for one that fails."""
    out = folder / "found.json"
    arm, *others = words
    code = "import sys; from bench.eval import work; sys.exit(work(sys.argv[1:]))"
    model, threads = str(folder / "model"), str(cfg.threads)
    ran = subprocess.run([sys.executable, "-c", code, arm, str(folder), model, threads, *others, str(out)],
                         env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"{arm}: {ran.stderr[-800:]}")
    return json.loads(out.read_text())


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Both sides on each task: seconds, and whether they say the same."""
    harness.imported()
    results, names = {}, cfg.tasks.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        few, all_of = Path(scratch) / "few", Path(scratch) / "all"
        for folder, limit in ((few, min(cfg.limit, 24)), (all_of, cfg.limit)):
            folder.mkdir()
            tasks = harness.write_tasks(folder, cfg.data, names, limit)
            write_model(cfg, folder / "model")
        parameters = LM(str(all_of / "model"), "cpu").model.num_parameters()
        for name in names:
            few_tasks = [task for task in tasks[name] if (few / "harness" / f"{task}.yaml").exists()]
            tried = {size: in_process(cfg, few, "theirs", size, *few_tasks)["seconds"]["asking"]
                     for size in cfg.batch_sizes.split(",")}
            best = min(tried, key=tried.__getitem__)
            ours, theirs = [], []
            for _ in range(cfg.rounds):
                ours.append(in_process(cfg, all_of, "ours", name))
                theirs.append(in_process(cfg, all_of, "theirs", best, *tasks[name]))
            results[name] = compare(ours[0]["said"], theirs[0]["said"]) | {
                "figures": ours[0]["figures"], "batch_size": int(best), "seconds_of_few": tried,
                "ours_seconds": [each["seconds"] for each in ours],
                "theirs_seconds": [each["seconds"] for each in theirs]}
    return {"model": cfg.model or "random", "parameters": parameters, "limit": cfg.limit, "tasks": results}


def write_model(cfg: Config, folder: Path) -> None:
    """The model that is asked: the user's, copied, or a random Llama whose tokenizer is made for English."""
    if cfg.model:
        shutil.copytree(hf.find_folder(cfg.model), folder)
        return
    text = [row["question"] for row in read(cfg.data, "mmlu", "")]
    tokenizer = Tokenizer.train(text, 8192)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=6, n_embd=320, n_head=5,
                          intermediate_size=1024, block_size=cfg.block_size))
    model.save_pretrained(folder, eos_token_id=tokenizer.eot_id)
    tokenizer.save(folder)


def compare(ours: list[tuple[str, list[str], list[float]]],
            theirs: list[tuple[str, str, float]]) -> dict[str, Any]:
    """Whether two sides prefer the same choices. UserError where they were asked different things.

    ours: (context, choices, their log-probabilities) a question. theirs: (context, choice, log-probability).
    """
    found = {(context, choice): value for context, choice, value in theirs}
    asked = {(context, choice) for context, choices, _ in ours for choice in choices}
    if asked != found.keys():
        context, choice = min(asked ^ found.keys())
        raise UserError(f"one side alone asks {choice!r} behind {context[-80:]!r}")
    counts, largest = {"agree": 0, "differ": 0, "near_ties": 0}, 0.0
    for context, choices, values in ours:
        sides = [values, [found[context, choice] for choice in choices]]
        largest = max(largest, *(abs(one - two) for one, two in zip(*sides, strict=True)))
        if any(gap(side) < NEAR_TIE for side in sides):
            counts["near_ties"] += 1
        else:
            best = [side.index(max(side)) for side in sides]
            counts["agree" if best[0] == best[1] else "differ"] += 1
    return {"questions": len(ours), "texts": len(asked), **counts, "largest_difference": largest}


def gap(values: list[float]) -> float:
    """Between the largest two."""
    second, first = sorted(values)[-2:]
    return first - second


def report(figures: dict[str, Any]) -> str:
    """A line a task."""
    lines = [f"{'task':14} {'questions':>9} {'agree':>6} {'differ':>6} {'near ties':>9} {'largest diff.':>13}"
             f" {'ours':>9} {'lm_eval':>9} {'batch':>5} {'speed':>7} {'whole':>7}"]
    for name, found in figures["tasks"].items():
        ours, theirs = ({key: min(each[key] for each in found[f"{side}_seconds"]) for key in
                         ("asking", "whole")} for side in ("ours", "theirs"))
        lines.append(f"{name:14} {found['questions']:9,} {found['agree']:6,} {found['differ']:6,} "
                     f"{found['near_ties']:9,} {found['largest_difference']:13.1e} {ours['asking']:7,.1f} s "
                     f"{theirs['asking']:7,.1f} s {found['batch_size']:5} "
                     f"{theirs['asking'] / ours['asking']:5.1f} x {theirs['whole'] / ours['whole']:5.1f} x")
    return "\n".join([*lines, f"{figures['model']}, {figures['parameters']:,} parameters; CPU seconds"])


