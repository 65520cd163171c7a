"""prepare.py --task: rows of benchmarks become the questions that eval.py --chat=True asks."""

import json

import pytest

from configurator import UserError
from dataset.encoding import Recipe, parse_content
from dataset.sources import Row, Skip
from dataset.tasks import example
from evals.tasks import glue, summarize, word_problems
from prepare import PrepareConfig, main


@pytest.mark.parametrize("task, row, prompt, answer", [
    ("sst2", {1: "so good", 2: "1"},
     "so good\nQuestion: Is this sentence positive or negative?\nAnswer:", "positive"),
    ("sst2", {"sentence": "bad", "label": 0, "idx": 3},
     "bad\nQuestion: Is this sentence positive or negative?\nAnswer:", "negative"),
    ("cola", {1: "gj04", 2: "0", 3: "*", 4: "X the."},
     "X the.\nQuestion: Does this sentence make sense?\nAnswer:", "no"),
    ("rte", {1: "7", 2: "A.", 3: "B.", 4: "entailment"}, "A.\nQuestion: B. True or False?\nAnswer:", "True"),
    ("gsm8k", {"question": "Q?", "answer": "2 * 2 = 4\n#### 4"}, "Question: Q?\nAnswer:",
     "2 * 2 = 4\n#### 4"),
    ("mawps", {"original_text": "Q ?", "equation": "X=((22.0-14.0)/4.0)", "ans": 2.0},
     "Question: Q ?\nAnswer:", "X=((22-14)/4)\n#### 2"),
    ("mawps", {"original_text": "Q ?", "equation": "X=7+5.5", "ans": "12.5"}, "Question: Q ?\nAnswer:",
     "X=7+5.5\n#### 12.5"),
    ("summarize", {"dialogue": "A: Hi", "summary": "A greets."},
     "A: Hi\n\nSummarize this text in a few sentences.", "A greets."),
    ("summarize", {"article": "T", "highlights": "S", "id": 1},
     "T\n\nSummarize this text in a few sentences.", "S"),
])
def test_a_row_of_each_form(task, row, prompt, answer):
    assert example(task, row) == (prompt, answer)


@pytest.mark.parametrize("task, row, reason", [
    ("rte", {1: "index", 2: "sentence1", 3: "sentence2", 4: "label"}, "the line of headers"),
    ("sst2", {"sentence": "x", "label": -1}, "not a row of sst2 .ValueError: the label -1 is"),
    ("sst2", {1: "gj04", 2: "1", 3: "", 4: "x"}, "ValueError"),
    ("gsm8k", {"question": "Q"}, "KeyError: 'answer'"),
    ("mawps", {"original_text": "Q", "equation": "X=1", "ans": "many"}, "ValueError"),
    ("summarize", {"document": None, "summary": ""}, "AttributeError"), ("sst2", ["a"], "not a JSON object")])
def test_a_row_of_another_form_is_counted(task, row, reason):
    with pytest.raises(Skip, match=reason):
        parse_content(Row("a:1", "value", row), Recipe("chat", "text", {}, None, task=task))


def test_the_prompts_are_those_of_the_evaluation():
    """Training and evaluation must not drift apart: the same row, the same prompt."""
    row = {"sentence": "so good", "label": 1}
    asked = glue.question_of(row, "sst2")
    assert example("sst2", row) == (asked.prompt, asked.choices[asked.gold[0]])
    row = {"question": "Q?", "answer": "#### 4", "file": "x"}
    assert example("gsm8k", row)[0] == word_problems.problem_of(row).prompt
    assert summarize.document_and_summary({"dialogue": "a", "summary": "b"}) == ("a", "b")


def test_prepare_reads_tables_and_generates_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sst2_train.tsv").write_text("sentence\tlabel\n" + "".join(
        f"film number {n} is it\t{n % 2}\n" for n in range(60)))
    argv = ["--kind=chat", "--task=sst2", "--source=sst2_train.tsv", "--vocab_size=300", "--num_proc=1",
            "--out=d"]
    main(argv)
    assert "61 in = 60 kept + 1 skipped" in capsys.readouterr().out
    main(argv)
    assert "up to date" in capsys.readouterr().out
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["inputs"]["task"] == "sst2"
    monkeypatch.setattr("prepare.TOOL_ROWS", 50)
    main(["--kind=chat", "--source=tools", "--vocab_size=400", "--num_proc=1"])
    assert "50 in = 50 kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "data/tools/meta.json").read_text())["source"] == "tools"


@pytest.mark.parametrize("keys, message", [
    (dict(source="tools"), "only work with --kind=chat"), (dict(task="sst2"), "only work with --kind=chat"),
    (dict(kind="preference", source="tools"), "only work with"),
    (dict(kind="chat", task="sst2", source="problems"), "does not work with keys or source=problems"),
    (dict(kind="chat", task="sst2", source="a", keys="question=a"), "does not work with keys")])
def test_settings_that_do_not_go_together(keys, message):
    with pytest.raises(UserError, match=message):
        PrepareConfig(**keys)
