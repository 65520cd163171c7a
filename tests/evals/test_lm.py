"""A model as benchmarks see it: where generation stops, how prompts are batched and truncated."""

import random

import pytest

import evals.lm
import generation.assistant
from evals.lm import LM
from formats.chat_format import encode_answer, encode_prompt
from generation.generate import visible_text


@pytest.fixture(scope="module")
def base(trained):
    return LM(str(trained), device="cpu")


@pytest.fixture(scope="module")
def chat(chat_folder):
    return LM(str(chat_folder), device="cpu", chat=True)


def scripted(ids):
    """A replacement for generation.generate.generate: every row generates these ids until it is done."""
    def generate(model, prompts, max_new_tokens, sampling, is_done, *rest):
        live, new = [True] * len(prompts), [[] for _ in prompts]
        for token in ids[:max_new_tokens]:
            if any(live):
                yield [token if alive else None for alive in live]
                for row, written in enumerate(new):
                    written.append(token)
                    live[row] = live[row] and not is_done(row, written)
    return generate


@pytest.mark.parametrize("text, stops, written", [
    ("12\n\nQuestion: 5?", ["\n\n"], "12"),
    ("12\n\nQuestion: 5?", ["Question:", "5"], "12\n\n"),
    ("a caf\u00e9 \u2192 b", ["\u2192"], "a caf\u00e9 "),
    ("a caf\u00e9 \u2192 b", ["f\u00e9 "], "a ca"),
    ("never", ["always", "nevermore"], "never"),
])
def test_generation_stops_at_a_stop_text_however_it_is_tokenized(base, monkeypatch, text, stops, written):
    tokenizer, asked = base.tokenizer, []
    spelled = [tokenizer.encode(text), [i for letter in text for i in tokenizer.encode(letter)]]
    for ids in spelled:  # as the tokenizer encodes it, and letter by letter
        monkeypatch.setattr(evals.lm, "generate", scripted(ids))
        before = base.tokens
        assert base.generate_until(["x"], stops, 100) == [written] == [visible_text(text, stops)]
        asked.append(base.tokens - before)
        least = next((n for n in range(1, len(ids)) if any(s in tokenizer.decode(ids[:n]) for s in stops)),
                     len(ids))
        assert asked[-1] == least, "no token is generated after the stop text"


def test_decoding_the_last_tokens_finds_every_stop(base, monkeypatch):
    """Random tokens, with broken characters: decoding the last few finds the same stops as decoding all."""
    draw, tokenizer = random.Random(0), base.tokenizer
    stops, decode = ["\n\n", "e\u2192", "in ", "Question:"], base.tokenizer.decode
    for _ in range(200):
        ids = [draw.randrange(tokenizer.eot_id) for _ in range(40)]
        at = draw.randrange(30)
        ids[at:at] = tokenizer.encode(draw.choice(stops))
        first = next(n for n in range(1, len(ids) + 1) if any(stop in decode(ids[:n]) for stop in stops))
        monkeypatch.setattr(evals.lm, "generate", scripted(ids))
        assert base.generate_ids([[1]], stops, 100) == [ids[:first]]
    decoded = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, inside: decoded.append(len(ids)) or decode(ids))
    monkeypatch.setattr(evals.lm, "generate", scripted([tokenizer.encode("a")[0]] * 500))
    base.generate_ids([[1]], ["Question:"], 500)
    assert len(decoded) == 500 and max(decoded) == 1 + len("Question:"), "only the last tokens are decoded"


def test_batches_have_similar_lengths_and_a_size_limit(base, monkeypatch):
    def batches(lengths):
        batches = []
        answers = base.in_batches(lengths, lambda batch: batches.append(batch) or [str(i) for i in batch])
        assert answers == [str(i) for i in range(len(lengths))], "one answer per prompt, in their order"
        return batches

    lengths = [3, 50, 7, 50, 1, 9]
    monkeypatch.setattr(base, "batch_size", 2)
    assert batches(lengths) == [[1, 3], [5, 2], [0, 4]]
    monkeypatch.setattr(base, "batch_size", 64)
    monkeypatch.setattr(evals.lm, "MAX_BATCH_TOKENS", 100)
    assert batches(lengths) == [[1, 3], [5, 2, 0, 4]]
    monkeypatch.setattr(evals.lm, "MAX_BATCH_TOKENS", 10)
    assert batches(lengths)[:3] == [[1], [3], [5]] and batches([]) == []


def test_answers_do_not_depend_on_the_batch(base, monkeypatch):
    prompts = ["import os", "x", "def f(self):\n    return", "", "class A", "# " + "a" * 80]
    alone = [base.generate_until([prompt], ["\n\n"], 12)[0] for prompt in prompts]
    for batch_size in (2, 64):
        monkeypatch.setattr(base, "batch_size", batch_size)
        assert base.generate_until(prompts, ["\n\n"], 12) == alone
    ids = [base.tokenizer.encode(prompt) for prompt in prompts]
    assert base.generate_until(ids, ["\n\n"], 12) == alone, "a prompt may be ids"


def test_a_prompt_longer_than_the_context_keeps_its_end(base, chat):
    block_size, text = base.model.config.block_size, "the quick brown fox " * 40
    ids = base.tokenizer.encode(text)
    assert base.prompt_ids(text, 20) == ids[-(block_size - 20):]
    assert base.prompt_ids(text, 1000) == ids[-block_size // 2:], "half of the context is for the prompt"
    assert base.prompt_ids("fox", 20) == base.tokenizer.encode("fox")
    end = base.tokenizer.decode(ids[-(block_size - 20):])
    assert base.generate_until([end, text], [], 20) == base.generate_until([end], [], 20) * 2
    assert base.generate_until([end, text], [], 20) and base.truncated == [False, True]

    whole = encode_prompt(chat.tokenizer, [{"role": "user", "content": " fox "}])
    assert chat.prompt_ids(" fox ", 20) == whole == chat.prompt_ids("fox", 20)
    found = chat.prompt_ids(text, 20)
    assert len(found) == chat.model.config.block_size - 20
    size = chat.room(20)
    assert found == chat.prefix + chat.tokenizer.encode(text.strip())[-size:] + chat.suffix


def test_chat_answers_are_generated_in_full_and_exclude_thoughts(chat, monkeypatch):
    said = {"role": "assistant", "thought": "one\n\ntwo", "content": "12 apples\nand more"}
    ids = encode_answer(chat.tokenizer, said)
    monkeypatch.setattr(evals.lm, "generate", scripted(ids + ids))
    before = chat.tokens
    assert chat.generate_until(["How many?"], ["\n"], 200) == ["12 apples"]
    assert chat.tokens - before == len(ids)


def test_replies_with_and_without_calls(chat, monkeypatch):
    call = {"name": "calculator", "arguments": {"expression": "2 + 2"}}
    ids = encode_answer(chat.tokenizer, {"role": "assistant", "content": "", "tool_calls": [call]})
    monkeypatch.setattr(generation.assistant, "generate", scripted(ids))
    asked = [[{"role": "user", "content": "2 + 2?"}]] * 2
    for replies in chat.reply(asked, 100, most_calls=0):
        assert [message.get("tool_calls") for message in replies] == [[call]]
    for replies in chat.reply(asked, 100, most_calls=1):
        assert [message["role"] for message in replies] == ["assistant", "tool", "assistant"]
        assert replies[1]["content"] == "4"
