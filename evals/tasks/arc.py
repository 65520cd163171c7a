"""ARC: science questions from American schools, easy and hard ones (arXiv 1803.05457). 25 worked examples.

    {"id": "Mercury_7175875", "question": {"stem": "An astronomer observes that ..", "choices": [
     {"text": "Planetary density will decrease.", "label": "A"}, ..]}, "answerKey": "C"}

    Question: An astronomer observes that ..
    Answer:

followed by a space and the text of a choice. The answer is the choice with the highest log-probability per
character (accuracy_norm). The prompt is that of lm-evaluation-harness (tasks arc_easy, arc_challenge). The
number of examples is that of the Open LLM Leaderboard. They are the first rows of the train split on the hub,
and of the dev split in files. If all rows are in one split, its first rows are the examples, and are not
asked. 25 examples take about 1,500 tokens. In a shorter context they lose their beginning, and the figure
"truncated" is the share of such questions. On the hub: allenai/ai2_arc, with the keys question, choices.text,
choices.label and answerKey. Rows with the keys query ("Question: .."), choices and gold are read as well.
"""

from typing import Any

from evals.benchmarks import label_index, label_number, text_of, texts_of
from evals.lm import LM
from evals.multiple_choice import Question, few_shot, score_by_character, splits
from evals.results import Result

SHOTS = 25
NAMES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}  # task: configuration on the hub


def question_of(row: dict[str, Any]) -> Question:
    if "query" in row:
        choices = texts_of(row["choices"])
        return Question(f"{text_of(row['query'])}\nAnswer:", tuple(choices),
                        (label_number(row["gold"], len(choices)),))
    stem = row["question"]
    if isinstance(stem, dict):  # the original files
        texts, labels = (texts_of([choice[key] for choice in stem["choices"]]) for key in ("text", "label"))
        stem = stem["stem"]
    else:  # the hub
        texts, labels = (texts_of(row["choices"][key]) for key in ("text", "label"))
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices and {len(labels)} labels")
    return Question(f"Question: {text_of(stem)}\nAnswer:", tuple(texts),
                    (label_index(row["answerKey"], labels),))


def load(source: str | None, limit: int, shots: int | None, name: str) -> list[Question]:
    """The first `limit` questions that are not examples."""
    shots = SHOTS if shots is None else shots
    hub = {split: f"allenai/ai2_arc:{NAMES[name]}:{split}" for split in ("train", "test")}
    examples, rows = splits(source, name, hub)
    if not examples:
        examples, rows = rows[:shots], rows[shots:]
    return few_shot(examples, rows[:limit], shots, question_of)


def score(lm: LM, questions: list[Question], name: str) -> Result:
    return score_by_character(lm, questions)
