"""HellaSwag: which of four endings continues a situation (arXiv 1905.07830)? No worked examples.

    {"ctx_a": "A man is sitting on a roof.", "ctx_b": "he", "activity_label": "Roof shingle removal",
     "endings": ["is using wrap to wrap a pair of skis.", "..", "..", ".."], "label": "3"}

    Roof shingle removal: A man is sitting on a roof. He

followed by a space and an ending. The answer is the ending with the highest log-probability per character
(accuracy_norm). The prompt and the removal of brackets are those of lm-evaluation-harness (task hellaswag).
On the hub: Rowan/hellaswag.

Rows of another form are read as well:

    {"question": "A man is sitting on a roof. he", "choices": {"A": "..", "B": "..", "C": "..", "D": ".."},
     "answer": "D"}

They name no activity, and they do not show where ctx_b begins, which lm-evaluation-harness capitalizes. Their
prompt is the question alone, without brackets.
"""

import re
from typing import Any

from evals.benchmarks import label_index, label_number, text_of, texts_of
from evals.multiple_choice import Question, few_shot, score_by_character, splits

HUB = {"train": "Rowan/hellaswag::train", "validation": "Rowan/hellaswag::validation"}


def clean(text: str) -> str:
    """The text without the markup in brackets that WikiHow's headings leave."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def question_of(row: dict[str, Any]) -> Question:
    if "endings" in row:
        activity, before, begin = (text_of(row[key]) for key in ("activity_label", "ctx_a", "ctx_b"))
        endings, label = texts_of(row["endings"]), row["label"]
        # The hub has the label as text, the original files have it as a number.
        gold = (label_number(label, len(endings)) if isinstance(label, int) else
                label_index(label, [str(number) for number in range(len(endings))]))
        return Question(clean(f"{activity}: {before} {begin.capitalize()}"), tuple(map(clean, endings)),
                        (gold,))
    letters = sorted(row["choices"])
    return Question(clean(row["question"]), tuple(clean(row["choices"][letter]) for letter in letters),
                    (label_index(row["answer"], letters),))


def load(source: str | None, limit: int, shots: int | None) -> list[Question]:
    """The first `limit` questions, each after `shots` examples (None: no examples)."""
    hub = HUB if shots else {"validation": HUB["validation"]}
    examples, rows = splits(source, "hellaswag", hub)
    return few_shot(examples, rows[:limit], shots or 0, question_of)


score = score_by_character
