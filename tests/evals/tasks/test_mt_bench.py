"""Answers that a judge compares: by hand, by a model folder, and by an API on this machine."""

import http.server
import json
import socket
import threading

import pytest

import eval as evaluation
from configurator import UserError
from evals.benchmarks import convert
from evals.lm import LM
from evals.tasks import mt_bench
from evals.tasks.mt_bench import ChatTask, compare, task_of, transcripts

ROWS = [{"question_id": 81, "turns": ["Sort 3 1 2.", "Add 1."], "reference": ["1 2 3", "2 3 4"]},
        {"prompt": "What is 2 + 2?"}]


@pytest.mark.parametrize("first, second, outcome, agrees", [
    ("A", "B", "win", True), ("B", "A", "loss", True), ("C", "C", "tie", True),
    ("A", "A", "tie", False), ("B", "B", "tie", False),  # the judge prefers a place
    ("A", "C", "tie", False), ("C", "A", "tie", False), ("", "B", "tie", False), ("", "", "tie", False)])
def test_outcomes_by_hand(first, second, outcome, agrees):
    pair = compare(first, second)
    assert pair[outcome] and pair["win"] + pair["tie"] + pair["loss"] == 1
    assert pair["score"] == {"win": 1, "tie": 0.5, "loss": 0}[outcome] and pair["self_agreement"] is agrees


def test_rows():
    rows = [row | {"file": "f"} for row in ROWS]
    assert convert(rows, task_of) == [ChatTask(["Sort 3 1 2.", "Add 1."], ["1 2 3", "2 3 4"]),
                                      ChatTask(["What is 2 + 2?"], [])]
    for bad in ({"turns": []}, {"turns": [1]}, {"prompt": " "}, {}, {"prompt": "x", "reference": "y"}):
        with pytest.raises(UserError, match="f: row 1 does not fit"):
            convert([bad | {"file": "f"}], task_of)
    with pytest.raises(UserError, match="mt_bench: needs --judge="):
        mt_bench.load(None, 1, None, judge="x")


def test_conversations_have_all_turns(chat_folder, monkeypatch):
    lm, asked = LM(str(chat_folder), device="cpu"), []

    def reply(talks, max_new_tokens, most_calls):
        asked.append([list(talk) for talk in talks])
        return [[{"role": "assistant", "content": f"answer {len(talk)}"}] for talk in talks]

    monkeypatch.setattr(lm, "reply", reply)
    assert transcripts(lm, list(map(task_of, ROWS))) == [
        "User: Sort 3 1 2.\n\nAssistant: answer 1\n\nUser: Add 1.\n\nAssistant: answer 3",
        "User: What is 2 + 2?\n\nAssistant: answer 1"]
    assert list(map(len, asked)) == [2, 1], "the second turn is asked where there is one"


@pytest.fixture
def api():
    """(address, the requests it got, what it says in turn)."""
    requests, says = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body))
            say = says.pop(0)
            content = {"choices": [{"message": {"content": say}}]} if isinstance(say, str) else {}
            answer = json.dumps(content).encode()
            self.send_response(200 if isinstance(say, str) else say)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests, says
    server.shutdown()
    server.server_close()


def test_an_api_judges_in_both_orders(chat_folder, api, tmp_path, monkeypatch, capsys):
    url, requests, says = api
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(mt_bench, "MAX_NEW_TOKENS", 4)
    argv = [f"--model={chat_folder}", "--tasks=mt_bench", f"--opponent={chat_folder}", f"--judge={url}",
            "--judge_model=wise", f"--data=mt_bench={path}", "--device=cpu", f"--out_dir={tmp_path / 'e'}"]
    says += ["[[B]] no: [[A]]", "[[A]]", "It is [[B]].", "neither"]  # a win, and a verdict that is unclear
    assert evaluation.main(argv) == 0
    assert [(path, key) for path, key, _ in requests] == [("/v1/chat/completions", "Bearer secret")] * 4
    bodies = [body for *_, body in requests]
    assert all(body["model"] == "wise" and body["temperature"] == 0 for body in bodies)
    prompts = [body["messages"][0]["content"] for body in bodies]
    assert "### A right answer\n1 2 3\n\n### A right answer\n2 3 4" in prompts[0]
    assert "right answer" not in prompts[1] and prompts[1].count("User: What is 2 + 2?") == 2
    text = (tmp_path / "e" / "results.json").read_text()
    task = json.loads(text)["models"][0]["tasks"]["mt_bench"]
    assert {key: figure["value"] for key, figure in task["figures"].items()} == {
        "score": 0.75, "win": 0.5, "tie": 0.5, "loss": 0, "self_agreement": 0.5, "unread": 0.25}
    assert task["details"]["first_preferred"]["value"] == 0.5 and "secret" not in text
    says[:] = [401]
    with pytest.raises(UserError, match=rf"judge={url}: HTTPError: HTTP Error 401"):
        evaluation.main(argv)
    # A helper that is not there is refused before the model answers for hours.
    for key in ("opponent", "judge"):
        monkeypatch.setattr(mt_bench, "transcripts", None)
        with pytest.raises(UserError, match="/nowhere: no model here"):
            evaluation.main([*argv, f"--{key}=/nowhere"])


@pytest.mark.parametrize("answer", [b"SSH-2.0\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_an_answer_that_is_no_http_or_is_cut_off(answer):
    def serve():
        connection, _ = server.accept()
        request = b""
        while b"hello" not in request:  # a request that is not read would reset the connection
            request += connection.recv(2**16)
        connection.sendall(answer)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="BadStatusLine|IncompleteRead"):
            mt_bench.from_api(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "wise", "hello")
    for address in ("http://127.0.0.1:port/v1", "http://[::1/v1"):
        with pytest.raises(UserError, match="InvalidURL|Invalid IPv6 URL"):
            mt_bench.from_api(address, "wise", "hello")


def test_a_redirect_does_not_get_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(("POST", self.headers["Authorization"]))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", "/elsewhere")  # urllib treats another server's address alike
            self.end_headers()

        def do_GET(self):
            got.append((self.path, self.headers["Authorization"]))
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(UserError, match="HTTP Error 404"):
            mt_bench.from_api(f"http://127.0.0.1:{server.server_port}/v1", "wise", "hello")
        server.shutdown()
    assert got == [("POST", "Bearer secret"), ("/elsewhere", None)]


def test_a_model_folder_judges(chat_folder, trained, monkeypatch):
    """The most likely verdict after the prompt, which is the same in both orders of equal answers."""
    monkeypatch.setattr(mt_bench, "MAX_NEW_TOKENS", 4)
    lm, tasks = LM(str(chat_folder), device="cpu"), [task_of(ROWS[1])]
    with pytest.raises(UserError, match="its context of .* tokens is too short for 2 of 2 comparisons"):
        mt_bench.score(lm, tasks, str(trained), "", str(chat_folder))
    monkeypatch.setattr(mt_bench, "ASK", "{reference}{a:.9}{b:.9} best:")
    for judge in (trained, chat_folder):
        result = mt_bench.score(lm, tasks, str(judge), "", str(chat_folder))
        assert result.answers[0]["said"] == result.answers[0]["opponent"] and result.figures["tie"].value == 1
        first, second = result.answers[0]["verdicts"]
        assert first == second and result.figures["self_agreement"].value == (first == "C")
    with pytest.raises(UserError, match="has no chat"):
        mt_bench.score(LM(str(trained), device="cpu"), tasks, str(trained), "", str(trained))
