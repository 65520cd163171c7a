"""Questions with short answers: HotpotQA (arXiv 1809.09600) and TriviaQA (arXiv 1705.03551), answered from
memory; SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822), answered from a passage.

    {"question": "Who wrote Emma?", "answer": "Jane Austen", "type": "bridge"}                      HotpotQA
    {"question": "Who wrote Emma?", "answer": {"value": "Jane Austen", "aliases": ["J. Austen"]}}   TriviaQA
    {"title": "Emma", "context": "Jane Austen wrote Emma.", "question": "Who wrote Emma?",
     "answers": {"text": ["Jane Austen", "Austen"], ..}}                                            SQuAD

The prompt is that of lm-eval's task triviaqa, without its second question mark. Five worked examples come
first (--shots=0 for none): the last rows of the file, which are not asked.

    Question: Who wrote Emma?
    Answer: Jane Austen

    Question: ...
    Answer:

A row with the key "passage" is asked with this text before its question; tools/errors.py then finds answers
that the text does not support. SQuAD's prompt is that of lm-eval's task squadv2, without worked examples:

    Title: Emma

    Background: Jane Austen wrote Emma.

    Question: Who wrote Emma?

    Answer:

Only the first line of the generated text counts (lm-eval also stops at a dot or a comma, which cuts
"J. Austen"). Exact match and F1 are those of the benchmarks' own scripts. Texts are compared in lower case,
without punctuation and articles; in TriviaQA a space replaces punctuation. F1 is that of their words. If
there are several right answers, the best match is taken. In HotpotQA "yes" and "no" are right or wrong as a
whole. A question of SQuAD 2.0 without an answer is answered by "unanswerable" or by nothing. lm-eval compares
that word with the empty answer of SQuAD's script, so it counts it as wrong. Files: hotpotqa*, triviaqa*,
squad_v1*, squad_v2* (rows as above, or SQuAD's own dev-v1.1.json as --data=squad_v1=FILE). On the hub: the
validation splits in HUB.
"""

import re
import string
from collections import Counter
from collections.abc import Set
from typing import Any, NamedTuple

from dataset.tasks import question_prompt
from evals.benchmarks import Questions, answer_text, convert, read, text_of, texts_of, with_last_as_shots
from evals.lm import LM
from evals.results import Result, means, truncated

HUB = {"hotpotqa": "hotpotqa/hotpot_qa:distractor:validation",
       "triviaqa": "mandarjoshi/trivia_qa:rc.nocontext:validation",
       "squad_v1": "rajpurkar/squad::validation", "squad_v2": "rajpurkar/squad_v2::validation"}
SHOTS = {"hotpotqa": 5, "triviaqa": 5, "squad_v1": 0, "squad_v2": 0}
UNANSWERABLE = "unanswerable"  # what a question without an answer is answered by
YES_NO = {"yes", "no"}
WHOLE: dict[str, Set[str]] = {  # texts that are right or wrong as a whole
    "hotpotqa": YES_NO, "triviaqa": set(), "squad_v1": {UNANSWERABLE}, "squad_v2": {UNANSWERABLE}}
# A span of a passage can be long: 256 is lm-eval's default.
MAX_NEW_TOKENS = {"hotpotqa": 32, "triviaqa": 32, "squad_v1": 256, "squad_v2": 256}


# ---- SQuAD's comparison -----------------------------------------------------------------------------------

def normalized(text: str, trivia: bool = False) -> str:
    """Lower case, without ASCII punctuation, articles and repeated spaces.

    trivia: as in TriviaQA's script, a space replaces punctuation, which includes four quotation marks.
    """
    marks, gap = (string.punctuation + "‘’´`", " ") if trivia else (string.punctuation, "")
    text = "".join(gap if letter in marks else letter for letter in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(said: str, answer: str, trivia: bool = False) -> bool:
    return normalized(said, trivia) == normalized(answer, trivia)


def f1(said: str, answer: str, whole: Set[str] = YES_NO, trivia: bool = False) -> float:
    """The harmonic mean of precision and recall of words.

    Equal texts have 1, even if no word is left ("The The"), as in SQuAD 2.0's script. whole: texts that are
    right or wrong as a whole.
    """
    said, answer = normalized(said, trivia), normalized(answer, trivia)
    if said == answer or {said, answer} & whole:
        return float(said == answer)
    common = (Counter(said.split()) & Counter(answer.split())).total()
    return 2 * common / (len(said.split()) + len(answer.split())) if common else 0.0


# ---- The task -------------------------------------------------------------------------------------------

class OpenQuestion(NamedTuple):
    prompt: str
    answers: list[str]  # right answers, the best known first
    kind: str | None  # HotpotQA's "bridge" or "comparison", SQuAD's "answerable" or "unanswerable"
    passage: str = ""  # a text that comes before the question, if the row has one


def flat_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with one row per question for each article of SQuAD's own files."""
    return [row for part in convert(rows, lambda each: (
        [{**question, "title": each["title"], "context": part["context"], "file": each["file"]}
         for part in each["paragraphs"] for question in part["qas"]] if "paragraphs" in each else [each]))
            for row in part]


def squad_question(row: dict[str, Any]) -> OpenQuestion:
    answers = row["answers"]  # a list of {"text": ..} in SQuAD's own files
    texts = texts_of(answers["text"] if isinstance(answers, dict) else [each["text"] for each in answers])
    prompt = (f"Title: {text_of(row['title'])}\n\nBackground: {text_of(row['context'])}\n\n"
              f"Question: {text_of(row['question'])}\n\nAnswer:")
    return OpenQuestion(prompt, [answer_text(text) for text in texts] or [UNANSWERABLE, ""],
                        "answerable" if texts else "unanswerable", row["context"])


def question_of(row: dict[str, Any]) -> OpenQuestion:
    if "context" in row:
        return squad_question(row)
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


def load(source: str | None, limit: int, shots: int | None, name: str) -> Questions:
    """The first `limit` rows as questions, and the last `shots` as worked examples."""
    return with_last_as_shots(flat_rows(read(source, name, HUB[name])), limit,
                              SHOTS[name] if shots is None else shots, question_of)


def score(lm: LM, questions: Questions, name: str) -> Result:
    """Exact match and F1. If the rows have a type, the details have exact match by type."""
    shots = "".join(f"{question.prompt} {question.answers[0]}\n\n" for question in questions.shots)
    prompts = [shots + question.prompt for question in questions.asked]
    whole, trivia = WHOLE[name], name == "triviaqa"
    nothing = UNANSWERABLE if name == "squad_v2" else ""  # there, no answer is an answer that can win a vote
    texts = lm.generate_until(prompts, ["\n"], MAX_NEW_TOKENS[name])
    answers, types = [], {}
    for question, text in zip(questions.asked, texts, strict=True):
        exact = max(exact_match(text, answer, trivia) for answer in question.answers)
        overlap = max(f1(text, answer, whole, trivia) for answer in question.answers)
        answers.append({"prompt": question.prompt, "answers": question.answers, "said": text.strip(),
                        "vote": normalized(text, trivia) or nothing, "exact_match": exact, "f1": overlap}
                       | ({"passage": question.passage} if question.passage else {}))
        types.setdefault(question.kind, []).append(exact)
    details = {"shots": len(questions.shots), "first_prompt": prompts[0],
               "types": {kind: sum(each) / len(each) for kind, each in types.items() if kind}}
    return Result(means(answers, ("exact_match", "f1")) | truncated(lm.truncated), answers, details)
