"""Measure models: tasks in, one table, results.json and results.md out.

    python eval.py --model=out/sft
    python eval.py --model=out/base --compare=out/sft,out/dpo --tasks=embedded --limit=500
    python eval.py --model=out/base --tasks=mmlu,hellaswag --data=../data --limit=1000
    python eval.py --model=out/base --tasks=all --data=../data,perplexity=book.txt

A task is a file in evals/, whose docstring shows a raw example, the prompt and where the protocol comes from.
It has two functions: load() gives its questions, score() asks a model. --data says where benchmarks lie: a
folder, and TASK=FILE for what lies elsewhere; without it they come from the Hugging Face hub. Of --tasks=all,
what cannot be run is named with the reason. Writes <out_dir>/results.json, where every number has its n,
standard error, settings, and the hashes of data and weights; the same table as results.md; what was said to
each question as answers/<task>.jsonl; pictures. All of that anew after each task, so that whatever comes
between, what is finished is there.
"""

import dataclasses
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from configurator import UserError, configure, require_positive, run_script
from evals.lm import LM
from evals.results import Figure, Result
from evals.tasks import (
    arc,
    bfcl,
    context_length,
    glue,
    gsm8k,
    hellaswag,
    mmlu,
    needle,
    open_qa,
    perplexity,
    problems,
    summarize,
    truthfulqa,
)
from formats import hf
from formats.chat_format import require_chat
from formats.files import write_bytes, write_json, write_text
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer


class Task(NamedTuple):
    """A file of evals/, and with which words its load() and score() are called."""

    module: ModuleType
    settings: dict[str, Any] = {}
    keys: tuple[str, ...] = ()  # of EvalConfig, which are further such words
    draw: Callable[[dict[str, Any]], Any] | None = None  # {model: details} -> a matplotlib Figure


TASKS = {  # in the order of "all"
    "perplexity": Task(perplexity, keys=("model", "stride")),
    "wikitext": Task(perplexity, {"wikitext": True}, keys=("model", "stride")),
    "context_length": Task(context_length, keys=("model", "context_length"), draw=context_length.draw),
    "mmlu": Task(mmlu),
    "hellaswag": Task(hellaswag),
    "arc_easy": Task(arc, {"name": "arc_easy"}),
    "arc_challenge": Task(arc, {"name": "arc_challenge"}),
    "truthfulqa": Task(truthfulqa),
    "sst2": Task(glue, {"name": "sst2"}),
    "cola": Task(glue, {"name": "cola"}),
    "rte": Task(glue, {"name": "rte"}),
    "sst2_few": Task(glue, {"name": "sst2", "few": 8}),
    "cola_few": Task(glue, {"name": "cola", "few": 8}),
    "rte_few": Task(glue, {"name": "rte", "few": 8}),

    "problems": Task(problems),
    "calculator": Task(problems, {"calculator": True}),
    "hard": Task(problems, {"family": "hard"}),
    "hard_calculator": Task(problems, {"family": "hard", "calculator": True}),

    "gsm8k": Task(gsm8k),
    "hotpotqa": Task(open_qa, {"name": "hotpotqa"}),
    "triviaqa": Task(open_qa, {"name": "triviaqa"}),
    "bfcl_simple": Task(bfcl, {"category": "simple_python"}),
    "bfcl_irrelevance": Task(bfcl, {"category": "irrelevance"}),
    "needle": Task(needle, keys=("context_length", "num_tests"), draw=needle.draw),
    "summarize": Task(summarize),
}
GROUPS = {"all": list(TASKS), "embedded": ["problems", "calculator", "hard", "hard_calculator"]}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: str = "out/sft"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    compare: str = ""  # further models, with commas between
    tasks: str = "problems,calculator"  # which, with commas between; embedded; all
    data: str = ""  # where benchmarks lie: a folder, or TASK=FILE, with commas between; else the hub
    limit: int = 500  # questions of a task; KiB of running text
    shots: int | None = None  # worked examples before each question; None: the task's own number
    chat: bool = False  # ask in the chat format
    stride: int | None = None  # perplexity: tokens by which the window moves; None: half the context
    context_length: int | None = None  # the longest: needle (None: the model's), context_length (None: twice)
    num_tests: int = 100  # needle: tests, over all lengths and depths
    batch_size: int = 64  # questions asked together
    out_dir: str | None = None  # where the results go; None: beside the model
    device: str | None = None  # cpu, cuda, mps; None: the best there is
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights

    def __post_init__(self) -> None:
        require_positive(self, "limit", "batch_size", "stride", "context_length", "num_tests")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"shots={self.shots}: must not be negative")
        for key, names in (("tasks", set(self.task_names)), ("data", set(self.places[1]))):
            if unknown := names - TASKS.keys():
                known = [*GROUPS, *TASKS] if key == "tasks" else TASKS
                raise UserError(f"{key}={getattr(self, key)}: {min(unknown)!r} is none of {', '.join(known)}")

    @property
    def task_names(self) -> list[str]:
        """Each task once, in the order of the words that name it."""
        words = self.tasks.split(",")
        return list(dict.fromkeys(name for word in words for name in GROUPS.get(word, [word])))

    @property
    def models(self) -> list[str]:
        return [self.model, *filter(None, map(str.strip, self.compare.split(",")))]

    @property
    def places(self) -> tuple[str | None, dict[str, str]]:
        """Where all benchmarks lie, and where those of some tasks do, as far as the user says."""
        words = [word for word in self.data.split(",") if word]
        pairs = dict(word.split("=", 1) for word in words if "=" in word)
        folders = [word for word in words if "=" not in word]
        if len(folders) > 1:
            raise UserError(f"data={self.data}: give one folder for all tasks, and TASK=FILE for others")
        return (folders[0] if folders else None), pairs

    def settings(self, name: str) -> dict[str, Any]:
        """The words for a task's load() and score()."""
        return TASKS[name].settings | {key: getattr(self, key) for key in TASKS[name].keys}


# ---- Measuring --------------------------------------------------------------------------------------------

def load_all(cfg: EvalConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The questions of each task; of tasks that only a group named, and that have none, why not."""
    folder, pairs = cfg.places
    questions, absent = {}, {}
    for name in cfg.task_names:
        try:
            found = TASKS[name].module.load(pairs.get(name, folder), cfg.limit, cfg.shots,
                                            **cfg.settings(name))
            if not getattr(found, "asked", found):
                raise UserError(f"{name}: there is no question in {pairs.get(name, folder)}")
            questions[name] = found
        except UserError as reason:
            if name in cfg.tasks.split(","):
                raise
            absent[name] = str(reason)
    if not questions:
        raise UserError(f"tasks={cfg.tasks}: none can be run; {next(iter(absent.values()))}")
    return questions, absent


def require_models(cfg: EvalConfig) -> None:
    """UserError for a name that stands for no model, before the others are measured for hours."""
    for path in cfg.models:
        tokenizer = Tokenizer.load(hf.find_folder(path))
        if cfg.chat:
            require_chat(tokenizer, path)


def measure(path: str, questions: dict[str, Any], cfg: EvalConfig, measured: dict[str, Any],
            finished: Callable[[str, Result], None]) -> None:
    """Fill in what is known of a model and of each task, and call finished(task, result) behind each."""
    lm = LM(path, cfg.device, cfg.dtype, cfg.chat, cfg.batch_size)
    measured |= {"model": str(lm.folder), "weights_sha256": weights_sha256(lm.folder),
                 "parameters": lm.model.num_parameters(), "tasks": {}, "not_run": {}}
    for name, asked in questions.items():
        print(f"{path}: {name}", file=sys.stderr)
        begin, tokens = time.perf_counter(), lm.tokens
        try:
            result = TASKS[name].module.score(lm, asked, **cfg.settings(name))
        except UserError as reason:
            if name in cfg.tasks.split(","):
                raise
            measured["not_run"][name] = str(reason)
            continue
        seconds = time.perf_counter() - begin
        measured["tasks"][name] = {
            "figures": {key: figure._asdict() for key, figure in result.figures.items()},
            "details": result.details, "seconds": seconds, "questions": len(result.answers),
            "tokens_written": lm.tokens - tokens}
        first = next(iter(result.figures))
        print(f"{path}: {name}  {first} {shown(result.figures[first])}  {seconds:,.1f} s", file=sys.stderr)
        finished(name, result)


def sha256(questions: Any) -> str:
    """Of what is asked, word for word."""
    return hashlib.sha256(repr(questions).encode("utf-8", "backslashreplace")).hexdigest()


# ---- The table --------------------------------------------------------------------------------------------

def table(models: list[dict[str, Any]], absent: dict[str, str]) -> list[list[str]]:
    """Cells: a row a figure of a task, a column a model; speeds last. A first row of names."""
    rows = [["task", "figure", "n", *(each["name"] for each in models)]]
    for task in TASKS:
        found = [each["tasks"].get(task, {}).get("figures", {}) for each in models]
        for key in dict.fromkeys(key for figures in found for key in figures):
            n = next(figures[key]["n"] for figures in found if key in figures)
            cells = [shown(Figure(**figures[key])) if key in figures else "-" for figures in found]
            rows.append([task, key, f"{n:,}", *cells])
        if not any(found) and (task in absent or any(task in each["not_run"] for each in models)):
            rows.append([task, "not run", "-", *("-" for _ in models)])
    for title, key in (("questions/s", "questions"), ("tokens/s", "tokens_written")):
        if any(rate(each, key)[0] for each in models):
            rows.append(["all", title, f"{rate(models[0], key)[0]:,}",
                         *(f"{rate(each, key)[1]:,.1f}" for each in models)])
    return rows


def rate(model: dict[str, Any], key: str) -> tuple[int, float]:
    """How many of something there were, and how many a second in the tasks that had some."""
    tasks = [task for task in model["tasks"].values() if task[key]]
    total = sum(task[key] for task in tasks)
    return total, total / max(sum(task["seconds"] for task in tasks), 1e-9)


def notes(models: list[dict[str, Any]], absent: dict[str, str]) -> list[str]:
    """Why a task is not in the table."""
    return [f"not run: {task}: {reason}" for task, reason in absent.items()] + [
        f"not run: {task}: {each['model']}: {reason}" for each in models
        for task, reason in each["not_run"].items()]


def shown(figure: Figure) -> str:
    return f"{figure.value:.4f} +- {figure.stderr:.4f}"


def aligned(rows: list[list[str]]) -> str:
    """Cells as a table for the terminal, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
                     for row in rows)


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


# ---- Files ------------------------------------------------------------------------------------------------

def save(out: Path, results: dict[str, Any]) -> None:
    """results.json and results.md, of what there is so far."""
    models, absent = results["models"], results["not_run"]
    lines = [f"- {line}\n" for line in notes(models, absent)]
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(table(models, absent)) + "\n" * bool(lines) + "".join(lines))


def save_answers(out: Path, task: str, answers: list[dict[str, Any]]) -> None:
    """answers/<task>.jsonl, of all models so far."""
    if answers:
        (out / "answers").mkdir(exist_ok=True)
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        write_text(out / "answers" / f"{task}.jsonl", "".join(lines))


def save_picture(out: Path, task: str, models: list[dict[str, Any]]) -> None:
    """<task>.png, of all models so far, for a task that draws."""
    details = {each["model"]: each["tasks"][task]["details"] for each in models if task in each["tasks"]}
    if TASKS[task].draw is None:
        return
    try:
        picture = TASKS[task].draw(details)
    except ImportError:
        print(f"{task}.png: not drawn, it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    picture.savefig(content := io.BytesIO(), dpi=130)
    write_bytes(out / f"{task}.png", content.getvalue())


def main(argv: list[str]) -> int:
    cfg, _ = configure(EvalConfig, argv, usage=__doc__)
    questions, absent = load_all(cfg)
    require_models(cfg)
    beside = Path(cfg.model) if Path(cfg.model).is_dir() else Path(".")
    out = Path(cfg.out_dir) if cfg.out_dir else beside
    out.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors")
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(cfg), "complete": False, "not_run": absent, "models": [],
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "data_sha256": {name: sha256(asked) for name, asked in questions.items()}}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in questions}

    def finished(name: str, result: Result) -> None:
        answers[name] += [{"model": results["models"][-1]["model"], **answer} for answer in result.answers]
        save_answers(out, name, answers[name])
        save_picture(out, name, results["models"])
        save(out, results)

    try:
        for path in cfg.models:
            results["models"].append({"name": path, "model": path, "tasks": {}, "not_run": {}})
            measure(path, questions, cfg, results["models"][-1], finished)
    except BaseException:
        if any(model["tasks"] for model in results["models"]):
            print(f"stopped; what was finished stands in {out / 'results.json'}", file=sys.stderr)
        raise
    save(out, results | {"complete": True})
    print("\n".join([aligned(table(results["models"], absent)), *notes(results["models"], absent)]))
    return 0


if __name__ == "__main__":
    run_script(main)
