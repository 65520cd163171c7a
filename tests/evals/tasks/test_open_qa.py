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
    assert normalized("the ‘well-known’ A_b's", trivia=True) == "well known b s", "as in TriviaQA's script"


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


SQUAD = {"title": "Emma", "context": "Jane Austen wrote Emma.", "id": "7"}
FLAT = [{**SQUAD, "question": "Who wrote Emma?", "answers": {"text": ["Jane Austen", "Austen"],
                                                           "answer_start": [0, 5]}},
        {**SQUAD, "question": "Who wrote Ulysses?", "answers": {"text": [], "answer_start": []}}]
NESTED = {"version": "v2.0", "data": [{"title": "Emma", "paragraphs": [{
    "context": "Jane Austen wrote Emma.", "qas": [
        {"question": "Who wrote Emma?", "id": "7", "is_impossible": False,
         "answers": [{"text": "Jane Austen", "answer_start": 0}, {"text": "Austen", "answer_start": 5}]},
        {"question": "Who wrote Ulysses?", "id": "8", "is_impossible": True, "answers": [],
         "plausible_answers": [{"text": "Jane Austen", "answer_start": 0}]}]}]}]}


def test_squad(trained, tmp_path, monkeypatch):
    """Both forms of SQuAD's rows; a right, a wrong and no answer to a question with and without one."""
    (tmp_path / "squad_v2_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FLAT))
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(NESTED))
    lm = LM(str(trained), device="cpu")
    questions = open_qa.load(str(tmp_path), 500, None, "squad_v2")
    assert questions == open_qa.load(str(tmp_path / "dev-v2.0.json"), 500, None, "squad_v2")
    assert questions.asked[0].prompt == ("Title: Emma\n\nBackground: Jane Austen wrote Emma.\n\n"
                                         "Question: Who wrote Emma?\n\nAnswer:")
    for said, exact, overlap in ((("Austen", "unanswerable."), (1, 1), (1, 1)),
                                 (("a Austen yes", ""), (0, 1), (2 / 3, 1)),
                                 (("unanswerable", "it is unanswerable"), (0, 0), (0, 0)),
                                 (("", "Jane Austen"), (0, 0), (0, 0))):
        monkeypatch.setattr(lm, "generate_until", lambda *words, said=said: list(said))
        result = open_qa.score(lm, questions, "squad_v2")
        assert [answer["exact_match"] for answer in result.answers] == list(exact), said
        assert [answer["f1"] for answer in result.answers] == pytest.approx(overlap), said
    assert result.details["types"] == {"answerable": 0, "unanswerable": 0}
    # No answer is right if there is none, so it can win a vote, together with the word for it.
    assert [answer["vote"] for answer in result.answers] == ["unanswerable", "jane austen"]
    assert open_qa.load(str(tmp_path), 500, 1, "squad_v2").shots[0].answers[0] == "unanswerable"
    assert f1("yes it is", "yes", {"unanswerable"}) == 0.5
    assert f1("well-known to all", "well known", set(), trivia=True) == pytest.approx(2 * 2 / (4 + 2))
    (tmp_path / "squad_v2_dev.jsonl").write_text(json.dumps(FLAT[0] | {"answers": {"text": "Austen"}}))
    with pytest.raises(UserError, match="'Austen' is not a list"):
        open_qa.load(str(tmp_path), 500, None, "squad_v2")
    (tmp_path / "squad_v2_dev.jsonl").write_text(json.dumps({"paragraphs": [{"title": "Emma"}]}))
    with pytest.raises(UserError, match="squad_v2_dev.jsonl: row 1 does not fit this benchmark"):
        open_qa.load(str(tmp_path), 500, None, "squad_v2")
