"""Rows of benchmarks as conversations: what `prepare.py --kind=chat --task=NAME` makes of a row.

    python prepare.py --kind=chat --task=sst2 --source=sst2_train.tsv --tokenizer=MODEL --out=data/sst2
    python prepare.py --kind=chat --task=gsm8k --source=hf:openai/gsm8k:main:train --tokenizer=MODEL

    example("sst2", {"sentence": "a great film", "label": 1})
    # ("a great film\\nQuestion: Is this sentence positive or negative?\\nAnswer:", "positive")

The prompts are those that evals/tasks/ asks with --chat=True, so a model is tuned on what it is measured by.
Each task has the forms of row that its evaluation reads. The answer of an arithmetic word problem has
GSM8K's form: the work, which is an equation in MAWPS, SVAMP and ASDiv, then "#### " and the number.
"""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from dataset.conversations import first_value
from dataset.sources import Skip

TaskName = Literal["sst2", "cola", "rte", "mnli", "mrpc", "qqp", "qnli", "wnli", "gsm8k", "mawps", "svamp",
                   "asdiv", "summarize"]
GLUE = tomllib.loads(Path(__file__).with_name("glue.toml").read_text(encoding="utf-8"))
PROMPTS = {task: each["prompt"] for task, each in GLUE.items()}
ANSWERS = {task: tuple(each["answers"]) for task, each in GLUE.items()}  # of the labels 0, 1, ..
COLUMNS = {task: each["columns"] for task, each in GLUE.items() if "columns" in each}  # of a .tsv
# Labels that are words in the .tsv of RTE and QNLI. All other labels are the number of an answer.
LABELS = {"entailment": 0, "not_entailment": 1}
ASK_SUMMARY = "\n\nSummarize this text in a few sentences."


def question_prompt(question: str) -> str:
    """The prompt of a question that is answered in words."""
    return "Question: " + question + "\nAnswer:"  # TypeError for a number


def word_problem(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, worked answer) of a row in the names of GSM8K, MAWPS, SVAMP or ASDiv. KeyError for others."""
    row = {key.lower(): value for key, value in row.items()}
    work = first_value(row, "equation", "formula")
    if work is None:
        return question_prompt(row["question"]), row["answer"]
    question = " ".join(row[key].strip() for key in ("body", "original_text", "question") if key in row)
    work = re.sub(r"\.0\b", "", work)  # numbers may be floats: 22.0
    text = str(first_value(row, "answer", "ans", "result_float"))  # such as 51.0, "1,200 (miles)"
    number = float(text.split(" (")[0].replace(",", ""))
    return question_prompt(question), f"{work}\n#### {int(number) if number.is_integer() else number}"


def summary_of(row: dict[str, Any]) -> tuple[str, str]:
    """(document, summary) of a row, in the names of CNN/DailyMail, SAMSum or ours. KeyError for others."""
    text = next((key for key in ("article", "dialogue") if key in row), "document")
    return row[text].strip(), row["highlights" if text == "article" else "summary"].strip()


def glue_question(task: str, row: dict[str, Any]) -> tuple[str, int]:
    """(prompt, index of the right one of ANSWERS) of a row of GLUE.

    The label is a number, or that number as text, or a word of LABELS. Raises KeyError, TypeError or
    ValueError if a text or the label is not one.
    """
    texts = {key: row[key] for key in re.findall(r"{(\w+)}", PROMPTS[task])}
    if wrong := [text for text in texts.values() if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} is not a text")
    if task == "mnli":  # the harness ends each hypothesis with a dot
        texts["hypothesis"] = texts["hypothesis"].strip().removesuffix(".") + "."
    labels = [str(number) for number in range(len(ANSWERS[task]))]
    label = LABELS.get(row["label"], row["label"]) if task in ("rte", "qnli") else row["label"]
    if str(label) not in labels:
        raise ValueError(f"the label {label!r} is not one of {', '.join(labels)}")
    return PROMPTS[task].format_map(texts), int(label)


def example(task: str, row: dict[Any, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row; a line of a .tsv is {number of the column: cell}. Raises Skip for others."""
    try:
        if task in PROMPTS:
            named = dict(zip(COLUMNS[task], row.values(), strict=True)) if 1 in row else row
            if named["label"] == "label":
                raise Skip("the line of headers")
            prompt, gold = glue_question(task, named)
            return prompt, ANSWERS[task][gold]
        if task == "summarize":
            document, summary = summary_of(row)
            return document + ASK_SUMMARY, summary
        return word_problem(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Skip(f"not a row of {task} ({type(error).__name__}: {error})") from None


def conversation_of(task: str, row: dict[Any, Any]) -> dict[str, Any]:
    """A row of the form that dataset/conversations.py reads. Raises Skip if it is not one of the task."""
    question, answer = example(task, row)
    return {"question": question, "answer": answer}
