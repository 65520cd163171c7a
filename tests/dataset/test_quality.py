"""dataset/quality.py: every rule on a text made for it, repeats as a plain definition counts them, and
near-duplicates as a comparison of all pairs finds them."""

import json
import random

import numpy as np
import pytest

import prepare as prepare_module
from configurator import UserError
from dataset import quality
from dataset.quality import SeenDocuments, chosen_rules, document_signatures, first_failure
from prepare import PrepareConfig, main, prepare
from tests.conftest import config_of

RULES = chosen_rules("gopher,fineweb")
NAMES = "amber birch cedar delta ember fjord grove haven inlet jetty kayak ledge maple north ocean".split()


def prose(seed, count=120, words=NAMES):
    """Sentences of nine words, one per line, with the stop words that Gopher asks for."""
    draw = random.Random(seed)
    lines = []
    for number in range(count // 8):
        *chosen, last = (f"{draw.choice(words)}{draw.choice('aeiou')}{draw.choice('bdgkl')}{number}"
                         for _ in range(6))  # fmt: skip
        lines.append(f"The {' '.join(chosen)} and of {last}.")
    return "\n".join(lines)


@pytest.mark.parametrize("rule, text", [
    ("short_document", prose(1, 24)), ("long_document", "the of " * 50_001),
    ("word_length", "\n".join(f"The and {'x' * 40}{i} {'y' * 40}{i} a." for i in range(40))),
    ("hashes", prose(1).replace("The ", "#The #")), ("ellipses", prose(1).replace(" and", "... and")),
    ("bullet_lines", prose(1).replace("The", "- The")), ("ellipsis_lines", prose(1).replace(".", "\u2026")),
    ("alphabetic_words", prose(1).replace("of", "of 1 2 3 4 5")),
    ("stop_words", prose(1).replace("and of", "xyz")),
    ("duplicate_paragraphs", "\n\n".join([prose(1), *["The end."] * 20])),
    ("duplicate_paragraph_characters", "\n\n".join([prose(1), *prose(3).split("\n"), prose(2), prose(2)])),
    ("duplicate_lines", "\n".join([prose(1), *["The end."] * 20])),
    ("duplicate_line_characters", "\n".join([prose(1), "\n".join([prose(2, 48)] * 2)])),
    ("top_2_gram", " ".join(f"w{i} amberly birchwood" for i in range(60))),
    ("top_3_gram", " ".join(f"www{i} wwww{i} aa be bb" for i in range(60))),
    ("top_4_gram", " ".join(f"wwww{i} wwwwwww{i} aa bb cc dd" for i in range(60))),
    ("duplicate_5_grams", " ".join([prose(1), *[" ".join(NAMES[i:i + 5]) for i in range(11)] * 4])),
    ("punctuated_lines", prose(1).replace(".", "")),
    ("short_lines", "\n".join([*prose(1).split(), prose(2)])),
    ("repeated_line_characters", "\n".join([prose(1), *prose(1).split("\n")[:3]])),
    ("newlines", prose(1).replace("\n", "\n" * 5)),
])  # fmt: skip
def test_each_rule_on_a_text_made_for_it(rule, text):
    assert first_failure(prose(1), RULES) is None
    values = [*quality.fineweb_values(text), *quality.gopher_values(text)]
    least, greatest = RULES[rule]
    assert any(name == rule and not least <= value <= greatest for name, value in values)
    assert first_failure(text, {rule: RULES[rule]})[0] == rule
    kept_by_others = [name for name, value in values if name != rule]
    assert len(kept_by_others) >= 4  # the other rules were measured, too


def test_paragraphs_of_a_text_with_windows_line_ends():
    paragraphs = [prose(1), *["The end."] * 20]
    values = dict(quality.gopher_values("\r\n\r\n".join(paragraphs)))
    assert values["duplicate_paragraphs"] == 19 / 21  # 20 are equal, and the first of them is no repeat


def repeated_by_definition(words, n):
    """Walk through the text; a gram that was walked over before is a repeat, and is left as a whole."""
    at, total, seen = 0, 0, set()
    while at + n <= len(words):
        gram = tuple(words[at:at + n])
        if gram in seen:
            total, at = total + len("".join(gram)), at + n
        else:
            seen.add(gram)
            at += 1
    return total


@pytest.mark.parametrize("distinct", [2, 5, 40])
def test_grams_are_those_of_the_definition(distinct):
    draw = random.Random(distinct)
    for _ in range(20):
        words = [draw.choice(NAMES)[:draw.randint(1, 5)] + str(draw.randrange(distinct)) for _ in range(300)]
        text = " ".join(words)
        values = dict(quality.gopher_values(text))
        for n in range(5, 11):
            expected = repeated_by_definition(words, n) / len(text)
            assert values.get(f"duplicate_{n}_grams", 0) == pytest.approx(expected)
        for n in (2, 3, 4):
            grams = [" ".join(words[i:i + n]) for i in range(len(words) - n + 1)]
            best = max(grams, key=grams.count)  # max returns the first of equally frequent ones
            expected = len(best) * grams.count(best) / len(text) if grams.count(best) > 1 else 0
            assert values.get(f"top_{n}_gram", 0) == pytest.approx(expected)


def test_words_and_lines_by_hand():
    text = "The cat -- \r\n\r\n  sat. \n- \u2026\n"
    values = dict(quality.gopher_values(text))
    assert values["short_document"] == 3 and values["word_length"] == pytest.approx(10 / 3)
    assert values["alphabetic_words"] == 3 / 6 and values["ellipses"] == 1 / 6
    assert values["bullet_lines"] == values["ellipsis_lines"] == 1 / 3  # of three lines that are not blank
    assert dict(quality.fineweb_values(text))["punctuated_lines"] == 2 / 3


def test_unknown_rules_are_one_line(tmp_path):
    assert "short_document" not in chosen_rules("gopher", "short_document,hashes")
    with pytest.raises(UserError, match="no rule 'newlines' in quality=gopher: short_document, "):
        chosen_rules("gopher", "newlines")
    for argv, message in (["--quality_off=hashes"], "no rule 'hashes'"), (
            ["--quality=gopher", "--kind=chat"], "quality=gopher only works with --kind=text"), (
            ["--dedup=0.3"], "dedup=0.3"), (["--quality=c4"], "gopher"):
        with pytest.raises(UserError, match=message):
            main([*argv, f"--out={tmp_path / 'd'}"])


# ---- Near-duplicates --------------------------------------------------------------------------------------

def edited(text, share, draw):
    words = text.split(" ")
    for at in draw.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = draw.choice(NAMES)
    return " ".join(words)


def test_planted_copies_are_found_and_nothing_else():
    draw = random.Random(3)
    texts = [" ".join(draw.choice(NAMES) + str(draw.randrange(50)) for _ in range(200)) for _ in range(300)]
    seen = SeenDocuments(0.8)
    assert seen.add([f"a:{i}" for i in range(300)], document_signatures(texts)) == [None] * 300
    copies = [edited(text, 0.01, draw).upper().replace(" ", ",\n") for text in texts]
    found = seen.add([f"b:{i}" for i in range(300)], document_signatures(copies))
    assert sum(place is not None and place.startswith(f"a:{i} (0.") for i, place in enumerate(found)) >= 295


def test_results_are_those_of_comparing_all_whatever_the_calls():
    draw = random.Random(4)
    texts = ["too short for it"]
    for _ in range(60):  # families of copies of copies: some are far from the documents that were kept
        text = " ".join(draw.choice(NAMES) + str(draw.randrange(50)) for _ in range(60))
        texts += [text := edited(text, 0.01, draw) for _ in range(draw.randint(1, 6))]
    draw.shuffle(texts)
    signature = document_signatures(texts)
    assert [not row.any() for row in signature] == [text == "too short for it" for text in texts]
    texts, signature = [text for text in texts if len(text) > 20], signature[signature.any(axis=1)]
    kept = []
    for row in range(len(texts)):
        if not any((signature[row] == signature[other]).mean() >= 0.8 for other in kept):
            kept.append(row)
    for size in (1, 7, 1000):
        seen, found = SeenDocuments(0.8), []
        for begin in range(0, len(texts), size):
            places = [str(row) for row in range(begin, min(begin + size, len(texts)))]
            found += seen.add(places, signature[begin:begin + size])
        assert [row for row, place in enumerate(found) if place is None] == kept
    assert 60 < len(kept) < len(texts) and len(seen.places) == len(kept)


def test_a_signature_is_of_the_text_alone():
    texts = [prose(1), "", "one two three", prose(2)]
    together = document_signatures(texts)
    assert all(np.array_equal(together[i], document_signatures([text])[0]) for i, text in enumerate(texts))


# ---- prepare.py -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_proc", [1, 2])
def test_prepare_counts_what_it_drops(tmp_path, monkeypatch, capsys, num_proc):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2**12)
    good = [prose(seed) for seed in range(100, 140)]
    rows = [*good, *[text.replace("birch", "BIRCH!") for text in good[:12]], *[prose(1, 16)] * 2, good[0],
            prose(1).replace(".", "")]  # fmt: skip
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    argv = [f"--source={source}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--val_fraction=0.2",
            "--quality=gopher,fineweb", "--dedup=0.8", f"--num_proc={num_proc}"]  # fmt: skip
    data = prepare(config_of(PrepareConfig, *argv))
    assert data.meta["rows"] == {"in": 56, "kept": 40, "skipped": {
        "near-duplicate document": 12, "quality rule short_document": 2, "duplicate document": 1,
        "quality rule punctuated_lines": 1}}  # fmt: skip
    dropped = json.loads((tmp_path / "d" / "dropped.json").read_text())
    near = dropped["near-duplicate document"]
    assert near["rows"] == 12 and len(near["examples"]) == 10
    assert near["examples"][0] == {"row": f"{source}:41", "near": f"{source}:1 (1.00)"}
    example = dropped["quality rule punctuated_lines"]["examples"][0]
    assert example["value"] == 0 and rows[-1].startswith(example["text"])
    assert data.meta["inputs"]["filters"]["dedup"] == 0.8
    # The same again is up to date; without filters, or with a rule less, the folder is another one.
    prepare(config_of(PrepareConfig, *argv))
    for other in (argv[:4], [*argv, "--quality_off=hashes"]):
        with pytest.raises(UserError, match="filters differ"):
            prepare(config_of(PrepareConfig, *other))
    capsys.readouterr()
    main([*argv, "--quality_off=short_document,punctuated_lines", "--overwrite=True", "--strict=True"])
    assert "12 skipped: near-duplicate document" in capsys.readouterr().out
