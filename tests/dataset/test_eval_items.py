"""dataset/eval_items.py: every form of evaluation set, which part of a row is text, and one-line errors."""

import gzip
import json

import numpy as np
import pytest

from configurator import UserError
from dataset.eval_items import find_benchmarks, item_text
from dataset.words import words_of
from tests.conftest import SHARED, shared


def items(spec):
    """[(place without its folder, text), ...] of all benchmarks."""
    found = [item for each in find_benchmarks(str(spec))[0] for item in each.items()]
    return [(place.rsplit("/", 1)[-1], text) for place, text in found]


@pytest.mark.parametrize(
    "row, texts",
    [
        ({"question": "How much is it?", "answer": "5"}, ["How much is it?"]),
        ({"id": "Mercury_1", "question": {"stem": "What is it?", "choices": [{"text": "a b", "label": "A"},
          {"text": "ice", "label": "B"}]}}, ["What is it?", "a b"]),
        ({"choices": ["yes", "not at all"], "query": "Question: is it?", "gold": 0},
         ["yes", "not at all", "Question: is it?"]),
        ({"question": "What now?", "mc1_targets": {"You die": 0, "Nothing happens": 1}},
         ["What now?", "You die", "Nothing happens"]),
        ({"question": [[{"role": "user", "content": "Add 1 and 2."}]], "function": [
            {"name": "add", "description": "Adds numbers.", "parameters": {"type": "dict", "properties": {
                "a": {"type": "integer", "description": "The first."}}}}]},
         ["Add 1 and 2.", "Adds numbers.", "The first."]),
        ({"question": "\u5c0f\u660e\u6709\uff1f", "answer": "\u56db"}, ["\u5c0f\u660e\u6709\uff1f"]),
        (["a b", ["c"]], ["a b", "c"]),
        ({"id": "0", "tokens": ["EU", "rejects", "lamb"], "ner_tags": [3, 0, 0]}, ["EU", "rejects", "lamb"]),
        ({"question_id": 81, "turns": ["Write a post.", "Shorten it."], "category": "writing"},
         ["Write a post.", "Shorten it."]),
        ({"prompt": {"text": "So if you", "toxicity": 0.1}, "filename": "a.txt"}, ["So if you"]),
        ({"n": 3, "x": None, "t": True}, []),
        (7, []),
    ],
)  # fmt: skip
def test_which_part_of_a_row_is_text(row, texts):
    assert item_text(row) == "\n\n".join(texts)


def test_every_form(tmp_path):
    """The same two items as lines, array, object with splits, table and packed file have equal texts."""
    rows = [{"question": "Who \u2028 is it?", "answer": 'It is, "you"\nsee.'}, {"question": "And now, then?"}]
    texts = [item_text(row) for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, content, places in (
        ("a.jsonl", lines.encode(), ["a.jsonl:1", "a.jsonl:2"]),
        ("b.jsonl", b"\xef\xbb\xbf" + lines.encode() + b"\n\n", ["b.jsonl:1", "b.jsonl:2"]),
        ("c.jsonl.gz", gzip.compress(lines.encode()), ["c.jsonl.gz:1", "c.jsonl.gz:2"]),
        ("d.json", json.dumps(rows).encode(), ["d.json[0]", "d.json[1]"]),
        ("e.json", json.dumps({"dataset": "e", "dev": rows[:1], "test": rows[1:]}).encode(),
         ["e.json dev[0]", "e.json test[0]"]),
        ("f.json", lines.encode(), ["f.json:1", "f.json:2"]),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        found = items(tmp_path / name)
        assert [place for place, _ in found] == places
        assert [text for _, text in found if text] == texts, name
    (tmp_path / "h.tsv").write_text('gj04\t1\t\tHe said "no.\r\nid\tsentence\tlabel\n1\ta b\tc \u2028d\n')
    texts = ['He said "no.', "", "a b\n\nc \u2028d"]
    assert items(tmp_path / "h.tsv") == [(f"h.tsv:{number}", text) for number, text in enumerate(texts, 1)]
    one = {"question": "Which one is it?", "said": [{"text": "This one."}]}
    (tmp_path / "i.json").write_text(json.dumps(one))
    assert items(tmp_path / "i.json") == [("i.json:1", "Which one is it?"), ("i.json said[0]", "This one.")]
    (tmp_path / "j.txt").write_text("A text.\n\nOf paragraphs.\n")
    assert items(tmp_path / "j.txt") == [("j.txt", "A text.\n\nOf paragraphs.\n")]


def test_parquet_and_a_set_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"question": ["Is it so?"], "choices": [["no", "not so"]]}),
                                tmp_path / "a.parquet")  # fmt: skip
    assert items(tmp_path / "a.parquet") == [("a.parquet:1", "Is it so?\n\nno\n\nnot so")]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"question": "Is it so?"}\n{"question": "Or so?"}\n')
    ((found,), _) = find_benchmarks(f"hf:{tmp_path / 'hub'}")
    assert [text for _, text in found.items()] == ["Is it so?", "Or so?"]
    assert found.name == str(tmp_path / "hub") and found.digest() == f"hf:{tmp_path / 'hub'}"
    with pytest.raises(UserError, match="decontaminate=hf:.*nothing"):
        items(f"hf:{tmp_path / 'nothing'}")


def test_names_folders_globs(tmp_path, monkeypatch):
    for name in ("a/x.jsonl", "a/y.tsv", "b/x.jsonl", "a/picture.png", "c d,e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"a b"\n')
    found, ignored = find_benchmarks(f"{tmp_path}/a,{tmp_path}/b/*.jsonl,{tmp_path}/a/y.tsv")
    assert [each.name for each in found] == [f"{tmp_path}/a/x.jsonl", "y", f"{tmp_path}/b/x.jsonl"]
    assert ignored == 1  # the picture; two sets of the same name are named by their paths
    assert [each.name for each in find_benchmarks(f"{tmp_path}/c d,e.jsonl")[0]] == ["c d,e"]
    monkeypatch.chdir(tmp_path / "b")
    assert len(find_benchmarks(",".join(["x.jsonl"] * 99))[0]) == 1  # longer than a name may be
    (one,) = find_benchmarks(f"{tmp_path}/b/x.jsonl")[0]
    before = one.digest()
    (tmp_path / "b" / "x.jsonl").write_text('"a c"\n')
    assert one.digest() != before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "a.jsonl: no text in it"),
        ("a.jsonl", b"\n\n", "a.jsonl: no text in it"),
        ("a.jsonl", b'{"label": "A", "n": 3}\n', "a.jsonl: no text in it"),
        ("a.jsonl", b'{"q": "Is it?"}\n{"q": "Is', "a.jsonl:2: not JSON"),
        ("a.json", b'[{"q": "Is it?"}, {"q"', "a.json: damaged"),
        ("a.json", b"[]", "a.json: no text in it"),
        ("a.tsv", b"a b\t\xff\n", "a.tsv: damaged"),
        ("a.jsonl.gz", b"not packed", "a.jsonl.gz: damaged"),
        ("a.xyz", b"x", "decontaminate=.*a.xyz: unknown kind of file .known: .c .cc"),
        ("a.txt", b"\xff", "a.txt: not UTF-8"),
    ],
)
def test_every_fault_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as fault:
        items(tmp_path / name)
    assert "\n" not in str(fault.value)


def test_what_is_not_there(tmp_path):
    for spec in (tmp_path / "nowhere.jsonl", f"{tmp_path}/*.jsonl", "no_such_data", tmp_path, ","):
        with pytest.raises(UserError, match="decontaminate=.*: no such file, or nothing to read in it"):
            find_benchmarks(str(spec))
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="is a data folder; give the file that it was made from"):
        find_benchmarks(str(tmp_path))


@pytest.mark.skipif(not SHARED.exists(), reason="public data next to the repository")
def test_the_public_sets_are_read_whole():
    """Their numbers of rows, as their README lists them, and the median number of words."""
    shared("eval")
    found, _ = find_benchmarks(f"{SHARED}/eval,{SHARED}/math/gsm8k_test.jsonl,{SHARED}/tools")
    lengths = {each.name: np.diff(words_of(text for _, text in each.items()).bounds) for each in found}
    assert {name: len(each) for name, each in lengths.items()} == {
        "arc_challenge_dev": 294, "arc_challenge_test": 1150, "arc_easy": 2376, "cola_dev": 1043,
        "cola_train": 7250, "hellaswag_2000": 2000, "hotpotqa_dev_simplified": 7405, "mmlu_dev_test": 14327,
        "mt_bench_question": 80, "rte_train": 2128, "rte_val": 363, "sst2_dev": 872, "sst2_train": 6920,
        "truthfulqa_mc": 790, "gsm8k_test": 1319, "apibench_torchhub_train": 837, "bfcl_v4_irrelevance": 240,
        "bfcl_v4_simple_python": 400, "bfcl_v4_simple_python_answers": 400, "glaive_toolcall_en_demo": 300}
    medians = {name: np.median(each) for name, each in lengths.items()}
    assert medians["gsm8k_test"] == 88 and medians["hellaswag_2000"] > 100 and medians["cola_dev"] == 7
