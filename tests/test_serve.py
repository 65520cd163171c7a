"""serve.py over HTTP: the answers of sample.py, OpenAI's own client, refusals, and the page in Chromium."""

import asyncio
import base64
import contextlib
import copy
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn

import prepare
import sample
import serve
from configurator import UserError, configure
from dataset.conversations import listed, preference
from dataset.shards import DataFolder
from formats import peft
from formats.chat_format import encode_answer, with_chat_tokens
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.batcher import Batcher
from generation.generate import Sampling, generate
from generation.verifier import Verifier
from model import GPT
from tests.conftest import CODE, ROOT, busy_model, tiny_config

CALL = {"name": "calculator", "arguments": {"expression": "12 * 30"}}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {
    "type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}
QUESTION = [{"role": "user", "content": "12 * 30?"}]


class Running:
    """A server in a thread. script(question) is what the model answers to a message; None leaves it alone."""

    def __init__(self, *argv):
        self.cfg, _ = configure(serve.ServeConfig, ["--device=cpu", *argv])
        self.server = serve.Server(self.cfg)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.server.app(), http=serve.Connection, log_level="critical")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    @property
    def served(self):
        return self.server.models[self.cfg.model]

    def ask(self, path, body=None, headers=None, data=None):
        """(status, JSON or text of the answer)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = json.dumps(body) if data is None and body is not None else data
        connection.request("GET" if data is None else "POST", path, data, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        with contextlib.suppress(ValueError):
            return response.status, json.loads(text)
        return response.status, text

    def events(self, path, body):
        """The events of a stream."""
        status, text = self.ask(path, body | {"stream": True})
        assert status == 200 and text.endswith("data: [DONE]\n\n")
        return [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]

    def idle(self):
        until = time.monotonic() + 10
        while self.served.batcher.live or self.served.batcher.waiting:
            assert time.monotonic() < until, "a slot is still in use"
            time.sleep(0.01)

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A random chat model, with a context that has room for a tool call and its result."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = with_chat_tokens(Tokenizer.train([CODE], 400))
    busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256)).save_pretrained(
        folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def start():
    running = []

    def make(*argv):
        running.append(Running(*argv))
        return running[-1]

    yield make
    for each in running:
        each.close()


@pytest.fixture(scope="module")
def server(start, chat_folder, tmp_path_factory):
    votes = tmp_path_factory.mktemp("votes") / "votes.jsonl"
    return start(f"--model={chat_folder}", "--max_new_tokens=12", "--slots=4", f"--votes={votes}")


@pytest.fixture
def script(monkeypatch, chat_folder):
    """Let the model answer with these messages, by the last user's or tool's text; all else is real."""
    tokenizer, original = Tokenizer.load(chat_folder), Batcher.choose

    class Answers(dict):
        pass

    answers = Answers()

    def choose(self, row, logits):
        token = original(self, row, logits)
        asked = tokenizer.decode(row.prompt)
        text = re.findall(r"(?:user\n|<\|tool_response\|>)(.*?)<\|im_end\|>", asked, re.S)[-1:]
        if text and text[0] in answers:
            ids = encode_answer(tokenizer, {"role": "assistant", "content": "", **answers[text[0]]})
            token = ids[len(row.new)]
        return token

    answers.choose = choose
    monkeypatch.setattr(Batcher, "choose", choose)
    return answers


# ---- Answers ----------------------------------------------------------------------------------------------


def test_chats_have_the_answers_of_the_assistant(server, chat_folder):
    """With a seed: those of sample.py, in a stream and whole; without one, another answer each time."""
    sampling = Sampling(seed=5, temperature=0.9, top_k=40)
    model, tokenizer = GPT.from_pretrained(chat_folder), Tokenizer.load(chat_folder)
    expected = Assistant(model, tokenizer, sampling, 12).reply([QUESTION] * 3, most_calls=0)
    body = {"messages": QUESTION, "n": 3, "seed": 5, "temperature": 0.9, "top_k": 40}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200 and answer["object"] == "chat.completion" and answer["usage"]["total_tokens"] > 12
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    ours = [reply[0]["content"] + "".join(reply[0].get("malformed", [])) for reply in expected]
    assert texts == ours
    streamed = ["", "", ""]
    for event in server.events("/v1/chat/completions", body):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts
    unseeded = [server.ask("/v1/chat/completions", {"messages": QUESTION})[1]["choices"][0]["message"]
                for _ in range(3)]
    assert len({json.dumps(each) for each in unseeded}) == 3


def test_completions_have_the_texts_of_sample(server, chat_folder, capsys):
    body = {"prompt": "import", "n": 3, "stop": "zq"}
    seed = next(seed for seed in range(9, 99) if len(  # one whose first text is long enough to be cut
        server.ask("/v1/completions", body | {"seed": seed})[1]["choices"][0]["text"]) > 8)
    body |= {"seed": seed}
    argv = [f"--model={chat_folder}", "--device=cpu", "--prompt=import", "--num_samples=3", f"--seed={seed}"]
    sample.main([*argv, "--max_new_tokens=12", "--stop=zq"])
    expected = capsys.readouterr().out
    choices = server.ask("/v1/completions", body)[1]["choices"]
    assert "".join(choice["text"] + "\n" for choice in choices) == expected
    stop = choices[0]["text"][3:6]
    status, cut = server.ask("/v1/completions", body | {"stop": [stop, "never"]})
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["text"] == choices[0]["text"][:choices[0]["text"].index(stop)]
    streamed = server.events("/v1/completions", body | {"stop": stop, "n": 1})
    assert "".join(each["choices"][0]["text"] for each in streamed) == cut["choices"][0]["text"]


def test_log_probabilities_of_prompts_as_ids(server, chat_folder):
    """What `lm_eval --model local-completions` reads."""
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    body = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choices = server.ask("/v1/completions", body)[1]["choices"]
    model = GPT.from_pretrained(chat_folder)
    for ids, choice in zip(prompts, choices, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([ids]))[0].log_softmax(-1)
        expected = [scores[place, token].item() for place, token in enumerate(ids[1:])]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-5)
        assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(scores[-1].max().item(), abs=1e-5)
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert len(choice["logprobs"]["top_logprobs"][1]) == 1
        assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    body = {"prompt": "import", "max_tokens": 1, "echo": True}
    (echoed,) = server.ask("/v1/completions", body)[1]["choices"]
    assert echoed["text"].startswith("import") and echoed["logprobs"] is None


def test_a_tool_call_and_its_result(server, script):
    script |= {"12 * 30?": {"thought": "a tool", "tool_calls": [CALL]},
               "360": {"content": "It is 360 \u00e9."}}
    body = {"messages": QUESTION, "tools": [TOOL], "max_tokens": 60}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200, answer
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    assert reason == "tool_calls" and message["reasoning_content"] == "a tool"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == CALL["arguments"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"],
              "content": server.ask("/tool", CALL)[1]["content"]}
    assert result["content"] == "360"
    status, answer = server.ask("/v1/chat/completions", body | {"messages": [*QUESTION, message, result]})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "It is 360 \u00e9."}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client(server, script):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    script |= {"12 * 30?": {"tool_calls": [CALL]}, "360": {"thought": "so", "content": "It is 360."}}
    (model,) = client.models.list().data
    messages = list(QUESTION)
    with client.chat.completions.stream(model=model.id, messages=messages, tools=[TOOL],
                                        max_tokens=60) as stream:
        answer = stream.get_final_completion().choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and json.loads(call.function.arguments) == CALL["arguments"]
    called = answer.message.model_dump(exclude_none=True, exclude={"parsed"})
    messages += [called, {"role": "tool", "content": "360", "tool_call_id": call.id}]
    pieces = list(client.chat.completions.create(
        model=model.id, messages=messages, stream=True, max_tokens=40,
        stream_options={"include_usage": True}))
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    assert "".join(delta.content or "" for delta in deltas) == "It is 360."
    thoughts = [getattr(delta, "reasoning_content", "") for delta in deltas]
    assert "".join(filter(None, thoughts)) == "so"
    assert pieces[-1].usage.completion_tokens > 3 and pieces[-2].choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="unknown key 'logit_bias'"):
        client.chat.completions.create(model=model.id, messages=messages, logit_bias={"5": 1})


# ---- Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, words, change", [
    (400, "messages: must be a list", {"messages": []}),
    (400, "unknown role 'x'", {"messages": [{"role": "x", "content": "a"}]}),
    (400, "'messages' is no list of messages", {"messages": [5]}),
    (400, "'content' is not a string", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    (400, "n=0: must be", {"n": 0}),
    (400, "temperature", {"temperature": -1}),
    (400, "body: stream = 1", {"stream": 1}),
    (400, "unknown key 'frequency_penalty'", {"frequency_penalty": 0.5}),
    (400, "prompt=a: must be left out with messages", {"prompt": "a"}),
    (400, "tools=[5]: must be left out without messages", {"messages": None, "prompt": "a", "tools": [5]}),
    (400, "prompt: must be a text", {"messages": None}),
    (400, "sinks is a setting of the server", {"sinks": 4}),
    (400, "stop=", {"stop": [""]}),
    (400, "tools: each needs", {"tools": [{"name": "a"}]}),
    (400, "response_format: must be text", {"response_format": {"type": "json_schema", "json_schema": "x"}}),
    (400, "lone surrogate", {"messages": [{"role": "user", "content": "\ud800"}]}),
    (404, "no model 'x' is served", {"model": "x"}),
    (429, "too many texts are waiting", {"n": 10**9}),
    (413, "the prompt has", {"messages": [{"role": "user", "content": "a b c d " * 99}]}),
])
def test_a_wrong_request_is_answered_with_its_reason(server, status, words, change):
    found, answer = server.ask("/v1/chat/completions", {"messages": QUESTION} | change)
    assert found == status and words in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_keys_at_values_that_change_nothing(server):
    """Some clients always send these; other values of them are refused."""
    body = {"messages": QUESTION, "temperature": 0}
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False,
               "top_logprobs": 0, "user": "me", "stop": None}
    (status, plain), (same_status, same) = (server.ask("/v1/chat/completions", body | more)
                                            for more in ({}, neutral))
    assert status == same_status == 200 and same["choices"] == plain["choices"]
    for key, value in [("presence_penalty", 1), ("logit_bias", {"5": 1}), ("top_logprobs", 2),
                       ("logprobs", True)]:
        status, answer = server.ask("/v1/chat/completions", body | {key: value})
        assert status == 400 and key in answer["error"]["message"]


def test_a_text_outgrows_the_context_with_sinks(start, chat_folder):
    """A prompt of 300 ids, 44 more than the context, and 30 new ones: those of sample.py."""
    small = start(f"--model={chat_folder}", "--sinks=2", "--window=18", "--slots=2", "--temperature=0")
    prompt = [number * 37 % 256 for number in range(300)]
    status, answer = small.ask("/v1/completions", {"prompt": prompt, "max_tokens": 30})
    tokenizer, sampling = Tokenizer.load(chat_folder), Sampling(temperature=0, sinks=2, window=18)
    model = GPT.from_pretrained(chat_folder).eval()
    new = [step[0] for step in generate(model, [prompt], 30, sampling, lambda row, new: new[-1] in
                                        small.served.ends[False])]
    assert status == 200 and len(new) > 18
    assert answer["choices"][0]["text"] == tokenizer.decode(new, inside=True)
    body = {"prompt": prompt[:50], "max_tokens": 1, "echo": True, "logprobs": 1}
    assert small.ask("/v1/completions", body)[0] == 413, "a slot keeps the scores of 20 tokens"


def test_bodies_that_are_no_requests(server):
    for data in ("", "{", "[1, 2]", "null", "[" * 100_000, b"\xff\xfe", '{"messages": NaN}', "{}"):
        assert server.ask("/v1/chat/completions", data=data)[0] == 400
    assert server.ask("/v1/chat/completions", data=b" " * (serve.MOST_BODY + 1))[0] == 413
    for depth in range(940, 1000):  # Python reads some of these, but cannot write them into a prompt
        deep = '{"a":' * depth + "1" + "}" * depth
        data = ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": '
                f'{{"name": "f", "parameters": {{"properties": {deep}}}}}}}]}}')
        assert server.ask("/v1/chat/completions", data=data)[0] in (400, 413)
    assert server.ask("/v1/completions", {"prompt": [10**9]})[0] == 400
    assert server.ask("/v1/completions", {"prompt": [[]]})[0] == 400
    for prompt in ([], "\ud800", [True], 5):
        assert server.ask("/v1/completions", {"prompt": prompt})[0] == 400
    assert server.ask("/nothing")[0] == 404 and server.ask("/v1/chat/completions")[0] == 405
    assert server.ask("/v1/models")[0] == 200


def test_headers_of_other_sites(server, start, chat_folder):
    for headers in ({"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:8000"},
                    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://[x"}):
        assert server.ask("/v1/models", headers=headers)[0] == 403
    for host in ("localhost", "127.0.0.1:99", "[::1]:8000"):
        assert server.ask("/v1/models", headers={"Host": host, "Origin": f"http://{host}"})[0] == 200
    locked = start(f"--model={chat_folder}", "--api_key=s3cret", "--slots=1")
    assert locked.ask("/")[0] == 200, "the page asks for the key"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00e9"}):
        assert locked.ask("/v1/models", headers=headers)[0] == 401
    assert locked.ask("/v1/models", headers={"Authorization": "Bearer s3cret"})[0] == 200


@pytest.mark.parametrize("argv, words", [
    (["--host=0.0.0.0"], "host=0.0.0.0: other computers could use the model; set --api_key="),
    (["--host=example.org"], "set --api_key="), (["--port=70000"], "port=70000: must be from 0"),
    (["--slots=0"], "slots=0: must be positive"), (["--timeout=0"], "timeout=0.0: must be positive"),
    (["--api_key=caf\u00e9"], "api_key=caf\u00e9: must be ASCII"),
])
def test_wrong_settings(argv, words):
    with pytest.raises(UserError, match=re.escape(words)):
        configure(serve.ServeConfig, argv)


def test_a_port_in_use(server):
    with pytest.raises(OSError, match="Address already in use"):
        serve.main([f"--port={server.port}"])


def test_a_slow_request_and_a_slow_answer(server, start, chat_folder, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(99).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/comple")
        assert client.recv(99) == b"", "a request that never begins loses its connection"
    hasty = start(f"--model={chat_folder}", "--timeout=0.2", "--slots=1", "--max_waiting=2")
    body = {"prompt": "a", "max_tokens": 10**6}
    monkeypatch.setattr(hasty.served, "ends", {True: set(), False: set()})
    status, answer = hasty.ask("/v1/completions", body)
    assert status == 408 and "took too long" in answer["error"]["message"]
    assert hasty.events("/v1/completions", body)[-1]["error"]["code"] == "408"
    hasty.idle()


def test_full_servers_and_clients_that_leave(start, chat_folder, monkeypatch):
    busy = start(f"--model={chat_folder}", "--slots=1", "--max_waiting=2")
    monkeypatch.setattr(busy.served, "ends", {True: set(), False: set()})
    clients = []
    for stream in (True, False, True):  # one runs, two wait
        body = json.dumps({"prompt": "a", "max_tokens": 10**6, "stream": stream}).encode()
        clients.append(socket.create_connection(("127.0.0.1", busy.port)))
        clients[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                            + str(len(body)).encode() + b"\r\n\r\n" + body)
        while len(busy.served.batcher.live) + len(busy.served.batcher.waiting) < len(clients):
            time.sleep(0.01)
    status, answer = busy.ask("/v1/completions", {"prompt": "a"})
    assert status == 429 and "too many texts" in answer["error"]["message"]
    for client in clients:
        client.close()
    busy.idle()
    assert busy.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


def test_an_error_of_the_model_is_status_500(start, chat_folder, monkeypatch):
    broken = start(f"--model={chat_folder}", "--slots=1")
    monkeypatch.setattr(broken.served.batcher, "decode", lambda rows: 1 / 0)
    status, answer = broken.ask("/v1/completions", {"prompt": "a"})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert broken.events("/v1/completions", {"prompt": "a"})[-1]["error"]["message"] == "division by zero"


def test_votes_are_preferences(server, chat_folder, tmp_path):
    """The file is read by prepare.py as it is."""
    said = {"role": "assistant", "content": "360"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c", "function": {
        "name": "calculator", "arguments": json.dumps(CALL["arguments"])}}]}
    result = {"role": "tool", "content": "360", "tool_call_id": "c"}
    names = {"chosen_model": "a", "rejected_model": "b"}
    other = said | {"content": "<b>36</b>", "reasoning_content": "so"}
    vote = {"prompt": [*QUESTION, called, result], "chosen": said, "rejected": other} | names
    assert server.ask("/vote", vote)[0] == 200
    assert server.ask("/vote", vote | {"prompt": QUESTION, "chosen": called})[0] == 200
    for bad in (vote | {"rejected": said}, vote | {"rejected": QUESTION[0]}, names, [], 5):
        assert server.ask("/vote", bad)[0] == 400
    votes = Path(server.cfg.votes)
    parts = [preference(json.loads(line)) for line in votes.read_text().splitlines()]
    assert [len(prompt) for prompt, _, _ in parts] == [3, 1]
    assert parts[0][1:] == (said, {"role": "assistant", "content": "<b>36</b>", "thought": "so"})
    assert parts[1][1]["tool_calls"] == [CALL]
    prepare.main(["--kind=preference", f"--source={votes}", f"--tokenizer={chat_folder}",
                  f"--out={tmp_path / 'data'}", "--val_fraction=0.5"])
    assert DataFolder(tmp_path / "data").meta["kind"] == "preference"


def test_sigterm_finishes_what_runs(chat_folder):
    command = [sys.executable, "serve.py", f"--model={chat_folder}", "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    body = {"prompt": "a", "max_tokens": 300, "stream": True, "temperature": 0, "repetition_penalty": 2}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    response.read(50)
    process.send_signal(signal.SIGTERM)
    assert response.read().endswith(b"data: [DONE]\n\n")
    assert process.wait(20) == 0


def test_schemas_and_forced_calls(server):
    """Constrained decoding: a random model writes JSON that fits, and a call of the tool."""
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
              "required": ["a", "b"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": QUESTION, "n": 3, "max_tokens": 60, "response_format": shape, "seed": 1}
    for choice in server.ask("/v1/chat/completions", body)[1]["choices"]:
        value = json.loads(choice["message"]["content"])
        assert value.keys() == {"a", "b"} and value["a"] in (1, 2) and choice["finish_reason"] == "stop"
    tool = {"type": "function", "function": {"name": "pick", "parameters": {
        "type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}}}
    body = {"messages": QUESTION, "tools": [tool], "tool_choice": "required", "n": 8, "max_tokens": 80,
            "seed": 1}
    choices = server.ask("/v1/chat/completions", body)[1]["choices"]
    for call in (call for choice in choices for call in choice["message"].get("tool_calls", [])):
        assert call["function"]["name"] == "pick"
        assert json.loads(call["function"]["arguments"])["side"] in ("left", "right")
    assert "tool_calls" in [choice["finish_reason"] for choice in choices]
    for change in ({"tool_choice": {"function": {"name": "x"}}}, {"tool_choice": "required", "tools": []},
                   {"response_format": {"type": "x"}, "tool_choice": None},
                   {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}):
        assert server.ask("/v1/chat/completions", body | change)[0] == 400


def test_the_best_of_several_answers(server, monkeypatch):
    """A verifier chooses; here it prefers the answers with the most different tokens."""
    body = {"prompt": ["import", "def"], "seed": 4, "temperature": 1.5}
    assert server.ask("/v1/completions", body | {"best_of": 4})[0] == 400, "there is no verifier"
    every = [choice["text"] for choice in server.ask("/v1/completions", body | {"n": 4})[1]["choices"]]
    seen = []

    def score(prompt, answers):
        seen.extend(answers)
        return torch.tensor([len(set(answer)) - 0.01 * place for place, answer in enumerate(answers)])

    monkeypatch.setattr(server.served, "verifier", SimpleNamespace(score=score))
    choices = server.ask("/v1/completions", body | {"best_of": 4})[1]["choices"]
    best = [max(range(first, first + 4), key=lambda row: len(set(seen[row]))) for first in (0, 4)]
    assert [choice["text"] for choice in choices] == [every[row] for row in best]
    streamed = server.events("/v1/completions", body | {"best_of": 4})
    assert [event["choices"][0]["text"] for event in streamed] == [choice["text"] for choice in choices]


def write_adapter(chat_folder, folder, *modules):
    """An adapter of rank 2 with random weights; a verifier, if modules has its head."""
    base, generator = GPT.from_pretrained(chat_folder), torch.Generator().manual_seed(3)
    state = {"score.weight": torch.randn(1, base.config.n_embd + 2, generator=generator)} if modules else {}
    for name, parameter in base.named_parameters():
        if name.endswith("q_proj.weight"):
            for side, shape in (("lora_A", (2, parameter.shape[1])), ("lora_B", (parameter.shape[0], 2))):
                state[name.replace("weight", side)] = torch.randn(*shape, generator=generator)
    peft.write_adapter(folder, state, peft.AdapterSpec(2, 4.0, 0.0, ("q_proj",), False, modules),
                       {"path": str(chat_folder), "sha256": peft.weights_sha256(chat_folder)})
    Tokenizer.load(chat_folder).save(folder)
    return folder


def test_an_adapter_with_a_verifier(start, chat_folder, tmp_path):
    """The adapter's answers are those of the assistant; of four, the one that the verifier scores best."""
    adapter = write_adapter(chat_folder, tmp_path / "adapter")
    verifier = write_adapter(chat_folder, tmp_path / "verifier", "score")
    server = start(f"--model={adapter}", f"--verifier={verifier}", "--slots=4")
    tokenizer, sampling = Tokenizer.load(chat_folder), Sampling(seed=2, temperature=1.2)
    assistant = Assistant(GPT.from_pretrained(adapter), tokenizer, sampling, 12)
    replies = assistant.reply([QUESTION] * 4, most_calls=0)
    # A thought without an end is malformed in our form, and a thought in the API's.
    expected = [(reply[0]["content"], "".join(reply[0].get("malformed", []))) for reply in replies]

    def parts(choice):
        return choice["message"]["content"], choice["message"].get("reasoning_content", "")

    body = {"messages": QUESTION, "seed": 2, "temperature": 1.2, "max_tokens": 12}
    choices = server.ask("/v1/chat/completions", body | {"n": 4})[1]["choices"]
    assert [parts(choice) for choice in choices] == expected
    scores = Verifier(verifier, tokenizer).score_rows(assistant.rows, assistant.sampled)
    assert len(set(scores.tolist())) == 4
    (best,) = server.ask("/v1/chat/completions", body | {"best_of": 4})[1]["choices"]
    assert parts(best) == expected[int(scores.argmax())]


# ---- The page in a browser --------------------------------------------------------------------------------


class Browser:
    """Chromium without a window, driven through its DevTools protocol."""

    async def __aenter__(self):
        aiohttp = pytest.importorskip("aiohttp")
        self.profile = Path(tempfile.mkdtemp())
        self.process = subprocess.Popen(
            [shutil.which("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={self.profile}",
             "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, until = self.profile / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and "\n" in file.read_text()):
            assert time.monotonic() < until, "chromium does not start"
            await asyncio.sleep(0.05)
        self.session = aiohttp.ClientSession()
        self.tools = f"http://127.0.0.1:{file.read_text().split()[0]}"
        async with self.session.get(f"{self.tools}/json") as answer:
            page = next(each for each in await answer.json() if each["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self.number, self.faults = 0, []
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *error):
        await self.session.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    async def call(self, method, **parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while (message := await self.socket.receive_json()).get("id") != self.number:
            if message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.faults.append(json.dumps(message["params"]))
        assert "error" not in message or method == "Runtime.evaluate", message
        return message.get("result", {"result": {}})  # an error: the page was just loading

    async def tab(self, url):
        """Another page of the same browser."""
        other, target = copy.copy(self), await self.call("Target.createTarget", url=url)
        other.socket = await self.session.ws_connect(f"{self.tools}/devtools/page/{target['targetId']}")
        return other

    async def js(self, code):
        result = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, code):
        until = time.monotonic() + 30
        tried = f"(() => {{ try {{ return {code} }} catch {{ return false }} }})()"
        while not (value := await self.js(tried)):
            assert time.monotonic() < until, f"{code}: {await self.js('document.body.innerText')}"
            await asyncio.sleep(0.05)
        return value

    async def size(self, width, height):
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                        mobile=width < 500)

    async def write(self, text):
        """Type into the message box and press Enter."""
        await self.js("document.querySelector('#input').focus()")
        await self.call("Input.insertText", text=text)
        await self.press("Enter", 13, text="\r")

    async def press(self, key, number, **more):
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=number,
                            **(more if kind == "keyDown" else {}))

    async def picture(self, name):
        if folder := os.environ.get("SERVE_SCREENSHOTS"):
            data = (await self.call("Page.captureScreenshot"))["data"]
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(data))

    async def click(self, text):
        await self.js(f"[...document.querySelectorAll('button')].find((b) => b.textContent === {text!r} && "
                      "b.offsetParent).click()")


HOSTILE = """<img src=x onerror=alert(1)> <script>alert(1)</script> **bold** `a < b`

```one line```
```py
print('<b>')
```
[site](https://example.org) [bad](javascript:alert(1))"""


async def visit(server, script, monkeypatch):
    """Send, stream, tool call, retry, export, markup, stop, edit, compare, vote, settings, dark, phone.

    Asserts what the page shows at each step. Returns the errors of its script.
    """
    done = ("document.querySelectorAll('[aria-busy=false]').length >= {} && "
            "!document.querySelector('[aria-busy=true]')")
    async with Browser() as page:
        await page.size(1280, 800)
        await page.call("Page.navigate", url=server.url)
        await page.until("!!state.server && !!document.querySelector('#empty')")
        # A tool call, its result, and the answer after it; the thought is folded.
        script["12 * 30?"] = {"thought": "a tool helps", "tool_calls": [CALL]}
        script["360"] = {"content": "It is 360."}
        await page.js("state.choices.calculator = true; state.choices.max_new_tokens = 120")
        await page.write("12 * 30?")
        await page.until(done.format(1))
        assert await page.js("document.querySelector('.call').innerText") == "calculator\n12 * 30\n= 360"
        assert await page.js("document.querySelector('.assistant .md').innerText") == "It is 360."
        assert not await page.js("document.querySelector('.thought').open")
        await page.picture("tool")
        # Retry is another branch; the export is a file for prepare.py.
        await page.click("Retry")
        await page.until("document.querySelector('.assistant').innerText.includes('2 / 2') && "
                         + done.format(1))
        await page.js("URL.createObjectURL = (blob) => { window.exported = blob.text(); return '#' }")
        await page.js("HTMLAnchorElement.prototype.click = () => {}")  # no download
        await page.click("Export JSON")
        (exported,) = json.loads(await page.js("window.exported"))
        assert [message["role"] for message in listed(exported)] == ["user", "assistant", "tool", "assistant"]
        # Markup of a model and of a person stays text; Markdown becomes elements.
        await page.js("state.choices.calculator = false; state.choices.max_new_tokens = 200")
        await page.click("New chat")
        script[HOSTILE] = {"content": HOSTILE}
        await page.write(HOSTILE)
        await page.until(done.format(1))
        assert await page.js("document.querySelectorAll('#turns img, #turns script').length") == 0
        assert await page.js("document.querySelector('.bubble').textContent") == HOSTILE
        assert await page.js("document.querySelector('.md strong').textContent") == "bold"
        assert await page.js("document.querySelector('.md pre').textContent") == "print('<b>')"
        assert await page.js("[...document.querySelectorAll('.md a')].map((a) => a.href).join()") == \
            "https://example.org/"
        await page.picture("markup")
        # Stop with Escape, then edit the question: two branches.
        monkeypatch.setattr(server.served, "ends", {True: set(), False: set()})
        await page.js("state.choices.max_new_tokens = 100000")
        await page.click("New chat")
        await page.write("never ends")
        await page.until("!document.querySelector('#stop').hidden && chat().turns[1]?.messages[0]?.content")
        await page.press("Escape", 27)
        await page.until("document.querySelector('.assistant').innerText.includes('Stopped.')")
        server.idle()
        monkeypatch.undo()
        script.clear()
        monkeypatch.setattr(Batcher, "choose", script.choose)
        await page.js("state.choices.max_new_tokens = 8")
        await page.click("Edit")
        await page.js("document.querySelector('.edit').value = 'ends soon'")
        await page.click("Send")
        await page.until(done.format(1))
        assert "2 / 2" in await page.js("document.querySelector('.user').innerText")
        # The keyboard alone switches branches: the focus stays where it was.
        await page.js("document.querySelector('[aria-label=\"Previous branch\"]').focus()")
        for shown in ("never ends", "ends soon", "never ends"):
            await page.press("Enter", 13, text="\r")
            assert await page.js("document.querySelector('.bubble').innerText") == shown
        assert await page.js("document.activeElement.ariaLabel") == "Next branch"
        # Compare the answers of two models, and vote.
        await page.click("New chat")
        await page.click("Compare")
        await page.js("state.choices.seed = 1")  # random answers may be equal or empty, which is no vote
        await page.write("which?")
        await page.until(done.format(2))
        assert await page.js("document.querySelectorAll('.pair .turn').length") == 2
        shown = "[...document.querySelectorAll('.pair .turn .md')].map((e) => e.innerText).join()"
        assert await page.js(shown)
        await page.picture("compare")
        votes = Path(server.cfg.votes)
        await page.click("This one is better")
        await page.until("!!document.querySelector('.chosen')")
        rows = [json.loads(line) for line in votes.read_text().splitlines()]
        assert len(rows) == 1 and preference(rows[0])[0][-1] == {"role": "user", "content": "which?"}
        assert {rows[0]["chosen_model"], rows[0]["rejected_model"]} == {server.cfg.model, server.cfg.compare}
        # The settings hold for the next request; dark is a choice, too.
        await page.click("Settings")
        await page.js("document.querySelector('#seed').value = 3")
        await page.picture("settings")
        await page.click("Done")
        await page.until("state.choices.seed === 3")  # a dialog tells that it closes a little later
        await page.click("Dark")
        await page.until("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"
                         ".every((c) => c < 60)")
        await page.picture("dark")
        # A phone: nothing is wider than the screen, and the list opens and closes.
        await page.size(390, 844)
        await page.until("getComputedStyle(document.querySelector('#side')).visibility === 'hidden'")
        assert await page.js("document.documentElement.scrollWidth") <= 390
        await page.picture("phone")
        await page.js("document.querySelector('#menu').click()")
        await page.until("getComputedStyle(document.querySelector('#side')).visibility === 'visible'")
        await page.press("Escape", 27)
        await page.until("getComputedStyle(document.querySelector('#side')).visibility === 'hidden'")
        # Every control has a name; a reload shows the same conversations.
        assert await page.js("[...document.querySelectorAll('button, input, textarea, select')].every((e) => "
                             "e.textContent.trim() || e.ariaLabel || e.labels?.length)")
        await page.call("Page.reload")
        await page.until("!!state.server && document.querySelectorAll('#list li').length === 4")
        return page.faults


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_in_a_browser(start, chat_folder, script, monkeypatch, tmp_path):
    other, tokenizer = tmp_path / "other", Tokenizer.load(chat_folder)
    busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256), seed=1).save_pretrained(
        other, eos_token_id=tokenizer.end_ids)
    tokenizer.save(other)
    server = start(f"--model={chat_folder}", f"--compare={other}", f"--votes={tmp_path / 'votes.jsonl'}")
    assert asyncio.run(visit(server, script, monkeypatch)) == []


async def mishaps(server, script):
    """What can go wrong with a page, step by step. Returns the errors of its script."""
    answered = "!running.size && chat()?.turns.at(-1).role === 'assistant'"
    async with Browser() as page:
        await page.call("Page.navigate", url=server.url)
        await page.until("!!state.server")
        # A conversation of another tab stays, whichever tab saves last.
        other = await page.tab(server.url)
        await other.until("!!state.server")
        for tab, text in ((other, "second tab"), (page, "first tab")):
            await tab.write(text)
            await tab.until(answered)
        for tab in (page, other):
            await tab.until("document.querySelectorAll('#list li').length === 2")
            await tab.js("save()")
            titles = "JSON.parse(localStorage.nanollama).chats.map((each) => each.title).join()"
            assert await tab.js(titles) == "first tab,second tab"
        # The server's values stay the server's: the settings are also where the page asks for the key.
        await page.call("Page.bringToFront")
        await page.js("state.server = null; openSettings()")
        await page.js("document.querySelector('#key').value = 'a\\u200bb'")  # copied with an invisible space
        await page.click("Done")
        await page.until("!!state.server && state.key === 'ab'")
        await page.js("openSettings()")
        await page.click("Done")
        await page.until("!document.querySelector('#settings').open && state.choices.calculator === false")
        kept = "['system', ...Object.values(NUMBERS)].map((key) => state.choices[key]).join('')"
        assert await page.js(kept) == ""
        # A page from another computer has no clipboard.
        await page.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        await page.click("Copy")
        await page.until("document.querySelector('#status').textContent === 'The browser refused to copy'")
        # A vote waits for both answers.
        await page.click("New chat")
        await page.click("Compare")
        await page.write("which?")
        await page.until(answered)
        for word, shown in (("running", 0), ("done", 2)):
            await page.js(f"chat().turns[2].state = '{word}'; draw()")
            assert await page.js("document.querySelectorAll('.vote').length") == shown
        # A Hebrew sentence ends on the left.
        script["shalom"] = {"content": "\u05e9\u05dc\u05d5\u05dd."}
        await page.click("Compare")
        await page.click("New chat")
        await page.write("shalom")
        await page.until(answered)
        await page.js("window.range = document.createRange()")
        left = ("range.setStart(document.querySelector('.md p').firstChild, {0}), "
                "range.setEnd(range.startContainer, {0} + 1), range.getBoundingClientRect().left")
        assert await page.js(left.replace("{0}", "4")) < await page.js(left.replace("{0}", "0"))
        # The server was started again with another model: the page reads its list; Retry asks that model.
        await page.js("state.choices.model = state.server.models[0].name = 'out/old'")
        await page.write("still the same?")
        await page.until(f"{answered} && state.choices.model !== 'out/old'")
        assert "status of 404" in page.faults.pop()
        await page.js("draw()")
        await page.click("Retry")
        await page.until(f"{answered} && chat().turns.at(-1).state === 'done'")
        # The server is gone, before an answer and within one.
        for failing in ("Promise.reject(new TypeError())", "new Response(new ReadableStream({pull: (each) => "
                        "each.error(new TypeError())}))"):
            await page.js(f"window.fetch = async () => {failing}")
            await page.write("anybody?")
            await page.until(answered)
            assert await page.js("[...document.querySelectorAll('.turn .error')].at(-1).innerText") == \
                "The server cannot be reached."
        return page.faults


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_mishaps_of_the_page(server, script):
    assert asyncio.run(mishaps(server, script)) == []
