"""dataset/decontaminate.py and prepare.py --decontaminate: copies of evaluation items are found wherever they
are, other text is not, and the rest becomes what it would be without the copies."""

import json
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

import prepare as prepare_module
from configurator import UserError
from dataset.conversations import conversation, preference
from dataset.decontaminate import NGRAM, WHOLE, Index
from dataset.encoding import full_text
from dataset.eval_items import find_benchmarks
from dataset.shards import DataFolder
from dataset.sources import standard_library
from dataset.words import words_of
from prepare import main
from tests.conftest import ROOT, shared

# Words distributed as in English: few frequent ones, many rare ones.
VOCABULARY = [f"w{number}" for number in range(3000)]
SHARES = 1 / np.arange(3, 3003)


def writing(seed, words):
    """A text of this many words, in sentences of 12."""
    draw = random.Random(f"{seed}")
    result = draw.choices(VOCABULARY, SHARES, k=words)
    for at in range(11, words, 12):
        result[at] += draw.choice((".", ".", ".\n", ".\n\n"))
    return " ".join(result)


def edited(text, share, seed=0):
    """A copy with this share of its words replaced, at least one."""
    draw, words = random.Random(seed), text.split(" ")
    for at in draw.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = f"new{draw.randrange(10**6)}"
    return " ".join(words)


def embedded(text, seed):
    return f"{writing(seed, 600)} {text} {writing(-seed, 600)}"


def index_of(*texts, name="test"):
    return Index([(name, [(f"{name}:{number}", text) for number, text in enumerate(texts)])])


ITEMS = [writing(f"item {number}", 27 + number % 120) for number in range(240)]


@pytest.fixture(scope="module")
def index():
    return index_of(*ITEMS)


def share_found(index, texts, how=""):
    """The share of texts that overlap the item of the same number; if `how` is given, by that rule."""
    return np.mean([any(each["item"] == f"test:{number}" and how in each for each in overlaps) if how else
                    any(each["item"] == f"test:{number}" for each in overlaps)
                    for number, overlaps in enumerate(index.find(texts))])  # fmt: skip


# ---- What is found ----------------------------------------------------------------------------------------


def test_copies(index):
    """Copies alone, in capitals and other punctuation, inside a long text, and halves of items."""
    assert share_found(index, ITEMS, "ngram") == share_found(index, ITEMS, "minhash") == 1
    other = [item.upper().replace(" ", " , ").replace(".", " \u2014 ") for item in ITEMS]
    assert share_found(index, other, "ngram") == share_found(index, other, "minhash") == 1
    assert share_found(index, [embedded(item, n + 1) for n, item in enumerate(ITEMS)], "ngram") == 1
    for half in (lambda words: words[: len(words) // 2], lambda words: words[len(words) // 2 :]):
        halves = [" ".join(half(item.split(" "))) for item in ITEMS]
        assert share_found(index, halves, "ngram") == 1
        assert share_found(index, [embedded(item, n + 1) for n, item in enumerate(halves)]) == 1


def test_copies_of_which_two_percent_are_edited(index):
    """MinHash finds all copies that are a whole text; equal words find all copies anywhere."""
    copies = [edited(item, 0.02, seed) for seed, item in enumerate(ITEMS)]
    assert share_found(index, copies, "minhash") == 1
    assert share_found(index, copies, "ngram") == 1
    assert share_found(index, [embedded(copy, n + 1) for n, copy in enumerate(copies)], "ngram") == 1
    paragraphs = [f"{writing(n, 200)}\n\n{copy}\n\n{writing(-n, 200)}" for n, copy in enumerate(copies, 1)]
    whole = [number for number, item in enumerate(ITEMS) if "\n\n" not in item]
    found = index.find([paragraphs[number] for number in whole])
    assert all(any("minhash" in each for each in overlaps) for overlaps in found)


def test_items_whose_sentences_are_in_another_order(index):
    """Shuffled sentences of 12 words keep no 13 words in a row, but nearly all pairs of neighbours."""
    draw, copies = random.Random(0), []
    for item in ITEMS:
        sentences = [" ".join(each.split()) for each in item.split(".") if each.strip()]
        if len(sentences) > 4:
            copies.append(". ".join(draw.sample(sentences, len(sentences))))
    found = [any("minhash" in each for each in overlaps) for overlaps in index.find(copies)]
    assert len(copies) > 100 and np.mean(found) > 0.99


def test_other_text_is_not_found(index):
    assert not any(index.find([writing(("other", number), 60) for number in range(3000)]))
    assert not any(index.find([path.read_text("utf-8", "replace") for path in standard_library()[:150]]))


def test_equal_words_are_those_of_sets_of_thirteen():
    """Against plain Python, on texts of two different words, which overlap or nearly do by chance."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices("ab", (5, 1), k=draw.randrange(60))) for _ in range(600)]
    items, texts = texts[:60], texts[60:]

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}

    known = set().union(*map(grams, items))
    whole = {tuple(item.split()) for item in items if WHOLE <= len(item.split()) < NGRAM}
    expected = [bool(grams(text) & known) or any(
        tuple(text.split()[i : i + len(each)]) == each for each in whole for i in range(60))
        for text in texts]  # fmt: skip
    found = index_of(*items).find(texts)
    assert [any("ngram" in each for each in overlaps) for overlaps in found] == expected
    assert 0 < sum(expected) < len(expected)
    for text, overlaps in zip(texts, found, strict=True):
        for each in overlaps:
            item = items[int(each["item"].removeprefix("test:"))]
            assert each.get("ngram", "") in " ".join(text.split()) and each.get("ngram", "") in item


@pytest.mark.parametrize("words", [13, 12, 10, 9, 8, 7])
def test_short_items(words):
    """From 10 words on anywhere in a text; from 8 words on as a line; a choice or a label nowhere."""
    item = " ".join(f"rare{number}" for number in range(words))
    index = index_of(f"{item}\n\nyes\n\nno", "yes", "of the")
    assert bool(index.find([embedded(item, 1)])[0]) == (words >= 10)
    for text in (item, f"{writing(1, 500)}\n{item}\n{writing(2, 500)}"):
        assert bool(index.find([text])[0]) == (words >= 8)
    assert index.find(["yes", "yes\n\nno", "of the", "", "\n"]) == [[]] * 5


def test_nothing_crosses_from_a_text_to_the_next():
    words = ITEMS[9].split()
    index = index_of(" ".join(words))
    parts = [" ".join(words[at : at + 12]) for at in range(0, len(words), 12)]
    assert not any(index.find(parts))
    assert index.find([" ".join(words[:13]), *parts])[0] and index.find([*parts, " ".join(words[-13:])])[-1]


def test_each_benchmark_is_listed_with_its_item():
    """An item that two sets have counts for both. In each set, the most similar item is named."""
    one, other = ITEMS[0], ITEMS[1]
    index = Index([("a", [("a:1", one), ("a:2", edited(one, 0.05))]), ("b", [("b:1", other), ("b:2", one)])])
    (found,) = index.find([one])
    assert Counter((each["benchmark"], each["item"]) for each in found) == {("a", "a:1"): 2, ("b", "b:2"): 2}
    assert {each["minhash"] for each in found if "minhash" in each} == {1.0}
    assert {each["ngram"] for each in found if "ngram" in each} == {words_of([one]).spelled(0, 13).decode()}


def test_similarities_are_those_of_sets_of_words_and_pairs(index):
    """Against exact Jaccard similarities in plain Python: within 4 standard errors, and right on average."""
    def elements(text):
        words = words_of([text]).data.split()
        return {*words, *zip(words, words[1:], strict=False)}

    errors = []
    for number, item in enumerate(ITEMS):
        copy = edited(item, 0.03, number)
        one, other = elements(item), elements(copy)
        exact = len(one & other) / len(one | other)
        for each in index.find([copy.replace("\n", " ")])[0]:
            if "minhash" in each:
                errors.append((each["minhash"] - exact) / np.sqrt(exact * (1 - exact) / 128))
    assert len(errors) > 200 and np.abs(errors).max() < 4 and abs(np.mean(errors)) < 4 / np.sqrt(len(errors))


def test_similarity_by_hand():
    """The example in the module docstring: 15 words, the middle one replaced, shares 26 of 32 elements."""
    one = [f"w{number}" for number in range(15)]
    other = [*one[:7], "new", *one[8:]]
    one, other = ({*words, *zip(words, words[1:], strict=False)} for words in (one, other))
    assert len(one) == len(other) == 29 and (len(one & other), len(one | other)) == (26, 32)


def test_an_index_without_anything_that_can_be_found():
    for texts in ([], [""], ["yes", "no", "a b c"]):
        assert index_of(*texts).find(["a b c", writing(1, 100), ""]) == [[], [], []]
    assert Index([]).find(["a b c"]) == [[]] and Index([]).find([]) == []


def test_a_template_that_thousands_share_costs_no_memory():
    """2,000 items and 1,000 texts that differ in 2 of 42 words: 2 million pairs share a band."""
    import tracemalloc

    template = ITEMS[3].split(" ")[:20]
    made = [" ".join([*template, str(number), *template[::-1], str(number + 7)]) for number in range(3000)]
    index = index_of(*made[:2000])
    tracemalloc.start()
    found = index.find(made[2000:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(found) and peak < 150 * 2**20


# ---- On the public sets -----------------------------------------------------------------------------------


def public(*names):
    spec = ",".join(str(shared(name)) for name in names)
    return [(each.name, list(each.items())) for each in find_benchmarks(spec)[0]]


def test_edited_copies_of_benchmark_items():
    """With 2 % of the words replaced: all of 27 words or more are found, by MinHash all of 50 or more."""
    for name, items in public("math/gsm8k_test.jsonl", "eval/mmlu_dev_test.jsonl.gz", "eval/arc_easy.jsonl"):
        texts = [text for _, text in items][:3000]
        lengths = np.array([len(text.split(" ")) for text in texts])
        found = Index([(name, items)]).find([edited(text, 0.02, seed) for seed, text in enumerate(texts)])
        by = [{how for each in overlaps for how in ("ngram", "minhash") if how in each} for overlaps in found]
        assert np.mean([bool(each) for each, n in zip(by, lengths, strict=True) if n >= 27]) > 0.999
        assert np.mean(["minhash" in each for each, n in zip(by, lengths, strict=True) if n >= 50]) > 0.999


def test_novels_hold_no_item_by_chance():
    import lzma
    items = public("eval/mmlu_dev_test.jsonl.gz", "eval/arc_easy.jsonl", "eval/cola_dev.tsv")
    with lzma.open(shared("text/novels_98_english.jsonl.xz"), "rt") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(6), strict=False)]
    assert not any(Index(items).find(texts))


def test_training_problems_against_test_problems():
    """GSM8K's train and test sets share some sentences, but no whole problem."""
    texts = [text for _, text in public("math/gsm8k_train.jsonl")[0][1]]
    found = Index(public("math/gsm8k_test.jsonl")).find(texts)
    equal = [each["ngram"] for overlaps in found for each in overlaps if "ngram" in each]
    assert len(equal) == 7 and sum(map(len, found)) == 7
    assert "miles in 3 hours at the same rate how many additional hours would" in equal


# ---- prepare.py -------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(folder, leave_out=("meta.json", "contaminated.json")):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in leave_out}


def contaminated(folder):
    return json.loads((folder / "contaminated.json").read_text())


@pytest.fixture
def dirty(tmp_path):
    """A folder with clean.jsonl, dirty.jsonl (the same with four copies of items) and two sets of items."""
    clean = [{"text": writing(("row", number), 80 + number % 50)} for number in range(300)]
    inside = embedded(" ".join(ITEMS[2].split()), 5)
    copies = [{"text": text} for text in (ITEMS[1], inside, edited(ITEMS[3], 0.02), ITEMS[1])]
    rows = list(clean)
    for at, copy in zip((17, 100, 101, 250), copies, strict=True):
        rows.insert(at, copy)
    write_rows(tmp_path / "clean.jsonl", clean)
    write_rows(tmp_path / "dirty.jsonl", rows)
    write_rows(tmp_path / "held.jsonl", [{"question": item, "answer": "yes"} for item in ITEMS[:50]])
    write_rows(tmp_path / "other.jsonl", [{"question": "what now?"}, {"question": ITEMS[2]}])
    return tmp_path


ARGS = ["--vocab_size=300", "--val_fraction=0.2"]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_rest_becomes_what_it_would_be_without_the_copies(dirty, monkeypatch, capsys, num_proc):
    """Shards and tokenizer equal those of the clean text byte for byte; every removed row is listed."""
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2**14)
    main([f"--source={dirty}/clean.jsonl", f"--out={dirty}/clean", "--num_proc=1", *ARGS])
    main([f"--source={dirty}/dirty.jsonl", f"--out={dirty}/found", f"--num_proc={num_proc}", *ARGS,
          f"--decontaminate={dirty}/held.jsonl,{dirty}/other.jsonl", "--strict=True"])  # fmt: skip
    assert content(dirty / "found") == content(dirty / "clean")
    assert DataFolder(dirty / "found").meta["rows"] == {
        "in": 304, "kept": 300, "skipped": {"overlaps an evaluation item": 4}}  # fmt: skip
    report = contaminated(dirty / "found")
    places = [each["row"] for each in report["removed"]]
    assert places == [f"{dirty}/dirty.jsonl:{line}" for line in (18, 101, 102, 251)]
    assert report["benchmarks"] == {
        "held": {"items": 50, "too_short": 0, "documents": 4, "ngram": 4, "minhash": 3},
        "other": {"items": 2, "too_short": 1, "documents": 1, "ngram": 1, "minhash": 0}}  # fmt: skip
    held = [each for each in report["removed"][1]["overlaps"] if each["benchmark"] == "held"]
    assert held == [{"benchmark": "held", "item": f"{dirty}/held.jsonl:3",
                     "ngram": words_of([ITEMS[2]]).spelled(0, 13).decode()}]  # fmt: skip
    assert report["settings"]["ngram"] == 13 and report["settings"]["threshold"] == 0.8
    printed = capsys.readouterr().out
    assert "overlap   4 rows with held: 4 by equal words, 3 as near-duplicates\n" in printed
    assert "1 of its 2 items are too short to be found" in printed
    assert not (dirty / "clean" / "contaminated.json").exists()


def test_only_what_was_read_is_listed(dirty):
    main([f"--source={dirty}/dirty.jsonl", f"--out={dirty}/d", "--num_proc=1", *ARGS, "--max_tokens=20_000",
          f"--decontaminate={dirty}/held.jsonl"])  # fmt: skip
    rows, report = DataFolder(dirty / "d").meta["rows"], contaminated(dirty / "d")
    assert rows["in"] == rows["kept"] + 1 < 100 and len(report["removed"]) == 1


def test_the_same_sets_do_nothing_others_are_refused(dirty, capsys):
    args = [f"--source={dirty}/dirty.jsonl", f"--out={dirty}/d", "--num_proc=1", *ARGS]
    held = f"--decontaminate={dirty}/held.jsonl"
    main([*args, held])
    before = content(dirty / "d", ())
    main([*args, held, "--num_proc=2"])
    assert "is up to date" in capsys.readouterr().out and content(dirty / "d", ()) == before
    for change in ([], [f"{held},{dirty}/other.jsonl"]):
        with pytest.raises(UserError, match="decontaminate differ"):
            main([*args, *change])
    write_rows(dirty / "held.jsonl", [{"question": ITEMS[0]}])
    with pytest.raises(UserError, match="decontaminate differ"):
        main([*args, held])
    assert content(dirty / "d", ()) == before
    main([*args, held, "--overwrite=True"])
    assert contaminated(dirty / "d")["benchmarks"]["held"]["documents"] == 0  # item 0 is not in it
    main([*args, "--overwrite=True"])
    assert not (dirty / "d" / "contaminated.json").exists()


CHATS = [
    {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "ITEM"}]},
    {"messages": [{"role": "user", "content": "ITEM"}, {"role": "assistant", "content": "I do not know."}]},
    {"messages": [{"role": "user", "content": "Why?"},
                  {"role": "assistant", "thought": "ITEM", "content": "Because."}]},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"name": "search", "arguments": {"query": "ITEM"}}]}]},
]  # fmt: skip
PREFERENCES = [
    {"prompt": "ITEM", "chosen": "yes", "rejected": "no"},
    {"prompt": "Tell me.", "chosen": "ITEM", "rejected": "no"},
    {"prompt": "Tell me.", "chosen": "yes", "rejected": "ITEM"},
]


@pytest.mark.parametrize("kind, rows", [("chat", CHATS), ("preference", PREFERENCES)])
def test_chats_and_preferences_are_searched_whole(tmp_path, kind, rows):
    """In the messages, thoughts and calls of every role."""
    item = json.dumps(writing("item 7", 33))[1:-1]
    rows = [json.loads(json.dumps(row).replace("ITEM", item)) for row in rows]
    other = {"chat": {"question": "Which?", "answer": "That one, {}."},
             "preference": {"prompt": "Which?", "chosen": "That one, {}.", "rejected": "No."}}[kind]
    plain = [json.loads(json.dumps(other).replace("{}", str(number))) for number in range(30)]
    write_rows(tmp_path / "rows.jsonl", rows + plain)
    write_rows(tmp_path / "held.jsonl", [{"question": writing("item 7", 33)}])
    main([f"--source={tmp_path}/rows.jsonl", f"--kind={kind}", f"--out={tmp_path}/d", "--num_proc=1", *ARGS,
          f"--decontaminate={tmp_path}/held.jsonl"])  # fmt: skip
    report = contaminated(tmp_path / "d")
    assert [each["row"] for each in report["removed"]] == [
        f"{tmp_path}/rows.jsonl:{line}" for line in range(1, len(rows) + 1)]  # fmt: skip
    assert DataFolder(tmp_path / "d").meta["rows"]["kept"] == 30


def test_visible_text():
    assert full_text("a text") == "a text"
    assert full_text(conversation(CHATS[2])) == "Why?\n\nITEM\n\nBecause."
    assert full_text(conversation({"system": "Be.", "question": "a", "answer": "b"})) == "Be.\n\na\n\nb"
    assert full_text(preference(PREFERENCES[1])) == "Tell me.\n\nITEM\n\nno"


def test_a_set_that_cannot_be_read_leaves_what_was_there(dirty):
    args = [f"--source={dirty}/clean.jsonl", f"--out={dirty}/d", "--num_proc=1", *ARGS]
    main(args)
    before = content(dirty / "d", ())
    (dirty / "bad.jsonl").write_text('{"question": "Is it')
    for name in ("bad.jsonl", "nowhere.jsonl"):
        with pytest.raises(UserError, match=f"decontaminate=.*{name}"):
            main([*args, "--overwrite=True", f"--decontaminate={dirty}/held.jsonl,{dirty}/{name}"])
        assert content(dirty / "d", ()) == before and not (dirty / ".d.tmp").exists()


def test_every_row_overlapping_is_one_line(dirty):
    with pytest.raises(UserError, match="no row can be used: overlaps an evaluation item"):
        main([f"--source={dirty}/held.jsonl", "--text_key=question", f"--out={dirty}/d", "--num_proc=1",
              f"--decontaminate={dirty}/held.jsonl", "--vocab_size=300"])  # fmt: skip


def test_a_prepare_that_is_killed_leaves_nothing_half(dirty):
    """The same command, run again, then completes."""
    some = [{"text": writing(n, 3000)} for n in range(60)]
    write_rows(dirty / "many.jsonl", [{"text": ITEMS[1]}, *some * 6])
    command = [sys.executable, str(ROOT / "prepare.py"), f"--source={dirty}/many.jsonl", f"--out={dirty}/d",
               f"--decontaminate={dirty}/held.jsonl", "--num_proc=2", "--vocab_size=300"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list((dirty / ".d.tmp").glob("train*.bin")) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (dirty / "d").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contaminated(dirty / "d")["benchmarks"]["held"]["documents"] == 1
    assert sorted(path.name for path in dirty.iterdir() if "tmp" in path.name) == []
