"""What kinds of mistakes models make: counts by model, examples, and a picture, from the answers of eval.py.

    python -m tools.errors out/sft/answers/*.jsonl           # writes out/sft/answers/errors.md and errors.png
    python -m tools.errors a/answers/problems.jsonl b/answers/problems.jsonl --out=errors.md

A wrong answer has the first of these kinds that fits:

    stopped early               the limit of tokens cut the answer
    malformed                   not the form that is asked for: no number, a thought or a call that is broken
    wrong tool                  calls another function, or any function where none is right
    wrong tool argument         a call is right but for its arguments
    refused                     says that it cannot, or is empty, or does not call the function that it should
    right answer in wrong form  the right answer, with more or other words around it
    missing step                all steps are right ones, but some are left out
    slipped digit               the first mistake is one digit, wrong, left out or added; or a wrong day
    wrong operator              what another operation gives for the same numbers
    not in the passage          a number, a name or, if it has none, a word is not in the text that was given
    wrong                       anything else

Multiple choice has a table of confusions instead, one row per right choice, if all questions have the same
choices. The rules only read texts, so they are right about nearly all mistakes and not about all.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from configurator import UserError, configure, run_script
from dataset.problems import DAYS, work
from dataset.sources import Row, Skip, read_rows, row_value, usable_rows
from evals.tasks.open_qa import normalized
from evals.tasks.word_problems import flexible
from evals.votes import RIGHT
from formats.files import write_text
from formats.markdown import table
from generation.calculator import calculate
from tools.plot import bar_chart

KINDS = ("stopped early", "malformed", "refused", "wrong tool argument", "wrong tool", "missing step",
         "right answer in wrong form", "wrong operator", "slipped digit", "not in the passage", "wrong")
REFUSAL = re.compile(r"\b(can ?not|can't|unable|don't know|do not know|no comment|sorry)\b", re.I)
VERDICTS = ("pass_at_1", "prompt_strict", *RIGHT)  # an answer has one of these keys: whether it is right
EXAMPLES = 3  # per kind and model

Found = dict[str, dict[str, list[dict[str, Any]]]]  # {"model, task (answers)": {kind: the wrong answers}}


@dataclass(frozen=True, kw_only=True)
class ErrorsConfig:
    out: str | None = None  # page to write, and the picture with it; None is errors.md next to the first file


# ---- Kinds of mistakes ------------------------------------------------------------------------------------

def is_slip(said: str, answer: str) -> bool:
    """Whether two texts differ in one digit, which is changed, left out or added, or are two days."""
    is_digit = re.fullmatch(r"(.*)\d?(.*)\n\1\d?\2", f"{said}\n{answer}")
    return said != answer and bool(is_digit or {said, answer} <= {*DAYS})


def other_results(expression: str | None) -> list[str]:
    """What other operators give for the two numbers of an expression: "3 + 4" -> ["-1", "12"]."""
    a, operator, b = expression.split() if expression else ("0", "", "0")
    return [str(work(int(a), int(b), other)[1]) for other in "+-*" if operator and other != operator]


def is_unsupported(said: str, passage: str) -> bool:
    """Whether a number or a name of the answer is not in the passage; without any, a word of it."""
    facts = re.findall(r"\b[A-Z]\w+|\d[\d.,]*\d|\d", said) or normalized(said).split()
    known = set(normalized(passage).split())
    return not all(word in known for fact in facts for word in normalized(fact).split())


def kind_of(row: dict[str, Any]) -> str | None:
    """One of KINDS, or None if the answer is right. row: a line of answers/TASK.jsonl."""
    if isinstance(row["said"], list):  # a dialogue of mt_bench, which no rule fits
        return None
    is_call = isinstance(row["said"], dict)  # BFCL's answers are messages
    message = row["said"] if is_call else {"content": row["said"], **row.get("message", {})}
    said, calls = message["content"], message.get("calls") or message.get("tool_calls") or []
    results = [calculate(each["arguments"].get("expression")) for each in calls
               if not is_call and isinstance(each["arguments"], dict)]
    answers = [*map(str, row.get("answers", [row.get("answer", "")]))]
    endings = [rf"(?<![\w-]){re.escape(normalized(each))}$" for each in answers if normalized(each)]
    steps, right_steps = [*filter(None, message.get("thought", "").split("; "))], row.get("steps", [])
    is_number = "steps" in row or row.get("strict") in (True, False)  # an answer of numbers or a day
    result = str(flexible(said)) if "strict" in row else said
    pairs = [*zip(steps, right_steps, strict=False), (result, answers[0])]  # the first that differs decides
    passage = row.get("passage") or row.get("document")
    rules = (
        ("stopped early", message.get("cut")),
        ("malformed", "malformed" in message),
        ("wrong tool", calls and is_call and not row.get("right_function")),
        ("wrong tool argument", calls and answers[0] not in results),
        ("refused", not said.strip() or is_call or REFUSAL.search(said)),
        ("right answer in wrong form", row.get("flexible") or any(
            re.search(ending, normalized(said)) for ending in endings)),
        ("malformed", is_number and flexible(said) is None and said not in DAYS),
        ("missing step", 0 < len(steps) < len(right_steps) and {*steps} < {*right_steps}),
        ("slipped digit", is_number and next((is_slip(*pair) for pair in pairs if pair[0] != pair[1]), None)),
        ("wrong operator", said in other_results(row.get("expression"))),
        ("not in the passage", passage and is_unsupported(said, passage)))
    kind = next((kind for kind, fits in rules if fits), "wrong")
    verdict = next((row[key] for key in VERDICTS if key in row), None)
    # A summary has no verdict, but it may say what its document does not.
    is_wrong = not verdict and (verdict is not None or kind == "not in the passage")
    return kind if is_wrong else None


# ---- The page ---------------------------------------------------------------------------------------------

def confusion(name: str, rows: list[dict[str, Any]]) -> str:
    """A table of the right choices against those that a model took."""
    choices, counts = rows[0]["choices"], Counter((row["gold"][0], row["said"]) for row in rows)
    lines = [[choice, *(counts[gold, said] for said in range(len(choices)))]
             for gold, choice in enumerate(choices)]
    return f"## {name}: right choices in rows, the model's in columns\n\n{table(['', *choices], lines)}"


def answer_and_kind(row: Row) -> tuple[dict[str, Any], str | None]:
    """(an answer, the kind of its mistake). Raises Skip for a row that eval.py cannot have written."""
    value = row_value(row)
    try:
        value["model"]
        if "choices" in value:  # they have no kinds, so this only checks them
            return value, confusion("", [value])
        return value, kind_of(value)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise Skip("not an answer that eval.py wrote") from None


def sort_answers(paths: list[Path]) -> tuple[Found, list[str]]:
    """The wrong answers in files answers/TASK.jsonl by kind, and tables of confusions."""
    answers, found, confusions = defaultdict(list), {}, []
    for path in paths:
        for _, (row, kind) in usable_rows(read_rows([path]), answer_and_kind):
            answers[f"{row['model']}, {path.stem}"].append((row, kind))
    for name, rows in answers.items():
        choices = rows[0][0].get("choices")
        if choices is None:
            found[f"{name} ({len(rows):,} answers)"] = {
                kind: [row for row, its_kind in rows if its_kind == kind] for kind in KINDS}
        elif all(row.get("choices") == choices for row, _ in rows):
            confusions.append(confusion(name, [row for row, _ in rows]))
    kinds = [kind for kind in KINDS if any(rows[kind] for rows in found.values())]
    return {name: {kind: rows[kind] for kind in kinds} for name, rows in found.items() if kinds}, confusions


def count_table(found: Found) -> str:
    """One row per kind of mistake, one column per model and task."""
    kinds = next(iter(found.values()), {})
    rows = [[kind, *(len(each[kind]) for each in found.values())] for kind in kinds]
    return table(["mistake", *found], rows) if rows else "No mistakes."


def count_chart(found: Found) -> Figure:
    return bar_chart({name: {kind: [len(rows)] for kind, rows in kinds.items()}
                      for name, kinds in found.items()}, "wrong answers")


def main(argv: list[str]) -> None:
    # Arguments without -- are files of answers here, not config files.
    cfg, _ = configure(ErrorsConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    paths = [Path(arg) for arg in argv if not arg.startswith("-")]
    if not paths:
        raise UserError("name files of answers: python -m tools.errors out/sft/answers/*.jsonl")
    found, confusions = sort_answers(paths)
    parts = [count_table(found), *confusions]
    for kind, (name, rows) in itertools.product(KINDS, found.items()):
        for row in rows.get(kind, [])[:EXAMPLES]:
            parts.append(f"**{kind}**, {name}\n\n```json\n{json.dumps(row, ensure_ascii=False)}\n```")
    out = Path(cfg.out) if cfg.out else paths[0].with_name("errors.md")
    write_text(out, "\n\n".join(["# Mistakes", *parts]) + "\n")
    if found:
        count_chart(found).savefig(out.with_suffix(".png"), dpi=130)
    print(parts[0], f"{out}: written", sep="\n\n")


if __name__ == "__main__":
    run_script(main)
