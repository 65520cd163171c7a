"""ARC: science questions of American schools, easy and hard ones (arXiv 1803.05457). 25 worked examples.

    {"id": "Mercury_7175875", "question": {"stem": "An astronomer observes that ..", "choices": [
     {"text": "Planetary density will decrease.", "label": "A"}, ..]}, "answerKey": "C"}

    Question: An astronomer observes that ..
    Answer:

followed by a space and the text of a choice. What counts is the log-probability a character of it
(accuracy_norm). Protocol: prompt as in lm-evaluation-harness (tasks arc_easy, arc_challenge), 25 examples as
on the Open LLM Leaderboard, here the first ones of the train split (of files: of the dev split), or, where
all rows are of one split, its first rows, which then are not asked. 25 examples take some 1,500 tokens: in a
shorter context they lose their beginning, and the share of such questions is among the figures. On the hub:
allenai/ai2_arc, whose rows have question, choices.text, choices.label and answerKey. Rows with query
("Question: .."), choices and gold are read, too.
"""

from typing import Any

from evals.lm import LM
from evals.multiple_choice import Question, questions_of, score_by_character, shots_text, splits
from evals.results import Result

SHOTS = 25
NAMES = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}  # of a file, and on the hub


def load(source: str | None, limit: int, shots: int | None, name: str) -> list[Question]:
    """The first questions behind the examples."""
    shots = SHOTS if shots is None else shots
    hub = {split: f"allenai/ai2_arc:{NAMES[name]}:{split}" for split in ("train", "test")}
    examples, asked = splits(source, name, hub)
    if not examples:
        examples, asked = asked[:shots], asked[shots:]
    before = shots_text(questions_of(examples[:shots], question_of), shots)
    return [Question(each.prompt, each.choices, each.gold, before)
            for each in questions_of(asked[:limit], question_of)]


def question_of(row: dict[str, Any]) -> Question:
    if "query" in row:
        return Question(f"{row['query']}\nAnswer:", tuple(row["choices"]), (row["gold"],))
    asked = row["question"]
    if isinstance(asked, dict):
        texts, labels = ([choice[key] for choice in asked["choices"]] for key in ("text", "label"))
        asked = asked["stem"]
    else:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
    return Question(f"Question: {asked}\nAnswer:", tuple(texts), (list(labels).index(row["answerKey"]),))


def score(lm: LM, questions: list[Question], name: str) -> Result:
    return score_by_character(lm, questions)
