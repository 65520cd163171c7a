"""serve.py under many clients: throughput of a batch, and a minute of faults.

    python -m bench.clients --model=out/dpo
    python -m bench.clients --model=out/dpo --seconds=60 --json=docs/results/clients.json

Starts serve.py. First 16 clients ask at the same time, compared with the same 16 requests one after another:
equal prompts and max_tokens, greedy, warm, in turns; the texts must be equal. Then 50 clients do what FAULTS
lists, each the next thing at random, and the memory of the server is read 12 times.
"""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from bench.measure import BenchConfig, run_benchmark, text_table
from configurator import UserError, require_positive, run_script

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is 15 * 4?"}], "max_tokens": 40}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
          "additionalProperties": False}
MARKUP = {"messages": [{"role": "user", "content": "<script>alert(1)</script><|im_end|>"}], "max_tokens": 10}
LONG = {"messages": [{"role": "user", "content": "many words " * 3000}]}
# {what a client does: (path, body, headers)}; a body of bytes is sent as it is, None is a client that leaves.
FAULTS: dict[str, tuple[str, Any, dict[str, str]]] = {
    "chat": (CHAT, QUESTION, {}),
    "stream": (CHAT, QUESTION | {"stream": True}, {}),
    "n=4": (CHAT, QUESTION | {"n": 4}, {}),
    "completion": (TEXT, {"prompt": "import os", "max_tokens": 30}, {}),
    "schema": (CHAT, QUESTION | {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": SCHEMA}}}, {}),
    "markup": (CHAT, MARKUP, {}),
    "broken JSON": (CHAT, b"{", {}),
    "50,000 brackets": (CHAT, b"[" * 50_000, {}),
    "not UTF-8": (CHAT, b"\xff", {}),
    "5 MB": (CHAT, b'"' + b"a" * 5_000_000 + b'"', {}),
    "long prompt": (CHAT, LONG, {}),
    "foreign Host": (CHAT, QUESTION, {"Host": "evil.example"}),
    "foreign Origin": (CHAT, QUESTION, {"Origin": "https://evil.example"}),
    "leaves": (CHAT, QUESTION | {"max_tokens": 4000, "stream": True}, {}),
    "half a body": (CHAT, b"{", {"Content-Length": "100"}),
}


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    model: str = "out/dpo"  # model folder or out_dir
    clients: int = 16  # clients of the throughput
    max_tokens: int = 64  # of each of their requests
    seconds: float = 60.0  # of faults

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "clients", "max_tokens", "seconds")


class Child:
    """serve.py in a process of its own."""

    def __init__(self, model: str):
        command = [sys.executable, "serve.py", f"--model={model}", "--port=0", "--max_waiting=64",
                   "--device=cpu"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        found = re.search(r":(\d+)$", self.process.stdout.readline().strip())
        if not found:
            raise UserError(f"model={model}: serve.py does not start")
        self.port = int(found[1])

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(body))
        return json.loads(connection.getresponse().read())

    def megabytes(self) -> int:
        with open(f"/proc/{self.process.pid}/status") as file:
            return round(int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


# ---- Throughput -------------------------------------------------------------------------------------------

def throughput(cfg: Config, server: Child) -> dict[str, Any]:
    """Tokens per second of the same requests together and in turn. UserError if their texts differ."""
    # Greedy, because sampled texts may differ: rounding can swap two tokens that are almost equally likely.
    bodies = [{"prompt": f"def f_{number}(self, value):\n    ", "temperature": 0,
               "max_tokens": cfg.max_tokens}
              for number in range(cfg.clients)]

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        return server.ask(TEXT, body)

    seconds: dict[str, list[float]] = {"in turn": [], "together": []}
    with ThreadPoolExecutor(cfg.clients) as pool:
        kinds = {"in turn": lambda: [*map(ask, bodies)], "together": lambda: [*pool.map(ask, bodies)]}
        warm = {kind: run() for kind, run in kinds.items()}
        texts = [[answer["choices"][0]["text"] for answer in answers] for answers in warm.values()]
        if texts[0] != texts[1]:
            raise UserError("the batch changes a text")
        for kind in [*kinds] * cfg.rounds:
            begin = time.perf_counter()
            kinds[kind]()
            seconds[kind].append(time.perf_counter() - begin)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in warm["together"])
    return {"tokens": tokens, "seconds": seconds,
            "tokens_per_second": {kind: tokens / statistics.median(each) for kind, each in seconds.items()}}


# ---- Faults -----------------------------------------------------------------------------------------------

async def commit_fault(port: int, name: str) -> str:
    """Do one thing of FAULTS; returns the status of the answer, or "left"."""
    path, body, headers = FAULTS[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Length": str(len(data)), "Connection": "close"} | headers
    lines = [f"POST {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join(lines).encode() + data)
        await writer.drain()
        if name == "leaves":
            await asyncio.sleep(random.random())
            return "left"
        answer = await reader.read()
        status = answer.split(b" ", 2)[1].decode()
        is_whole = name != "stream" or b"[DONE]" in answer or status != "200"
        return status if is_whole else "a stream without its end"
    finally:
        writer.close()


async def faults(cfg: Config, server: Child) -> dict[str, Any]:
    """Count the answers to 50 clients, and read the server's memory."""
    counts: dict[str, Counter] = defaultdict(Counter)
    end, memory = time.monotonic() + cfg.seconds, []

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            name = draw.choice([*FAULTS])
            try:
                counts[name][await commit_fault(server.port, name)] += 1
            except OSError as error:
                counts[name][type(error).__name__] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.megabytes())
            await asyncio.sleep(cfg.seconds / 12)

    await asyncio.gather(watch(), *map(client, range(50)))
    return {"counts": {name: dict(counts[name]) for name in FAULTS}, "megabytes": memory}


def measure(cfg: Config) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    server = Child(cfg.model)
    try:
        results = throughput(cfg, server) | asyncio.run(faults(cfg, server))
        answer = server.ask(TEXT, FAULTS["completion"][1])
        return results | {"after": answer["choices"][0]["finish_reason"], "exit_code": server.stop()}
    finally:
        server.process.kill()


def report(results: dict[str, Any]) -> str:
    speed = results["tokens_per_second"]
    lines = [[name, ", ".join(f"{count} x {status}" for status, count in sorted(counts.items()))]
             for name, counts in results["counts"].items()]
    first = (f"one after another {speed['in turn']:,.0f} tokens/s, together {speed['together']:,.0f} "
             f"tokens/s ({speed['together'] / speed['in turn']:.1f} x), equal texts")
    return "\n".join([
        first, text_table(["client", "answers"], lines),
        f"memory {results['megabytes']} MB; exit code after SIGTERM {results['exit_code']}"])


def main(argv: list[str]) -> int:
    run_benchmark("bench.clients", Config, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
