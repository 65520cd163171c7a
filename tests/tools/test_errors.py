"""Kinds of mistakes: those of the mistake makers are recovered; every other kind has an example."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from configurator import UserError
from dataset.problems import REFUSAL, is_right, problems, solution
from tests.mistakes import mistake, mistake_kinds
from tools.errors import confusion, is_slip, is_unsupported, kind_of, main

NAMES = {"slip": "slipped digit", "format": "right answer in wrong form", "operator": "wrong operator",
         "missing": "missing step"}


def row_of(problem, message, **more):
    """A line of answers/problems.jsonl."""
    return {"model": "m", "question": problem.question, "answer": problem.answer, "right": False,
            "said": message["content"], "message": message | more, "steps": problem.steps,
            "expression": problem.expression}


def mistakes(count):
    """(name of its kind, row) of mistakes by the makers, each of one known kind."""
    draw = random.Random(5)
    for problem in islice(problems("test", 3), count):
        for kind in mistake_kinds(problem):
            message = mistake(problem, draw, kind)
            if not is_right(problem, message):
                yield NAMES[kind], row_of(problem, message)


def test_the_makers_kinds_are_recovered():
    found = [(name, kind_of(row)) for name, row in mistakes(700)]
    for name in NAMES.values():
        kinds = [kind for made, kind in found if made == name]
        assert len(kinds) > 200 and kinds.count(name) >= 0.95 * len(kinds), name


def test_answers_of_trained_models_labelled_by_hand():
    """Wrong answers of 12 models. A label is the kind of the first mistake, written before the rules read it.

    The rules were changed once, after draw 0 and before draw 1: with the old rules 36 of draw 0 agreed.
    """
    lines = (Path(__file__).parent / "labelled_answers.jsonl").read_text().splitlines()
    agree = [[], []]
    for row in map(json.loads, lines):
        agree[row["draw"]].append(kind_of(row) == row["label"])
    assert [len(draw) for draw in agree] == [50, 50] and [sum(draw) for draw in agree] == [47, 46]


@pytest.mark.parametrize("said, answer, slip", [
    ("561", "531", True), ("16", "1", True), ("264", "2640", True), ("1119", "119", True),
    ("Monday", "Sunday", True), ("4 + 5 = 8", "4 + 5 = 9", True),
    ("2080", "1980", False), ("316440", "311640", False), ("5", "5", False), ("5", "-5", False),
    ("4 - 5", "4 + 5", False)])
def test_what_a_slip_is(said, answer, slip):
    assert is_slip(said, answer) == slip


def test_other_kinds():
    """What a model does besides wrong arithmetic, made from right solutions."""
    recovered = 0
    cases = list(islice(problems("test", 4, ("add", "hard", "multiply")), 60))
    for problem in cases:
        call, _, answer = solution(problem, True)
        wrong = {"name": "calculator", "arguments": {"expression": problem.expression + " + 1"}}
        result = {"role": "assistant", "content": str(int(problem.answer) + 1)}
        made = [("refused", row_of(problem, {"content": REFUSAL})),
                ("refused", row_of(problem, {"content": ""})),
                ("stopped early", row_of(problem, {"content": "", "malformed": ["1 + "]}, cut=True)),
                ("malformed", row_of(problem, {"content": "12", "malformed": ['{"name": ']})),
                ("malformed", row_of(problem, {"content": "the answer"})),
                ("wrong tool argument", row_of(problem, result, calls=[wrong]))]
        kinds = [kind_of(row) for _, row in made]
        assert kinds == [name for name, _ in made]
        recovered += len(kinds)
        assert kind_of(row_of(problem, result, calls=call["tool_calls"])) != "wrong tool argument"
    assert recovered == 6 * 60


@pytest.mark.parametrize("row, kind", [
    ({"prompt": "?", "answer": "18", "said": "so 9 * 2 = 18.", "strict": False, "flexible": True},
     "right answer in wrong form"),
    ({"prompt": "?", "answer": "18", "said": "9 * 2 = 16\n#### 16", "strict": False, "flexible": False},
     "slipped digit"),
    ({"prompt": "?", "answer": "18", "said": "#### 9", "strict": False, "flexible": False}, "wrong"),
    ({"prompt": "?", "answer": "18", "said": "Let me think", "strict": False, "flexible": False},
     "malformed"),
    ({"accuracy": False, "right_function": True, "said": {"content": "", "tool_calls": [{"name": "f"}]}},
     "wrong tool argument"),
    ({"accuracy": False, "said": {"content": "", "tool_calls": [{"name": "f"}]}}, "wrong tool"),
    ({"accuracy": False, "said": {"content": "Hello."}}, "refused"),
    ({"accuracy": False, "said": {"content": "", "malformed": ["{"]}}, "malformed"),
    ({"prompt": "?", "answers": ["Jane Austen"], "said": "It was Jane Austen.", "exact_match": False},
     "right answer in wrong form"),
    ({"prompt": "?", "answers": ["Jane Austen"], "said": "Mary", "passage": "Emma is by Jane Austen.",
      "exact_match": False}, "not in the passage"),
    ({"prompt": "?", "answers": ["Jane Austen"], "said": "Emma", "passage": "Emma is by Jane Austen.",
      "exact_match": False}, "wrong"),
    ({"prompt": "def f():", "said": "    return 3", "outcome": "failed", "pass_at_1": False}, "wrong"),
    ({"prompt": "def f():", "said": "    return 2", "outcome": "passed", "pass_at_1": True}, None),
    ({"prompt": "In capitals.", "said": "no", "strict": [True, False], "prompt_strict": False}, "wrong"),
    ({"prompt": "In capitals.", "said": "NO", "strict": [True, True], "prompt_strict": True}, None),
    ({"question": ["Hi.", "Go on."], "said": ["Hello.", "I do."], "score": 0.5}, None)])
def test_a_row_of_each_task(row, kind):
    assert kind_of(row) == kind


def test_what_a_passage_supports():
    passage = "In 1815 Jane Austen published the novel Emma, of 1,000 copies."
    assert not is_unsupported("Emma appeared in 1815.", passage) and not is_unsupported("the novel", passage)
    assert is_unsupported("Emma appeared in 1816.", passage) and is_unsupported("a poem", passage)


def test_the_table_of_confusions():
    rows = [{"choices": ["no", "yes"], "gold": [gold], "said": said}
            for gold, said in [(0, 0), (0, 1), (0, 1), (1, 1)]]
    assert confusion("m, cola", rows).split("\n")[-2:] == ["| no | 1 | 2 |", "| yes | 0 | 1 |"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_page_and_the_picture(tmp_path, capsys):
    rows = [row for _, row in mistakes(20)]
    files = [write(tmp_path / "problems.jsonl", [row | {"model": name} for name in "ab" for row in rows]),
             write(tmp_path / "cola.jsonl",
                   [{"model": "a", "choices": ["no", "yes"], "gold": [1], "said": 0}])]
    main(files)
    out, page = capsys.readouterr().out, (tmp_path / "errors.md").read_text()
    count = sum(kind_of(row) == "slipped digit" for row in rows)
    assert f"| slipped digit | {count} | {count} |" in out and "a, problems (" in out
    assert page.count("**slipped digit**, a") == 3 and "| yes | 1 | 0 |" in page
    assert (tmp_path / "errors.png").stat().st_size > 5_000
    main([write(tmp_path / "fine.jsonl", [rows[0] | {"right": True}]), f"--out={tmp_path / 'none.md'}"])
    assert not (tmp_path / "none.png").exists()


def test_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="name files of answers"):
        main([])
    fine = {"model": "a", "said": "b", "right": True}
    for bad in ({"said": "b"}, [1], {**fine, "said": None}, {**fine, "said": 3}, {**fine, "said": {"x": 1}},
                {**fine, "message": 3}, {**fine, "answers": []}, {**fine, "steps": 3},
                {**fine, "expression": "1 +"}, {"model": "a", "choices": ["no", "yes"], "said": 0},
                {"model": "a", "choices": 3, "gold": [0], "said": 0}):
        with pytest.raises(UserError, match="x.jsonl:2: not an answer that eval.py wrote"):
            main([write(tmp_path / "x.jsonl", [fine, bad])])
