"""dataset/conversations.py: what each value means where a text belongs (the table of docs/data.md)."""

import json
import math
import re
import sys
import types
from datetime import datetime
from itertools import product

import pytest

from configurator import UserError
from dataset.conversations import conversation, preference
from dataset.encoding import Recipe, parse_content, parse_rows
from dataset.sources import Row, Skip, read_rows
from prepare import main as prepare_main
from tests.conftest import ROOT

NUMBERS = [(0, "0"), (0.0, "0"), (-0.0, "0"), (2.0, "2"), (0.5, "0.5"), (10**30, "1" + "0" * 30),
           (1e16, "1e+16"), (1e308, "1e+308")]  # fmt: skip
NOT_TEXT = [True, False, [1], {"a": 1}, [[]], b"bytes"]
ABSENT = [None, [], {}]


def chat(**row):
    return [message["content"] for message in conversation(row)]


@pytest.mark.parametrize("number, text", NUMBERS)
def test_a_number_is_a_text_wherever_a_text_belongs(number, text):
    assert chat(question=number, answer=number) == [text, text]
    assert chat(instruction="Add 1.", input=number, output="1") == [f"Add 1.\n\n{text}", "1"]
    assert chat(system=number, tools=number, question="a", answer="b")[0] == f"{text}\n\n{text}"
    messages = [{"role": "user", "content": number}, {"from": "gpt", "value": number, "thought": number}]
    assert conversation({"messages": messages})[1] == {"role": "assistant", "content": text, "thought": text}
    assert preference({"prompt": number, "chosen": number, "rejected": "x"})[1]["content"] == text


@pytest.mark.parametrize("absent", ABSENT)
def test_null_and_empty_containers_are_as_if_the_key_were_absent(absent):
    plain = {"question": "a", "answer": "b"}
    others = ("messages", "conversations", "instruction", "prompt", "input", "system", "tools", "output",
              "response", "completion", "thought")  # fmt: skip
    assert conversation(plain | dict.fromkeys(others, absent)) == conversation(plain)
    turns = [{"role": absent, "from": "human", "content": absent, "value": "a", "tool_calls": absent},
             {"role": "assistant", "content": "b", "thought": absent, "from": absent}]  # fmt: skip
    assert conversation({"messages": turns}) == conversation(plain)
    with pytest.raises(Skip, match="no answer"):
        chat(question="a", answer=absent)
    with pytest.raises(Skip, match="no conversation"):
        chat(question=absent, answer="b")
    with pytest.raises(Skip, match="no 'chosen' and 'rejected'"):
        preference({"prompt": "a", "chosen": absent, "rejected": "b"})


def test_an_empty_text_is_a_value():
    assert chat(instruction="a", input="", system="", output="b") == ["a", "b"]
    turns = [{"role": "user", "content": "", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat(messages=turns) == ["", "b"]
    assert chat(prompt="a", question="", answer="b") == ["a", "b"]  # "prompt" comes before "question"
    for row, reason in (({"prompt": "", "question": "a", "answer": "b"}, "empty question"),
                        ({"question": "a", "output": "", "answer": "b"}, "empty answer")):  # fmt: skip
        with pytest.raises(Skip, match=reason):
            conversation(row)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value):
    for row in ({"question": value, "answer": "b"}, {"question": "a", "answer": value},
                {"question": "a", "input": value, "answer": "b"}):  # fmt: skip
        with pytest.raises(Skip, match="is NaN or infinite"):
            conversation(row)
    for arguments in ({"x": value}, json.dumps({"x": value})):
        call = {"name": "f", "arguments": arguments}
        with pytest.raises(Skip, match="arguments are not JSON"):
            conversation({"messages": [{"role": "assistant", "tool_calls": [call]}]})


@pytest.mark.parametrize("value", NOT_TEXT)
def test_other_values_are_refused(value):
    for row in ({"question": "a", "answer": value}, {"question": "a", "input": value, "answer": "b"},
                {"question": "a", "system": value, "answer": "b"},
                {"messages": [{"role": "assistant", "content": value}]},
                {"messages": [{"role": "assistant", "content": "a", "thought": value}]}):  # fmt: skip
        with pytest.raises(Skip, match="is not a string"):
            conversation(row)


@pytest.mark.parametrize("value", [b"\xff", datetime(2026, 1, 2), math.nan])
def test_tools_with_values_that_are_no_json(value):
    """Parquet has dates and bytes."""
    with pytest.raises(Skip, match="'tools' is not JSON"):
        conversation({"question": "a", "answer": "b", "tools": [{"name": "f", "since": value}]})


def test_parquet_means_the_same_as_json(tmp_path):
    """Arrow fills the fields that a struct lacks with nulls; the rows are those of the JSON lines."""
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]
    calls = [{"name": "f", "arguments": {"city": "Bern"}}, {"name": "g", "arguments": {"day": 0}}]
    rows = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "tool_calls": calls}]},
            {"question": "a", "answer": "0", "input": ""}, {"question": "", "answer": "b"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = pyarrow.string()
    arguments = pyarrow.struct({"city": text, "day": pyarrow.int64()})
    call = pyarrow.struct({"name": text, "arguments": arguments})
    message = pyarrow.struct(dict.fromkeys(("role", "content", "from", "value"), text)
                             | {"tool_calls": pyarrow.list_(call)})  # fmt: skip
    columns = {"messages": pyarrow.list_(message), **dict.fromkeys(("question", "answer", "input"), text)}
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(columns))
    assert table.to_pylist()[0]["messages"][0]["value"] is None
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    recipe = Recipe("chat", "text", {}, None)
    from_lines, from_table = (parse_rows(list(read_rows([tmp_path / name], None, 2**20)), recipe)
                    for name in ("a.jsonl", "a.parquet"))  # fmt: skip
    assert from_lines == from_table
    assert [document.reason for document in from_lines] == [None, None, None, "empty question"]
    assert from_lines[1].content[1]["tool_calls"][1] == {"name": "g", "arguments": {"day": 0}}


def test_no_value_anywhere_raises_anything_but_skip():
    values = [value for value, _ in NUMBERS] + NOT_TEXT + ABSENT + [
        "a", "", "\ud800", math.nan, math.inf, {"\ud800": "b"}, [{}], [{"role": 3}], [{"role": "user"}],
        [{"role": "assistant", "content": "a", "tool_calls": [{"function": 3}]}],
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": b""}]}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": NaN}'}], [{"output": 3}]]  # fmt: skip
    keys = ["messages", "prompt", "input", "output", "system", "chosen", "rejected", "\ud800"]
    rows = [{"question": "a", "answer": "b"} | {key: value} for key, value in product(keys, values)]
    rows += [{one: value, two: other} for one, two in (("prompt", "answer"), ("chosen", "rejected"))
             for value, other in product(values, values)] + values  # fmt: skip
    for kind, row_kind in product(("chat", "preference"), ("json", "value")):
        for row in rows:
            content = json.dumps(row, default=str).encode() if row_kind == "json" else row
            try:
                parse_content(Row("a:1", row_kind, content), Recipe(kind, "text", {}, None))
            except Skip as reason:
                str(reason).encode()


@pytest.mark.parametrize("kind", ["chat", "preference", "text"])
def test_a_key_that_is_half_a_character(tmp_path, kind, capsys):
    """It is named in a reason, which is printed and written to meta.json."""
    good = {"question": "a", "answer": "b", "chosen": "b", "rejected": "c", "text": "d"}
    rows = [good, {"\ud800\x1b[31m\n": 1}, {"text": ["\ud800"], "\udfff": 2}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    args = [f"--source={tmp_path / 'a.jsonl'}", f"--kind={kind}", "--vocab_size=300", "--val_fraction=0",
            f"--out={tmp_path / 'd'}", "--num_proc=1"]  # fmt: skip
    prepare_main(args)
    printed = capsys.readouterr().out
    printed.encode()
    skipped = json.loads((tmp_path / "d" / "meta.json").read_text("utf-8"))["rows"]["skipped"]
    assert sum(skipped.values()) == 2 and "".join(skipped).encode()
    if kind == "chat":
        reason = r"no conversation (keys: \ud800\x1b[31m\n)"
        assert skipped[reason] == 1 and reason in printed
    (tmp_path / "a.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match=r"one of \\ud800"):
        prepare_main([*args, "--overwrite=True"])


def test_a_tree_of_messages_becomes_chats_by_the_program_in_the_docs(tmp_path, monkeypatch):
    """a - b - c - d, and a - e: the chats a b c d and a e. f is a question without an answer."""
    rows = [{"message_id": name, "parent_id": parent, "role": role, "text": name.upper()}
            for name, parent, role in (
                ("d", "c", "assistant"), ("a", None, "prompter"), ("b", "a", "assistant"),
                ("c", "b", "prompter"), ("e", "a", "assistant"), ("f", None, "prompter"))]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(import json\nfrom datasets.*?)```", text, re.DOTALL)
    exec(program, {})
    chats = [conversation(json.loads(line)) for line in (tmp_path / "oasst2.jsonl").open(encoding="utf-8")]
    assert [[(each["role"], each["content"]) for each in chat] for chat in chats] == [
        [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")],
        [("user", "A"), ("assistant", "E")]]
