"""The assistant: calculator calls and their results, the prefix cache of a conversation, the terminal."""

import json
import os
import pty
import subprocess
import sys

import pytest

import sample
from configurator import UserError
from formats.chat_format import encode_answer, encode_prompt, with_chat_tokens
from formats.tokenizer import Tokenizer
from generation import assistant as assistants
from generation.assistant import MOST_CALLS, Assistant, call_tool
from generation.generate import Options, PrefixCache, Sampling, generate
from generation.terminal import Printer, converse, drop_turns, escaped, read_line
from model import GPT
from tests.conftest import CODE, ROOT, busy_model, tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    return with_chat_tokens(Tokenizer.train([CODE], 400))


class Scripted(Assistant):
    """An assistant whose model writes the given turns; everything else is real."""

    def __init__(self, tokenizer, turns, monkeypatch):
        super().__init__(GPT(tiny_config(vocab_size=512)), tokenizer, Sampling(), 50)
        self.turns, self.prompts = list(turns), []

        def written(model, prompts, max_new_tokens, sampling, is_done, options):
            self.prompts.append([tokenizer.decode(prompt) for prompt in prompts])
            said = [encode_answer(tokenizer, self.turns.pop(0)) for _ in prompts]
            for step in range(max(map(len, said))):
                yield [ids[step] if step < len(ids) else None for ids in said]

        monkeypatch.setattr(assistants, "generate", written)


def called(expression):
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def said(text):
    return {"role": "assistant", "content": text}


USER = {"role": "user", "content": "12 * 30?"}


def test_the_calculator_is_called_and_its_result_read(tokenizer, monkeypatch):
    scripted = Scripted(tokenizer, [called("12 * 30"), said("hello"), said("360")], monkeypatch)
    first, second = scripted.reply([[USER], [{"role": "user", "content": "hi"}]])
    assert first == [called("12 * 30"), {"role": "tool", "content": "360"}, said("360")]
    assert second == [said("hello")]
    assert len(scripted.prompts[1]) == 1, "only the conversation with a call continues"
    assert scripted.prompts[1][0].endswith(
        "<|im_start|>tool\n<|tool_response|>360<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_number_of_calls_is_limited(tokenizer, monkeypatch):
    scripted = Scripted(tokenizer, [called("1 + 1")] * 9, monkeypatch)
    (reply,) = scripted.reply([[USER]])
    assert len(scripted.prompts) == MOST_CALLS + 1
    assert reply[-1]["role"] == "assistant" and reply[-1]["cut"], "a reply does not end with a result"


def test_a_wrong_call_returns_an_error_to_the_model():
    assert call_tool({"name": "calculator", "arguments": {"expression": "2 * 3"}}) == "6"
    assert call_tool({"name": "shell", "arguments": {}}) == "error: no tool 'shell'"
    for arguments in ({}, {"x": 1}, [], "2 * 3"):
        assert call_tool({"name": "calculator", "arguments": arguments}).startswith("error: give")


def test_earlier_turns_are_not_read_again(tokenizer, monkeypatch):
    """The same tokens with and without the prefix cache, and fewer tokens through the model."""
    model = busy_model(tiny_config(vocab_size=512, block_size=256))
    sizes = []
    original = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, ids, **more: sizes.append(ids.shape[1]) or original(self, ids, **more)
    )
    options, messages, before = Options(prefix=PrefixCache()), [USER], 0
    for _ in range(3):
        prompt = encode_prompt(tokenizer, messages)
        plain = [ids[0] for ids in generate(model, [prompt], 12, Sampling(temperature=0))]
        sizes.clear()
        kept = [ids[0] for ids in generate(model, [prompt], 12, Sampling(temperature=0), options=options)]
        assert kept == plain
        assert sizes[0] <= len(prompt) - before, "the last prompt is not read again"
        before = len(prompt)
        messages += [said(tokenizer.decode([i for i in kept if i < 400])), USER]
    long = [*range(300)]  # longer than the context: its end is read and cached
    assert [i[0] for i in generate(model, [long], 4, Sampling(temperature=0), options=options)] == [
        i[0] for i in generate(model, [long], 4, Sampling(temperature=0))
    ]


def test_a_terminal_obeys_no_character_of_an_answer(tokenizer):
    """ESC ] 52 writes to the clipboard, ESC [ 2 J and its short form \\x9b clear the screen."""
    text = "a\x1b]52;c;eA==\x07\r\tb\x9b2J\u3000\u00e9\U0001f600\x7f\n\x00"
    shown = "a\\x1b]52;c;eA==\\x07\\r\tb\\x9b2J\u3000\u00e9\U0001f600\\x7f\n\\x00"
    assert escaped(text) == shown
    for styled, expected in ((True, shown), (False, text)):  # a file gets the text as it is
        out = []
        printer = Printer(tokenizer, out.append, styled)
        for token in tokenizer.encode(text):
            printer(token)
        assert "".join(out) == expected


def test_a_conversation_in_the_terminal(tokenizer, monkeypatch, tmp_path):
    thoughtful = {"role": "assistant", "content": "It is 360.", "thought": "3 * 12"}
    scripted = Scripted(tokenizer, [thoughtful, called("2 * 3"), said("6 \u00e9")], monkeypatch)
    lines = iter(["12 * 30?", "", "/save " + str(tmp_path / "s.jsonl"), "/reset", "2 * 3?", "/save", "/what"])
    out = []

    def ask(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(scripted, "Be brief.", ask, out.append)
    text = "".join(out)
    assert "\x1b[2m3 * 12\x1b[0m\nIt is 360.\x1b[0m\n" in text
    assert text.index("= 6\x1b[0m\n") < text.index("6 \u00e9")  # the result of a call comes before the answer
    assert "/save needs a file" in text and text.count("/reset starts over") == 2
    saved = json.loads((tmp_path / "s.jsonl").read_text())
    assert saved["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 * 30?"}, thoughtful
    ]  # fmt: skip
    assert "12 * 30" not in scripted.prompts[1][0] and "Be brief." in scripted.prompts[1][0]


def test_a_full_context_drops_the_oldest_turns(tokenizer, monkeypatch):
    scripted = Scripted(tokenizer, [], monkeypatch)
    messages = [{"role": "system", "content": "s"}]
    messages += [USER, said("360")] * 12 + [{"role": "user", "content": "last"}]
    printed = drop_turns(scripted, messages, keep=1)
    assert "the context is full: dropped the oldest" in printed
    assert messages[0]["role"] == "system" and messages[1]["role"] == "user"
    assert messages[-1]["content"] == "last"
    assert len(encode_prompt(tokenizer, messages)) <= scripted.model.config.block_size
    assert drop_turns(scripted, messages, keep=1) == ""


def test_a_line_that_is_not_utf8_is_asked_for_again():
    lines, out = iter(["\udcff", " hi "]), []
    assert read_line(lambda prompt: next(lines), out.append) == "hi"
    assert out == ["that is not UTF-8\n"]


# ---- The commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    busy_model(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(
        folder, eos_token_id=tokenizer.end_ids
    )
    tokenizer.save(folder)
    return folder


def test_arrow_keys_edit_the_line_in_a_chat(chat_folder, tmp_path):
    """In a terminal: "2", the left arrow, "1" is "12". The up arrow brings it back, also in the next chat."""
    pytest.importorskip("readline")
    saved = tmp_path / "saved.jsonl"
    command = [sys.executable, "sample.py", f"--model={chat_folder}", "--chat=True", "--device=cpu",
               "--max_new_tokens=1"]

    def chat(*lines):
        screen, keyboard = pty.openpty()
        process = subprocess.Popen(command, cwd=ROOT, stdin=keyboard, stdout=keyboard, stderr=keyboard,
                                   env=os.environ | {"TERM": "xterm", "HOME": str(tmp_path)})
        os.close(keyboard)
        printed = b""
        for line in (*lines, f"/save {saved}\n".encode(), b"/quit\n"):
            while not printed.endswith(b"> "):
                printed += os.read(screen, 1024)
            os.write(screen, line)
            printed = b""
        assert process.wait(60) == 0
        return [each["content"] for row in saved.read_text().splitlines()
                for each in json.loads(row)["messages"] if each["role"] == "user"]

    assert chat(b"2\x1b[D1\n", b"\x1b[A\n") == ["12", "12"]
    up = b"\x1b[A"
    assert chat(up * 3 + b"\n") == ["12", "12", "12"], "before it in the history: /save and /quit"
    history = tmp_path / ".nanollama_history"
    assert history.read_text().startswith("12\n/save") and history.stat().st_mode & 0o077 == 0


def test_a_chat_needs_stdin(chat_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # what Python does after `<&-`
    with pytest.raises(UserError, match="--chat=True reads questions from stdin, which is closed"):
        sample.main([f"--model={chat_folder}", "--chat=True", "--device=cpu"])


def test_messages_in_a_file(chat_folder, tmp_path, capsys):
    rows = [{"messages": [USER], "id": 1}, {"conversations": [{"from": "human", "value": "b"}]}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = [f"--model={chat_folder}", "--device=cpu", "--max_new_tokens=5", "--temperature=0"]
    sample.main([*words, f"--prompt_file={tmp_path / 'p.jsonl'}", "--num_samples=2"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2 and found[0] == found[1]
    assert found[0].keys() == {"messages", "id", "completion", "replies", "finish_reason"}
    assert found[0]["finish_reason"] == "length" and found[0]["replies"][-1]["role"] == "assistant"
    with pytest.raises(UserError, match="stop only works with prompts"):
        sample.main([*words, f"--prompt_file={tmp_path / 'p.jsonl'}", "--stop=x"])
    for bad, message in (
        ('{"messages": []}', 'p.jsonl:1: needs the key "prompt" with a text, or "messages"'),
        ('{"messages": "x"}', "p.jsonl:1: 'messages' is no list of messages"),
        ('{"messages": [{"role": "x", "content": "a"}]}', "p.jsonl:1: unknown role"),
        (json.dumps(rows[0]) + '\n{"prompt": "a"}', 'p.jsonl:2: has no "messages"'),
    ):
        (tmp_path / "p.jsonl").write_text(bad + "\n")
        with pytest.raises(UserError, match=message):
            sample.main([*words, f"--prompt_file={tmp_path / 'p.jsonl'}"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--chat=True", "--prompt=a"], "--chat=True does not work with prompt"),
        (["--system=a"], "--system needs --chat=True"),
        (["--chat=True", "--system=\udcff"], "command line: system is not UTF-8"),
    ],
)
def test_mistakes_are_one_line(chat_folder, words, message):
    with pytest.raises(UserError, match=message):
        sample.main([f"--model={chat_folder}", *words])


def test_a_base_does_not_chat(trained):
    with pytest.raises(UserError, match="its tokenizer has no chat tokens; sft.py makes a chat model"):
        sample.main([f"--model={trained}", "--chat=True"])
