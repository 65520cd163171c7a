"""Summaries of texts, scored by ROUGE (Lin 2004, "ROUGE: a package for automatic evaluation of summaries"):
CNN/DailyMail (arXiv 1704.04368), XSum (arXiv 1808.08745) and SAMSum (arXiv 1911.12237).

    {"document": "The council met on Monday and ...", "summary": "The council agreed on a new bridge."}

The prompt is GPT-2's (Radford et al. 2019, section 3.6): the document, a blank line and "TL;DR:". For a chat
model (--chat=True) it is the document, a blank line and "Summarize this text in a few sentences.". The
summary ends at a blank line or after 128 tokens. A document that does not fit into the context loses its end.
With --shots=k the last k rows, which are not asked then, come first with their summaries.

ROUGE is the F-measure of the package rouge_score (pip install rouge_score), of Porter stems ("ends" equals
"ended"), as in pyrouge, which the papers use. rouge1 counts common words, rouge2 common pairs of words.
rougeL is the longest common subsequence of the two texts, each as one sequence (the sentence level).
rougeLsum takes lines for sentences (the summary level, which papers on CNN/DailyMail report). Files:
summarize*, xsum*, samsum*, with document, article or dialogue; hub: the test splits in HUB.
"""

import functools
from typing import Any

from configurator import optional_import
from dataset.tasks import ASK_SUMMARY, summary_of
from evals.benchmarks import Questions, answer_text, read, with_last_as_shots
from evals.lm import LM
from evals.results import Result, means, truncated

HUB = {"summarize": "abisee/cnn_dailymail:3.0.0:test", "xsum": "EdinburghNLP/xsum::test",
       "samsum": "knkarthick/samsum::test"}
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MAX_NEW_TOKENS = 128
ASK = "\n\nTL;DR:"


@functools.cache
def scorer() -> Any:
    """The scorer of the package rouge_score. UserError if it is missing."""
    return optional_import("rouge_score.rouge_scorer", "ROUGE").RougeScorer(list(ROUGE), use_stemmer=True)


def rouge(summary: str, reference: str) -> dict[str, float]:
    """{"rouge1": F-measure, ..} of a summary against a reference."""
    return {name: each.fmeasure for name, each in scorer().score(reference, summary).items()}


def document_and_summary(row: dict[str, Any]) -> tuple[str, str]:
    document, summary = summary_of(row)
    return document, answer_text(summary)


def load(source: str | None, limit: int, shots: int | None, name: str = "summarize") -> Questions:
    """The first `limit` rows as (document, summary), and the last `shots` as worked examples."""
    scorer()  # a missing package ends the program now
    return with_last_as_shots(read(source, name, HUB[name]), limit, shots or 0, document_and_summary)


def score(lm: LM, questions: Questions, name: str = "summarize") -> Result:
    """The four kinds of ROUGE, each the mean over the summaries."""
    request = ASK_SUMMARY if lm.chat else ASK
    shots = lm.tokenizer.encode("".join(f"{document}{request} {summary}\n\n\n"
                                        for document, summary in questions.shots))
    documents = [lm.tokenizer.encode(document) for document, _ in questions.asked]
    end, room = lm.tokenizer.encode(request), lm.room(MAX_NEW_TOKENS)
    # Tokens of a document that are read: what the examples leave, but at least half of the room. If the
    # prompt is then too long, the examples lose their beginning.
    kept = max(room - len(shots) - len(end), room // 2)
    prompts = [shots + ids[:kept] + end for ids in documents]
    texts = lm.generate_until(prompts, ["\n\n"], MAX_NEW_TOKENS)
    answers = [{"document": document, "summary": summary, "said": text.strip(), **rouge(text, summary)}
               for (document, summary), text in zip(questions.asked, texts, strict=True)]
    return Result(means(answers, ROUGE) | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": lm.tokenizer.decode(prompts[0]),
                   "documents_cut": sum(len(ids) > kept for ids in documents)})
