"""Serve a model: a chat page in the browser, and an API that OpenAI's clients can use.

    python serve.py --model=out/dpo                          # http://127.0.0.1:8000
    python serve.py --model=out/dpo --compare=out/sft --votes=votes.jsonl
    python serve.py --model=out/dpo --host=0.0.0.0 --api_key="$KEY"

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "12 * 30?"}]}'

Requests that arrive while others run join the batch at its next step (generation/batcher.py). The answers
are those of sample.py with the same seed (generation/api.py). The paths are /v1/chat/completions,
/v1/completions and /v1/models; the page also uses /, /tool and /vote. The page is generation/chat.html. A
vote in it, between two answers, becomes a line of --votes, which prepare.py --kind=preference reads.

Other computers are served only with an api_key. Requests with a foreign Host or Origin are refused, so a page
of another site cannot use the server. Bodies, prompts, waiting requests and time are limited. The only tool
that runs is the calculator. SIGTERM or Ctrl-C ends the server after the running requests.

Left out: HTTPS (put a proxy in front), several processes, and users.
"""

import asyncio
import hmac
import json
import random
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from configurator import UserError, configure, require, require_positive, run_script
from dataset.conversations import preference, tool_call
from dataset.sources import Skip
from generation.api import CompletionRequest, Job, Served, parse
from generation.assistant import call_tool
from generation.generate import Sampling
from modeling.devices import open_device

MOST_BODY = 4 * 2**20  # bytes of a request; 4 MiB are a million tokens of English
BODY_SECONDS = 10  # until a request has arrived
PAGE = Path(__file__).parent / "generation" / "chat.html"
# The page may run its own script and style, and talk to this server; nothing else, and no text becomes HTML.
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'")
LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts that no other computer can reach
# The status of an answer to an error. UnicodeEncodeError: half of a surrogate pair in the JSON.
# RecursionError: JSON of nearly 1,000 levels. 499: the client has gone, so nobody reads the answer.
STATUS: dict[type[Exception], int] = {
    UserError: 400, Skip: 400, UnicodeEncodeError: 400, RecursionError: 400, TimeoutError: 408,
    ClientDisconnect: 499, Exception: 500}


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Sampling):
    model: str = "out/dpo"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    compare: str | None = None  # a second model, for comparisons in the page
    verifier: str | None = None  # a model of verifier.py; it chooses among best_of answers
    best_of: int = 1  # answers to generate for a request without best_of; needs a verifier
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 serves the network, and needs an api_key
    port: int = 8000  # 0 takes a free port
    api_key: str = ""  # what clients must send as a bearer token; the page asks for it
    votes: str | None = None  # file to which the page appends votes, as preferences for prepare.py
    system: str = ""  # the first message of the page's conversations, from the role "system"
    max_new_tokens: int = 200  # longest answer of a request without max_tokens, in tokens
    context_length: int = 2048  # longest prompt and answer, in tokens; at most the model's
    slots: int = 16  # texts generated together
    max_waiting: int = 256  # texts that may wait for a slot; further requests get status 429
    timeout: float = 600.0  # seconds that a request may take, waiting included; then it gets status 408
    device: str | None = None  # cpu, cuda or mps; None is the best available
    threads: int | None = None  # CPU threads; None takes every core the process may use
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None is bfloat16 on cuda

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "context_length", "slots", "max_waiting", "timeout", "max_new_tokens")
        require(self, "port", 0 <= self.port < 2**16, "from 0 to 65,535")
        require(self, "best_of", self.best_of == 1 or self.verifier is not None, "1 without a verifier")
        if not self.api_key and self.host not in LOCAL:
            raise UserError(f"host={self.host}: other computers could use the model; set --api_key=")
        require(self, "api_key", self.api_key.isascii(), "ASCII, as HTTP headers are")


# ---- Access and errors ------------------------------------------------------------------------------------

def check_headers(cfg: ServeConfig, request: Request) -> None:
    """Raise HTTPException for a request that comes from elsewhere, or without the key.

    A page of another site can make a browser send requests to this computer. Such a request has the other
    site's Origin, or its Host if the site's name was made to point here (DNS rebinding).
    """
    host, origin = request.url.hostname, request.headers.get("origin")
    # A server for the whole network may be called by any name; there, the api_key protects it.
    if cfg.host not in ("0.0.0.0", "::") and host not in (cfg.host, *LOCAL):
        raise HTTPException(403, f"the Host {host!r} is not served")
    if origin is not None and origin.partition("://")[2] != request.url.netloc:
        raise HTTPException(403, "requests from pages of other sites are refused")
    # compare_digest takes the same time for every wrong key, so its time tells nothing about the right one.
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    if cfg.api_key and not hmac.compare_digest(key.encode(), cfg.api_key.encode()):
        raise HTTPException(401, "the api_key is missing or wrong")


def error_body(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    # STATUS ends with Exception, so there is always a first match.
    status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
    message = str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    kind = "server_error" if status == 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


async def on_error(request: Request, error: Exception) -> Response:
    """The answer to a request that raised an error."""
    body = error_body(error)
    return JSONResponse(body, int(body["error"]["code"]))


class Connection(H11Protocol):
    """uvicorn's connection, which also ends if no request arrives on it."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Otherwise, connections that send nothing could use up all that the system allows.
        self.loop.call_later(BODY_SECONDS, lambda: self.cycle or transport.close())


# ---- Answers ----------------------------------------------------------------------------------------------

class Server:
    """The models, and a handler for each route."""

    def __init__(self, cfg: ServeConfig):
        self.cfg = cfg
        device, dtype = open_device(cfg.device, cfg.threads, cfg.dtype)
        # What a request leaves out has the server's own value.
        sampling: dict[str, Any] = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
        self.defaults = CompletionRequest(max_tokens=cfg.max_new_tokens, best_of=cfg.best_of, **sampling)
        self.seeds = random.Random(cfg.seed)
        # The same model twice is loaded once.
        names = dict.fromkeys(filter(None, (cfg.model, cfg.compare)))
        self.models = {name: Served(name, device, dtype, cfg, cfg.slots, cfg.context_length, cfg.verifier)
                       for name in names}

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The JSON of a request, whose headers are checked. Too large is status 413, too slow 408."""
        check_headers(self.cfg, request)
        data, size = b"", 0
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                data += chunk if size <= MOST_BODY else b""  # read on: a client that sends reads no answer
        if size > MOST_BODY:
            raise HTTPException(413, f"the body has {size:,} bytes; at most {MOST_BODY:,} are read")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):  # not JSON, or thousands of open brackets
            body = None
        if not isinstance(body, dict):
            raise UserError("the body must be a JSON object")
        return body

    async def page(self, request: Request) -> Response:
        # A new number for each page: only the page's own script and style have it (POLICY).
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce), headers={
            "Content-Security-Policy": POLICY.format(nonce), "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})

    async def list_models(self, request: Request) -> Response:
        """The models, and under "page" what the page has to know."""
        check_headers(self.cfg, request)
        # The page requests this list first, so its settings can come with it.
        page: dict[str, Any] = {key: getattr(self.cfg, key)
                                for key in ("system", "max_new_tokens", "temperature", "top_p")}
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "nanollama",
                   "is_chat": served.is_chat, "context_length": served.context_length}
                  for name, served in self.models.items()]
        return JSONResponse({"object": "list", "data": models,
                             "page": page | {"votes": self.cfg.votes is not None}})

    async def tool(self, request: Request) -> Response:
        """The result of a tool call, {"name", "arguments"}. The calculator is the only tool that runs."""
        return JSONResponse({"content": call_tool(tool_call(await self.read_json(request)))})

    async def vote(self, request: Request) -> Response:
        """Append a preference: {"prompt": messages, "chosen": message, "rejected": message}."""
        body = await self.read_json(request)  # checks the key first, so strangers learn nothing
        if self.cfg.votes is None:
            raise HTTPException(404, "votes are kept only with --votes=FILE")
        preference(body)  # raises Skip for a row that prepare.py would not use
        with open(self.cfg.votes, "a", encoding="utf-8") as file:  # votes of earlier servers stay
            file.write(json.dumps(body) + "\n")
        return JSONResponse({})

    async def complete(self, request: Request) -> Response:
        """An answer of a model: to a chat, or to a text."""
        body = await self.read_json(request)
        # Without a seed, the same question may get another answer each time.
        completion = parse(body, replace(self.defaults, seed=self.seeds.randrange(2**43)))
        name = completion.model or self.cfg.model
        if name not in self.models:
            raise HTTPException(404, f"no model {name!r} is served, but {', '.join(self.models)}")
        # What waits already counts against max_waiting; Job refuses what does not fit with status 429.
        served = self.models[name]
        job = Job(served, completion, self.cfg.timeout, self.cfg.max_waiting - len(served.batcher.waiting))
        if completion.stream:
            return StreamingResponse(self.events(job), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        try:
            # One round per token of the batch. A client that has gone away frees its slot at the next one.
            async for _ in job.steps():
                if await request.is_disconnected():
                    raise ClientDisconnect
            return JSONResponse(job.response())
        finally:  # also if it was cancelled: nobody would read the rest
            job.end()

    async def events(self, job: Job) -> AsyncIterator[str]:
        """The pieces of an answer as server-sent events. An error is an event, because the status is already
        sent."""
        def event(content: Any) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        # Each piece is sent as soon as later tokens cannot change it: what may begin a stop text waits.
        try:
            async for chunk in job.chunks():
                yield event(chunk)
        except Exception as error:  # such as memory that ran out
            yield event(error_body(error))
        finally:  # also when the client has gone
            job.end()
        yield "data: [DONE]\n\n"  # OpenAI's clients read up to this line

    def app(self) -> Starlette:
        posts = {"/v1/chat/completions": self.complete, "/v1/completions": self.complete, "/tool": self.tool,
                 "/vote": self.vote}
        routes = [Route("/", self.page), Route("/v1/models", self.list_models),
                  *(Route(path, handler, methods=["POST"]) for path, handler in posts.items())]
        return Starlette(routes=routes, exception_handlers=dict.fromkeys((*STATUS, HTTPException), on_error))


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure(ServeConfig, argv, usage=__doc__)
    # The address is bound before the model is loaded: a busy port should not cost a minute.
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    listening = socket.create_server((cfg.host, cfg.port), family=family)  # a busy port fails at once
    # Without log_config: uvicorn's own would close the log handlers of everybody in this process.
    server = uvicorn.Server(uvicorn.Config(Server(cfg).app(), http=Connection, log_config=None,
                                           log_level="warning"))
    host = f"[{cfg.host}]" if family == socket.AF_INET6 else cfg.host
    print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
    # uvicorn ends after the running requests, then raises the signal again; SIGTERM is exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listening])


if __name__ == "__main__":
    run_script(main)
