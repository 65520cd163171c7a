"""GSM8K: numbers read from 552 answers of known meaning and from the benchmark's own answers; the prompt."""

import json
import re
from decimal import Decimal

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import word_problems
from evals.tasks.word_problems import flexible, strict
from tests.conftest import shared

NUMBERS = [0, 1, 5, 18, 64, 72, 100, 366, 999, 1000, 1080, 2250, 15620, 109200000, -1, -7, -47, -1200,
           Decimal("0.5"), Decimal("2.50"), Decimal("99.99"), Decimal("1234.56"), Decimal("-0.25"), 2**40]
AFTER_HASHES = ["#### {n}", "####{n}", "#### {n}.", "#### {n:,}", "####  {n:,} apples", "#### ${n}",
                 "#### ${n:,}.", "So 3 * 4 = <<3*4=12>>12.\n#### {n}", "a\n#### {n}\n\nThat is all",
                 "#### {n}\n#### 77", "####\n{n}"]
ELSEWHERE = ["{n}", "The answer is {n}.", "The answer is {n:,}.", "She pays ${n:,}", "12 + 5 = 17, not {n}!",
             "**{n}**", "$$\\boxed{{{n}}}$$", "x={n}", "2x3=6; ({n})", "it is {n} %", "{n}...",
             "Answer: {n:,}\n"]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_in_every_spelling(number):
    """24 numbers with 23 spellings each make 552 answers."""
    for form in AFTER_HASHES:
        assert strict(form.format(n=number)) == number, form
    for form in ELSEWHERE:
        text = form.format(n=number)
        assert flexible(text) == number and strict(text) is None, form
    assert len(NUMBERS) * len(AFTER_HASHES + ELSEWHERE) == 552


@pytest.mark.parametrize("text, number", [
    ("-$7", "-7"), ("$-7", "-7"), ("10-5", "5"), ("(2)-1", "1"), ("5 -3", "-3"), ("1,2,3", "3"),
    ("12,34", "34"), (".5", "0.5"), ("5.0", "5"), ("a 3.", "3"), ("9:30", "30"),
    ("1/2", "2"), ("12.5.3", "3"), ("7.", "7"),
])
def test_the_last_number(text, number):
    assert flexible(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "...", "$", "####", "#### twelve", "-", "\uff11\uff12"])
def test_no_number(text):
    assert strict(text) is None and flexible(text) is None


def lm_eval(text):
    """The two filters of lm-eval's gsm8k.yaml (version 3), with its normalization of answers."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    last = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)

    def spelled(answer):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            answer = re.sub(pattern, "", answer)
        return answer
    return (spelled(found[0]) if found else None), (spelled("".join(last[-1])) if last else None)


def test_the_answers_of_the_benchmark_itself():
    """Our number, lm-eval's and the file's agree on all 1,319 test and 7,473 training rows."""
    for name in ("test", "train"):
        for line in shared(f"math/gsm8k_{name}.jsonl").read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)["answer"]
            number = answer.split("#### ")[1].replace(",", "")
            assert strict(answer) == flexible(answer) == Decimal(number)
            assert lm_eval(answer) == (number, number)


@pytest.mark.parametrize("text, theirs, ours", [
    ("#### 12.00", ("12.00", "12.00"), (12, 12)),  # we compare numbers, not strings
    ("#### 12...", ("12..", "12.."), (12, 12)),
    ("#### $12", (None, "12"), (12, 12)),
    ("It is 12 ...", (None, ".."), (None, 12)),
    ("10-5", (None, "-5"), (None, 5)),
    ("1,2,3", (None, "123"), (None, 3)),
])
def test_differences_from_lm_eval(text, theirs, ours):
    assert lm_eval(text) == theirs and (strict(text), flexible(text)) == ours


ROWS = [{"question": f"What is {n} + {n}?",
         "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(600, 612)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "GSM8K_TRAIN.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:9]))
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[9:]))
    return tmp_path


def test_prompt_oracle_and_wrong_answers(folder, trained, monkeypatch):
    lm, asked = LM(str(trained), device="cpu"), []
    questions = word_problems.load(str(folder), 500, None)

    def scored(texts):
        monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or texts)
        return word_problems.score(lm, questions)

    oracle = scored([" " + problem.answer for problem in questions.asked])
    assert oracle.figures == {"strict": (1, 0, 3), "flexible": (1, 0, 3)} and oracle.details["shots"] == 8
    prompts, stops, max_new_tokens = asked[0]
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in ROWS[:8])
    assert prompts == [f"{shots}Question: {row['question']}\nAnswer:" for row in ROWS[9:]]
    assert (stops, max_new_tokens) == (["Question:"], 256)
    assert scored(["I do not know."] * 3).figures == {"strict": (0, 0, 3), "flexible": (0, 0, 3)}
    said = ["It is 1,218.", "#### 5", "#### 1222.0\nor 7"]
    answers = scored(said).answers
    assert [(answer["strict"], answer["flexible"]) for answer in answers] == [(False, True), (False, False),
                                                                              (True, False)]
    assert [answer["answer"] for answer in answers] == ["1218", "1220", "1222"]


def test_shots_and_files(folder):
    assert [len(part) for part in word_problems.load(str(folder), 2, 0)[:2]] == [2, 0]
    with pytest.raises(UserError, match="shots=10: gsm8k has 9 rows of training"):
        word_problems.load(str(folder), 2, 10)
    alone = str(folder / "gsm8k_test.jsonl")  # without training rows, the last rows are the examples
    assert [len(part) for part in word_problems.load(alone, 500, 2)] == [1, 2]
    with pytest.raises(UserError, match="shots=8: there are 3 rows, so none is left to ask"):
        word_problems.load(alone, 2, None)
    for line, reason in (('{"question": "What?"}', "KeyError: 'answer'"),
                         ('{"question": "What?", "answer": "12"}', "ValueError: no number after ####"),
                         ('{"question": 12, "answer": "#### 12"}', "TypeError"),
                         ('{"Body": "A", "Question": "B", "Equation": "1", "Answer": "two"}', "ValueError"),
                         ('{"Body": "A", "Question": "B", "Equation": "1", "Answer": 1e999}', "ValueError")):
        (folder / "gsm8k_test.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=f"gsm8k_test.jsonl: row 1 does not fit .* .{reason}"):
            word_problems.load(str(folder), 2, None)


@pytest.mark.parametrize("name, row, prompt, answer", [
    ("svamp", {"ID": "chal-1", "Body": "A pack costs $ 76 and a discount is $ 25", "Question": "What now? ",
               "Equation": "( 76.0 - 25.0 )", "Answer": 51.0, "Type": "Subtraction"},
     "A pack costs $ 76 and a discount is $ 25 What now?", "( 76 - 25 )\n#### 51"),
    ("mawps", {"original_text": "How many ?", "equation": "X=(22.0/4.0)", "ans": 5.5}, "How many ?",
     "X=(22/4)\n#### 5.5"),
    ("mawps", {"question": "How many ?", "equation": "22/4", "result": "5_500", "result_float": 5500.0,
               "chain": "<a>"}, "How many ?", "22/4\n#### 5500"),
    ("asdiv", {"body": "Cats sleep.", "question": "How long?", "formula": "500*2=1,000",
               "answer": "1,000 (hours)"}, "Cats sleep. How long?", "500*2=1,000\n#### 1000"),
])
def test_the_rows_of_the_other_sets(name, row, prompt, answer, tmp_path):
    left_out = {"body": "", "question": "Who?", "formula": "1<2", "answer": "Ann"}
    rows = [row, *([left_out] if name == "asdiv" else []), row]
    (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    asked, shots = word_problems.load(str(tmp_path), 500, 1, name)
    assert asked == shots and len(asked) == 1
    assert asked[0][:2] == (f"Question: {prompt}\nAnswer:", answer) and strict(answer) == asked[0].number
