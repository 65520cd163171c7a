"""Tool use: the leaderboard's rules for arguments, one by one; the system message; right and wrong calls."""

import json

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import bfcl
from evals.tasks.bfcl import is_possible, judge_message, question_of, wrong_argument
from tests.conftest import shared


def kind(name, inner=None):
    return {"type": name} | ({"items": {"type": inner}} if inner else {})


@pytest.mark.parametrize("value, described, possible, verdict", [
    (5, kind("integer"), [5, 6], True),
    (5.0, kind("integer"), [5], False),
    (True, kind("integer"), [1], False),  # JSON's true is not a number
    ("5", kind("integer"), [5], False),
    (5, kind("float"), [5.0], True),  # an integer is accepted as a float
    (10**400, kind("float"), [5.0], False),
    (5.5, kind("float"), [5.0, ""], False),
    (True, kind("boolean"), [True], True),
    ("true", kind("boolean"), [True], False),
    ("NEW-York, ny", kind("string"), ["New York NY"], True),
    ("April 1, 2024", kind("string"), ["april 1 2024"], True),
    ("it's", kind("string"), ['It"s'], True),
    ("Paris!", kind("string"), ["Paris"], False),
    ("", kind("string"), ["Paris", ""], True),
    (True, kind("string"), [True, ""], True),  # the possible values do not have the described type
    ("True", kind("string"), [True, ""], False),
    ("a", kind("any"), ["A"], True),
    (["A b"], kind("array", "string"), [["ab"], ["c"]], True),
    (["c", "ab"], kind("array", "string"), [["ab", "c"]], False),
    ([1, 2], kind("array", "integer"), [[1, 2]], True),
    ([1, 2], kind("array", "float"), [[1.0, 2.0]], False),  # but not inside an array
    ([1.0, 2.0], kind("tuple", "float"), [[1.0, 2.0]], True),
    ([], kind("array", "integer"), [[1], ""], True),
    ("[1]", kind("array", "integer"), [[1]], False),
    ({"a": 1, "b": "X y"}, kind("dict"), [{"a": [1], "b": ["xy"], "c": ["", 3]}], True),
    ({"a": 1}, kind("dict"), [{"a": [1], "b": ["xy"]}], False),
    ({"a": 1, "d": 1}, kind("dict"), [{"a": [1]}], False),
    ({"a": 2}, kind("dict"), ["", {"a": [1]}], False),
    ([{"a": 1}, {"a": 2}], kind("array", "dict"), [[{"a": [1]}, {"a": [2]}]], True),
    ([{"a": 2}, {"a": 1}], kind("array", "dict"), [[{"a": [1]}, {"a": [2]}]], False),
    ([{"a": 1}], kind("array", "dict"), [[{"a": [1]}, {"a": [2]}]], False),
    (None, kind("string"), ["", "a"], False),
])
def test_a_value(value, described, possible, verdict):
    assert is_possible(value, described, possible) is verdict


def test_the_arguments_of_a_call():
    parameters = {"required": ["base"], "properties": {"base": kind("integer"), "unit": kind("string"),
                                                       "name": kind("string"), "far": kind("boolean")}}
    possible = {"base": [10], "unit": ["cm", ""], "name": ["x"]}
    for arguments, wrong in (({"base": 10, "name": "X"}, None),
                             ({"base": 10, "name": "x", "unit": "cm"}, None),
                             ({"name": "x"}, "no base"), ({"base": 10}, "no name"),
                             ({"base": 10, "name": "x", "far": True}, "far is unknown"),
                             ({"base": 11, "name": "x"}, "base = 11"), (["base"], "not an object")):
        assert wrong_argument(arguments, parameters, possible) == wrong
    assert wrong_argument({"name": "x"}, parameters, possible | {"base": [10, ""]}) == "no base", "required"


ROW = {"id": "simple_python_7", "question": [[{"role": "user", "content": "Area, base 10, height 5?"}]],
       "function": [{"name": "geo.area", "description": "Area of a triangle.", "parameters": {
           "type": "dict", "properties": {"base": kind("integer"), "height": kind("integer")},
           "required": ["base", "height"]}}],
       "ground_truth": [{"geo.area": {"base": [10], "height": [5]}}]}
QUESTION = {key: value for key, value in ROW.items() if key != "ground_truth"}
RIGHT = {"name": "geo.area", "arguments": {"base": 10, "height": 5}}


@pytest.mark.parametrize("message, verdicts", [  # accuracy, valid_syntax, right_function, right_arguments
    ({"tool_calls": [RIGHT]}, (True, True, True, True)),
    ({"tool_calls": [RIGHT | {"name": "area"}]}, (False, True, False, True)),
    ({"tool_calls": [RIGHT | {"arguments": {"base": 5, "height": 10}}]}, (False, True, True, False)),
    ({"tool_calls": [RIGHT, RIGHT]}, (False, True, False, False)),
    ({"tool_calls": [RIGHT], "malformed": ["{"]}, (False, False, False, False)),
    ({"malformed": ["{"]}, (False, False, False, False)),
    ({"content": "25"}, (False, False, False, False)),
])
def test_a_message(message, verdicts):
    question = question_of(ROW, ROW["ground_truth"])
    assert tuple(judge_message(question, message).values())[:4] == verdicts
    assert judge_message(question._replace(calls=[]), message) == {"accuracy": message == {"content": "25"}}


def first(values):
    """The first value that is not "", built recursively for objects."""
    value = next(value for value in values if value != "")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [first([each]) for each in value]
    if isinstance(value, dict):
        return {key: first(each) for key, each in value.items() if set(map(str, each)) != {""}}
    return value


def oracle(question):
    calls = [{"name": name, "arguments": {key: first(values) for key, values in possible.items()
                                          if values != [""]}} for name, possible in question.calls]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


def test_several_functions_and_several_calls():
    """Calls fit in any order; each right call needs a call of its own."""
    functions = [ROW["function"][0], {"name": "geo.side", "description": "", "parameters": {
        "type": "dict", "properties": {"base": kind("integer")}, "required": ["base"]}}]
    truth = [{"geo.area": {"base": [10], "height": [5]}}, {"geo.side": {"base": [3]}},
             {"geo.side": {"base": [3, 4]}}]
    question = question_of(ROW | {"function": functions}, truth)
    assert question.messages[0]["content"].count("You can call geo.") == 2

    def verdicts(*calls):
        given = [{"name": f"geo.{name}", "arguments": arguments} for name, arguments in calls]
        judged = judge_message(question, {"tool_calls": given})
        return judged["accuracy"], judged["right_function"], judged["right_arguments"]

    area, three, four = ("area", {"base": 10, "height": 5}), ("side", {"base": 3}), ("side", {"base": 4})
    assert verdicts(area, three, four) == verdicts(four, area, three) == (True, True, True)
    assert verdicts(area, three, three) == (True, True, True)
    assert verdicts(area, four, four) == (False, True, False)
    assert verdicts(area, three, ("area", {"base": 3})) == (False, False, True)
    assert verdicts(area, three) == verdicts(area, three, four, four) == (False, False, False)
    with pytest.raises(KeyError, match="geo.other"):
        question_of(ROW | {"function": functions}, [{"geo.other": {}}])


def test_system_message_oracle_and_wrong_answers(chat_folder, trained, tmp_path, monkeypatch):
    (tmp_path / "bfcl_v4_simple_python.jsonl").write_text(2 * (json.dumps(QUESTION) + "\n"))
    (tmp_path / "bfcl_v4_simple_python_answers.jsonl").write_text(
        json.dumps({"id": ROW["id"], "ground_truth": ROW["ground_truth"]}) + "\n")
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(2 * (json.dumps(QUESTION) + "\n"))
    lm, asked = LM(str(chat_folder), device="cpu"), []

    def scored(category, messages):
        monkeypatch.setattr(lm, "reply", lambda *words, **more: asked.append((words, more)) or [messages] * 2)
        return bfcl.score(lm, bfcl.load(str(tmp_path), 500, None, category), category).figures

    silent = [{"role": "assistant", "content": "I cannot."}]
    call = oracle(question_of(ROW, ROW["ground_truth"]))
    assert scored("simple_python", call) == {key: (1, 0, 2) for key in (
        "accuracy", "valid_syntax", "right_function", "right_arguments")}
    assert set(scored("simple_python", silent).values()) == {(0, 0, 2)}
    assert scored("irrelevance", silent) == {"accuracy": (1, 0, 2)}
    assert scored("irrelevance", call) == {"accuracy": (0, 0, 2)}
    [[[system, user], _], max_new_tokens], more = asked[0]
    name, described = system["content"].split("\n")
    assert name == "You can call geo.area(base, height)." and json.loads(described) == ROW["function"][0]
    assert user == ROW["question"][0][0] and (max_new_tokens, more) == (200, {"most_calls": 0})
    questions = bfcl.load(str(tmp_path), 5, None, "irrelevance")
    with pytest.raises(UserError, match="its tokenizer has no chat tokens"):
        bfcl.score(LM(str(trained), device="cpu"), questions, "irrelevance")


def test_the_leaderboard_itself(chat_folder, monkeypatch):
    """An oracle answers every question of the leaderboard correctly."""
    folder = str(shared("tools"))
    lm = LM(str(chat_folder), device="cpu")
    questions = bfcl.load(folder, 10**6, None, "simple_python")
    monkeypatch.setattr(lm, "reply", lambda *words, **more: list(map(oracle, questions.asked)))
    assert bfcl.score(lm, questions, "simple_python").figures["accuracy"] == (1, 0, 400)
    assert len(bfcl.load(folder, 10**6, None, "irrelevance").asked) == 240


def test_files(tmp_path, monkeypatch):
    (tmp_path / "bfcl_v4_simple_python.jsonl").write_text(json.dumps(QUESTION) + "\n")
    with pytest.raises(UserError, match="bfcl_v4_simple_python.jsonl: row 1 does not fit this benchmark"):
        bfcl.load(str(tmp_path), 5, None, "simple_python")  # which has no answer
    parameters = {"properties": {"base": kind("list")}, "required": []}
    strange = QUESTION | {"function": [{"name": "geo.area", "parameters": parameters}]}
    (tmp_path / "bfcl_v4_simple_python.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in (strange, {"id": ROW["id"], "ground_truth": ROW["ground_truth"]})))
    with pytest.raises(UserError, match="row 1 does not fit this benchmark .KeyError: 'list'"):
        bfcl.load(str(tmp_path), 5, None, "simple_python")
    for truth in (None, [], [{}], [{"other": {}}], [{"geo.area": {"base": 10}}]):
        (tmp_path / "bfcl_v4_simple_python.jsonl").write_text("".join(
            json.dumps(row) + "\n" for row in (QUESTION, {"id": ROW["id"], "ground_truth": truth})))
        with pytest.raises(UserError, match="row 1 does not fit this benchmark"):
            bfcl.load(str(tmp_path), 5, None, "simple_python")
    asked = []

    def hf_hub_download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = ("id", "ground_truth") if "possible_answer" in name else QUESTION
        path.write_text(2 * (json.dumps({key: ROW[key] for key in keys}) + "\n"))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    [question, _] = bfcl.load(None, 5, None, "simple_python").asked
    assert question == question_of(ROW, ROW["ground_truth"]) and asked == [
        (bfcl.HUB, f"{folder}BFCL_v3_simple.json", "dataset") for folder in ("", "possible_answer/")]
    assert bfcl.load(None, 5, None, "irrelevance").asked == [question_of(ROW, None)] * 2


def test_without_a_hub_the_error_is_one_line():
    with pytest.raises(UserError, match="hf:gorilla-llm/Berkeley-Function-Calling-Leaderboard: "):
        bfcl.load(None, 5, None, "irrelevance")
