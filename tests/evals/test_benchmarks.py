"""Labels of benchmarks are read strictly: a row without a clear right answer is refused, never guessed."""

import copy
import json

import pytest

import eval as evaluation
from configurator import UserError
from evals.benchmarks import Questions

ARC_HUB = {"question": "Why?", "answerKey": "2",
           "choices": {"text": ["so", "thus", "no"], "label": ["1", "2", "3"]}}
# One row of every form. All of them have the right answer at index 1, where there are choices.
ROWS = {
    "mmlu": [{"subject": "anatomy", "question": "?", "choices": ["w", "x", "y", "z"], "answer": "B"},
             {"subject": "anatomy", "question": "?", "choices": ["w", "x", "y", "z"], "answer": 1}],
    "hellaswag": [{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"},
                  {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1},
                  {"question": "?", "choices": {"A": "d", "B": "e"}, "answer": "B"}],
    "arc_easy": [ARC_HUB, {"query": "Question: Why?", "choices": ["so", "thus"], "gold": 1},
                 {"answerKey": "B", "question": {"stem": "Why?", "choices": [
                     {"text": "so", "label": "A"}, {"text": "thus", "label": "B"}]}}],
    "truthfulqa": [{"question": "Why?", "mc1_targets": {"no": 0, "so": 1}, "mc2_targets": {"no": 0, "so": 1}},
                   {"question": "Why?", **{key: {"choices": ["no", "so"], "labels": [0, 1]}
                                           for key in ("mc1_targets", "mc2_targets")}}],
    "sst2": [{"sentence": "good", "label": 1}, {"sentence": "good", "label": "1"}],
    "cola": [{"sentence": "good", "label": 1}],
    "rte": [{"sentence1": "a", "sentence2": "b", "label": 1},
            {"sentence1": "a", "sentence2": "b", "label": "not_entailment"}],
    "gsm8k": [{"question": "?", "answer": "2 * 2 = 4\n#### 4"}],
    "hotpotqa": [{"question": "?", "answer": "x", "type": "bridge"}],
    "triviaqa": [{"question": "?", "answer": {"value": "x", "aliases": ["y"]}}],
    "summarize": [{"document": "a", "summary": "b"}, {"article": "a", "highlights": "b"}]}
VALUES = [None, True, False, -1, 0, 0.5, 1.0, 1e308, float("nan"), "", " ", "0", "AB", "yes", [], {}, [[[]]]]


def load(name, row, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    task = evaluation.TASKS[name]
    questions = task.module.load(str(path), 10, 0, **task.settings)
    return questions.asked if isinstance(questions, Questions) else questions


def gold_of(name, questions):
    """(indices, texts) of the right answers of the only question; generated answers have no index."""
    if name == "truthfulqa":
        questions = questions.one + questions.many
    if name == "gsm8k":
        return None, questions[0].number
    if name in ("hotpotqa", "triviaqa", "summarize"):
        return None, questions[0].answers[0] if name != "summarize" else questions[0][1]
    return ([question.gold for question in questions],
            [question.choices[index] for question in questions for index in question.gold])


def mutations(value):
    """Copies of a nested value: every leaf and container replaced by each of VALUES, every key removed."""
    for key in value if isinstance(value, dict) else range(len(value)):
        for other in VALUES:
            changed = copy.copy(value)
            changed[key] = other
            yield changed
        changed = copy.copy(value)
        del changed[key]
        yield changed
        if isinstance(value[key], dict | list):
            for inside in mutations(value[key]):
                changed = copy.copy(value)
                changed[key] = inside
                yield changed


@pytest.mark.parametrize("name, row, message", [
    ("mmlu", {"answer": ""}, "mmlu.jsonl: row 1 .* the label '' is not one of A, B, C, D"),
    ("mmlu", {"answer": "AB"}, "the label 'AB' is not one of"),
    ("mmlu", {"answer": "b"}, "the label 'b' is not one of"),
    ("mmlu", {"answer": True}, "the label True is not a whole number from 0 to 3"),
    ("mmlu", {"answer": 4}, "the label 4 is not"),
    ("mmlu", {"answer": -1}, "the label -1 is not"),
    ("mmlu", {"choices": "wxyz"}, "'wxyz' is not a list"),
    ("mmlu", {"choices": ["w", None, "y", "z"]}, "None is not a text"),
    ("hellaswag", {"label": ""}, "the label '' is not one of 0, 1"),  # the hub's test split
    ("hellaswag", {"label": "1.0"}, "the label '1.0'"),
    ("hellaswag", {"label": 1.7}, "the label 1.7"),
    ("arc_easy", {"answerKey": ""}, "the label '' is not one of 1, 2, 3"),
    ("arc_easy", {"answerKey": 1}, "1 is not a text"),
    ("arc_easy", {"choices": {"text": ["so", "thus"], "label": ["1", "2", "3"]}}, "2 choices and 3 labels"),
    ("arc_easy", {"choices": {"text": ["so", "thus"], "label": ["2", "2"]}}, "the label '2' is not one of"),
    ("truthfulqa", {"mc1_targets": {"no": 0, "so": "1"}}, "the label '1'"),
    ("truthfulqa", {"mc1_targets": {"no": 1, "so": 1}}, "mc1_targets: 2 choices, 2 labels, 2 of them true"),
    ("truthfulqa", {"mc2_targets": {"no": 0, "so": 0}}, "no right answer"),
    ("sst2", {"label": -1}, "the label -1"),  # the hub's test split
    ("sst2", {"label": "entailment"}, "the label 'entailment' is not one of 0, 1"),
    ("sst2", {"sentence": None}, "None is not a text"),
    ("gsm8k", {"answer": "#### 12,34"}, "no number after ####, or more after it"),
    ("hotpotqa", {"answer": " "}, "the right answer is blank"),
    ("triviaqa", {"answer": {"value": "x", "aliases": "yz"}}, "'yz' is not a list"),
    ("summarize", {"summary": ""}, "the right answer is blank"),
])
def test_a_label_that_is_not_clear_is_refused(name, row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(name, ROWS[name][0] | row, tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_a_changed_row_keeps_its_label_or_is_refused(name, tmp_path):
    """Every value of every row is replaced, or removed. Only a label that is valid itself changes the answer.
    """
    valid = {"mmlu": {"0"}, "arc_easy": {"0"}, "hellaswag": {"0", '"0"'}, "truthfulqa": set(),
             "gsm8k": set()}.get(name, {"0", '"0"', '"AB"', '"yes"'})
    refused = total = 0
    for row in ROWS[name]:
        indices, texts = gold_of(name, load(name, row, tmp_path))
        for changed in mutations(row):
            total += 1
            try:
                found = gold_of(name, load(name, changed, tmp_path))
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            same = texts == found[1] or (indices is not None and indices == found[0])
            label = next((key for key in ("answer", "label", "gold", "summary") if key in row), "highlights")
            new = changed.get(label)
            new = new["value"] if isinstance(new, dict) and "value" in new else new
            assert same or json.dumps(new) in valid, (changed, found)
    assert refused > total / 3
