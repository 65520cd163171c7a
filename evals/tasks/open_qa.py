"""Closed-book questions: HotpotQA (arXiv 1809.09600) and TriviaQA (arXiv 1705.03551), answered from memory.

    {"question": "Who wrote Emma?", "answer": "Jane Austen", "type": "bridge"}                      HotpotQA
    {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen", "aliases": ["J. Austen"]}}   TriviaQA

The prompt is that of lm-eval's task triviaqa, less a second question mark, with five worked examples before
it (--shots=0 for none): the last rows of the file, which are not asked themselves.

    Question: Who wrote Emma?
    Answer: Jane Austen

    Question: ...
    Answer:

The first line that is written counts (lm-eval also stops at a dot or a comma, which cuts "J. Austen"). Exact
match and F1 are SQuAD's (v1.1, arXiv 1606.05250): lower case, without punctuation and articles; F1 is that of
the words; of several right answers the nearest counts. As in HotpotQA's own script, "yes" and "no" are right
or wrong as a whole. Files: hotpotqa*, triviaqa* (rows as above); hub: hotpotqa/hotpot_qa (distractor) and
mandarjoshi/trivia_qa (rc.nocontext), their validation rows.
"""

import re
import string
from collections import Counter
from typing import Any, Literal, NamedTuple

from configurator import UserError
from evals.benchmarks import Questions, convert, read
from evals.lm import LM
from evals.results import Result, mean, truncated

HUB = {"hotpotqa": "hotpotqa/hotpot_qa:distractor:validation",
       "triviaqa": "mandarjoshi/trivia_qa:rc.nocontext:validation"}
SHOTS = 5
MAX_NEW_TOKENS = 32


class OpenQuestion(NamedTuple):
    prompt: str
    answers: list[str]  # those that are right, the best known first
    kind: str | None  # HotpotQA's "bridge" or "comparison"


def load(source: str | None, limit: int, shots: int | None,
         name: Literal["hotpotqa", "triviaqa"]) -> Questions:
    """The first `limit` rows, and the last `shots`."""
    rows = read(source, name, HUB[name])
    count = SHOTS if shots is None else shots
    if count >= len(rows):
        raise UserError(f"shots={count}: {name} has {len(rows)} rows, which leaves none to ask")
    asked, examples = rows[:len(rows) - count][:limit], rows[len(rows) - count:]
    return Questions(convert(asked, question_of), convert(examples, question_of))


def question_of(row: dict[str, Any]) -> OpenQuestion:
    answer = row["answer"]
    answers = [answer["value"], *answer["aliases"]] if isinstance(answer, dict) else [answer]
    if not all(isinstance(text, str) for text in answers):
        raise TypeError("an answer is a text")
    return OpenQuestion("Question: " + row["question"] + "\nAnswer:", answers, row.get("type"))


def score(lm: LM, questions: Questions, name: str) -> Result:
    """Exact match and F1; where the rows have a type, exact match by type among the details."""
    shots = "".join(f"{question.prompt} {question.answers[0]}\n\n" for question in questions.shots)
    prompts = [shots + question.prompt for question in questions.asked]
    texts = lm.generate_until(prompts, ["\n"], MAX_NEW_TOKENS)
    answers, types = [], {}
    for question, text in zip(questions.asked, texts, strict=True):
        exact, overlap = (max(judge(text, answer) for answer in question.answers)
                          for judge in (exact_match, f1))
        answers.append({"prompt": question.prompt, "answers": question.answers, "said": text.strip(),
                        "exact_match": exact, "f1": overlap})
        types.setdefault(question.kind, []).append(exact)
    details = {"shots": len(questions.shots), "first_prompt": prompts[0],
               "types": {kind: sum(of) / len(of) for kind, of in types.items() if kind}}
    figures = {key: mean([answer[key] for answer in answers]) for key in ("exact_match", "f1")}
    return Result(figures | truncated(lm.truncated), answers, details)


# ---- SQuAD's comparison -----------------------------------------------------------------------------------

def normalized(text: str) -> str:
    """Lower case, without punctuation (ASCII's), articles and superfluous space."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(said: str, answer: str) -> bool:
    return normalized(said) == normalized(answer)


def f1(said: str, answer: str) -> float:
    """Harmonic mean of the shares of words that are in the other one, too; of equals 1, even of no words at
    all ("The The"), as in SQuAD 2.0's script."""
    said, answer = normalized(said), normalized(answer)
    if said == answer or {said, answer} & {"yes", "no"}:
        return float(said == answer)
    common = (Counter(said.split()) & Counter(answer.split())).total()
    return 2 * common / (len(said.split()) + len(answer.split())) if common else 0.0
