"""Closed-book questions: SQuAD's comparison by hand, aliases, the prompt; right and wrong models."""

import json

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import open_qa
from evals.tasks.open_qa import exact_match, f1, normalized
from tests.conftest import shared


def test_normalization():
    assert normalized("  The  U.S.A.'s \"an apple\" a day ") == "usas apple day"
    assert normalized("Theatre of another") == "theatre of another", "articles are whole words"
    assert normalized("a-the") == "athe", "punctuation goes first, as in SQuAD's script"
    assert normalized("Caf\u00e9 \u2013 \u00c9") == "caf\u00e9 \u2013 \u00e9", "only ASCII is dropped"


@pytest.mark.parametrize("said, answer, exact, overlap", [
    ("Jane Austen", "jane austen.", True, 1),
    ("the Jane Austen", "Jane Austen", True, 1),
    ("Austen", "Jane Austen", False, 2 / 3),  # precision 1, recall 1/2
    ("Jane Jane Austen", "Jane Austen", False, 4 / 5),  # a word counts at most as often as in the other text
    ("Emma", "Jane Austen", False, 0),
    ("", "Jane Austen", False, 0),
    ("The The", "The The", True, 1),  # the name of a band; no word is left of it
    ("yes it is", "yes", False, 0),  # HotpotQA's rule
    ("Yes.", "yes", True, 1),
    ("no", "no man", False, 0),
])
def test_exact_match_and_f1(said, answer, exact, overlap):
    assert exact_match(said, answer) is exact and f1(said, answer) == pytest.approx(overlap)


HOTPOT = [{"question": f"Who is number {n}?", "answer": f"Person {n}",
           "type": "bridge" if n % 2 else "comparison"} for n in range(9)]
TRIVIA = [{"question": f"Who is number {n}?",
           "answer": {"value": f"Person {n}", "aliases": [f"P. {n}", f"{n}th"]}} for n in range(9)]


@pytest.mark.parametrize("name, rows", [("hotpotqa", HOTPOT), ("triviaqa", TRIVIA)])
def test_prompt_oracle_and_wrong_answers(name, rows, trained, tmp_path, monkeypatch):
    (tmp_path / f"{name}_dev.json").write_text(json.dumps(rows))
    lm, asked = LM(str(trained), device="cpu"), []
    questions = open_qa.load(str(tmp_path), 500, None, name)

    def scored(texts):
        monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or texts)
        return open_qa.score(lm, questions, name)

    oracle = scored([f" person {n}" for n in range(4)])
    assert oracle.figures == {"exact_match": (1, 0, 4), "f1": (1, 0, 4)}
    assert oracle.details["types"] == ({"bridge": 1, "comparison": 1} if name == "hotpotqa" else {})
    shots = "".join(f"Question: Who is number {n}?\nAnswer: Person {n}\n\n" for n in range(4, 9))
    assert asked[0] == ([f"{shots}Question: Who is number {n}?\nAnswer:" for n in range(4)], ["\n"], 32)
    assert scored([" nobody"] * 4).figures == {"exact_match": (0, 0, 4), "f1": (0, 0, 4)}
    alias = scored([" p 0.", " the 1th", " P. 3", " Person"])
    assert [answer["exact_match"] for answer in alias.answers] == ([False] * 4 if name == "hotpotqa" else
                                                                   [True, True, False, False])
    assert alias.answers[3]["f1"] == pytest.approx(2 / 3)


def test_limits_and_shots(tmp_path):
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    questions = open_qa.load(str(tmp_path), 2, 3, "hotpotqa")
    assert [question.answers for question in questions.asked] == [["Person 0"], ["Person 1"]]
    assert [question.answers[0] for question in questions.shots] == ["Person 6", "Person 7", "Person 8"]
    assert len(open_qa.load(str(tmp_path), 500, 0, "hotpotqa").asked) == 9
    with pytest.raises(UserError, match="shots=9: there are 9 rows"):
        open_qa.load(str(tmp_path), 2, 9, "hotpotqa")
    with pytest.raises(UserError, match=r"no file triviaqa\*"):
        open_qa.load(str(tmp_path), 2, 3, "triviaqa")
    for row in ({"question": "What?"}, {"question": "What?", "answer": 5}, {"question": 5, "answer": "x"},
                {"question": "What?", "answer": {"value": "x"}}):
        (tmp_path / "triviaqa.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="triviaqa.jsonl: row 1 does not fit this benchmark"):
            open_qa.load(str(tmp_path), 2, 0, "triviaqa")


def test_hotpotqa_itself():
    questions = open_qa.load(str(shared("eval/hotpotqa_dev_simplified.json")), 10**6, None, "hotpotqa")
    answers = [question.answers[0] for question in questions.asked]
    assert (len(answers), len(questions.shots)) == (7400, 5)
    assert all(f1(answer, answer) == 1 for answer in answers)
    assert [answer for answer in answers if not normalized(answer)] == ["The The", "!!!"]


def test_a_passage_comes_before_the_question():
    row = {"question": "Who wrote Emma?", "answer": "Jane Austen", "passage": "Emma is by Jane Austen."}
    found = open_qa.question_of(row)
    assert found.prompt == "Emma is by Jane Austen.\n\nQuestion: Who wrote Emma?\nAnswer:"
    assert found.passage == row["passage"]
    assert open_qa.question_of(row | {"passage": ""}).prompt == "Question: Who wrote Emma?\nAnswer:"
