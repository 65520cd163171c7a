"""Benchmarks whose answer is one of the choices of a row. One function per benchmark makes the prompt.

    {"goal": "How do I ready a guinea pig cage ..?", "sol1": "Provide the guinea pig ..", "sol2": "..",
     "label": 0}

    Question: How do I ready a guinea pig cage ..?
    Answer:

followed by a space and a choice. `BENCHMARKS` names the rows on the hub, the metric and the number of worked
examples. score_by_log_prob takes the most likely choice (accuracy); score_by_character the choice with the
highest log-probability per character (accuracy_norm, and accuracy). Each function below shows its prompt.

Prompts and metrics are those of lm-evaluation-harness (tasks of the same names, leaderboard_mmlu_pro,
lambada_openai). ARC has the 25 examples of the Open LLM Leaderboard, about 1,500 tokens; in a shorter
context they lose their beginning. Examples come from the first split of the table. If the rows of a file are
all in one split, the first ones are the examples, and are not asked.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from evals.benchmarks import answer_text, convert, label_index, label_number, label_of, text_of, texts_of
from evals.lm import LM
from evals.multiple_choice import (
    LETTERS,
    Question,
    ask,
    grade_greedy,
    lettered,
    score_by_character,
    score_by_log_prob,
    shots_text,
    splits,
)
from evals.results import Result, mean
from evals.tasks.perplexity import perplexity_of

Row = dict[str, Any]


class Entry(NamedTuple):
    """An entry of the table. Questions come from the last split, worked examples from the first."""

    question_of: Callable[[Row], Question]
    hub: str  # NAME:CONFIG
    splits: tuple[str, str]
    score: Callable[[LM, list[Question]], Result]
    shots: int = 0
    opening: str = ""  # text before the worked examples, with the subject in place of {}


# ---- Rows -> questions ------------------------------------------------------------------------------------

def school_row(row: Row) -> tuple[str, list[str], int]:
    """(question, choices, index of the right one) of ARC, OpenBookQA and CommonsenseQA.

    On the hub: question or question_stem, choices {text: [..], label: [..]} and answerKey. In the original
    files: question {stem, choices [{text, label}, ..]} and answerKey.
    """
    question, choices = row.get("question_stem", row.get("question")), row.get("choices")
    if isinstance(question, dict):
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    texts, labels = texts_of(choices["text"]), texts_of(choices["label"])
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices and {len(labels)} labels")
    return text_of(question), texts, label_index(text_of(row["answerKey"]).strip(), labels)


def arc(row: Row) -> Question:
    """Science at school (arXiv 1803.05457): "Question: An astronomer observes that ..\\nAnswer:".

    Rows with the keys query ("Question: .."), choices and gold are read as well.
    """
    if "query" in row:
        choices = texts_of(row["choices"])
        return Question(f"{text_of(row['query'])}\nAnswer:", tuple(choices),
                        (label_number(row["gold"], len(choices)),))
    question, choices, gold = school_row(row)
    return Question(f"Question: {question}\nAnswer:", tuple(choices), (gold,))


def openbookqa(row: Row) -> Question:
    """Facts of school science, applied (arXiv 1809.02789). The prompt is the question alone."""
    question, choices, gold = school_row(row)
    return Question(question, tuple(choices), (gold,))


def commonsense_qa(row: Row) -> Question:
    """Relations between everyday things (arXiv 1811.00937), five choices; the answer is a letter.

    "Question: A revolving door is ..?\\nA. bank\\nB. library\\n..\\nAnswer:"
    """
    question, choices, gold = school_row(row)
    return lettered(f"Question: {question.strip()}", choices, gold)


def mmlu(row: Row) -> Question:
    """57 subjects of school and university (arXiv 2009.03300), four choices; the answer is a letter.

    The following are multiple choice questions (with answers) about anatomy.

    What is the embryological origin of the hyoid bone?
    A. The first pharyngeal arch
    B. ..
    Answer: D

    (four more)

    A lesion causing compression of the facial nerve ..
    A. paralysis of the facial muscles.
    B. ..
    Answer:

    The examples are the first ones of the subject's dev split. The hub has the answer's number, the original
    files have its letter.
    """
    choices = texts_of(row["choices"])
    gold = label_of(row["answer"], list(LETTERS[:len(choices)]))
    return lettered(row["question"].strip(), choices, gold, text_of(row["subject"]))


def mmlu_pro(row: Row) -> Question:
    """MMLU with up to ten choices and harder questions (arXiv 2406.01574); the answer is a letter.

    "Approximately how far away is ..?\\nA. 2.5 pc\\n..\\nJ. 3 pc\\nAnswer:". The paper lets the model write a
    chain of thought; the likelihood of the letter is the form of the Open LLM Leaderboard.
    """
    choices = texts_of(row["options"])
    return lettered(text_of(row["question"]), choices,
                    label_index(row["answer"], list(LETTERS[:len(choices)])))


def without_markup(text: str) -> str:
    """The text without the markup in brackets that the headings of WikiHow leave."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(row: Row) -> Question:
    """How does a situation continue (arXiv 1905.07830)?

    {"ctx_a": "A man is sitting on a roof.", "ctx_b": "he", "activity_label": "Roof shingle removal",
     "endings": ["is using wrap to wrap a pair of skis.", "..", "..", ".."], "label": "3"}

    Roof shingle removal: A man is sitting on a roof. He

    Rows {question, choices {A: .., B: .., ..}, answer} are read as well. They name no activity, and do not
    show where ctx_b begins, which the prompt capitalizes. Their prompt is the question alone. Markup in
    brackets is removed.
    """
    if "endings" in row:
        activity, before, begin = (text_of(row[key]) for key in ("activity_label", "ctx_a", "ctx_b"))
        prompt, endings, label = f"{activity}: {before} {begin.capitalize()}", row["endings"], row["label"]
        # The hub has the label as text, the original files have it as a number.
        gold = label_of(label, [str(number) for number in range(len(endings))])
    else:
        letters = sorted(row["choices"])
        prompt, endings = row["question"], [row["choices"][letter] for letter in letters]
        gold = label_index(row["answer"], letters)
    return Question(without_markup(prompt), tuple(map(without_markup, texts_of(endings))), (gold,))


def piqa(row: Row) -> Question:
    """How is a thing done (arXiv 1911.11641)? The prompt is that of the module docstring."""
    return Question(f"Question: {text_of(row['goal'])}\nAnswer:",
                    (text_of(row["sol1"]), text_of(row["sol2"])), (label_number(row["label"], 2),))


def winogrande(row: Row) -> Question:
    """Who is meant (arXiv 1907.10641)? The end of a sentence, after each of two beginnings.

    {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
     "option1": "Sarah", "option2": "Maria", "answer": "2"}

    The choices are "Sarah was .. so Sarah" and "Sarah was .. so Maria". The answer is the one after which
    " always got the easier cases." is more likely.
    """
    before, after = text_of(row["sentence"]).split("_", 1)
    return Question("", tuple(before + text_of(row[key]) for key in ("option1", "option2")),
                    (label_index(row["answer"], ["1", "2"]),), ending=answer_text(after).strip())


def boolq(row: Row) -> Question:
    """Yes or no, after a passage (arXiv 1905.10044).

    All biomass goes through at least some of these steps: ..
    Question: does ethanol take more energy make that produces?
    Answer:

    SuperGLUE has the label 0 or 1; the original files have the answer true or false.
    """
    label = int(row["answer"]) if isinstance(row.get("answer"), bool) else row["label"]
    return Question(f"{text_of(row['passage'])}\nQuestion: {text_of(row['question'])}?\nAnswer:",
                    ("no", "yes"), (label_number(label, 2),))


def sciq(row: Row) -> Question:
    """Science exams, after a passage (arXiv 1707.06209). The right answer is the last choice.

    Mesophiles grow best in moderate temperature, ..
    Question: What type of organism is commonly used in preparation of foods ..?
    Answer:
    """
    wrong = [text_of(row[f"distractor{number}"]) for number in (1, 2, 3)]
    return Question(f"{text_of(row['support']).lstrip()}\nQuestion: {text_of(row['question'])}\nAnswer:",
                    (*wrong, answer_text(row["correct_answer"])), (3,))


def copa(row: Row) -> Question:
    """Cause or effect (Roemmele et al., 2011; as in SuperGLUE).

    {"premise": "The man turned on the faucet.", "question": "effect", "label": 1,
     "choice1": "The toilet filled with water.", "choice2": "Water flowed from the spout."}

    The man turned on the faucet therefore

    The choices follow in lower case, after two spaces: lm-evaluation-harness adds one to its own.
    """
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [answer_text(row[key]) for key in ("choice1", "choice2")]
    return Question(f"{text_of(row['premise']).strip()[:-1]} {word}",
                    tuple(f" {choice[0].lower()}{choice[1:]}" for choice in choices),
                    (label_number(row["label"], 2),))


def lambada(row: Row) -> Question:
    """The last word of a passage (arXiv 1606.06031): the word after the last space of the key "text"."""
    before, _, word = text_of(row["text"]).rpartition(" ")
    return Question(before, (answer_text(word),), (0,))


def score_by_subject(lm: LM, questions: list[Question]) -> Result:
    """Accuracy; the details have it by subject and by group of subjects as well."""
    result = score_by_log_prob(lm, questions)
    for answer, question in zip(result.answers, questions, strict=True):
        answer["subject"] = question.group
    subjects = {name: {name} for name in sorted({question.group for question in questions})}
    for key, groups in (("subjects", subjects), ("groups", SUBJECTS)):
        points = {group: [answer["right"] for answer in result.answers if answer["subject"] in names]
                  for group, names in groups.items()}
        result.details[key] = {group: mean(each)._asdict() for group, each in points.items() if each}
    return result


def score_last_word(lm: LM, questions: list[Question]) -> Result:
    """The share of words that greedy decoding would write, and the perplexity per word."""
    likelihoods = ask(lm, questions)
    result = grade_greedy(questions, likelihoods)
    nats = mean([-row[0].log_prob for row in likelihoods])
    result.figures["perplexity"] = perplexity_of(nats)
    return result


# ---- The table --------------------------------------------------------------------------------------------

# {group of subjects of MMLU: its subjects}
SUBJECTS = {group: set(subjects.split()) for group, subjects in tomllib.loads(
    Path(__file__).with_name("mmlu.toml").read_text(encoding="utf-8")).items()}
VALIDATION, TEST = ("train", "validation"), ("train", "test")
BENCHMARKS = {
    "mmlu": Entry(mmlu, "cais/mmlu:all", ("dev", "test"), score_by_subject, 5,
                      "The following are multiple choice questions (with answers) about {}.\n\n"),
    "hellaswag": Entry(hellaswag, "Rowan/hellaswag:", VALIDATION, score_by_character),
    "arc_easy": Entry(arc, "allenai/ai2_arc:ARC-Easy", TEST, score_by_character, 25),
    "arc_challenge": Entry(arc, "allenai/ai2_arc:ARC-Challenge", TEST, score_by_character, 25),
    "openbookqa": Entry(openbookqa, "allenai/openbookqa:main", TEST, score_by_character),
    "commonsense_qa": Entry(commonsense_qa, "tau/commonsense_qa:", VALIDATION, score_by_log_prob),
    "mmlu_pro": Entry(mmlu_pro, "TIGER-Lab/MMLU-Pro:", ("validation", "test"), score_by_log_prob, 5),
    "piqa": Entry(piqa, "baber/piqa:", VALIDATION, score_by_character),
    "winogrande": Entry(winogrande, "allenai/winogrande:winogrande_xl", VALIDATION, score_by_log_prob),
    "boolq": Entry(boolq, "aps/super_glue:boolq", VALIDATION, score_by_log_prob),
    "sciq": Entry(sciq, "allenai/sciq:", TEST, score_by_character),
    "copa": Entry(copa, "aps/super_glue:copa", VALIDATION, score_by_log_prob),
    "lambada": Entry(lambada, "EleutherAI/lambada_openai:default", TEST, score_last_word),
}


def by_subject(questions: list[Question]) -> dict[str, list[Question]]:
    """{subject: its questions}, in order; "" is the subject of questions without one."""
    return {subject: [each for each in questions if each.group == subject]
            for subject in dict.fromkeys(each.group for each in questions)}


def load(source: str | None, limit: int, shots: int | None, name: str) -> list[Question]:
    """The first `limit` questions that are not examples, each after the first examples of its subject.

    Subjects are taken in turn: the first question of each, the second of each, and so on.
    """
    benchmark = BENCHMARKS[name]
    shots = benchmark.shots if shots is None else shots
    hub = {split: f"{benchmark.hub}:{split}" for split in benchmark.splits[0 if shots else 1:]}
    examples, rows = splits(source, name, hub)
    if not examples:
        examples, rows = rows[:shots], rows[shots:]
    shown, asked = (by_subject(convert(each, benchmark.question_of))
                    for each in (examples if shots else [], rows))
    before = {key: benchmark.opening.format(key.replace("_", " ")) + shots_text(shown.get(key, []), shots)
              for key in asked or [""]}  # by subject
    turns = sorted((turn, key, each) for key, group in asked.items()
                   for turn, each in enumerate(group[:limit]))[:limit]
    return [replace(each, shots=before[key]) for _, key, each in turns]


def score(lm: LM, questions: list[Question], name: str) -> Result:
    return BENCHMARKS[name].score(lm, questions)
