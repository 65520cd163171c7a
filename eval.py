"""Measure models on benchmarks; the result is one table, results.json and results.md.

    python eval.py --model=out/sft
    python eval.py --model=out/base --compare=out/sft,out/dpo --tasks=embedded --limit=500
    python eval.py --model=out/base --tasks=mmlu,hellaswag --data=../benchmarks --limit=1000
    python eval.py --model=out/base --tasks=all --data=../benchmarks,perplexity=book.txt

Each task is a file in evals/tasks/, or a line of a table in such a file. The docstrings show raw examples,
prompts and the sources of the protocols. load() reads the questions, score() runs them on a model.

--data is a folder with the benchmarks' files; TASK=PLACE names another file or folder for one task. Without
--data the benchmarks come from the Hugging Face hub. A task of --tasks=all that cannot be run is listed with
the reason.

--target=needle:0.85,perplexity:12 sets what --model has to reach in the first figure of a task: at least
0.85, and for a perplexity at most 12. The table then has a column "target". A missed target is exit code 3.

--num_samples=8 also samples answers to questions that are answered in text, and measures votes and choices by
a --verifier (evals/votes.py): a second table and a picture of accuracy against tokens.

--reference=True adds a table of published figures (SmolLM2, Qwen3, ..) for the tasks measured.
--allow_code=True runs the programs of humaneval and mbpp, within limits that are no sandbox
(evals/tasks/code.py).

Writes to out_dir: results.json (each figure with its n and standard error, the settings, the hashes of data
and weights), results.md (the same table), answers/<task>.jsonl (one line per question and model), pictures.
All files are written again after each task, so an interrupted run keeps what is finished.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from configurator import UserError, configure, require, require_not_negative, require_positive, run_script
from evals.all_tasks import TASKS, draw, load, places_of, refuse_unknown, task_names
from evals.lm import LM
from evals.results import Figure, Result
from evals.votes import Asker, VoteSettings, add_votes, method_rows
from formats import hf
from formats.chat_format import end_of_turn, require_chat
from formats.files import write_bytes, write_json, write_text
from formats.markdown import table
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from generation.constraints import ConstraintKeys
from generation.verifier import Verifier, find_verifier
from modeling.devices import open_device

REFERENCE = Path(__file__).parent / "docs/results/reference.json"  # published figures, with their sources


@dataclass(frozen=True, kw_only=True)
class EvalConfig(VoteSettings, ConstraintKeys):
    model: str = "out/sft"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    compare: str = ""  # more models to measure, separated by commas
    tasks: str = "problems,calculator"  # tasks, separated by commas; "embedded" and "all" are groups
    data: str = ""  # folder with the benchmarks' files, and TASK=PLACE, separated by commas; "" reads the hub
    limit: int = 500  # largest number of questions per task; KiB of text for perplexity and context_length
    target: str = ""  # TASK:VALUE, separated by commas; if --model misses one, the exit code is 3
    shots: int | None = None  # worked examples before each question; None takes the number of the task
    chat: bool = False  # put each question in the model's chat format
    stride: int | None = None  # perplexity: tokens between two windows; None is half the context
    context_length: int | None = None  # longest prompt (needle) or row (context_length); None fits the model
    sinks: int = 0  # context_length: first tokens that stay in a small cache, such as 4 (modeling/sinks.py)
    window: int | None = None  # context_length: last tokens in that cache; None fills the context
    num_tests: int = 100  # needle: number of tests over all lengths and depths
    reference: bool = False  # also print the published figures of known models (docs/results/reference.json)
    allow_code: bool = False  # run the programs that a model writes, within limits that are no sandbox
    classifier: str = ""  # toxicity: folder of transformers' text classification; "" looks for listed words
    judge: str = ""  # mt_bench: the model that compares answers: a model folder, or the address of an API
    judge_model: str = ""  # mt_bench: the judge's name, for an API
    opponent: str = ""  # mt_bench: the model whose answers are compared with those of --model
    batch_size: int = 64  # prompts that are generated together
    out_dir: str | None = None  # folder for the results; None is the model's folder
    device: str | None = None  # cpu, cuda, mps; None picks the best one of this machine
    threads: int | None = None  # CPU threads; None takes every core the process may use
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples and (self.constrain or self.json_schema):
            raise UserError("num_samples does not work with constrain or json_schema")
        require_positive(self, "limit", "batch_size", "stride", "context_length", "num_tests", "window")
        for key, most in (("limit", 100_000), ("batch_size", 2**14), ("context_length", 2**20),
                          ("num_tests", 100_000)):
            require(self, key, (getattr(self, key) or 0) <= most, f"at most {most:,}")
        require_not_negative(self, "shots", "sinks")
        if (self.sinks or self.window is not None) and set(self.task_names) != {"context_length"}:
            raise UserError("sinks and window only work with --tasks=context_length")
        places_of("data", self.data)  # raises UserError
        refuse_unknown("target", self.target, list(self.targets), list(TASKS))
        if unmeasured := [name for name in self.targets if name not in self.task_names]:
            raise UserError(f"target={self.target}: {unmeasured[0]} is not in tasks={self.tasks}")

    @property
    def task_names(self) -> list[str]:
        """The tasks, each once, in the order in which --tasks names them."""
        return task_names("tasks", self.tasks)

    @property
    def models(self) -> list[str]:
        return [self.model, *filter(None, map(str.strip, self.compare.split(",")))]

    @property
    def targets(self) -> dict[str, float]:
        """--target as {task: value}."""
        targets: dict[str, float] = {}
        for part in filter(None, self.target.split(",")):
            name, _, text = part.partition(":")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            # All first figures that rise are shares of right answers, or a correlation.
            highest = 1 if name in TASKS and not TASKS[name].falls else math.inf
            if name in targets or not math.isfinite(value) or value > highest:
                raise UserError(f"target={self.target}: {part!r} must be TASK:VALUE, each task once; a share "
                                "of right answers is at most 1")
            targets[name] = value
        return targets

    def arguments(self, name: str) -> dict[str, Any]:
        """The keys that are arguments of a task's load() and score()."""
        # The table of tasks lists them, so a new key of one task does not concern the others.
        return {key: getattr(self, key) for key in TASKS[name].keys}


# ---- Questions --------------------------------------------------------------------------------------------

def load_all(cfg: EvalConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the questions of every task before any model is measured: ({task: questions}, {task: reason}).

    A task that has no questions is left out with the reason if a group brought it in. Raises UserError if the
    user named it, or if no task is left.
    """
    places, loaded, absent = places_of("data", cfg.data), {}, {}
    # A group such as "all" may bring in tasks whose files are not there; a task that was named must run.
    for name in cfg.task_names:
        try:
            loaded[name] = load(name, places[name], cfg.limit, cfg.shots, **cfg.arguments(name))
        except UserError as reason:
            if name in cfg.tasks.split(","):  # named by the user, not by a group
                raise
            absent[name] = str(reason)
    if not loaded:
        raise UserError(f"tasks={cfg.tasks}: none can be run; {next(iter(absent.values()))}")
    return loaded, absent


def require_models(cfg: EvalConfig) -> None:
    """Raises UserError for a model that cannot be loaded, before the others are measured for hours."""
    mt_bench = [cfg.opponent, cfg.judge] if "mt_bench" in cfg.task_names else []
    helpers = [path for path in mt_bench if path and not path.startswith(("http://", "https://"))]
    for path in cfg.models + helpers:
        tokenizer = Tokenizer.load(hf.find_folder(path))  # downloads a hub id; the weights stay on disk
        if cfg.chat and path in cfg.models:
            require_chat(tokenizer, path)
    if cfg.verifier:
        find_verifier(cfg.verifier)


# ---- Measuring --------------------------------------------------------------------------------------------

def measure(path: str, questions: dict[str, Any], cfg: EvalConfig,
            measured: dict[str, Any]) -> Iterator[tuple[str, Result]]:
    """Measure a model task by task, filling in `measured`; yields (task, result) after each task."""
    lm = LM(path, cfg.device, cfg.dtype, cfg.chat, cfg.batch_size, cfg)
    verifier = None  # it scores conversations, so models without chat tokens are measured without it
    if cfg.verifier and end_of_turn(lm.tokenizer) is None:
        print(f"{path}: without chat tokens, so the verifier does not score its answers", file=sys.stderr)
    elif cfg.verifier:
        verifier = Verifier(cfg.verifier, lm.tokenizer, lm.model.head_weight.device)
    measured |= {"model": str(lm.folder), "weights_sha256": weights_sha256(lm.folder),
                 "parameters": lm.model.num_parameters(), "tasks": {}, "not_run": {}}
    for name, loaded in questions.items():
        print(f"{path}: {name}", file=sys.stderr)  # progress; only the table goes to stdout
        begin, tokens = time.perf_counter(), lm.tokens
        try:
            # The module has the method; the table's line adds what differs from task to task.
            score = partial(TASKS[name].module.score, **TASKS[name].settings, **cfg.arguments(name))
            result = score(lm, loaded)
            if cfg.num_samples and TASKS[name].votes:
                add_votes(Asker(lm, score, loaded, cfg, verifier), result)
        except UserError as reason:  # this model cannot do the task; its context may be too short
            if name in cfg.tasks.split(","):
                raise
            measured["not_run"][name] = str(reason)
            continue
        seconds = time.perf_counter() - begin  # without loading the model and reading the questions
        measured["tasks"][name] = {
            "figures": {key: figure._asdict() for key, figure in result.figures.items()},
            "details": result.details, "seconds": seconds, "questions": len(result.answers),
            "tokens_written": lm.tokens - tokens}
        headline = next(iter(result.figures))  # the first figure is the one that a task is known by
        print(f"{path}: {name}  {headline} {figure_text(result.figures[headline])}  {seconds:,.1f} s",
              file=sys.stderr)
        yield name, result


# ---- The table --------------------------------------------------------------------------------------------

def figure_text(figure: Figure) -> str:
    return f"{figure.value:.4f} +- {figure.stderr:.4f}"


def speed(model: dict[str, Any], key: str) -> tuple[int, float]:
    """The sum of a count over a model's tasks, and that sum per second of the tasks where it is not 0."""
    tasks = [task for task in model["tasks"].values() if task[key]]
    # Tasks without such a count (multiple choice writes no tokens) would only add their time.
    total = sum(task[key] for task in tasks)
    return total, total / max(sum(task["seconds"] for task in tasks), 1e-9)  # 1e-9 s: no division by zero


def target_cells(cfg: EvalConfig, model: dict[str, Any]) -> dict[str, str]:
    """{task: "met (>= 0.85)" or "missed (>= 0.85)"} for each target, from the results of --model.

    A task that could not be run misses its target.
    """
    cells = {}
    for task, target in cfg.targets.items():
        figures = model["tasks"].get(task, {}).get("figures", {})
        value = next((figure["value"] for figure in figures.values()), math.nan)  # nan: neither <= nor >=
        # A perplexity falls when a model gets better; all other figures rise.
        met = value <= target if TASKS[task].falls else value >= target
        cells[task] = f"{'met' if met else 'missed'} ({'<=' if TASKS[task].falls else '>='} {target:g})"
    return cells


def table_rows(models: list[dict[str, Any]], absent: dict[str, str],
               targets: dict[str, str]) -> list[list[str]]:
    """The table as rows of cells: a header, one row per figure of each task, then the speeds.

    The columns are task, figure, n, one per model and, if there are targets, whether --model meets them.
    models: as in results.json. targets: see `target_cells`.
    """
    rows = [["task", "figure", "n", *(model["name"] for model in models)]]
    for task in TASKS:
        figures = [model["tasks"].get(task, {}).get("figures", {}) for model in models]  # one dict per model
        # Models may differ in their figures: "truncated" is only there if a prompt lost its beginning.
        for key in dict.fromkeys(itertools.chain(*figures)):
            n = next(each[key]["n"] for each in figures if key in each)
            cells = [figure_text(Figure(**each[key])) if key in each else "-" for each in figures]
            rows.append([task, key, f"{n:,}", *cells])
        if not any(figures) and (task in absent or any(task in model["not_run"] for model in models)):
            rows.append([task, "not run", "-", *("-" for _ in models)])
    # Questions that are answered, and tokens that are generated, per second of all tasks that have any.
    for title, key in (("questions/s", "questions"), ("tokens/s", "tokens_written")):
        if any(speed(model, key)[0] for model in models):
            rows.append(["all", title, f"{speed(models[0], key)[0]:,}",
                         *(f"{speed(model, key)[1]:,.1f}" for model in models)])
    if targets:  # one more column, with a cell in the first row of each task that has a target
        left = {"task": "target", **targets}
        rows = [[*row, left.pop(row[0], "-")] for row in rows]  # pop: only the first row of a task has it
    return rows


def reference_rows(model: dict[str, Any]) -> list[list[str]]:
    """Published figures for the tasks that were measured, next to those of a model, with their settings."""
    rows = [["published", "task", "figure", "value", model["name"], "settings"]]
    # The settings stand in the last column, because published figures differ in shots and prompts.
    for each in json.loads(REFERENCE.read_text(encoding="utf-8")):
        if figures := model["tasks"].get(each["task"], {}).get("figures"):
            # A figure of another name (exact match) stands next to the task's first one.
            own = figures.get(each["figure"], next(iter(figures.values())))
            rows.append([each["model"], each["task"], each["figure"], f"{each['value']:.4f}",
                         figure_text(Figure(**own)), each["settings"]])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text for the terminal: two columns of names to the left, numbers to the right."""
    # A column is as wide as its longest cell.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
                     for row in rows)


def report(results: dict[str, Any], targets: dict[str, str], show: Callable[[list[list[str]]], str],
           bullet: str = "") -> str:
    """The tables as text, and one line per task that was not run, with the reason.

    results: as in results.json. targets: see `target_cells`. show: makes text of a table's rows.
    """
    models, absent = results["models"], results["not_run"]
    # The main table, then votes and choices (empty without num_samples), then published figures.
    tables = [table_rows(models, absent, targets), method_rows(models)]
    if results["settings"]["reference"]:
        tables.append(reference_rows(models[0]))
    reasons = [*absent.items(), *((task, f"{model['model']}: {reason}") for model in models
                                  for task, reason in model["not_run"].items())]
    notes = "\n".join(f"{bullet}not run: {task}: {reason}" for task, reason in reasons)
    return "\n\n".join([*(show(rows) for rows in tables if rows), *filter(None, [notes])]) + "\n"


# ---- Files ------------------------------------------------------------------------------------------------

def save_results(out: Path, results: dict[str, Any], targets: dict[str, str]) -> None:
    """Write results.json and results.md with all that is finished. targets: see `target_cells`."""
    write_json(out / "results.json", results | {"targets": targets})
    write_text(out / "results.md", report(results, targets, lambda rows: table(rows[0], rows[1:]), "- "))


def save_answers(out: Path, task: str, answers: list[dict[str, Any]]) -> None:
    """Write answers/<task>.jsonl with the answers of all models so far."""
    if answers:  # running text has none
        (out / "answers").mkdir(exist_ok=True)
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]  # UTF-8 as it is
        write_text(out / "answers" / f"{task}.jsonl", "".join(lines))


def save_picture(out: Path, task: str, models: list[dict[str, Any]]) -> None:
    """Draw <task>.png with all models so far, if the task has a picture."""
    # Models that could not do this task, or are not measured yet, are no part of it.
    details = {model["model"]: model["tasks"][task]["details"] for model in models if task in model["tasks"]}
    if picture := draw(task, details):
        picture.savefig(content := io.BytesIO(), dpi=130)  # to memory: the file is replaced in one step
        write_bytes(out / f"{task}.png", content.getvalue())


# ---- Main -------------------------------------------------------------------------------------------------

def empty_results(cfg: EvalConfig, questions: dict[str, Any], absent: dict[str, str]) -> dict[str, Any]:
    """The content of results.json before the first model."""
    # What a figure may depend on besides the model and the questions.
    packages = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors")
    # Hashes of all questions with their prompts show whether two results are about the same questions. They
    # also cover the names of the classes that hold the questions, so those have to stay.
    hashes = {name: hashlib.sha256(repr(loaded).encode("utf-8", "backslashreplace")).hexdigest()
              for name, loaded in questions.items()}
    return {"settings": dataclasses.asdict(cfg), "complete": False, "not_run": absent, "models": [],
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
            "data_sha256": hashes}


def main(argv: list[str]) -> int:
    cfg, _ = configure(EvalConfig, argv, usage=__doc__)
    # Everything that can be wrong is checked before the first model is measured.
    open_device(cfg.device, cfg.threads, cfg.dtype)
    questions, absent = load_all(cfg)
    require_models(cfg)
    # Next to the model: export.py takes the scores of its card from there.
    default = Path(cfg.model) if Path(cfg.model).is_dir() else Path(".")  # a hub id has no folder here
    out = Path(cfg.out_dir) if cfg.out_dir else default
    out.mkdir(parents=True, exist_ok=True)
    results = empty_results(cfg, questions, absent)
    models = results["models"]  # one dict per model, which measure() fills in
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in questions}  # of all models, by task
    try:
        for path in cfg.models:
            models.append({"name": path, "model": path, "tasks": {}, "not_run": {}})
            for name, result in measure(path, questions, cfg, models[-1]):
                answers[name] += [{"model": models[-1]["model"], **answer} for answer in result.answers]
                # Write all files after each task: an interrupted run keeps what is finished.
                save_answers(out, name, answers[name])
                save_picture(out, name, models)
                save_results(out, results, target_cells(cfg, models[0]))
    except BaseException:  # Ctrl-C as well
        if any(model["tasks"] for model in models):
            print(f"stopped; the finished tasks are in {out / 'results.json'}", file=sys.stderr)
        raise
    # "complete" tells a reader of results.json that no task was cut off.
    targets = target_cells(cfg, models[0])
    save_results(out, results | {"complete": True}, targets)
    print(report(results, targets, aligned), end="")
    print(f"next        python export.py --model={shlex.quote(cfg.model)} --format=gguf", file=sys.stderr)
    # A code of its own: a script can tell a model that is too bad from a command that is wrong (2).
    return 3 if any(cell.startswith("missed") for cell in targets.values()) else 0


if __name__ == "__main__":
    run_script(main)
