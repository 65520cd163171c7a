"""MMLU: four choices, 57 subjects (arXiv 2009.03300). Five worked examples; the answer is a letter.

    {"subject": "anatomy", "split": "test", "question": "A lesion causing compression of the facial nerve ..",
     "choices": ["paralysis of the facial muscles.", "..", "..", ".."], "answer": "A"}

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

The examples are the first of the subject's dev split; the choice is the likeliest of " A" to " D". Protocol:
the paper's, prompt and groups of subjects as in lm-evaluation-harness (task mmlu). A limit takes the first
questions of each subject in turn. On the hub: cais/mmlu, config all.
"""

from typing import Any

from evals.lm import LM
from evals.multiple_choice import (
    Question,
    accuracy,
    ask,
    choice_log_probs,
    questions_of,
    result,
    shots_text,
    splits,
)
from evals.results import Result, mean

HUB = {"dev": "cais/mmlu:all:dev", "test": "cais/mmlu:all:test"}
SHOTS = 5
LETTERS = "ABCDEFGHIJ"
GROUPS = {group: set(subjects.split()) for group, subjects in {
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine
        virology"""}.items()}


def load(source: str | None, limit: int, shots: int | None) -> list[Question]:
    """Questions behind the examples of their subject."""
    shots = SHOTS if shots is None else shots
    examples, asked = (by_subject(questions_of(rows, question_of)) for rows in splits(source, "mmlu", HUB))
    before = {subject: opening(subject) + shots_text(examples.get(subject, []), shots) for subject in asked}
    turns = sorted((turn, subject, each) for subject, found in asked.items()
                   for turn, each in enumerate(found[:limit]))[:limit]
    return [Question(each.prompt, each.choices, each.gold, before[subject], subject)
            for _, subject, each in turns]


def question_of(row: dict[str, Any]) -> Question:
    letters = LETTERS[:len(row["choices"])]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
    gold = row["answer"] if isinstance(row["answer"], int) else letters.index(row["answer"])
    return Question("\n".join([row["question"].strip(), *lines, "Answer:"]), tuple(letters), (gold,),
                    group=row["subject"])


def by_subject(questions: list[Question]) -> dict[str, list[Question]]:
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.group, []).append(question)
    return subjects


def opening(subject: str) -> str:
    words = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {words}.\n\n"


def score(lm: LM, questions: list[Question]) -> Result:
    """Accuracy over all questions; by subject and by group of subjects among the details."""
    found = ask(lm, questions)
    scores = list(map(choice_log_probs, found))
    right = accuracy(questions, scores)
    measured = result(questions, found, {"accuracy": mean(right)}, right, scores)
    for each, question in zip(measured.answers, questions, strict=True):
        each["subject"] = question.group
    subjects = {question.group for question in questions}
    kinds = {"subjects": {subject: {subject} for subject in sorted(subjects)}, "groups": GROUPS}
    for key, kind in kinds.items():
        measured.details[key] = {
            name: mean(those)._asdict() for name, members in kind.items()
            if (those := [each for each, question in zip(right, questions, strict=True)
                          if question.group in members])}
    return measured
