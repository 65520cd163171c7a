"""Summaries of any texts, by ROUGE (Lin 2004, "ROUGE: a package for automatic evaluation of summaries").

    {"document": "The council met on Monday and ...", "summary": "The council agreed on a new bridge."}

The prompt is GPT-2's (Radford et al. 2019, section 3.6): the document, and behind a blank line "TL;DR:"; for
an assistant (--chat=True) a blank line and "Summarize this text in a few sentences.". What is written counts
up to a blank line, at most 128 tokens of it. A document that does not fit the context loses its end. With
--shots=k the last k rows, which are then not asked, stand before it with their summaries.

ROUGE is the F-measure of the package rouge_score, without stemming. Words are runs of a-z and 0-9; rouge1 and
rouge2 count them and their pairs. rougeL is the longest common subsequence of the two texts, each as a single
sequence (the sentence level). rougeLsum takes lines for sentences, and counts of each line of the right
summary the union of its common subsequences with all lines that were written (the summary level, which papers
on CNN/DailyMail report). Files: summarize*, with document and summary or article and highlights; hub:
abisee/cnn_dailymail, 3.0.0, test.
"""

import re
from collections import Counter
from typing import Any

from configurator import UserError
from evals.benchmarks import Questions, convert, read
from evals.lm import LM
from evals.results import Result, mean, truncated

HUB = "abisee/cnn_dailymail:3.0.0:test"
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MAX_NEW_TOKENS = 128
ASK, ASK_CHAT = "\n\nTL;DR:", "\n\nSummarize this text in a few sentences."


def load(source: str | None, limit: int, shots: int | None) -> Questions:
    """The first `limit` rows as (document, summary), and the last `shots`."""
    rows = read(source, "summarize", HUB)
    asked = len(rows) - (shots or 0)
    if asked <= 0:
        raise UserError(f"shots={shots}: there are {len(rows)} rows, which leaves none to ask")
    return Questions(convert(rows[:min(asked, limit)], texts_of), convert(rows[asked:], texts_of))


def texts_of(row: dict[str, Any]) -> tuple[str, str]:
    keys = ("article", "highlights") if "article" in row else ("document", "summary")
    document, summary = (row[key].strip() for key in keys)
    return document, summary


def score(lm: LM, questions: Questions) -> Result:
    """The four figures, each the mean over the summaries."""
    ask = ASK_CHAT if lm.chat else ASK
    shots = lm.tokenizer.encode("".join(f"{document}{ask} {summary}\n\n\n"
                                        for document, summary in questions.shots))
    documents = [lm.tokenizer.encode(document) for document, _ in questions.asked]
    end, room = lm.tokenizer.encode(ask), lm.room(MAX_NEW_TOKENS)
    kept = max(room - len(shots) - len(end), room // 2)  # of a document; it comes before the worked examples
    prompts = [shots + ids[:kept] + end for ids in documents]
    texts = lm.generate_until(prompts, ["\n\n"], MAX_NEW_TOKENS)
    answers = [{"document": document[:200], "summary": summary, "said": text.strip(), **rouge(text, summary)}
               for (document, summary), text in zip(questions.asked, texts, strict=True)]
    figures = {key: mean([answer[key] for answer in answers]) for key in ROUGE}
    return Result(figures | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": lm.tokenizer.decode(prompts[0]),
                   "documents_cut": sum(len(ids) > kept for ids in documents)})


# ---- ROUGE ------------------------------------------------------------------------------------------------

def rouge(said: str, right: str) -> dict[str, float]:
    """{"rouge1": F-measure, ..} of two texts."""
    a, b = words(right), words(said)
    pairs = [Counter(zip(text, text[1:], strict=False)) for text in (a, b)]
    return {"rouge1": f_measure((Counter(a) & Counter(b)).total(), len(a), len(b)),
            "rouge2": f_measure((pairs[0] & pairs[1]).total(), len(a) - 1, len(b) - 1),
            "rougeL": f_measure(len(common(a, b)), len(a), len(b)),
            "rougeLsum": f_measure(union_of_lines(right, said), len(a), len(b))}


def words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f_measure(hits: int, right: int, said: int) -> float:
    """Harmonic mean of hits / right (recall) and hits / said (precision)."""
    return 2 * hits / (right + said) if hits else 0.0


def common(a: list[str], b: list[str]) -> list[int]:
    """The places in a of a longest common subsequence of a and b; of several, the one that rouge_score
    takes."""
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # [i][j]: of a[:i] and b[:j]
    for i, left in enumerate(a, 1):
        above, row = longest[i - 1], longest[i]
        for j, right in enumerate(b, 1):
            row[j] = above[j - 1] + 1 if left == right else max(above[j], row[j - 1])
    places, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif longest[i][j - 1] > longest[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]


def union_of_lines(right: str, said: str) -> int:
    """Hits of the summary level: no word counts more often than it stands in either text."""
    lines = [words(line) for line in said.split("\n")]
    left = Counter(words(right)) & Counter(words(said))
    hits = 0
    for line in map(words, right.split("\n")):
        for place in sorted({place for other in lines for place in common(line, other)}):
            hits += left[line[place]] > 0
            left[line[place]] -= 1
    return hits
