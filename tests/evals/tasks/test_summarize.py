"""Summaries: ROUGE by hand; the prompt; right and wrong models."""

import json

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import summarize
from evals.tasks.summarize import ROUGE, rouge


def test_rouge_by_hand():
    found = rouge("The quick brown dog jumps on the log.", "the quick brown fox jumps over the lazy dog")
    assert found["rouge1"] == pytest.approx(2 * 6 / (8 + 9))  # the (twice), quick, brown, dog, jumps
    assert found["rouge2"] == pytest.approx(2 * 2 / (7 + 8))  # the quick, quick brown
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(10 / 17)  # the quick brown jumps the
    assert rouge("it ended", "it ends")["rouge1"] == 1  # equal stems
    # Two lines in the other order: as one sequence only one of them is common, line by line both are.
    found = rouge("c d\na b", "a b\nc d")
    assert (found["rougeL"], found["rougeLsum"]) == (0.5, 1)
    # Union over lines: "a b" from one line, "a c" from the other; "a" counts once.
    assert rouge("a b x\na c y", "a b c")["rougeLsum"] == pytest.approx(2 * 3 / (3 + 6))


@pytest.mark.parametrize("said, right", [("", "a b"), ("a b", ""), ("...", "a"), ("a", "b"), ("", "")])
def test_rouge_of_nothing(said, right):
    assert set(rouge(said, right).values()) == {0.0}


ROWS = [{"document": f"Number {n} met number {n + 1} on Monday. " * 3, "summary": f"{n} met {n + 1}."}
        for n in range(6)]


def load(tmp_path, shots=None):
    (tmp_path / "Summarize_mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return summarize.load(str(tmp_path), 4, shots)


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_oracle_and_wrong_answers(chat, trained, chat_folder, tmp_path, monkeypatch):
    lm, asked = LM(str(chat_folder if chat else trained), device="cpu", chat=chat), []
    lm.model.reconfigure(block_size=400)
    questions = load(tmp_path, shots=1)

    def scored(texts):
        monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or texts)
        return summarize.score(lm, questions)

    oracle = scored([" " + row["summary"] for row in ROWS[:4]])
    assert oracle.figures == {key: (1, 0, 4) for key in ROUGE} and oracle.details["documents_cut"] == 0
    ask = "\n\nSummarize this text in a few sentences." if chat else "\n\nTL;DR:"
    prompts, stops, max_new_tokens = asked[0]
    assert [lm.tokenizer.decode(ids) for ids in prompts] == [
        f"{ROWS[5]['document'].strip()}{ask} {ROWS[5]['summary']}\n\n\n{row['document'].strip()}{ask}"
        for row in ROWS[:4]]
    assert (stops, max_new_tokens) == (["\n\n"], 128)
    assert scored(["xyz"] * 4).figures == {key: (0, 0, 4) for key in ROUGE}


def test_a_long_document_loses_its_end(trained, tmp_path, monkeypatch):
    lm, asked = LM(str(trained), device="cpu"), []
    monkeypatch.setattr(lm, "generate_until", lambda prompts, *words: asked.extend(prompts) or [""] * 4)
    assert summarize.score(lm, load(tmp_path)).details["documents_cut"] == 4
    ask = lm.tokenizer.encode("\n\nTL;DR:")
    whole = lm.tokenizer.encode(ROWS[0]["document"].strip())
    assert asked[0] == whole[:lm.room(128) - len(ask)] + ask and len(asked[0]) == lm.room(128) == 32
    summarize.score(lm, load(tmp_path, shots=2))
    assert asked[4][-len(ask) - 16:] == whole[:16] + ask, "half of the room is the document's"


def test_files(tmp_path):
    assert [summary for _, summary in load(tmp_path).asked] == [f"{n} met {n + 1}." for n in range(4)]
    (tmp_path / "Summarize_mine.jsonl").write_text('{"article": "long", "highlights": "short"}\n')
    assert summarize.load(str(tmp_path), 4, None).asked == [("long", "short")]
    with pytest.raises(UserError, match="shots=1: there are 1 rows"):
        summarize.load(str(tmp_path), 4, 1)
    (tmp_path / "Summarize_mine.jsonl").write_text('{"document": "long"}\n')
    with pytest.raises(UserError, match="Summarize_mine.jsonl: row 1 does not fit .* 'summary'"):
        summarize.load(str(tmp_path), 4, None)
