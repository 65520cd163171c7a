"""What kinds of mistakes models make: counts by model, examples, and a picture, from the answers of eval.py.

    python -m tools.errors out/sft/answers/*.jsonl                  # writes out/sft/answers/errors.md and .png
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
    not in the passage          a number, a name or (if there is none) a word is not in the text that was given
    wrong                       anything else

For multiple choice there is a table of confusions instead, one row per right choice, if all questions have the
same choices. The rules read texts, so they are right about nearly all mistakes and not about all.
"""

import json
import re
from collections import defaultdict
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

KINDS = ("stopped early", "malformed", "refused", "wrong tool argument", "wrong tool",
         "right answer in wrong form", "missing step", "wrong operator", "slipped digit", "not in the passage",
         "wrong")
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
    """The kind of a wrong answer to an embedded problem whose steps are known."""
    said, right, expression = row["said"], row["steps"], row["expression"]
    steps = row["message"].get("thought", "").split("; ")
    if steps != [""] and len(steps) < len(right) and {*steps} < {*right}:
        return "missing step"
    if expression:
        a, operator, b = expression.split()
        for other in {*"+-*"} - {operator}:
            if str(work(int(a), int(b), other)[1]) == said:
                return "wrong operator"
    return None


def call_kind(row: dict[str, Any]) -> str | None:
    """The kind of a mistake in a call: of the calculator, or of a function of BFCL."""
    message = row["message"] if "message" in row else row["said"]
    calls = message.get("calls") or message.get("tool_calls") or []
    if "message" in row:
        results = [calculate(call["arguments"].get("expression")) for call in calls
                   if isinstance(call["arguments"], dict)]
        return "wrong tool argument" if calls and row["answer"] not in results else None
    if not calls:
        return "refused"
    return "wrong tool argument" if row.get("right_function") else "wrong tool"


def is_unsupported(said: str, passage: str) -> bool:
    """Whether a number or a name of the answer is not in the passage; without any, a word of it."""
    facts = re.findall(r"\b[A-Z]\w+|\d[\d.,]*\d|\d", said) or normalized(said).split()
    known = set(normalized(passage).split())
    return not all(word in known for fact in facts for word in normalized(fact).split())


def kind_of(row: dict[str, Any]) -> str:
    """The kind of a wrong answer, one of KINDS. row: a line of answers/TASK.jsonl."""
    message = row["message"] if "message" in row else row["said"] if isinstance(row["said"], dict) else {}
    said = row["said"] if isinstance(row["said"], str) else message["content"]
    answers = [str(each) for each in row.get("answers", [row.get("answer", row.get("summary", ""))])]
    number = flexible(said)
    if message.get("cut"):
        return "stopped early"
    if "malformed" in message:
        return "malformed"
    if (message.get("tool_calls") or message.get("calls") or isinstance(row["said"], dict)) and (
            kind := call_kind(row)):
        return kind
    if not said.strip() or REFUSAL.search(said):
        return "refused"
    if row.get("flexible") or any(re.search(rf"(?<![\w-]){re.escape(normalized(each))}$", normalized(said))
                                  for each in answers if normalized(each)):
        return "right answer in wrong form"
    if "steps" in row or "strict" in row:  # the answer is a number, numbers or a day
        if number is None and said not in DAYS:
            return "malformed"
        if "steps" in row and (kind := arithmetic_kind(row)):
            return kind
        return "slipped digit" if is_slip(str(number) if "strict" in row else said, answers[0]) else "wrong"
    passage = row.get("passage") or row.get("document")
    return "not in the passage" if passage and is_unsupported(said, passage) else "wrong"


# ---- The page ---------------------------------------------------------------------------------------------

def confusion(name: str, rows: list[dict[str, Any]]) -> str:
    """A table of the right choices against those that a model took."""
    choices = rows[0]["choices"]
    counts = [[sum(row["said"] == said and row["gold"] == [gold] for row in rows) for said in range(len(choices))]
              for gold in range(len(choices))]
    lines = [[choice, *count] for choice, count in zip(choices, counts, strict=True)]
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
    kinds = [kind for kind in KINDS if any(kind in each for each in counts.values())][::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(kinds) * len(counts)), layout="constrained")
    plot, height = figure.subplots(), 0.8 / len(counts)
    for number, (name, found) in enumerate(counts.items()):
        bars = plot.barh([at - number * height for at in range(len(kinds))],
                         [len(found.get(kind, [])) for kind in kinds], height, label=name)
        plot.bar_label(bars, padding=2)
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
    answers, parts, counts = read_answers(paths), [], {}
    for name, rows in answers.items():
        if "choices" in rows[0]:
            same = all(row["choices"] == rows[0]["choices"] for row in rows)
            parts += [confusion(name, rows)] if same else []
            continue
        verdict = next((key for key in VERDICTS if key in rows[0]), None)
        found = counts[f"{name} ({len(rows):,} answers)"] = defaultdict(list)
        for row in rows:
            # A summary is never right or wrong, but it may say what its document does not.
            kind = None if verdict and row[verdict] else kind_of(row)
            if kind and (verdict or kind == "not in the passage"):
                found[kind].append(row)
    lines = [[kind, *(len(found.get(kind, [])) for found in counts.values())] for kind in KINDS]
    parts[:0] = [table(["mistake", *counts], [line for line in lines if any(line[1:])])] if counts else []
    for kind in KINDS:
        for name, found in counts.items():
            for row in found.get(kind, [])[:EXAMPLES]:
                texts = {key: row[key] for key in ("question", "prompt", "answer", "answers", "said", "message")
                         if key in row}
                parts.append(f"**{kind}**, {name}\n\n```json\n{json.dumps(texts, ensure_ascii=False)}\n```")
    out = Path(cfg.out) if cfg.out else Path(paths[0]).with_name("errors.md")
    write_text(out, "\n\n".join(["# Mistakes", *parts]) + "\n")
    if any(counts.values()):
        draw(counts).savefig(out.with_suffix(".png"), dpi=130)
    print(parts[0] if parts else "no mistakes", f"{out}: written", sep="\n\n")
    return 0


if __name__ == "__main__":
    run_script(main)
