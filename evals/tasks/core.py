"""CORE: the mean of 22 tasks of DCLM, each centred so that guessing is 0 (arXiv 2406.11794).

    {"query": "The man turned on the faucet, therefore", "choices": ["the toilet filled ..", ".."], "gold": 1}
    {"context_options": ["The city councilmen refused .. because the city councilmen", ".."],
     "continuation": "feared violence.", "gold": 0}
    {"context": "The native language of Daniel Schneidermann is", "continuation": "French"}

A row of the first kind has one text before several choices, a row of the second kind one continuation of
several texts. The answer is the text with the highest mean log-probability per token, over the tokens in
which the texts differ. For a row of the third kind, greedy decoding has to write the continuation. Worked
examples, with a blank line after each, come from the same file. The figure of a task is (accuracy - chance) /
(1 - chance).

The protocol is that of nanochat (github.com/karpathy/nanochat, nanochat/core_eval.py): the order of the rows,
the examples of each question and the tokens that count are the same. Number of examples and chance are
DCLM's. Equal choices share the point, where nanochat takes the first of them.

--data=core=FOLDER holds the 21 files of nanochat's eval_bundle.zip, or of llm-foundry's
scripts/eval/local_data, anywhere below it. Tasks without a file are left out: the n of the figure "core" is
the number of tasks. The first --limit rows of each task are asked. There is nothing on the hub.
"""

import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from evals.benchmarks import answer_text, benchmark_rows, convert, label_number, text_of, texts_of
from evals.likelihood import Likelihood, Text, opening_id, score_texts, shared_prefix_length
from evals.lm import LM
from evals.multiple_choice import Question, grade, grade_greedy, log_probs_of, shots_text
from evals.results import Figure, Result
from formats.tokenizer import Tokenizer


class Setting(NamedTuple):
    """A task of CORE: a line of core.csv."""

    file: str
    shots: int  # worked examples
    chance: float  # of a guess, in percent; for BoolQ the share of the more frequent answer
    before: str  # text between the question and the answer, before a space


LINES = Path(__file__).with_suffix(".csv").read_text(encoding="utf-8").splitlines()
SETTINGS = {name: Setting(file, int(shots), float(chance), before and f"\n{before}")  # by task
            for name, file, shots, chance, before in (line.split(",") for line in LINES[1:])}


# ---- Questions --------------------------------------------------------------------------------------------

def question_of(row: dict[str, Any], before: str) -> Question:
    """A row of one of the three kinds. before: text between the question and the answer."""
    if "context_options" in row:
        contexts = texts_of(row["context_options"])
        return Question("", tuple(contexts), (label_number(row["gold"], len(contexts)),),
                        ending=answer_text(row["continuation"]))
    if "choices" in row:
        choices = texts_of(row["choices"])
        return Question(text_of(row["query"]) + before, tuple(choices),
                        (label_number(row["gold"], len(choices)),))
    return Question(text_of(row["context"]).strip() + before, (answer_text(row["continuation"]),), (0,))


def examples(questions: list[Question], index: int, shots: int) -> str:
    """The worked examples of a question: other rows of its file, drawn as nanochat draws them."""
    others = questions[:index] + questions[index + 1:]
    return shots_text(random.Random(1234 + index).sample(others, shots), shots)


def load(source: str | None, limit: int, shots: int | None) -> dict[str, list[Question]]:
    """{task: its first `limit` rows in nanochat's order}; `shots` has no effect.

    Raises UserError if the folder has no file of CORE, or if a file has too few rows.
    """
    # If two files have the same name, the path that sorts last is read.
    files = {path.stem: path for path in sorted(Path(source).rglob("*.jsonl"))} if source else {}
    found = {name: files[each.file] for name, each in SETTINGS.items() if each.file in files}
    if not found:
        raise UserError(f"data={source}: no file of CORE; give --data=core=FOLDER with piqa.jsonl, ..")
    tasks = {}
    for name, path in found.items():
        rows, setting = list(benchmark_rows(path)), SETTINGS[name]
        random.Random(1337).shuffle(rows)
        questions = convert(rows[:limit], partial(question_of, before=setting.before))
        if len(questions) <= setting.shots:
            raise UserError(f"{path}: {len(questions)} rows, with limit={limit}; CORE takes "
                            f"{setting.shots} of them as worked examples")
        tasks[name] = [replace(each, shots=examples(questions, index, setting.shots))
                       for index, each in enumerate(questions)]
    return tasks


# ---- Answers ----------------------------------------------------------------------------------------------

def scored_texts(tokenizer: Tokenizer, question: Question) -> list[Text]:
    """The choices of a question as ids that end in the tokens to score."""
    count = len(question.choices)
    texts = [question.shots + "".join(question.scored(index)) for index in range(count)]
    if count == 1:  # scored are the tokens that the text without the choice does not have
        texts.append(question.shots + question.prompt)
    rows = [np.array([opening_id(tokenizer), *tokenizer.encode(text)], np.int32) for text in texts]
    if question.ending:  # the tokens of the common end
        targets = [min(shared_prefix_length(rows[0][::-1], row[::-1]) for row in rows[1:])] * count
    else:  # the tokens after the common beginning
        same = min(shared_prefix_length(rows[0], row) for row in rows[1:])
        targets = [len(row) - same for row in rows[:count]]
    # One token at least: a choice may be the beginning of another one.
    return [Text(row, min(max(target, 1), len(row) - 1))
            for row, target in zip(rows[:count], targets, strict=True)]


def score_task(lm: LM, questions: list[Question]) -> Result:
    """The accuracy by mean log-probability per token or, for one choice, by greedy decoding."""
    most = lm.model.config.block_size + 1  # the last token is not read
    rows = [scored_texts(lm.tokenizer, question) for question in questions]
    cut = [Text(text.ids[-most:], min(text.num_targets, most - 1)) for row in rows for text in row]
    scores = iter(zip(score_texts(lm.model, cut), cut, strict=True))
    likelihoods = []
    for row in rows:
        pairs = [(text, *next(scores)) for text in row]
        likelihoods.append([Likelihood(score.log_prob / kept.num_targets, len(text.ids) - len(kept.ids),
                                       score.greedy) for text, score, kept in pairs])
    if len(questions[0].choices) == 1:
        return grade_greedy(questions, likelihoods)
    return grade(questions, likelihoods, {"accuracy": log_probs_of(likelihoods)})


def centre(figure: Figure, chance: float) -> Figure:
    """A share of right answers on a scale where guessing is 0 and always right is 1."""
    return Figure((figure.value - chance) / (1 - chance), figure.stderr / (1 - chance), figure.n)


def score(lm: LM, tasks: dict[str, list[Question]]) -> Result:
    """CORE, and the accuracy of each task. The details have each task centred, and the missing tasks."""
    if lm.chat:
        raise UserError("chat=True: CORE has no chat form; its texts are continued")
    results = {name: score_task(lm, questions) for name, questions in tasks.items()}
    figures = {name: result.figures["accuracy"] for name, result in results.items()}
    centred = {name: centre(figure, SETTINGS[name].chance / 100) for name, figure in figures.items()}
    n, cut = len(centred), sum(result.details["truncated"] for result in results.values())
    core = Figure(sum(each.value for each in centred.values()) / n,
                  math.sqrt(sum(each.stderr**2 for each in centred.values())) / n, n)
    answers = [{"task": name, **answer} for name, result in results.items() for answer in result.answers]
    return Result({"core": core, **figures}, answers, {
        "centred": {name: figure._asdict() for name, figure in centred.items()}, "truncated": cut,
        "missing": [name for name in SETTINGS if name not in tasks]})
