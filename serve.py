"""Serve a model: a chat page in the browser, and an API that OpenAI's clients can use.

    python serve.py --model=out/dpo                          # http://127.0.0.1:8000
    python serve.py --model=out/dpo --compare=out/sft --votes=votes.jsonl
    python serve.py --model=out/dpo --host=0.0.0.0 --api_key="$KEY"

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "12 * 30?"}]}'

Requests that arrive while others run join the batch at its next step (generation/batcher.py). The answers are
those of sample.py with the same seed (generation/api.py). The page is generation/chat.html. A vote in it, between
two answers, becomes a line of --votes, which prepare.py --kind=preference reads.

Other computers are served only with an api_key. Requests with a foreign Host or Origin are refused, so a page of
another site cannot use the server. Bodies, prompts, waiting requests and time are limited. The only tool that
runs is the calculator. SIGTERM or Ctrl-C ends the server after the running requests.

Left out: HTTPS (put a proxy in front), several processes, and users.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import itertools
import json
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configurator import UserError, configure, require, require_positive, run_script
from dataset.conversations import preference
from dataset.sources import Skip
from generation.api import Asked, Job, Refused, Served, parse, read_message
from generation.assistant import call_tool
from generation.generate import MOST_NEW_TOKENS, Sampling
from modeling.devices import DTYPES, pick_device, use_threads

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise SystemExit("serve.py needs two more packages: pip install starlette uvicorn") from None

MOST_BODY = 4 * 2**20  # bytes of a request; 4 MiB are a million tokens of English
BODY_SECONDS = 10  # until a request has arrived
PAGE = Path(__file__).parent / "generation" / "chat.html"
# The page may run its own script and style, and talk to this server; nothing else, and no text becomes HTML.
POLICY = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Sampling):
    model: str = "out/dpo"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    compare: str | None = None  # a second model, for comparisons in the page
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
        require(self, "slots", self.slots <= 1024, "at most 1,024")
        require(self, "max_new_tokens", self.max_new_tokens <= MOST_NEW_TOKENS, f"at most {MOST_NEW_TOKENS:,}")
        require(self, "port", 0 <= self.port < 2**16, "from 0 to 65,535")
        if not self.api_key and not is_loopback(self.host):
            raise UserError(f"host={self.host}: other computers could use the model; set --api_key=")


# ---- Who may ask ------------------------------------------------------------------------------------------

def is_loopback(host: str) -> bool:
    """True for a name or an address of this computer that no other computer can reach."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def refusal(cfg: ServeConfig, headers: dict[str, str], path: str) -> tuple[int, str] | None:
    """(status, reason) for a request that is refused by its headers, or None.

    A page of another site can make a browser send requests to this computer. Such a request has the other
    site's Origin, or its Host if the site's name was made to point here (DNS rebinding).
    """
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if cfg.host not in ("0.0.0.0", "::") and name != cfg.host and not is_loopback(name):
        return 403, f"the Host {name!r} is not served"
    if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
        return 403, "requests from pages of other sites are refused"
    key = headers.get("authorization", "").removeprefix("Bearer ")
    if cfg.api_key and path != "/" and not hmac.compare_digest(key.encode(), cfg.api_key.encode()):
        return 401, "the api_key is missing or wrong"
    return None


def guarded(cfg: ServeConfig, app: Any) -> Any:
    """The application, which gets only the requests that are not refused."""
    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            if refused := refusal(cfg, headers, scope["path"]):
                return await failure(*refused)(scope, receive, send)
        await app(scope, receive, send)
    return guard


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "server_error" if status == 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def failure(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    headers = {"Retry-After": "1"} if status == 429 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_body(status, message), status, headers)


async def read_json(request: Request) -> Any:
    """The JSON of a request. Raises Refused for one that is too large (413) or too slow (408)."""
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                data += chunk if size <= MOST_BODY else b""  # read on: a client that is sending hears no answer
    except TimeoutError:
        raise Refused(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
    if size > MOST_BODY:
        raise Refused(413, f"the body has more than {MOST_BODY:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None


# ---- Answers ----------------------------------------------------------------------------------------------

class Server:
    """The models, and a handler for each route."""

    def __init__(self, cfg: ServeConfig):
        self.cfg, device = cfg, pick_device(cfg.device)
        if device.type == "cpu" and (text := use_threads(cfg.threads)):
            print(text, file=sys.stderr)
        dtype = DTYPES[cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        names = list(dict.fromkeys(filter(None, (cfg.model, cfg.compare))))
        self.models = {name: Served(name, device, dtype, cfg.slots, cfg.context_length) for name in names}

    def served(self, name: str | None) -> Served:
        if name is not None and name not in self.models:
            raise Refused(404, f"no model {name!r} is served, but {', '.join(self.models)}")
        return self.models[name or self.cfg.model]

    async def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce), headers={
            "Content-Security-Policy": POLICY.format(nonce), "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})

    async def settings(self, request: Request) -> Response:
        """What the page has to know."""
        keys = ("system", "max_new_tokens", "temperature", "top_p", "top_k", "timeout")
        return JSONResponse({key: getattr(self.cfg, key) for key in keys} | {
            "models": [{"name": name, "chat": served.is_chat, "context": served.context_length}
                       for name, served in self.models.items()], "votes": self.cfg.votes is not None})

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "nanollama"} for name in self.models]})

    async def tool(self, request: Request) -> Response:
        """The result of a tool call, {"name", "arguments"}. The calculator is the only tool that runs."""
        call = await read_json(request)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError("the body must have a name and arguments")
        return JSONResponse({"content": call_tool(call)})

    async def vote(self, request: Request) -> Response:
        """Append a preference: {"prompt": messages, "chosen": messages, "rejected": messages}.

        If the answers begin alike, as with the same tool call, what they share belongs to the prompt. The first
        messages that differ are chosen and rejected.
        """
        if self.cfg.votes is None:
            raise Refused(404, "votes are kept only with --votes=FILE")
        body = await read_json(request)
        try:
            prompt, *sides = ([read_message(each) for each in body[key]] for key in ("prompt", "chosen", "rejected"))
            shared = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))])
            row = {"prompt": prompt + sides[0][:shared], "chosen": sides[0][shared:][:1],
                   "rejected": sides[1][shared:][:1]}
            preference(row)  # raises Skip for a row that prepare.py would not use
        except (KeyError, TypeError) as error:
            raise UserError(f"a vote has prompt, chosen and rejected ({error})") from None
        except Skip as error:
            raise UserError(str(error)) from None
        row |= {key: str(body[key]) for key in ("chosen_model", "rejected_model") if key in body}
        with open(self.cfg.votes, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return JSONResponse({"votes": 1})

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, is_chat=True)

    async def text(self, request: Request) -> Response:
        return await self.answer(request, is_chat=False)

    async def answer(self, request: Request, is_chat: bool) -> Response:
        asked = parse(await read_json(request))
        served = self.served(asked.model)
        if len(served.batcher.waiting) >= self.cfg.max_waiting:
            raise Refused(429, "too many requests are waiting; try again later")
        job = served.start(asked, is_chat, self.cfg, self.cfg.max_new_tokens)
        if asked.stream:
            return StreamingResponse(self.stream(job), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        try:
            async with asyncio.timeout(self.cfg.timeout):
                return JSONResponse(await self.unless_gone(request, job))
        except TimeoutError:
            raise Refused(408, f"the answer took more than {self.cfg.timeout:g} seconds") from None
        finally:
            job.cancel()

    async def unless_gone(self, request: Request, job: Job) -> Any:
        """The response; ends with ClientDisconnect if the client closes its connection first."""
        response, gone = asyncio.ensure_future(job.response()), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((response, gone), return_when=asyncio.FIRST_COMPLETED)
            if not response.done():
                raise ClientDisconnect
            return response.result()
        finally:
            response.cancel()
            gone.cancel()

    async def stream(self, job: Job) -> AsyncIterator[str]:
        """The pieces of an answer as server-sent events. An error is an event too, since the status is sent."""
        try:
            async with asyncio.timeout(self.cfg.timeout):
                async for chunk in job.chunks():
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except TimeoutError:
            yield f"data: {json.dumps(error_body(408, 'the answer took too long'))}\n\n"
        except UserError as error:
            yield f"data: {json.dumps(error_body(500, str(error)))}\n\n"
        finally:  # also when the client has gone
            job.cancel()
        yield "data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        yield
        for served in self.models.values():
            served.batcher.close()

    def app(self) -> Any:
        """The ASGI application."""
        async def failed(request: Request, error: Exception) -> Response:
            if isinstance(error, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it
            return failure(error.status if isinstance(error, Refused) else 400, str(error))

        get = {"/": self.page, "/settings": self.settings, "/v1/models": self.list_models}
        post = {"/v1/chat/completions": self.chat, "/v1/completions": self.text, "/tool": self.tool, "/vote": self.vote}
        routes = [Route(path, handler, methods=[method]) for method, handlers in (("GET", get), ("POST", post))
                  for path, handler in handlers.items()]
        return guarded(self.cfg, Starlette(routes=routes, lifespan=self.lifespan, exception_handlers={
            UserError: failed, ClientDisconnect: failed}))


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, _ = configure(ServeConfig, argv, usage=__doc__)
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    listening = socket.create_server((cfg.host, cfg.port), family=family)  # before the model: a busy port fails now
    server = uvicorn.Server(uvicorn.Config(Server(cfg).app(), log_level="warning", timeout_keep_alive=30))
    host = f"[{cfg.host}]" if family == socket.AF_INET6 else cfg.host
    print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
    # uvicorn ends after the running requests, then raises the signal again; SIGTERM is exit code 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listening])
    return 0


if __name__ == "__main__":
    run_script(main)
