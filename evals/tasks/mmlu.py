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

The examples are the first ones of the subject's dev split. The answer is the most likely of " A" to " D".
Protocol: the paper's; the prompt and the groups of subjects are those of lm-evaluation-harness (task mmlu).
A limit takes the first question of each subject, then the second of each, and so on. On the hub: cais/mmlu,
config all.
"""

from dataclasses import replace
from typing import Any

from evals.benchmarks import convert, label_index, label_number, text_of, texts_of
from evals.lm import LM
from evals.multiple_choice import LETTERS, Question, lettered, score_by_log_prob, shots_text, splits
from evals.results import Result, mean

HUB = {"dev": "cais/mmlu:all:dev", "test": "cais/mmlu:all:test"}
SHOTS = 5
OPENING = "The following are multiple choice questions (with answers) about {}.\n\n"
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


def question_of(row: dict[str, Any]) -> Question:
    choices, answer = texts_of(row["choices"]), row["answer"]
    # The hub has the answer's number, the original files have its letter.
    gold = (label_number(answer, len(choices)) if isinstance(answer, int) else
            label_index(answer, list(LETTERS[:len(choices)])))
    return lettered(row["question"].strip(), choices, gold, text_of(row["subject"]))


def by_subject(questions: list[Question]) -> dict[str, list[Question]]:
    return {subject: [each for each in questions if each.group == subject]
            for subject in dict.fromkeys(each.group for each in questions)}


def load(source: str | None, limit: int, shots: int | None) -> list[Question]:
    """The first `limit` questions, taking subjects in turn, each after the examples of its subject."""
    shots = SHOTS if shots is None else shots
    examples, questions = (by_subject(convert(rows, question_of)) for rows in splits(source, "mmlu", HUB))
    before = {name: OPENING.format(name.replace("_", " ")) + shots_text(examples.get(name, []), shots)
              for name in questions}
    turns = sorted((turn, name, each) for name, group in questions.items()
                   for turn, each in enumerate(group[:limit]))[:limit]
    return [replace(each, shots=before[name]) for _, name, each in turns]


def score(lm: LM, questions: list[Question]) -> Result:
    """Accuracy over all questions; the details have it by subject and by group of subjects."""
    result = score_by_log_prob(lm, questions)
    for answer, question in zip(result.answers, questions, strict=True):
        answer["subject"] = question.group
    subjects = {name: {name} for name in sorted({question.group for question in questions})}
    for key, groups in (("subjects", subjects), ("groups", GROUPS)):
        points = {group: [answer["right"] for answer in result.answers if answer["subject"] in names]
                  for group, names in groups.items()}
        result.details[key] = {group: mean(each)._asdict() for group, each in points.items() if each}
    return result
