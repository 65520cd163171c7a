"""Closed-book questions: HotpotQA (arXiv 1809.09600) and TriviaQA (arXiv 1705.03551), answered from memory.

    {"question": "Who wrote Emma?", "answer": "Jane Austen", "type": "bridge"}                      HotpotQA
    {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen", "aliases": ["J. Austen"]}}   TriviaQA

The prompt is that of lm-eval's task triviaqa, without its second question mark. Five worked examples come
first (--shots=0 for none): the last rows of the file, which are not asked.

    Question: Who wrote Emma?
    Answer: Jane Austen

    Question: ...
    Answer:

A row with the key "passage" is asked with this text before its question; tools/errors.py then finds answers
that the text does not support. Only the first line of the generated text counts (lm-eval also stops at a
dot or a comma, which cuts "J. Austen"). Exact match and F1 are SQuAD's (v1.1, arXiv 1606.05250). Texts are
compared in lower case, without punctuation and articles; F1 is that of their words. If there are several
right answers, the best match is taken. As in HotpotQA's own script, "yes" and "no" are right or wrong as a
whole. Files: hotpotqa*, triviaqa* (rows as above). On the hub: the validation splits of hotpotqa/hotpot_qa
(distractor) and mandarjoshi/trivia_qa (rc.nocontext).
"""

import re
import string
from collections import Counter
from typing import Any, Literal, NamedTuple

from dataset.tasks import question_prompt
from evals.benchmarks import Questions, answer_text, read, text_of, texts_of, with_last_as_shots
from evals.lm import LM
from evals.results import Result, means, truncated

HUB = {"hotpotqa": "hotpotqa/hotpot_qa:distractor:validation",
       "triviaqa": "mandarjoshi/trivia_qa:rc.nocontext:validation"}
SHOTS = 5
MAX_NEW_TOKENS = 32


# ---- SQuAD's comparison -----------------------------------------------------------------------------------

def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and repeated spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(said: str, answer: str) -> bool:
    return normalized(said) == normalized(answer)


def f1(said: str, answer: str) -> float:
    """The harmonic mean of precision and recall of words.

    Equal texts have 1, even if no word is left ("The The"), as in SQuAD 2.0's script.
    """
    said, answer = normalized(said), normalized(answer)
    if said == answer or {said, answer} & {"yes", "no"}:
        return float(said == answer)
    common = (Counter(said.split()) & Counter(answer.split())).total()
    return 2 * common / (len(said.split()) + len(answer.split())) if common else 0.0


# ---- The task -------------------------------------------------------------------------------------------

class OpenQuestion(NamedTuple):
    prompt: str
    answers: list[str]  # right answers, the best known first
    kind: str | None  # HotpotQA's "bridge" or "comparison"
    passage: str = ""  # a text that comes before the question, if the row has one


def question_of(row: dict[str, Any]) -> OpenQuestion:
    answer = row["answer"]
    aliases = []
    if isinstance(answer, dict):
        aliases = [text for text in texts_of(answer["aliases"]) if text.strip()]  # a blank one says nothing
        answer = answer["value"]
    kind = None if row.get("type") is None else text_of(row["type"])
    passage = text_of(row.get("passage", ""))
    prompt = question_prompt(text_of(row["question"]))
    prompt = f"{passage}\n\n{prompt}" if passage else prompt
    return OpenQuestion(prompt, [answer_text(answer), *aliases], kind, passage)


def load(source: str | None, limit: int, shots: int | None,
         name: Literal["hotpotqa", "triviaqa"]) -> Questions:
    """The first `limit` rows as questions, and the last `shots` as worked examples."""
    return with_last_as_shots(read(source, name, HUB[name]), limit, SHOTS if shots is None else shots,
                              question_of)


def score(lm: LM, questions: Questions, name: str) -> Result:
    """Exact match and F1. If the rows have a type, the details have exact match by type."""
    shots = "".join(f"{question.prompt} {question.answers[0]}\n\n" for question in questions.shots)
    prompts = [shots + question.prompt for question in questions.asked]
    texts = lm.generate_until(prompts, ["\n"], MAX_NEW_TOKENS)
    answers, types = [], {}
    for question, text in zip(questions.asked, texts, strict=True):
        exact, overlap = (max(metric(text, answer) for answer in question.answers)
                          for metric in (exact_match, f1))
        answers.append({"prompt": question.prompt, "answers": question.answers, "said": text.strip(),
                        "vote": normalized(text), "exact_match": exact, "f1": overlap}
                       | ({"passage": question.passage} if question.passage else {}))
        types.setdefault(question.kind, []).append(exact)
    details = {"shots": len(questions.shots), "first_prompt": prompts[0],
               "types": {kind: sum(each) / len(each) for kind, each in types.items() if kind}}
    return Result(means(answers, ("exact_match", "f1")) | truncated(lm.truncated), answers, details)
