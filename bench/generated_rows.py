"""Rows and answers for bench/generated.py.

    gsm8k_rows("../data", "gsm8k")       # {"train": eight rows, "test": rows}, in the hub's form
    ANSWERS["gsm8k"]({"question": "..", "answer": "2 + 3 = 5\\n#### 5"})["decimals"]

Each function of ANSWERS takes a row in the hub's form and returns {how the answer is written: text}: right
answers, rewritten or made wrong on purpose. The names appear in the results, so that a difference can be
traced to the way in which an answer is written. SQuAD's own files and the rows of llm-foundry's TriviaQA are
turned into the hub's form.
"""

import re
from typing import Any

from dataset.tasks import word_problem
from evals.benchmarks import find, read
from evals.multiple_choice import splits
from evals.tasks import open_qa, word_problems

Row = dict[str, Any]


# ---- Rows in the hub's form -------------------------------------------------------------------------------

def gsm8k_rows(source: str, name: str) -> dict[str, list[Row]]:
    """The rows as GSM8K has them. ASDiv, SVAMP and MAWPS get GSM8K's form."""
    train, test = splits(source, name, word_problems.HUB[name])
    if name == "asdiv":
        test = [row for row in test if re.fullmatch(r"[\d.]+( \(.*\))?", row["answer"])]
    if not train:
        train, test = test[-word_problems.SHOTS:], test[:-word_problems.SHOTS]

    def named(row: Row) -> Row:
        prompt, answer = word_problem(row)
        return {"question": prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": answer}
    train = train[:word_problems.SHOTS]
    return {"train": [*map(named, train)], "test": [*map(named, test)]}


def triviaqa_rows(source: str, name: str) -> dict[str, list[Row]]:
    """The harness answers the worked examples by the first alias, so the value comes first."""
    rows = read(source, name, "")
    if "context" in rows[0]:  # a row of llm-foundry
        rows = [{"question": row["context"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                 "answer": {"value": row["answer"], "aliases": row["aliases"]}} for row in rows]
    count = open_qa.SHOTS[name]
    made = [{"question": row["question"], "answer": {"value": row["answer"]["value"], "aliases": [
        *dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])]}} for row in rows]
    return {"train": made[-count:], "test": made[:-count]}


def squad_rows(source: str, name: str) -> dict[str, list[Row]]:
    rows = open_qa.flat_rows(read(source, name, ""))
    texts = [row["answers"]["text"] if isinstance(row["answers"], dict) else
             [each["text"] for each in row["answers"]] for row in rows]
    return {"validation": [
        {"id": str(number), **{key: row[key] for key in ("title", "context", "question")},
         "answers": {"text": each, "answer_start": [0] * len(each)}}
        for number, (row, each) in enumerate(zip(rows, texts, strict=True))]}


def mbpp_rows(source: str, name: str) -> dict[str, list[Row]]:
    keys = ("text", "code", "task_id", "test_setup_code", "test_list")
    rows = [{key: row[key] for key in keys} for row in read(source, name, "")]
    return {"prompt": [row for row in rows if row["task_id"] < 11],
            "test": [row for row in rows if 11 <= row["task_id"] <= 510]}


def plain_rows(source: str, name: str) -> dict[str, list[Row]]:
    return {"test": [{key: value for key, value in row.items() if key != "file"}
                     for row in read(source, name, "")]}


def page_rows(source: str, name: str) -> dict[str, list[Row]]:
    """The articles of WikiText's raw text: each begins at a line like " = Title = "."""
    text = find(source, name, {".txt"})[0].read_text("utf-8")
    pages = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
    return {"test": [{"page": page} for page in pages if page.strip()]}


# ---- Answers ----------------------------------------------------------------------------------------------


def worked_answers(row: Row) -> dict[str, str]:
    """Answers to a word problem."""
    work, _, number = row["answer"].rpartition("#### ")
    plain = number.replace(",", "")
    more = str(float(plain) + 1).removesuffix(".0")
    return {
        "right": f" {row['answer']}", "no steps": f" #### {number}", "spaces": f" {work}####  {number} ",
        "thousands": f" {work}#### {float(plain):,.10g}",
        "decimals": f" {work}#### {plain}{'0' if '.' in plain else '.00'}",
        "dollar": f" {work}#### ${number}", "full stop": f" {work}#### {number}.",
        "unit": f" {work}#### {number} apples", "sentence": f" So the answer is {number}.",
        "sentence and unit": f" So she has {number} apples left", "negative": f" {work}#### -{plain}",
        "one more": f" {work}#### {more}", "two numbers": f" {work}#### {number}\n#### {more}",
        "wrong, then right": f" It is not {more} but {number}",
        "next question": f" {row['answer']}\n\nQuestion: What is 2 + 5?\nAnswer: #### 7",
        "no number": " I do not know", "empty": ""}


def short_answers(row: Row) -> dict[str, str]:
    """Answers to a question from memory."""
    answer, *others = row["answer"]["aliases"]
    return spellings(answer) | {
        "alias": f" {others[-1] if others else answer}", "initials": f" J. {answer}",
        "no answer": " unanswerable"}


def passage_answers(row: Row) -> dict[str, str]:
    """Answers to a question with a passage."""
    answers = row["answers"]["text"]
    words = row["context"].split()
    return spellings(answers[-1] if answers else "") | {
        "unanswerable": " unanswerable", "Unanswerable.": " Unanswerable.",
        "beginning of the passage": " " + " ".join(words[:5]),
        "more words": f" It is {answers[0] if answers else words[-1]} I think",
        "first word": f" {(answers[0] if answers else words[0]).split()[0]}"}


def spellings(answer: str) -> dict[str, str]:
    """An answer in several spellings, and two that are wrong."""
    return {"right": f" {answer}", "lower case": f" {answer.lower()}", "upper case": f" {answer.upper()}",
            "article": f" the {answer}", "full stop": f" {answer}.", "quotes": f' "{answer}"',
            "hyphens": f" {answer.replace(' ', '-')}", "spaces": f"   {answer.replace(' ', '   ')}  ",
            "next line": f" {answer}\n\nQuestion: Who?", "wrong": " a green elephant", "empty": ""}


def programs(row: Row) -> dict[str, str]:
    """Programs for a problem of MBPP."""
    code = row["code"].replace("\r", "")
    names = re.findall(r"assert (?:\w+\()*(\w+)\(", " ".join(row["test_list"]))
    return {"right": f"{code}\n[DONE]\n\nYou are", "twice": f"{code}\n\n{code}", "no end": code,
            "None": f"def {names[0] if names else 'f'}(*values):\n    return None\n[DONE]",
            "another name": re.sub(r"\bdef (\w+)", r"def other_\1", code), "syntax": f"{code}\n)",
            "in Markdown": f"```python\n{code}\n```\n[DONE]", "exit": f"{code}\nraise SystemExit(0)",
            "prose": f"Here it is:\n{code}", "empty": ""}


def summaries(row: Row) -> dict[str, str]:
    """Summaries of an article."""
    right, article = row["highlights"], row["article"]
    words = right.split()
    return {"right": f" {right}", "one line": " " + " ".join(words), "first half":
            " " + " ".join(words[:len(words) // 2]), "backwards": " " + " ".join(words[::-1]),
            "beginning of the article": " " + article[:300],
            "plurals": " " + " ".join(f"{word}s" for word in words),
            "blank line": f" {right}\n\n{article[:100]}", "capitals": f" {right.upper()}", "empty": ""}


def continuations(row: Row) -> dict[str, str]:
    """Continuations of a prompt, which a classifier judges."""
    text = row["prompt"]["text"]
    return {"plain": " and then they went home.", "prompt again": f" {text}", "insult": " you stupid moron",
            "two lines": f" {text}.\n\nNext", "capitals": f" {text.upper()}!", "empty": ""}


ANSWERS = {**dict.fromkeys(("gsm8k", "asdiv", "svamp", "mawps"), worked_answers), "triviaqa": short_answers,
           "squad_v2": passage_answers, "mbpp": programs, "summarize": summaries, "toxicity": continuations}
