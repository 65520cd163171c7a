"""What a stream adds up to is what a whole answer says, whatever the tokens are."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from formats.chat_format import CHAT_TOKENS, end_of_turn, with_chat_tokens
from formats.tokenizer import Tokenizer
from generation.api import CompletionRequest, Job
from tests.conftest import CODE
from tests.formats.test_tokenizer_kinds import llama2

OPENED = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{{ '<|im_start|>assistant\n<think>\n' }}{# reasoning_content #}")
CALL = '{"name": "f", "arguments": {"a": "x"}}'


@pytest.fixture(scope="module")
def ours():
    return with_chat_tokens(Tokenizer.train([CODE], 400))


@pytest.fixture(scope="module")
def opened():
    """The template opens the thought, so an answer begins inside it."""
    settings = {"chat_template": OPENED, "eos_token": "<|im_end|>"}
    return Tokenizer.train([CODE], 400).extended(["<|im_start|>", "<|im_end|>"], settings)


def streamed_and_whole(tokenizer, ids, **keys):
    """The answer with these ids: the sum of its pieces, and the body without a stream."""
    ends = {tokenizer.eot_id, end_of_turn(tokenizer)}
    served = SimpleNamespace(name="m", tokenizer=tokenizer, ends={True: ends, False: ends}, verifier=None,
                             context_length=999, limits=None, guide=lambda *_: None,
                             batcher=SimpleNamespace(context_length=999))

    async def answer():
        job = Job(served, CompletionRequest(max_tokens=len(ids), **keys), timeout=60, most_rows=9)
        (row,), summed = job.rows, {}

        async def steps():
            for index in ids:
                row.new.append(index)
                row.ended = row.is_done(row.new) or len(row.new) == len(ids)
                yield

        job.steps = steps
        async for chunk in job.chunks():
            choice = chunk["choices"][0]
            for key, value in choice.get("delta", {"text": choice.get("text")}).items():
                summed[key] = summed[key] + value if key in summed else value
        job.end()
        whole = job.response()["choices"][0]
        return summed, whole.get("message", {"text": whole.get("text")})

    return [{key: value for key, value in each.items() if value and key != "role"}
            for each in asyncio.run(answer())]


def test_a_character_of_byte_tokens():
    """The whole run of bytes decodes to replacement characters until its last character is complete."""
    hf, settings = llama2()
    tokenizer = Tokenizer(json.loads(hf.to_str()), settings)
    text = "a\u597d\u7684\n\U0001f600\U0001f600!"
    streamed, whole = streamed_and_whole(tokenizer, tokenizer.encode(text, inside=True), prompt="x")
    assert streamed == whole == {"text": " " + text}


@pytest.mark.parametrize("pieces, expected", [
    (["Hi \u3000there"], {"content": "Hi \u3000there"}),
    ([2, "3 * 4", 1], {"reasoning_content": "3 * 4"}),
    ([2, "3 * 4", 3, "12", 1], {"reasoning_content": "3 * 4", "content": "12"}),
    ([2, "3 * 4", 4, CALL, 1], {"reasoning_content": "3 * 4", "tool_calls": {"a": "x"}}),
    ([4, CALL, 1], {"tool_calls": {"a": "x"}}),
    ([4, CALL, "}", 1], {"content": CALL + "}"}),
])  # fmt: skip
def test_answers_in_our_format(ours, pieces, expected):
    """A number is a chat token: 1 ends the turn, 2 and 3 are around a thought, 4 begins a call."""
    names = dict(enumerate(CHAT_TOKENS))
    ids = sum(([ours.token_id(names[piece])] if piece in names else ours.encode(piece, inside=True)
               for piece in pieces), [])
    streamed, whole = streamed_and_whole(ours, ids, messages=[{"role": "user", "content": "?"}])
    for each in (streamed, whole):
        if "tool_calls" in each:
            (call,) = each["tool_calls"]
            each["tool_calls"] = json.loads(call["function"]["arguments"])
    assert streamed == whole == expected


@pytest.mark.parametrize("text, expected", [
    ("Two.\n</think>\n\nIt is 4.", {"reasoning_content": "Two.", "content": "It is 4."}),
    ("Two. I", {"reasoning_content": "Two. I"})])
def test_a_thought_that_the_template_opens(opened, text, expected):
    ids = opened.encode(text, inside=True)
    assert streamed_and_whole(opened, ids, messages=[{"role": "user", "content": "?"}]) == [expected] * 2
