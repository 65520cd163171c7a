"""Multiple choice: ours compared with lm-evaluation-harness, on the same model, questions and prompts.

    python -m bench eval --data=../data --limit=1000                # MMLU, a random model of 11 M parameters
    python -m bench eval --data=../data --limit=300 --model=out/base \\
        --tasks=mmlu,hellaswag,arc_easy,arc_challenge,truthfulqa

--data is a folder with the files of the benchmarks (evals/tasks/ has their names). The arms take turns, each
in a process of its own. Before that, lm-evaluation-harness answers a few questions at each of --batch_sizes;
it then runs with the fastest one. Seconds are CPU time of encoding and computing, without loading packages,
model and rows. "agree" counts the questions where both sides prefer the same choice. For LAMBADA, both sides
have to agree whether greedy decoding writes the word. A question is a near tie if the best two choices are
closer than 1e-4 nats on either side; near ties are counted separately. A text that only one side scores is an
error.
"""

import functools
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness, post
from bench.measure import BenchConfig, in_turns, numbers, run_child, text_table
from configurator import UserError, require_positive
from eval import TASKS
from evals.benchmarks import read
from evals.lm import LM
from evals.tasks import truthfulqa
from formats import hf
from formats.tokenizer import Tokenizer
from model import GPT

NEAR_TIE = 1e-4  # nats between the two best choices


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    data: str = "../data"  # folder with the files of the benchmarks
    tasks: str = "mmlu"  # task names, separated by commas
    limit: int = 1000  # number of questions per task
    shots: int | None = None  # worked examples before each question; None takes the number of the task
    model: str | None = None  # model folder or out_dir; None: a random one of 11 M parameters
    block_size: int = 2048  # context length of the random model
    batch_sizes: str = "1,4,16"  # batch sizes that lm-evaluation-harness chooses from
    rounds: int = 1  # turns of each arm

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "limit", "block_size")
        numbers(self, "batch_sizes")


# ---- The arms, each in a process of its own ---------------------------------------------------------------

class TimedLM(LM):
    """Keeps the score of every choice, and the CPU seconds of encoding and computing."""

    def __init__(self, path: str):
        super().__init__(path, "cpu")
        self.scores: dict[tuple[str, str], tuple[float, bool]] = {}  # (context, text): log-prob., greedy
        self.seconds = 0.0

    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[Any]:
        begin = time.process_time()
        found = super().loglikelihood(requests)
        self.seconds += time.process_time() - begin
        self.scores |= {request: (each.log_prob, each.greedy)
                        for request, each in zip(requests, found, strict=True)}
        return found

    def answers(self, questions: Any) -> list[list[list[Any]]]:
        """[context, text, log-probability, greedy] of each choice of each question that was asked."""
        if isinstance(questions, truthfulqa.BothForms):
            questions = questions.one + questions.many
        return [[[each.shots + before, text, *self.scores[each.shots + before, text]]
                 for before, text in map(each.scored, range(len(each.choices)))] for each in questions]


def run_ours(model: str, folder: str, tasks: list[str], shots: int | None) -> dict[str, Any]:
    """Our tasks on the rows of a folder: {task: answers, seconds, and the results of the task}."""
    lm, runs = TimedLM(model), {}
    for task in tasks:
        lm.seconds, begin = 0.0, time.process_time()
        settings, module = TASKS[task].settings, TASKS[task].module
        questions = module.load(folder, 10**9, shots, **settings)
        result = module.score(lm, questions, **settings)
        seconds = {"asking": lm.seconds, "whole": time.process_time() - begin}
        runs[task] = {"answers": lm.answers(questions), "seconds": seconds,
                      "figures": {key: figure._asdict() for key, figure in result.figures.items()}}
    return runs


# ---- The comparison ---------------------------------------------------------------------------------------

def write_model(cfg: Config, folder: Path) -> None:
    """Copy the user's model, as float32 if it is a GGUF file, or write a random Llama with a tokenizer."""
    if cfg.model and (source := hf.find_folder(cfg.model)).is_dir():
        shutil.copytree(source, folder)
        return
    if cfg.model:
        GPT.from_pretrained(source).save_pretrained(folder, eos_token_id=hf.end_ids(source))
        Tokenizer.load(source).save(folder)
        return
    tokenizer = Tokenizer.train([row["question"] for row in read(cfg.data, "mmlu", "")], 8192)
    post.write_model(folder, tokenizer, n_layer=6, n_embd=320, block_size=cfg.block_size)


def measure(cfg: Config) -> dict[str, Any]:
    """Run both sides on each task: seconds, and whether they agree."""
    harness.import_package()
    names = cfg.tasks.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        few, full, model = (Path(scratch) / name for name in ("few", "full", "model"))
        few_tasks = harness.write_tasks(few, cfg.data, names, min(cfg.limit, 24), cfg.shots)
        tasks = harness.write_tasks(full, cfg.data, names, cfg.limit, cfg.shots)
        write_model(cfg, model)
        parameters = LM(str(model), "cpu").model.num_parameters()
        sizes, results = numbers(cfg, "batch_sizes"), {}
        tried = {size: run_child(harness.run, str(model), str(few), few_tasks, dict.fromkeys(names, size))
                 for size in (sizes if len(sizes) > 1 else [])}
        best = {name: min(sizes, key=lambda size, name=name: tried[size][name]["seconds"]["asking"])
                if tried else sizes[0] for name in names}
        runs = in_turns({
            "ours": functools.partial(run_child, run_ours, str(model), str(full), names, cfg.shots),
            "theirs": functools.partial(run_child, harness.run, str(model), str(full), tasks, best),
        }, cfg.rounds)
        for name in names:
            ours, theirs = (runs[side][0][name] for side in ("ours", "theirs"))
            results[name] = compare(ours["answers"], theirs["answers"]) | {
                "figures": ours["figures"], "batch_size": best[name],
                "seconds_of_few": {size: run[name]["seconds"]["asking"] for size, run in tried.items()},
                **{f"{side}_seconds": [run[name]["seconds"] for run in runs[side]] for side in runs}}
    return {"model": cfg.model or "random", "parameters": parameters, "limit": cfg.limit, "shots": cfg.shots,
            "tasks": results}


def compare(ours: list[list[list[Any]]], theirs: list[list[Any]]) -> dict[str, Any]:
    """Count the questions where both sides prefer the same choice. UserError if they score other texts.

    ours: [context, choice, log-probability, greedy] of each choice, per question. theirs: the same of all
    choices.
    """
    their_scores = {(context, choice): score for context, choice, *score in theirs}
    texts = {(context, choice) for question in ours for context, choice, *_ in question}
    if texts != their_scores.keys():
        context, choice = min(texts ^ their_scores.keys())
        raise UserError(f"only one side scores {choice!r} after {context[-80:]!r}")
    counts, largest = {"agree": 0, "differ": 0, "near_ties": 0}, 0.0
    for question in ours:
        scores = [their_scores[context, choice] for context, choice, *_ in question]
        sides = [[value for _, _, value, _ in question], [value for value, _ in scores]]
        largest = max(largest, *(abs(one - two) for one, two in zip(*sides, strict=True)))
        if len(question) == 1:
            counts["agree" if question[0][3] == scores[0][1] else "differ"] += 1
        elif any(gap(side) < NEAR_TIE for side in sides):
            counts["near_ties"] += 1
        else:
            best = [side.index(max(side)) for side in sides]
            counts["agree" if best[0] == best[1] else "differ"] += 1
    return {"questions": len(ours), "texts": len(texts), **counts, "largest_difference": largest}


def gap(values: list[float]) -> float:
    """The difference of the largest two."""
    second, first = sorted(values)[-2:]
    return first - second


def report(results: dict[str, Any]) -> str:
    """One line per task."""
    lines = []
    for name, task in results["tasks"].items():
        ours, theirs = ({key: min(run[key] for run in task[side]) for key in ("asking", "whole")}
                        for side in ("ours_seconds", "theirs_seconds"))
        lines.append([name, *(f"{task[key]:,}" for key in ("questions", "agree", "differ", "near_ties")),
                      f"{task['largest_difference']:.1e}", f"{ours['asking']:,.1f} s",
                      f"{theirs['asking']:,.1f} s", str(task["batch_size"]),
                      *(f"{theirs[key] / ours[key]:.1f} x" for key in ours)])
    headers = ["task", "questions", "agree", "differ", "near ties", "largest diff.", "ours", "lm_eval",
               "batch", "speed", "whole"]
    return (f"{text_table(headers, lines)}\n"
            f"{results['model']}, {results['parameters']:,} parameters; CPU seconds")
