"""Rows of benchmarks as conversations: what `prepare.py --kind=chat --task=NAME` makes of a row.

    python prepare.py --kind=chat --task=sst2 --source=sst2_train.tsv --tokenizer=MODEL --out=data/sst2
    python prepare.py --kind=chat --task=gsm8k --source=hf:openai/gsm8k:main:train --tokenizer=MODEL

    example("sst2", {"sentence": "a great film", "label": 1})
    # ("a great film\\nQuestion: Is this sentence positive or negative?\\nAnswer:", "positive")

The prompts are those that evals/tasks/ asks with --chat=True, so a model is tuned on what it is measured by.
Each task has the forms of row that its evaluation reads. In addition, "mawps" reads the rows of MAWPS
(original_text, equation, ans) with an answer like GSM8K's: the equation, then "#### " and the number.
"""

import re
from typing import Any, Literal

from dataset.conversations import require_text
from dataset.sources import Skip

TaskName = Literal["sst2", "cola", "rte", "gsm8k", "mawps", "summarize"]
# GLUE, in the words of lm-evaluation-harness (evals/tasks/glue.py).
PROMPTS = {"sst2": "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
           "cola": "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
           "rte": "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:"}
ANSWERS = {"sst2": ("negative", "positive"), "cola": ("no", "yes"), "rte": ("True", "False")}  # labels 0, 1
COLUMNS = {"sst2": ("sentence", "label"), "cola": ("source", "label", "mark", "sentence"),  # of a .tsv
           "rte": ("index", "sentence1", "sentence2", "label")}
LABELS = {"sst2": {"0": 0, "1": 1}, "cola": {"0": 0, "1": 1},  # as texts, in a .tsv
          "rte": {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}}
ASK_SUMMARY = "\n\nSummarize this text in a few sentences."


def question_prompt(question: str) -> str:
    """The prompt of a question that is answered in words."""
    return f"Question: {question}\nAnswer:"


def summary_of(row: dict[str, Any]) -> tuple[str, str]:
    """(document, summary) of a row, in the names of CNN/DailyMail, SAMSum or ours. KeyError for others."""
    text = next((key for key in ("article", "dialogue") if key in row), "document")
    return row[text].strip(), row["highlights" if text == "article" else "summary"].strip()


def example(task: str, row: dict[Any, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row; a line of a .tsv is {number of the column: cell}. Raises Skip for others."""
    try:
        if task in PROMPTS:
            named = dict(zip(COLUMNS[task], row.values(), strict=True)) if 1 in row else row
            if named["label"] == "label":
                raise Skip("the line of headers")
            return PROMPTS[task].format_map(named), ANSWERS[task][LABELS[task][str(named["label"])]]
        if task == "summarize":
            document, summary = summary_of(row)
            return document + ASK_SUMMARY, summary
        if task == "mawps":  # the numbers are floats: 22.0
            work = re.sub(r"\.0\b", "", row["equation"])
            number = require_text(float(row["ans"]), "ans")
            return question_prompt(row["original_text"]), f"{work}\n#### {number}"
        return question_prompt(row["question"]), row["answer"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Skip(f"not a row of {task} ({type(error).__name__}: {error})") from None


def conversation_of(task: str, row: Any) -> dict[str, Any]:
    """A row of the form that dataset/conversations.py reads. Raises Skip if it is not one of the task."""
    if not isinstance(row, dict):
        raise Skip("not a JSON object")
    question, answer = example(task, row)
    return {"question": question, "answer": answer}
