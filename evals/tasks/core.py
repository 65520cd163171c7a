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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from evals.benchmarks import convert, file_rows, label_number, text_of, texts_of
from evals.likelihood import Score, Text, opening_id, shared_prefix_length
from evals.lm import LM
from evals.multiple_choice import credit
from evals.results import Figure, Result, mean, truncated
from formats.tokenizer import Tokenizer


class Setting(NamedTuple):
    """A task: its file, worked examples, chance in percent, and the text before the answer."""

    file: str
    shots: int
    chance: float
    delimiter: str = " "


ANSWER = "\nAnswer: "
SETTINGS = {
    "hellaswag_zeroshot": Setting("hellaswag", 0, 25),
    "jeopardy": Setting("jeopardy_all", 10, 0, ANSWER),
    "bigbench_qa_wikidata": Setting("bigbench_qa_wikidata", 10, 0),
    "arc_easy": Setting("arc_easy", 10, 25, ANSWER),
    "arc_challenge": Setting("arc_challenge", 10, 25, ANSWER),
    "copa": Setting("copa", 0, 50),
    "commonsense_qa": Setting("commonsense_qa", 10, 20),
    "piqa": Setting("piqa", 10, 50, ANSWER),
    "openbook_qa": Setting("openbook_qa", 0, 25),
    "lambada_openai": Setting("lambada_openai", 0, 0),
    "hellaswag": Setting("hellaswag", 10, 25),
    "winograd": Setting("winograd_wsc", 0, 50),
    "winogrande": Setting("winogrande", 0, 50),
    "bigbench_dyck_languages": Setting("bigbench_dyck_languages", 10, 0),
    "agi_eval_lsat_ar": Setting("agi_eval_lsat_ar", 3, 20),
    "bigbench_cs_algorithms": Setting("bigbench_cs_algorithms", 10, 0),
    "bigbench_operators": Setting("bigbench_operators", 10, 0),
    "bigbench_repeat_copy_logic": Setting("bigbench_repeat_copy_logic", 10, 0),
    "squad": Setting("squad", 10, 0),
    "coqa": Setting("coqa", 0, 0),
    "boolq": Setting("boolq", 10, 62, ANSWER),  # the share of the more frequent answer
    "bigbench_language_identification": Setting("bigbench_language_identification", 10, 9.1),
}


class Item(NamedTuple):
    """A row: (text before, text after) of each choice; the right one; the kind of row."""

    sides: list[tuple[str, str]]
    gold: int
    kind: str  # its key: "choices", "context_options" or "continuation"

    def texts(self, delimiter: str) -> list[str]:
        return [before + delimiter + after for before, after in self.sides]


# ---- Questions --------------------------------------------------------------------------------------------

def item_of(row: dict[str, Any]) -> Item:
    if "choices" in row:
        sides = [(text_of(row["query"]), choice) for choice in texts_of(row["choices"])]
        return Item(sides, label_number(row["gold"], len(sides)), "choices")
    if "context_options" in row:
        sides = [(context, text_of(row["continuation"])) for context in texts_of(row["context_options"])]
        return Item(sides, label_number(row["gold"], len(sides)), "context_options")
    return Item([(text_of(row["context"]).strip(), text_of(row["continuation"]))], 0, "continuation")


def load(source: str | None, limit: int, shots: int | None) -> dict[str, list[Item]]:
    """{task: its first `limit` rows in nanochat's order}; `shots` has no effect.

    Raises UserError if the folder has no file of CORE, or if a file has too few rows.
    """
    # Of two files with the same name, the last one in the order of the paths counts.
    files = {path.stem: path for path in sorted(Path(source).rglob("*.jsonl"))} if source else {}
    found = {name: files[each.file] for name, each in SETTINGS.items() if each.file in files}
    if not found:
        raise UserError(f"data={source}: no file of CORE; give --data=core=FOLDER with piqa.jsonl, ..")
    tasks = {}
    for name, path in found.items():
        rows = list(file_rows(path))
        random.Random(1337).shuffle(rows)
        tasks[name] = convert(rows[:limit], item_of)
        if len(tasks[name]) <= SETTINGS[name].shots:
            raise UserError(f"{path}: {len(tasks[name])} rows, with limit={limit}; CORE takes "
                            f"{SETTINGS[name].shots} of them as worked examples")
    return tasks


def examples(items: list[Item], index: int, setting: Setting) -> str:
    """The worked examples of a question: other rows of its file, drawn as nanochat draws them."""
    others = [number for number in range(len(items)) if number != index]
    drawn = [items[number] for number in random.Random(1234 + index).sample(others, setting.shots)]
    return "".join(each.texts(setting.delimiter)[each.gold] + "\n\n" for each in drawn)


def choice_texts(tokenizer: Tokenizer, item: Item, before: str, delimiter: str) -> list[Text]:
    """The choices of a question, after its worked examples, as ids that end in the tokens to score."""
    texts = [before + text for text in item.texts(delimiter)]
    if item.kind == "continuation":  # scored are the tokens that the text without it does not have
        texts.append((before + item.sides[0][0] + delimiter).strip())
    rows = [np.array([opening_id(tokenizer), *tokenizer.encode(text)], np.int32) for text in texts]
    if item.kind == "context_options":  # the tokens of the common end
        same = min(shared_prefix_length(rows[0][::-1], row[::-1]) for row in rows[1:])
        counts = [same] * len(rows)
    else:  # the tokens after the common beginning
        same = min(shared_prefix_length(rows[0], row) for row in rows[1:])
        counts = [len(row) - same for row in rows]
    # One token at least: a choice may be the beginning of another one.
    return [Text(row, min(max(count, 1), len(row) - 1))
            for row, count in zip(rows, counts, strict=True)][:len(item.sides)]


# ---- Answers ----------------------------------------------------------------------------------------------

def answer_of(item: Item, texts: list[Text], scores: list[Score]) -> dict[str, Any]:
    """What the model said, and the credit for it. texts, scores: one per choice."""
    if item.kind == "continuation":
        return {"prompt": item.sides[0][0], "choices": [item.sides[0][1]], "gold": [0],
                "log_probs": [scores[0].log_prob], "right": int(scores[0].greedy)}
    means = [score.log_prob / text.num_targets for score, text in zip(scores, texts, strict=True)]
    return {"choices": item.texts(" "), "gold": [item.gold], "log_probs": means,
            "said": means.index(max(means)), "right": credit(means, (item.gold,))}


def answers_of(lm: LM, name: str, items: list[Item]) -> list[dict[str, Any]]:
    """The answers to a task, one per item."""
    setting, most = SETTINGS[name], lm.model.config.block_size + 1  # the last token is not read
    rows = [choice_texts(lm.tokenizer, item, examples(items, index, setting), setting.delimiter)
            for index, item in enumerate(items)]
    scores = iter(lm.score_texts([Text(text.ids[-most:], min(text.num_targets, most - 1))
                                  for row in rows for text in row]))
    return [{"task": name, **answer_of(item, row, [next(scores) for _ in row]),
             "truncated": any(len(text.ids) > most for text in row)}
            for item, row in zip(items, rows, strict=True)]


def centre(figure: Figure, chance: float) -> Figure:
    """A share of right answers on a scale where guessing is 0 and always right is 1."""
    return Figure((figure.value - chance) / (1 - chance), figure.stderr / (1 - chance), figure.n)


def score(lm: LM, tasks: dict[str, list[Item]]) -> Result:
    """CORE, and the accuracy of each task. The details have each task centred, and the missing tasks."""
    if lm.chat:
        raise UserError("chat=True: CORE has no chat form; its texts are continued")
    answers = [answer for name, items in tasks.items() for answer in answers_of(lm, name, items)]
    figures = {name: mean([each["right"] for each in answers if each["task"] == name]) for name in tasks}
    centred = {name: centre(figure, SETTINGS[name].chance / 100) for name, figure in figures.items()}
    n = len(centred)
    core = Figure(sum(each.value for each in centred.values()) / n,
                  math.sqrt(sum(each.stderr**2 for each in centred.values())) / n, n)
    cut = truncated([answer["truncated"] for answer in answers])
    return Result({"core": core, **figures} | cut, answers, {
        "centred": {name: figure._asdict() for name, figure in centred.items()},
        "missing": [name for name in SETTINGS if name not in tasks]})
