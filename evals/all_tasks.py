"""All benchmarks: what eval.py measures, and what a training script can measure at its evaluations.

    questions = load("hellaswag", "../data", limit=100)
    TASKS["hellaswag"].module.score(lm, questions, **TASKS["hellaswag"].settings)       # a Result

    evaluate = with_tasks(cfg, run, evaluate)       # cfg.eval_tasks=hellaswag adds val_hellaswag_accuracy, ..
"""

import difflib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from configurator import UserError
from evals import votes
from evals.benchmarks import Questions
from evals.lm import LM
from evals.tasks import (
    bfcl,
    choice,
    code,
    conll,
    context_length,
    core,
    glue,
    ifeval,
    math_problems,
    mt_bench,
    needle,
    open_qa,
    perplexity,
    problems,
    summarize,
    toxicity,
    truthfulqa,
    word_problems,
)
from model import GPT
from training.config import RunConfig
from training.run import Run

Evaluate = Callable[[GPT, bool], dict[str, float]]  # as in loop.py


class Task(NamedTuple):
    """A benchmark: its module in evals/tasks/, and the keyword arguments of its load() and score()."""

    module: ModuleType
    settings: dict[str, Any] = {}  # arguments with fixed values
    keys: tuple[str, ...] = ()  # keys of EvalConfig that are arguments as well
    draw: Callable[[dict[str, Any]], Any] | None = None  # {model: details} -> a matplotlib Figure
    votes: bool = False  # answers can be sampled and voted on (evals/votes.py)
    falls: bool = False  # a better model has a lower first figure: a perplexity, not a share of right answers


TASKS = {  # in the order of the table and of --tasks=all
    # Running text.
    "perplexity": Task(perplexity, keys=("model", "stride"), falls=True),  # by a sliding window
    "wikitext": Task(perplexity, {"wikitext": True}, keys=("model", "stride"), falls=True),  # WikiText-2
    # Loss by position, and after shorter and longer contexts.
    "context_length": Task(context_length, keys=("model", "context_length", "sinks", "window"),
                           draw=context_length.draw, falls=True),

    # Multiple choice: the most likely choice is the answer.
    **{name: Task(choice, {"name": name}) for name in choice.BENCHMARKS},  # MMLU, HellaSwag, ARC, PIQA, ...
    "truthfulqa": Task(truthfulqa),  # true answers against common misconceptions
    **{name: Task(glue, {"name": name}) for name in glue.NAMES},  # the nine tasks of GLUE
    # Three of them with 8 worked examples.
    **{f"{name}_few": Task(glue, {"name": name, "few": 8}) for name in ("sst2", "cola", "rte")},
    "core": Task(core),  # CORE: the centred mean over 22 tasks of DCLM

    # The embedded problems, which need no data: arithmetic, dates, lists.
    "problems": Task(problems, votes=True),
    "calculator": Task(problems, {"calculator": True}, votes=True),  # the model may call the calculator
    "hard": Task(problems, {"family": "hard"}, votes=True),  # arithmetic that is hard without a calculator
    "hard_calculator": Task(problems, {"family": "hard", "calculator": True}, votes=True),

    # Answers that are generated.
    # Arithmetic word problems with worked answers: GSM8K, SVAMP, MAWPS, ASDiv.
    **{name: Task(word_problems, {"name": name}, votes=True) for name in word_problems.HUB},
    # Competition mathematics, compared as expressions: MATH, MATH-500.
    **{name: Task(math_problems, {"name": name}, votes=True) for name in math_problems.HUB},
    # Short answers from memory (HotpotQA, TriviaQA) or from a passage (SQuAD 1.1 and 2.0).
    **{name: Task(open_qa, {"name": name}, votes=True) for name in open_qa.HUB},
    "bfcl_simple": Task(bfcl, {"category": "simple_python"}),  # a call of the offered function
    # One of several functions; several calls; both.
    **{f"bfcl_{name}": Task(bfcl, {"category": name})
       for name in ("multiple", "parallel", "parallel_multiple")},
    "bfcl_irrelevance": Task(bfcl, {"category": "irrelevance"}),  # no call: the function does not help
    "ifeval": Task(ifeval),  # instructions whose obedience a program can check
    # Programs that are run; needs --allow_code=True.
    **{name: Task(code, {"name": name}, keys=("allow_code",)) for name in code.HUB},
    "needle": Task(needle, keys=("context_length", "num_tests"), draw=needle.draw),  # a number in a long text
    # ROUGE of summaries: CNN/DailyMail, XSum, SAMSum.
    **{name: Task(summarize, {"name": name}) for name in summarize.HUB},
    "conll2003": Task(conll),  # persons, organizations and places in a sentence
    "toxicity": Task(toxicity, keys=("classifier",), falls=True),  # judged by the user's classifier
    # Open questions: the user's judge, a model, compares the answers with those of another model.
    "mt_bench": Task(mt_bench, keys=("judge", "judge_model", "opponent")),
}
# Names that --tasks accepts for several tasks. A group's task is skipped if it cannot run; a task that is
# named must run.
GROUPS = {"all": list(TASKS), "embedded": ["problems", "calculator", "hard", "hard_calculator"]}


# ---- Names, places, questions -----------------------------------------------------------------------------

def refuse_unknown(key: str, value: str, names: list[str], known: list[str]) -> None:
    """Raises UserError with the nearest name if one of the names is no task."""
    if unknown := next((name for name in names if name not in TASKS), None):
        [nearest] = difflib.get_close_matches(unknown, known, n=1, cutoff=0)
        raise UserError(f"{key}={value}: unknown task {unknown!r}, did you mean {nearest!r}? "
                        f"(known: {', '.join(known)})")


def task_names(key: str, value: str) -> list[str]:
    """The tasks and groups of a list with commas, each task once. UserError for an unknown one."""
    # dict.fromkeys drops a task that is named twice, and keeps the order.
    names = list(dict.fromkeys(task for name in value.split(",") for task in GROUPS.get(name, [name])))
    refuse_unknown(key, value, names, [*GROUPS, *TASKS])
    return names


def places_of(key: str, value: str) -> dict[str, str | None]:
    """"../data,mmlu=a.jsonl" as {task: its own file or folder, else the one for all tasks, else None}."""
    parts = [part for part in value.split(",") if part]
    pairs = dict(part.split("=", 1) for part in parts if "=" in part)
    folders = [part for part in parts if "=" not in part]
    if len(folders) > 1:
        raise UserError(f"{key}={value}: give one folder for all tasks, and TASK=PLACE for others")
    refuse_unknown(key, value, list(pairs), list(TASKS))
    return dict.fromkeys(TASKS, folders[0] if folders else None) | pairs


def load(name: str, place: str | None, limit: int, shots: int | None = None, **keys: Any) -> Any:
    """The questions of a task. keys: its arguments besides its settings. UserError if there are none."""
    questions = TASKS[name].module.load(place, limit, shots, **TASKS[name].settings, **keys)
    # Texts and needles are never empty; questions can be, if all rows became worked examples.
    if not (questions.asked if isinstance(questions, Questions) else questions):
        raise UserError(f"{name}: there is no question in {place}")
    return questions


def draw(name: str, details: dict[str, dict[str, Any]]) -> Any:
    """The picture of a task, a matplotlib Figure, or None. details: {model: those of its Result}."""
    draw_details = votes.draw if TASKS[name].votes else TASKS[name].draw
    return draw_details(details) if draw_details and details else None


# ---- Training ---------------------------------------------------------------------------------------------

def with_tasks(cfg: RunConfig, run: Run, evaluate: Evaluate) -> Evaluate:
    """`evaluate`, which also measures cfg.eval_tasks: {"val_hellaswag_accuracy": 0.3, ..}.

    The questions are read now. Rank 0 asks them in plain text, greedily, with the settings that eval.py has
    by default, while the other ranks wait. A task that the model cannot do, because it has no chat tokens or
    too short a context, is reported and left out. Raises UserError on all ranks for an unknown task, for one
    whose questions cannot be read, and for parallel=fsdp, where no rank has the whole model.
    """
    if not cfg.eval_tasks:
        return evaluate
    if cfg.parallel == "fsdp":
        raise UserError("eval_tasks: does not work with parallel=fsdp; use parallel=ddp or none")
    questions: dict[str, Any] = {}

    def read() -> None:
        places = places_of("eval_data", cfg.eval_data)
        for name in task_names("eval_tasks", cfg.eval_tasks):
            if {"allow_code", "classifier", "judge"} & {*TASKS[name].keys}:
                raise UserError(f"eval_tasks: {name} needs settings that only eval.py has")
            try:
                questions[name] = load(name, places[name], cfg.eval_limit)
            except UserError as error:
                raise UserError(f"eval_tasks: {error}".replace("--data=", "--eval_data=")) from None

    def measure(model: GPT) -> dict[str, float]:
        assert run.tokenizer is not None
        lm, figures = LM((model, run.tokenizer)), dict[str, float]()
        for name, loaded in questions.items():
            try:
                result = TASKS[name].module.score(lm, loaded, **TASKS[name].settings)
            except UserError as reason:
                run.print(f"note      eval_tasks: {name}: {reason}")
                continue
            figures |= {f"val_{name}_{key}": figure.value for key, figure in result.figures.items()}
        return figures

    run.run_on_rank0(read)
    return lambda model, last: evaluate(model, last) | run.run_on_rank0(lambda: measure(model))
