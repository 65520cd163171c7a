"""OpenAI's API, without connections: the body of a request -> prompts -> rows of a batcher -> answers.

    served = Served("out/dpo", torch.device("cpu"), torch.float32, Sampling(), slots=16, context_length=2048)
    request = parse({"messages": [{"role": "user", "content": "Hi"}]}, CompletionRequest(max_tokens=200))
    job = Job(served, request, timeout=600, most_rows=256)
    async for chunk in job.chunks(): ...        # the pieces of the answer, for "stream": true; or
    async for _ in job.steps(): ...             # and then
    body = job.response()                       # the whole answer
    job.end()                                   # frees its slots

The keys are those of /v1/chat/completions and /v1/completions (platform.openai.com/docs/api-reference), and
top_k, min_p, repetition_penalty and best_of. Other keys are refused. Thoughts are "reasoning_content", as
DeepSeek names them. A tool call is sent when it is complete. The answers are those of sample.py with the same
seed. Left out: images, audio, logit_bias, penalties, log-probabilities of chats.
"""

import asyncio
import functools
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from starlette.exceptions import HTTPException

from configurator import UserError, override, require, require_positive
from dataset.conversations import Message, listed, system_message
from dataset.tool_problems import offer
from formats import hf
from formats.chat_format import (
    CALL,
    THOUGHT,
    THOUGHT_END,
    encode_prompt,
    end_of_turn,
    read_answer,
    require_chat,
)
from formats.chat_template import own_template
from formats.tokenizer import Tokenizer
from generation.assistant import ROUND_STRIDE, Assistant
from generation.batcher import Batcher, Row
from generation.constraints import Constraint, ConstraintKeys, Guide, grammar
from generation.generate import Sampling, TextSampling, visible_text
from generation.verifier import Verifier
from model import GPT
from modeling.sinks import cache_limits

# Keys of a request that change no answer.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
           "prompt_cache_key"}
# Keys that are not supported, with the values that clients send to leave them out.
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0}
# Around thoughts and before calls, in other models' chat formats.
MARKS = ("<think>", "</think>", "<tool_call>")


# ---- Requests ---------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class CompletionRequest(TextSampling):
    """The body of a request."""

    model: str | None = None  # None is the first one
    messages: list | None = None
    prompt: str | list | None = None  # a text, a list of ids, or a list of these
    max_tokens: int = 16
    n: int = 1  # answers per prompt
    best_of: int = 1  # answers to generate per prompt; the verifier chooses the n best
    stream: bool = False
    stream_options: dict | None = None
    echo: bool = False  # repeat the prompt before the answer
    logprobs: int | None = None  # log-probabilities of the tokens, and of this many of the likeliest
    tools: list | None = None
    tool_choice: Literal["none", "auto", "required"] | None = None
    response_format: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n", "best_of", "max_tokens")
        require(self, "logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20")
        require(self, "stop", len(self.stops) <= 16, "a text or a list of at most 16 texts")
        of_texts, of_chats = ("prompt", "echo", "logprobs"), ("tools", "tool_choice", "response_format")
        for key in of_texts if self.is_chat else of_chats:
            require(self, key, not getattr(self, key), "left out with messages" if self.is_chat else
                    "left out without messages")

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def parse(body: dict[str, Any], defaults: CompletionRequest) -> CompletionRequest:
    """The body of a request, checked. Raises UserError that names the key."""
    keys = {key: value for key, value in body.items()
            if key not in IGNORED and value not in (None, NEUTRAL.get(key))}
    if keys.get("logprobs") is False:  # in chats it is True or False, not a number
        del keys["logprobs"]
    if "max_completion_tokens" in keys:  # OpenAI's newer name
        keys["max_tokens"] = keys.pop("max_completion_tokens")
    if fixed := {"sinks", "window"} & keys.keys():
        raise UserError(f"body: {fixed.pop()} is a setting of the server")
    return override(defaults, keys, "body")


def read_messages(request: CompletionRequest, tokenizer: Tokenizer) -> list[Message]:
    """The conversation, with the tools in its first system message. Raises UserError, or Skip for no text."""
    messages = listed({"messages": request.messages})
    if messages is None:
        raise UserError("messages: must be a list with at least one message")
    if request.tools and request.tool_choice != "none":
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        if "tools" in (own_template(tokenizer) or ""):  # the model has a format for them
            return system_message({"system": system, "tools": request.tools}) + messages
        content = "\n\n".join(filter(None, (system, tools_text(request.tools))))
        messages.insert(0, {"role": "system", "content": content})
    return messages


def tools_text(tools: list) -> str:
    """The text that offers the tools: as in our training data, one line for a tool that has no description
    and only string parameters. Raises UserError for a tool in another form."""
    texts = []
    try:
        for function in ({"parameters": {"properties": {}}} | tool["function"] for tool in tools):
            kinds = function["parameters"]["properties"].values()
            is_plain = "description" not in function and all(kind == {"type": "string"} for kind in kinds)
            texts.append(offer(function).partition("\n")[0] if is_plain else offer(function))
    except (KeyError, TypeError, AttributeError):
        raise UserError("tools: each needs a function with a name and, for parameters, properties") from None
    return "\n".join(texts)


def read_prompts(request: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the prompts of a completion. An empty text starts after the end-of-text token."""
    is_one = not isinstance(request.prompt, list) or all(isinstance(each, int) for each in request.prompt)
    prompts = [tokenizer.prefix_ids + tokenizer.encode(each) or [tokenizer.eot_id]
               if isinstance(each, str) else each
               for each in ([request.prompt] if is_one else request.prompt)]
    for ids in prompts:
        if not isinstance(ids, list) or not ids or \
                not all(type(index) is int and 0 <= index < tokenizer.vocab_size for index in ids):
            raise UserError(f"prompt: must be a text or a list of ids below {tokenizer.vocab_size:,}")
    return prompts


# ---- Models -----------------------------------------------------------------------------------------------

class Served:
    """A model that answers requests. name: what requests call it."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, sampling: Sampling, slots: int,
                 context_length: int, verifier: str | None = None):
        """sampling: its sinks and window. slots: texts generated together. context_length: of prompt and
        answer, in tokens. verifier: a model of verifier.py, for requests with best_of."""
        folder = hf.find_folder(name)
        self.name, self.tokenizer = name, Tokenizer.load(folder)
        model = GPT.from_pretrained(folder, device, dtype).eval()
        self.is_chat = end_of_turn(self.tokenizer) is not None
        # Assistant refuses a tokenizer with more ids than the model, and knows which tokens end a turn.
        self.ends = {True: Assistant(model, self.tokenizer, Sampling(), 0).end_ids,
                     False: {self.tokenizer.eot_id, *hf.end_ids(folder)}}  # by is_chat
        self.context_length = min(context_length, model.config.block_size)
        sinks = sampling.sinks
        window = sampling.window or (self.context_length - sinks if sinks else None)
        self.limits = cache_limits(model.config, sinks, window)
        self.verifier = Verifier(verifier, self.tokenizer, device) if verifier else None
        self.constraint = functools.cache(functools.partial(Constraint, self.tokenizer, self.ends[True]))
        self.batcher = Batcher(model, self.tokenizer.vocab_size, slots, self.context_length, self.limits)
        self.thread = ThreadPoolExecutor(1)
        self.running: asyncio.Task | None = None
        self.stepped = asyncio.Event()  # replaced after each step

    async def run(self) -> None:
        """Generate until no row is left."""
        while self.batcher.waiting or self.batcher.live:
            self.batcher.admit()
            await asyncio.get_running_loop().run_in_executor(self.thread, self.batcher.step)
            stepped, self.stepped = self.stepped, asyncio.Event()
            stepped.set()

    def guide(self, request: CompletionRequest, messages: list[Message]) -> Guide | None:
        """The grammar that an answer must fit: a JSON schema, or calls. UserError without llguidance."""
        shape = request.response_format or {"type": "text"}
        if shape.get("type") != "text":
            any_object = {"schema": {"type": "object"}}
            described = any_object if shape.get("type") == "json_object" else shape.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                raise UserError('response_format: must be text, json_object, or json_schema with a "schema"')
            rules = grammar("json", dict(schema))
            return self.constraint(ConstraintKeys()).guide_of([rules], "response_format")
        if request.tool_choice == "required":
            return self.constraint(ConstraintKeys(constrain="tools")).guide([messages])
        return None


# ---- Answers ----------------------------------------------------------------------------------------------

def added(old: Any, new: Any) -> Any:
    """What a text, or a list of calls, has more than before.

    A text may become shorter for a while: a run of byte tokens ("<0xE4>") that ends within a character
    decodes to replacement characters as a whole.
    """
    old = old or new[:0]  # None: an empty text, or an empty list
    return new[len(old) if new[:len(old)] == old else len(os.path.commonprefix((old, new))):]


class Job:
    """A running request. It has `size` rows per prompt; the n rows in `shown` become the answer."""

    def __init__(self, served: Served, request: CompletionRequest, timeout: float, most_rows: int):
        """After `timeout` seconds the rows end with a TimeoutError. Raises UserError, and HTTPException for
        a prompt that does not fit the context, or for more than most_rows rows."""
        self.served, self.request, self.tokenizer = served, request, served.tokenizer
        self.ends, self.size = served.ends[request.is_chat], max(request.n, request.best_of)
        self.head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": served.name}
        messages: list[Message] = []
        if request.is_chat:
            require_chat(self.tokenizer, served.name)
            messages = read_messages(request, self.tokenizer)
            prompts = [encode_prompt(self.tokenizer, messages)]
        else:
            prompts = read_prompts(request, self.tokenizer)
        # Some templates open the thought: the answer begins inside it.
        opened = request.is_chat and self.tokenizer.decode(prompts[0][-16:]).rstrip().endswith(MARKS[0])
        self.opening = self.tokenizer.encode(MARKS[0], inside=True) if opened else []
        is_limited = request.echo or not served.limits
        size = served.batcher.context_length  # with sinks, the tokens that a slot keeps
        if (longest := max(map(len, prompts))) > size and is_limited:
            raise HTTPException(413, f"the prompt has {longest:,} tokens, and the context {size:,}")
        if request.best_of > request.n and served.verifier is None:
            raise UserError("best_of: needs a server with --verifier=")
        if len(prompts) * self.size > most_rows:
            raise HTTPException(429, "too many texts are waiting for a slot; try again later")
        # As in Assistant.reply, the rounds after a tool's result draw other random numbers.
        newest = takewhile(lambda message: message["role"] != "user", reversed(messages))
        rounds = sum(message["role"] == "assistant" for message in newest)
        guides = [served.guide(request, messages) for _ in range(len(prompts) * self.size)]
        echo = request.echo and request.logprobs is not None
        self.rows = [Row(prompt=prompts[number // self.size], max_new_tokens=request.max_tokens,
                         sampling=request, number=number + rounds * ROUND_STRIDE, is_done=self.is_done,
                         top=request.logprobs, echo=echo, guide=guide)
                     for number, guide in enumerate(guides)]
        self.shown = self.rows if self.size == request.n else []  # the best ones are known at the end
        self.timer = asyncio.get_running_loop().call_later(timeout, self.end)

    def end(self) -> None:
        """Free the slots of rows that still run. Also called when the time is up."""
        self.timer.cancel()
        for row in self.rows:
            row.fail(TimeoutError("the answer took too long"))

    async def steps(self) -> AsyncIterator[None]:
        """Generate: yield after each step of the batcher, until all rows have ended. Raises a row's error."""
        served = self.served
        served.batcher.waiting += self.rows
        if served.running is None or served.running.done():
            served.running = asyncio.create_task(served.run())
        while not all(row.ended for row in self.rows):
            await served.stepped.wait()
            yield
        if errors := [row.error for row in self.rows if row.error is not None]:
            raise errors[0]
        # best_of: the verifier now chooses among the answers to each prompt.
        for first in range(0, len(self.rows) if not self.shown else 0, self.size):
            group = self.rows[first:first + self.size]
            answers = [row.new for row in group]
            scores = await asyncio.to_thread(served.verifier.score, group[0].prompt, answers)
            self.shown += [group[place] for place in scores.topk(self.request.n).indices.tolist()]
        yield

    def is_done(self, new: list[int]) -> bool:
        """Whether the generated ids have reached an end token or a stop text, which may begin in a token."""
        content = self.read(new, False)["content"] if self.request.stops else ""
        return new[-1] in self.ends or any(stop in content for stop in self.request.stops)

    def read(self, new: list[int], finished: bool) -> Message:
        """Generated ids as a message in our form. A completion has content only."""
        if not self.request.is_chat:
            return {"content": self.tokenizer.decode([i for i in new if i not in self.ends], inside=True)}
        end, start, call = map(self.tokenizer.hf.token_to_id, (THOUGHT_END, THOUGHT, CALL))
        if end is not None:  # close an open thought: it is a thought already
            borders = {start, call, *self.ends}
            new = [each for i in new for each in ((end, i) if i in borders else (i,))] + [end]
        message = read_answer(self.tokenizer, [*self.opening, *new])
        if end is not None and not finished:
            message.pop("tool_calls", None)  # a call counts only if nothing follows it
        malformed = "".join(message.get("malformed", [])).lstrip()
        if malformed.startswith(MARKS[0]):
            message["thought"] = malformed.removeprefix(MARKS[0]).strip()
        elif finished:
            message["content"] += malformed
        return message

    def state(self, row: Row) -> tuple[Message, str | None]:
        """A row so far as a message of OpenAI's API, and its finish_reason, which is None until it ends."""
        finished = row.ended and row.error is None
        may_go_on = self.request.is_chat and not finished

        def settled(text: str, stops: list[str], marks: tuple[str, ...]) -> str:
            """The text without its end, if that may still change: white space, or the start of a mark."""
            text = visible_text(text, [*stops, *marks] if may_go_on else stops, finished)
            return text.rstrip() if may_go_on else text

        read = self.read(row.new, finished)
        echo = self.tokenizer.decode(row.prompt) if self.request.echo else ""
        message: Message = {"role": "assistant",
                            "content": echo + settled(read["content"], self.request.stops, MARKS)}
        if read.get("thought"):
            message["reasoning_content"] = settled(read["thought"], [], MARKS[1:2])
        if calls := read.get("tool_calls"):
            message["tool_calls"] = [
                {"index": number, "id": f"call_{self.head['id']}_{row.number}_{number}", "type": "function",
                 "function": {"name": call["name"],
                              "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for number, call in enumerate(calls)]
        if not finished:
            return message, None
        reason = "tool_calls" if calls else "stop"
        return message, reason if self.is_done(row.new) else "length"

    def logprobs(self, row: Row) -> dict[str, Any] | None:
        """The log-probabilities of a completion's tokens; with echo also those of the prompt."""
        if row.top is None:
            return None
        name = functools.partial(self.tokenizer.decode, inside=True)
        scores = [*([None] if row.echo else []), *row.scores]  # nothing predicts a prompt's first token
        return {"tokens": [name([index]) for index in [*(row.prompt if row.echo else []), *row.new]],
                "token_logprobs": [each and each[0] for each in scores],
                "top_logprobs": [each and {name([index]): value for index, value in each[1].items()}
                                 for each in scores]}

    def choice(self, index: int, row: Row, key: str, message: Message, reason: str | None) -> dict[str, Any]:
        """An entry of "choices". key: "message", or "delta" for what is new in it."""
        content = {key: message} if self.request.is_chat else {"text": message.get("content", "")}
        return {"index": index, **content, "finish_reason": reason,
                "logprobs": self.logprobs(row) if reason else None}

    def envelope(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        """The body of an answer, or of a chunk with the suffix ".chunk"."""
        kind = f"chat.completion{suffix}" if self.request.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens. Each prompt counts once, and all of its generated answers count."""
        prompts, new = self.rows[::self.size], sum(len(row.new) for row in self.rows)
        read = sum(len(row.prompt) for row in prompts)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new,
                "prompt_tokens_details": {"cached_tokens": sum(row.cached for row in prompts)}}

    def response(self) -> dict[str, Any]:
        """The body of the answer, after the last step."""
        choices = [self.choice(index, row, "message", *self.state(row))
                   for index, row in enumerate(self.shown)]
        return self.envelope(choices) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The pieces of the answer, as they are generated."""
        sent: dict[int, tuple[Message, str | None]] = {}
        async for _ in self.steps():
            for index, row in enumerate(self.shown):
                before, ended = sent.get(index, ({}, None))
                if ended:
                    continue
                now, reason = self.state(row)
                delta = {key: more for key, value in now.items() if (more := added(before.get(key), value))}
                sent[index] = before | {key: now[key] for key in delta}, reason
                if delta or reason:
                    yield self.envelope([self.choice(index, row, "delta", delta, reason)], ".chunk")
        if (self.request.stream_options or {}).get("include_usage"):
            yield self.envelope([], ".chunk") | {"usage": self.usage}
