"""What kinds of mistakes models make: counts by model, examples, and a picture, from the answers of eval.py.

    python -m tools.errors out/sft/answers/*.jsonl           # writes out/sft/answers/errors.md and errors.png
    python -m tools.errors a/answers/problems.jsonl b/answers/problems.jsonl --out=errors.md

A wrong answer has the first of these kinds that fits:

    stopped early               the limit of tokens cut the answer
    malformed                   not the form that is asked for: no number, a thought or a call that is broken
    refused                     says that it cannot, or is empty, or does not call the function that it should
    wrong tool argument         a call is right but for its arguments; "wrong tool": another function, or any
                                function where none is right
    right answer in wrong form  the right answer, with more or other words around it
    missing step                all steps are right ones, but some are left out
    wrong operator              what another operation gives for the same numbers
    slipped digit               one digit, or the day, is wrong
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
from evals.tasks.gsm8k import flexible
from evals.tasks.open_qa import normalized
from formats.files import write_text
from formats.markdown import table
from generation.calculator import calculate

KINDS = ("stopped early", "malformed", "refused", "wrong tool argument", "wrong tool", "missing step",
         "right answer in wrong form", "wrong operator", "slipped digit", "not in the passage", "wrong")
REFUSAL = re.compile(r"\b(can ?not|can't|unable|don't know|do not know|no comment|sorry)\b", re.I)
VERDICTS = ("right", "accuracy", "strict", "exact_match")  # keys that say whether an answer is right
EXAMPLES = 3  # per kind and model


@dataclass(frozen=True, kw_only=True)
class ErrorsConfig:
    out: str | None = None  # page to write, and the picture with it; None is errors.md next to the first file


# ---- Kinds of mistakes ------------------------------------------------------------------------------------

def is_slip(said: str, answer: str) -> bool:
    """Whether two texts of the same length differ in one digit, or are two days."""
    pairs = [pair for pair in zip(said, answer, strict=False) if pair[0] != pair[1]]
    return {said, answer} <= {*DAYS} or (len(said) == len(answer) and len(pairs) == 1
                                         and "".join(pairs[0]).isdigit())


def arithmetic_kind(row: dict[str, Any]) -> str | None:
    """The kind of a wrong answer to an embedded problem, from its steps and the numbers of its question."""
    steps, right = row["message"].get("thought", "").split("; "), row["steps"]
    if len(steps) < len(right) and {*steps} < {*right}:
        return "missing step"
    a, operator, b = row["expression"].split() if row["expression"] else ("0", "", "0")
    others = {str(work(int(a), int(b), other)[1]) for other in {*"+-*"} - {operator}} if operator else set()
    return "wrong operator" if row["said"] in others else None


def call_kind(row: dict[str, Any], calls: list[dict[str, Any]]) -> str | None:
    """The kind of a mistake in calls of the calculator, or of a function of BFCL."""
    if "message" not in row:
        return "wrong tool argument" if row.get("right_function") else "wrong tool"
    results = [calculate(call["arguments"].get("expression")) for call in calls
               if isinstance(call["arguments"], dict)]
    return None if row["answer"] in results else "wrong tool argument"


def is_unsupported(said: str, passage: str) -> bool:
    """Whether a number or a name of the answer is not in the passage; without any, a word of it."""
    facts = re.findall(r"\b[A-Z]\w+|\d[\d.,]*\d|\d", said) or normalized(said).split()
    known = set(normalized(passage).split())
    return not all(word in known for fact in facts for word in normalized(fact).split())


def kind_of(row: dict[str, Any]) -> str:
    """The kind of a wrong answer, one of KINDS. row: a line of answers/TASK.jsonl."""
    is_call = isinstance(row["said"], dict)  # BFCL's answers are messages
    message = row["said"] if is_call else {"content": row["said"], **row.get("message", {})}
    said, calls = message["content"], message.get("calls") or message.get("tool_calls") or []
    answers = [*map(str, row.get("answers", [row.get("answer", "")]))]
    endings = [rf"(?<![\w-]){re.escape(normalized(each))}$" for each in answers if normalized(each)]
    right = row.get("flexible") or any(re.search(ending, normalized(said)) for ending in endings)
    is_number = "steps" in row or "strict" in row  # the answer is a number, numbers or a day
    passage = row.get("passage") or row.get("document")
    rules = (("stopped early", lambda: message.get("cut")),
             ("malformed", lambda: "malformed" in message),
             (call_kind(row, calls) if calls else None, lambda: calls),
             ("refused", lambda: not said.strip() or is_call or REFUSAL.search(said)),
             ("right answer in wrong form", lambda: right),
             ("malformed", lambda: is_number and flexible(said) is None and said not in DAYS),
             (arithmetic_kind(row) if "steps" in row else None, lambda: True),
             ("slipped digit", lambda: is_number and is_slip(
                 str(flexible(said)) if "strict" in row else said, answers[0])),
             ("not in the passage", lambda: passage and is_unsupported(said, passage)))
    return next((kind for kind, fits in rules if kind and fits()), "wrong")


# ---- The page ---------------------------------------------------------------------------------------------

def confusion(name: str, rows: list[dict[str, Any]]) -> str:
    """A table of the right choices against those that a model took."""
    choices, counts = rows[0]["choices"], Counter((row["gold"][0], row["said"]) for row in rows)
    lines = [[choice, *(counts[gold, said] for said in range(len(choices)))]
             for gold, choice in enumerate(choices)]
    return f"## {name}: right choices in rows, the model's in columns\n\n{table(['', *choices], lines)}"


def read_answers(paths: list[str]) -> dict[str, list[dict[str, Any]]]:
    """{"model, task": its answers}. Raises UserError for a file that is not one of eval.py's."""
    answers = defaultdict(list)
    for path in paths:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row:
                    answers[f"{row['model']}, {Path(path).stem}"].append(row | {"said": row["said"]})
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}:{number}: not an answer that eval.py wrote") from None
    return answers


def draw(counts: dict[str, dict[str, list[Any]]]) -> Figure:
    """Bars of the number of mistakes of each kind, in one color per model and task."""
    kinds = [kind for kind in KINDS if any(each[kind] for each in counts.values())][::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(kinds) * len(counts)), layout="constrained")
    plot, height = figure.subplots(), 0.8 / len(counts)
    for number, (name, found) in enumerate(counts.items()):
        bars = plot.barh([at - number * height for at in range(len(kinds))],
                         [len(found[kind]) for kind in kinds], height, label=name)
        plot.bar_label(bars, fmt=lambda count: f"{count:g}" if count else "", padding=2)
    plot.set_yticks([at - (len(counts) - 1) * height / 2 for at in range(len(kinds))], kinds)
    plot.set(xlabel="wrong answers")
    plot.legend()
    return figure


def main(argv: list[str]) -> int:
    # Arguments without -- are files of answers here, not config files.
    cfg, _ = configure(ErrorsConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    paths = [arg for arg in argv if not arg.startswith("-")]
    if not paths:
        raise UserError("name files of answers: python -m tools.errors out/sft/answers/*.jsonl")
    parts, counts = [], defaultdict(lambda: defaultdict(list))
    for name, rows in read_answers(paths).items():
        if "choices" in rows[0]:
            if all(row["choices"] == rows[0]["choices"] for row in rows):
                parts.append(confusion(name, rows))
            continue
        verdict = next((key for key in VERDICTS if key in rows[0]), None)
        for row in rows:
            kind = None if verdict and row[verdict] else kind_of(row)
            # A summary is never right or wrong, but it may say what its document does not.
            if kind and (verdict or kind == "not in the passage"):
                counts[f"{name} ({len(rows):,} answers)"][kind].append(row)
    lines = [[kind, *(len(found[kind]) for found in counts.values())] for kind in KINDS]
    parts[:0] = [table(["mistake", *counts], [line for line in lines if any(line[1:])])] if counts else []
    for kind, (name, found) in itertools.product(KINDS, counts.items()):
        for row in found[kind][:EXAMPLES]:
            shown = {key: row[key] for key in ("question", "prompt", "answer", "answers", "said", "message")
                     if key in row}
            parts.append(f"**{kind}**, {name}\n\n```json\n{json.dumps(shown, ensure_ascii=False)}\n```")
    out = Path(cfg.out) if cfg.out else Path(paths[0]).with_name("errors.md")
    write_text(out, "\n\n".join(["# Mistakes", *parts]) + "\n")
    if counts:
        draw(counts).savefig(out.with_suffix(".png"), dpi=130)
    print(parts[0] if parts else "no mistakes", f"{out}: written", sep="\n\n")
    return 0


if __name__ == "__main__":
    run_script(main)
