"""HellaSwag: which of four endings goes on with a situation (arXiv 1905.07830). No worked examples.

    {"ctx_a": "A man is sitting on a roof.", "ctx_b": "he", "activity_label": "Roof shingle removal",
     "endings": ["is using wrap to wrap a pair of skis.", "..", "..", ".."], "label": "3"}

    Roof shingle removal: A man is sitting on a roof. He

followed by a space and an ending. What counts is the log-probability a character of the ending
(accuracy_norm). Protocol: prompt and cleaning of brackets as in lm-evaluation-harness (task hellaswag). On
the hub: Rowan/hellaswag.

Rows of another form are read as well:

    {"question": "A man is sitting on a roof. he", "choices": {"A": "..", "B": "..", "C": "..", "D": ".."},
     "answer": "D"}

These have no activity to name and do not say where ctx_b begins, which lm-evaluation-harness writes with a
capital letter: their prompt is the question alone, cleaned.
"""

import re
from typing import Any

from evals.lm import LM
from evals.multiple_choice import Question, questions_of, score_by_character, shots_text, splits
from evals.results import Result

HUB = {"train": "Rowan/hellaswag::train", "validation": "Rowan/hellaswag::validation"}


def load(source: str | None, limit: int, shots: int | None) -> list[Question]:
    """The first questions, each behind `shots` examples (none unless asked for)."""
    hub = HUB if shots else {"validation": HUB["validation"]}
    examples, asked = splits(source, "hellaswag", hub)
    before = shots_text(questions_of(examples[:shots or 0], question_of), shots or 0)
    return [Question(each.prompt, each.choices, each.gold, before)
            for each in questions_of(asked[:limit], question_of)]


def question_of(row: dict[str, Any]) -> Question:
    if "endings" in row:
        prompt = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return Question(clean(prompt), tuple(map(clean, row["endings"])), (int(row["label"]),))
    letters = sorted(row["choices"])
    return Question(clean(row["question"]), tuple(clean(row["choices"][letter]) for letter in letters),
                    (letters.index(row["answer"]),))


def clean(text: str) -> str:
    """Without the brackets that are left of WikiHow's headings."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def score(lm: LM, questions: list[Question]) -> Result:
    return score_by_character(lm, questions)
