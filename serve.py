"""Serve a model: a chat page in the browser, and an API that OpenAI's clients can use.

    python serve.py --model=out/dpo                          # http://127.0.0.1:8000
    python serve.py --model=out/dpo --compare=out/sft --votes=votes.jsonl
    python serve.py --model=out/dpo --host=0.0.0.0 --api_key="$KEY"

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "12 * 30?"}]}'

Requests that arrive while others run join the batch at its next step (generation/batcher.py). The answers
are those of sample.py with the same seed (generation/api.py). The page is generation/chat.html. A vote in it,
between two answers, becomes a line of --votes, which prepare.py --kind=preference reads.

Other computers are served only with an api_key. Requests with a foreign Host or Origin are refused, so a page
of another site cannot use the server. Bodies, prompts, waiting requests and time are limited. The only tool
that runs is the calculator. SIGTERM or Ctrl-C ends the server after the running requests.

Left out: HTTPS (put a proxy in front), several processes, and users.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import itertools
import json
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from configurator import UserError, configure, require, require_positive, run_script
from dataset.conversations import preference
from dataset.sources import Skip
from generation.api import Job, Served
from generation.assistant import call_tool
from generation.generate import MOST_NEW_TOKENS, Sampling
from generation.requests import Asked, Refused, parse, read_message
from generation.verifier import Verifier
from modeling.devices import DTYPES, pick_device, use_threads

MOST_BODY = 4 * 2**20  # bytes of a request; 4 MiB are a million tokens of English
BODY_SECONDS = 10  # until a request has arrived
PAGE = Path(__file__).parent / "generation" / "chat.html"
# The page may run its own script and style, and talk to this server; nothing else, and no text becomes HTML.
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
          "require-trusted-types-for 'script'")
Handler = Callable[[Request], Awaitable[Response]]


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
        for key, most in (("slots", 1024), ("max_new_tokens", MOST_NEW_TOKENS), ("context_length", 2**24)):
            require(self, key, getattr(self, key) <= most, f"at most {most:,}")
        if self.sinks or self.window is not None:
            raise UserError("sinks and window do not work in the server, whose rows share one cache")
        require(self, "port", 0 <= self.port < 2**16, "from 0 to 65,535")
        require(self, "best_of", self.best_of == 1 or self.verifier is not None, "1 without a verifier")
        if not self.api_key and not is_loopback(self.host):
            raise UserError(f"host={self.host}: other computers could use the model; set --api_key=")


# ---- Who may ask ------------------------------------------------------------------------------------------

def is_loopback(host: str) -> bool:
    """True for a name or an address that no other computer can reach."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_headers(cfg: ServeConfig, request: Request) -> None:
    """Raise Refused for a request that comes from elsewhere, or without the key.

    A page of another site can make a browser send requests to this computer. Such a request has the other
    site's Origin, or its Host if the site's name was made to point here (DNS rebinding).
    """
    host = request.headers.get("host", "")
    name = re.sub(r":\d+$", "", host)
    if cfg.host not in ("0.0.0.0", "::") and name.strip("[]") != cfg.host and not is_loopback(name):
        raise Refused(403, f"the Host {name!r} is not served")
    if request.headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
        raise Refused(403, "requests from pages of other sites are refused")
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    is_right = not cfg.api_key or hmac.compare_digest(key.encode(), cfg.api_key.encode())
    if not is_right and request.url.path != "/":  # the page holds no secret; it asks for the key
        raise Refused(401, "the api_key is missing or wrong")


async def read_json(request: Request) -> Any:
    """The JSON of a request. Raises Refused for one that is too large (413) or too slow (408)."""
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                data += chunk if size <= MOST_BODY else b""  # read on: who sends does not listen yet
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
    if size > MOST_BODY:
        raise Refused(413, f"the body has {size:,} bytes; at most {MOST_BODY:,} are read")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None


def error_body(error: Exception, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status == 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": str(status)}}


async def failed(request: Request, error: Exception) -> Response:
    """The answer to a request that raised an error."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    is_users = isinstance(error, UserError | UnicodeEncodeError)  # the second: half of a surrogate pair
    status = getattr(error, "status", 400 if is_users else 500)
    return JSONResponse(error_body(error, status), status, {"Retry-After": "1"} if status == 429 else None)


class Protocol(H11Protocol):
    """uvicorn's connection, which also ends if no request arrives on it."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(BODY_SECONDS, lambda: self.cycle or transport.close())


# ---- Answers ----------------------------------------------------------------------------------------------

class Server:
    """The models, and a handler for each route."""

    def __init__(self, cfg: ServeConfig):
        self.cfg, device = cfg, pick_device(cfg.device)
        if device.type == "cpu" and (text := use_threads(cfg.threads)):
            print(text, file=sys.stderr)
        dtype = DTYPES[cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        sampling: dict[str, Any] = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
        self.defaults = Asked(max_tokens=cfg.max_new_tokens, best_of=cfg.best_of, **sampling)
        names = list(dict.fromkeys(filter(None, (cfg.model, cfg.compare))))
        self.models = {name: Served(name, device, dtype, cfg.slots, cfg.context_length) for name in names}
        if cfg.verifier is not None:
            for served in self.models.values():
                served.verifier = Verifier(cfg.verifier, served.tokenizer, device)

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce), headers={
            "Content-Security-Policy": POLICY.format(nonce), "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})

    async def list_models(self, request: Request) -> Response:
        """The models, and under "page" what the page has to know."""
        keys = ("system", "max_new_tokens", "temperature", "top_p")
        page: dict[str, Any] = {key: getattr(self.cfg, key) for key in keys}
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "nanollama",
                   "is_chat": served.is_chat, "context_length": served.context_length}
                  for name, served in self.models.items()]
        page["votes"] = self.cfg.votes is not None
        return JSONResponse({"object": "list", "data": models, "page": page})

    async def tool(self, request: Request) -> Response:
        """The result of a tool call, {"name", "arguments"}. The calculator is the only tool that runs."""
        call = await read_json(request)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError("the body must have a name and arguments")
        return JSONResponse({"content": call_tool(call)})

    async def vote(self, request: Request) -> Response:
        """Append a preference. The body has lists of messages: prompt, chosen, rejected.

        If both answers begin alike, as with the same tool call, what they share belongs to the prompt. The
        first messages that differ are chosen and rejected.
        """
        if self.cfg.votes is None:
            raise Refused(404, "votes are kept only with --votes=FILE")
        body = await read_json(request)
        try:
            prompt, *sides = ([read_message(each) for each in body[key]]
                              for key in ("prompt", "chosen", "rejected"))
            shared = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))])
            row: dict[str, Any] = {"prompt": prompt + sides[0][:shared], "chosen": sides[0][shared:][:1],
                                   "rejected": sides[1][shared:][:1]}
            preference(row)  # raises Skip for a row that prepare.py would not use
            row |= {key: str(body[key]) for key in ("chosen_model", "rejected_model") if key in body}
        except (KeyError, TypeError, Skip) as error:
            raise UserError(f"not a vote: {error}") from None
        with open(self.cfg.votes, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return JSONResponse({})

    async def complete(self, request: Request) -> Response:
        """An answer of a model: to a chat, or to a text."""
        is_chat = "chat" in request.url.path
        asked = parse(await read_json(request), self.defaults, is_chat)
        name = self.cfg.model if asked.model is None else asked.model
        if name not in self.models:
            raise Refused(404, f"no model {name!r} is served, but {', '.join(self.models)}")
        if len(self.models[name].batcher.waiting) >= self.cfg.max_waiting:
            raise Refused(429, "too many requests are waiting; try again later")
        job = self.models[name].start(asked, is_chat, self.cfg.timeout)
        if asked.stream:
            return StreamingResponse(self.stream(job), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        tasks = [asyncio.ensure_future(job.response()), asyncio.ensure_future(request.receive())]
        try:
            # The second task ends when the client closes its connection.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            return JSONResponse(tasks[0].result())
        finally:
            job.cancel()
            for task in tasks:
                task.cancel()

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """The pieces of an answer as server-sent events. An error is an event, too: the status is sent."""
        def event(content: Any) -> str:
            return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

        try:
            async for chunk in job.chunks():
                yield event(chunk)
        except Exception as error:  # 408, or one of the model, such as no memory
            yield event(error_body(error, getattr(error, "status", 500)))
        finally:  # also when the client has gone
            job.cancel()
        yield "data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        yield
        for served in self.models.values():
            served.batcher.close()

    def app(self) -> Starlette:
        """The application: every route checks the headers first."""
        def route(path: str, handler: Handler, method: str = "POST") -> Route:
            async def checked(request: Request) -> Response:
                check_headers(self.cfg, request)
                return await handler(request)
            return Route(path, checked, methods=[method])

        return Starlette(lifespan=self.lifespan, routes=[
            route("/", self.page, "GET"), route("/v1/models", self.list_models, "GET"),
            route("/v1/chat/completions", self.complete), route("/v1/completions", self.complete),
            route("/tool", self.tool), route("/vote", self.vote)],
            exception_handlers=dict.fromkeys(
                (UserError, UnicodeEncodeError, ClientDisconnect, Exception), failed))


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, _ = configure(ServeConfig, argv, usage=__doc__)
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        listening = socket.create_server((cfg.host, cfg.port), family=family)  # a busy port fails at once
    except OSError as error:
        reason = f"{error.strerror}; --port=0 takes a free one"
        raise UserError(f"host={cfg.host}, port={cfg.port}: {reason}") from None
    server = uvicorn.Server(uvicorn.Config(Server(cfg).app(), http=Protocol, log_level="warning"))
    host = f"[{cfg.host}]" if family == socket.AF_INET6 else cfg.host
    print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
    # uvicorn ends after the running requests, then raises the signal again; SIGTERM is exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listening])
    return 0


if __name__ == "__main__":
    run_script(main)
