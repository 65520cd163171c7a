"""OpenAI's API without HTTP: a request's body -> prompts -> rows of a batcher -> answers, whole or in pieces.

    served = Served("out/dpo", torch.device("cpu"), torch.float32, slots=16, context_length=2048)
    job = served.start(parse(body), is_chat=True, defaults=Sampling(), ...)
    await job.finish()                 # then job.response() is the body of the answer
    async for chunk in job.chunks():   # or, with "stream": true, the pieces as they are generated
        ...

The keys are those of /v1/chat/completions and /v1/completions (platform.openai.com/docs/api-reference), and
top_k, min_p and repetition_penalty of generation/generate.py. A key that would change the answer and that is not
implemented is refused by name. Thoughts are "reasoning_content", as DeepSeek's API names them. A tool call is
sent when it is complete.

A request without a seed takes the next row number of the server's seed, so the same question gets another
answer next time. With a seed, the answers are those of sample.py with that seed.

Left out: images, audio, logit_bias, log-probabilities of chats, and prompts of several texts in a stream's echo.
"""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from configurator import UserError, coerce_field, require
from dataset.conversations import message_of
from dataset.sources import Skip
from dataset.tool_problems import offer
from formats import hf
from formats.chat_format import THOUGHT_END, encode_prompt, end_of_turn, read_answer, require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import ROUND_STRIDE, Assistant
from generation.batcher import Batcher, Row
from generation.generate import MOST_NEW_TOKENS, Sampling
from model import GPT

MOST_CHOICES = 128  # rows of one request
Message = dict[str, Any]

# Keys that change no answer, and keys that are accepted only with the value that changes none.
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
           "prompt_cache_key"}
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": "",
           "top_logprobs": 0}
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class Refused(UserError):
    """A request that is answered with another HTTP status than 400."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The body of a request. None stands for an absent key."""

    model: str | None = None
    messages: list | None = None  # of a chat
    prompt: str | list | None = None  # of a completion: a text, ids, or a list of these
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer name of it
    n: int = 1
    stop: str | list | None = None
    stream: bool = False
    stream_options: dict | None = None
    echo: bool = False
    logprobs: int | bool | None = None
    tools: list | None = None
    tool_choice: str | dict | None = None
    response_format: dict | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self, "n", 1 <= self.n <= MOST_CHOICES, f"between 1 and {MOST_CHOICES}")
        for key in ("max_tokens", "max_completion_tokens"):
            require(self, key, 0 <= (getattr(self, key) or 0) <= MOST_NEW_TOKENS,
                    f"between 0 and {MOST_NEW_TOKENS:,}")
        require(self, "logprobs", 0 <= (self.logprobs or 0) <= 20, "between 0 and 20")
        stops = all(isinstance(text, str) and text for text in self.stops)
        require(self, "stop", stops and len(self.stops) <= 16, "a text or a list of at most 16, none empty")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse(body: Any) -> Asked:
    """Check the body of a request. Raises UserError that names the key."""
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    body = {key: value for key, value in body.items() if key not in IGNORED and value is not None}
    names = {field.name for field in fields(Asked)}
    for key in body.keys() - names:
        if key not in NEUTRAL or body[key] != NEUTRAL[key]:
            raise UserError(f"{key}: not supported")
    return Asked(**{key: coerce_field(Asked, key, body[key], "body") for key in body.keys() & names})


# ---- Prompts ----------------------------------------------------------------------------------------------

def read_message(value: Any) -> Message:
    """A message in our form from one in OpenAI's. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError("messages: every message is an object")
    content = value.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError("messages: only parts of type text are supported")
        content = "".join(part["text"] for part in content)
    role = "system" if value.get("role") == "developer" else value.get("role")
    try:
        return message_of(value | {"role": role, "content": content, "thought": value.get("reasoning_content")})
    except Skip as error:
        raise UserError(f"messages: {error}") from None


def tools_text(tools: list) -> str:
    """The text that offers the tools of a request: a line for each, and its description if it has one."""
    try:
        functions = [tool["function"] for tool in tools]
        texts = [offer({"parameters": {"properties": {}}} | function) for function in functions]
    except (KeyError, TypeError):
        raise UserError("tools: each needs a function with a name and, for parameters, properties") from None
    return "\n".join(text if function.get("description") else text.partition("\n")[0]
                     for text, function in zip(texts, functions, strict=True))


def read_messages(asked: Asked) -> list[Message]:
    """The conversation of a request; the first system message also offers its tools."""
    if not asked.messages:
        raise UserError("messages: must be a list with at least one message")
    messages = [read_message(value) for value in asked.messages]
    if asked.tools and asked.tool_choice != "none":
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        content = "\n\n".join(filter(None, (system, tools_text(asked.tools))))
        messages.insert(0, {"role": "system", "content": content})
    return messages


# ---- Models -----------------------------------------------------------------------------------------------

class Served:
    """A model that answers requests. name: what requests call it."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, slots: int, context_length: int):
        folder = hf.find_folder(name)
        self.name, self.tokenizer = name, Tokenizer.load(folder)
        self.model = GPT.from_pretrained(folder, device, dtype).eval()
        # Refuses a tokenizer with more ids than the model, and knows which tokens end a turn.
        self.turn_ends = Assistant(self.model, self.tokenizer, Sampling(), 0).end_ids
        self.text_ends = {self.tokenizer.eot_id, *hf.end_ids(folder)}
        self.is_chat = end_of_turn(self.tokenizer) is not None
        self.context_length = min(context_length, self.model.config.block_size)
        self.counter = 0  # row number of the next request without a seed
        self.batcher = Batcher(self.model, self.tokenizer.vocab_size, slots, self.context_length)

    def prompts(self, asked: Asked) -> list[list[int]]:
        """The ids of the prompts of a completion."""
        given = asked.prompt if asked.prompt is not None else ""
        is_one = isinstance(given, str) or all(type(part) is int for part in given) and given
        prompts = [given] if is_one else given
        if not prompts or not all(isinstance(each, str | list) for each in prompts):
            raise UserError("prompt: must be a text, a list of ids, or a list of these")
        return [self.encode(each) for each in prompts]

    def encode(self, prompt: str | list) -> list[int]:
        """The ids of one prompt, at least one: an empty text starts after the end-of-text token."""
        if isinstance(prompt, str):
            return self.tokenizer.prefix_ids + self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]
        if not prompt or not all(type(each) is int and 0 <= each < self.tokenizer.vocab_size for each in prompt):
            raise UserError(f"prompt: ids must be from 0 to {self.tokenizer.vocab_size - 1}, at least one")
        return prompt

    def read_chat(self, asked: Asked) -> tuple[list[int], int]:
        """The prompt of a chat, and the number of its round: 0, or 1 after the first result of a tool."""
        require_chat(self.tokenizer, self.name)
        messages = read_messages(asked)
        questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
        rounds = sum(message["role"] == "assistant" for message in messages[max(questions, default=0):])
        return encode_prompt(self.tokenizer, messages), rounds

    def start(self, asked: Asked, is_chat: bool, defaults: Sampling, max_new_tokens: int) -> "Job":
        """Submit the rows of a request. defaults, max_new_tokens: where the request has no value of its own."""
        prompts, rounds = self.prompts(asked) if not is_chat else [], 0
        if is_chat:
            prompt, rounds = self.read_chat(asked)
            prompts = [prompt]
        if (longest := max(map(len, prompts))) > self.context_length:
            raise Refused(413, f"the prompt has {longest:,} tokens, and the context {self.context_length:,}")
        given = {key: getattr(asked, key) for key in SAMPLING_KEYS}
        number = self.counter if asked.seed is None else 0
        self.counter += len(prompts) * asked.n if asked.seed is None else 0
        most = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        job = Job(self, asked, is_chat, prompts)
        job.submit(replace(defaults, **{key: value for key, value in given.items() if value is not None}),
                   max_new_tokens if most is None else most, number % ROUND_STRIDE + rounds * ROUND_STRIDE)
        return job


# ---- Answers ----------------------------------------------------------------------------------------------

def visible_text(text: str, stops: list[str], finished: bool) -> str:
    """The text up to the earliest of the stop texts in it.

    Until it is finished, leave out an end that may still change: an incomplete character, or the beginning of
    a stop text.
    """
    if ends := [text.find(stop) for stop in stops if stop in text]:
        return text[:min(ends)]
    if finished:
        return text
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(begun, default=0)].rstrip("\N{REPLACEMENT CHARACTER}")


def added(before: Message, now: Message) -> Message:
    """What a message has that an earlier state of it had not: the delta of a stream."""
    delta: Message = {key: now[key][len(before.get(key, "")):] for key in ("content", "reasoning_content")
                      if len(now.get(key, "")) > len(before.get(key, ""))}
    known = len(before.get("tool_calls", []))
    calls = [call | {"index": known + n} for n, call in enumerate(now.get("tool_calls", [])[known:])]
    return delta | ({"tool_calls": calls} if calls else {})


class Job:
    """A request at work: n rows per prompt."""

    def __init__(self, served: Served, asked: Asked, is_chat: bool, prompts: list[list[int]]):
        self.served, self.asked, self.is_chat, self.prompts = served, asked, is_chat, prompts
        self.ends = served.turn_ends if is_chat else served.text_ends
        self.id, self.created = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.rows: list[Row] = []
        self.changed, self.loop = asyncio.Event(), asyncio.get_running_loop()

    def submit(self, sampling: Sampling, max_new_tokens: int, number: int) -> None:
        """Give the rows to the batcher. The other rows of a prompt wait until its first row has read it."""
        top = None if self.asked.logprobs is None else int(self.asked.logprobs)
        for prompt in self.prompts:
            first = None
            for _ in range(self.asked.n):
                self.rows.append(Row(
                    prompt=prompt, max_new_tokens=max_new_tokens, sampling=sampling, first=first,
                    number=number + len(self.rows), is_done=self.is_done, wake=self.wake, top=top,
                    echo=self.asked.echo and top is not None))
                first = first or self.rows[-1]
        self.served.batcher.submit(self.rows)

    def wake(self, row: Row) -> None:
        """Called in the batcher's thread."""
        if self.asked.stream or row.ended:
            self.loop.call_soon_threadsafe(self.changed.set)

    def is_done(self, new: list[int]) -> bool:
        if new[-1] in self.ends or not self.asked.stops:
            return new[-1] in self.ends
        content = self.read(new, False)["content"]  # a stop text may begin or end within a token
        return any(stop in content for stop in self.asked.stops)

    def read(self, new: list[int], finished: bool) -> Message:
        """Generated ids as a message in our form. A completion has content only."""
        tokenizer = self.served.tokenizer
        if not self.is_chat:
            return {"content": tokenizer.decode([i for i in new if i not in self.ends], inside=True)}
        # A thought that has not ended yet is a thought already. A call that has not may become one.
        message = read_answer(tokenizer, [*new, tokenizer.token_id(THOUGHT_END)])
        malformed = "".join(message.get("malformed", [])) if finished else ""
        return message | {"content": message["content"] + malformed}

    def message(self, index: int, finished: bool) -> tuple[Message, str | None]:
        """A row's message so far in OpenAI's form, and its finish_reason once it is finished."""
        row, stops = self.rows[index], self.asked.stops
        message = self.read(row.new, finished)
        stopped = row.new[-1:] and row.new[-1] in self.ends or any(stop in message["content"] for stop in stops)
        reason = ("tool_calls" if message.get("tool_calls") else "stop") if stopped else "length"
        sent = {"role": "assistant", "content": visible_text(message["content"], stops, finished)}
        if not self.is_chat and self.asked.echo:
            sent["content"] = self.served.tokenizer.decode(row.prompt) + sent["content"]
        if message.get("thought"):
            sent["reasoning_content"] = visible_text(message["thought"], [], finished)
        if calls := message.get("tool_calls"):
            sent["tool_calls"] = [
                {"id": f"call_{self.id[-12:]}_{index}_{n}", "type": "function", "function":
                 {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for n, call in enumerate(calls)]
        return sent, reason if finished else None

    def logprobs(self, row: Row) -> dict[str, Any] | None:
        """The log-probabilities of a completion's tokens; with echo those of the prompt, too."""
        if row.top is None:
            return None
        ids = [*(row.prompt if row.echo else []), *row.new]
        scores = [*([None] if row.echo else []), *row.scores]
        tokens = [self.served.tokenizer.decode([index], inside=True) for index in ids]
        return {"tokens": tokens, "token_logprobs": [each and each[0] for each in scores],
                "top_logprobs": [each and {self.served.tokenizer.decode([index], inside=True): score
                                           for index, score in each[1].items()} for each in scores],
                "text_offset": [0, *itertools.accumulate(map(len, tokens[:-1]))]}

    def envelope(self, choices: list[dict[str, Any]], kind: str = "") -> dict[str, Any]:
        name = "chat.completion" + kind if self.is_chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.served.name,
                "choices": choices}

    @property
    def usage(self) -> dict[str, Any]:
        prompt, new = sum(map(len, self.prompts)), sum(len(row.new) for row in self.rows)
        cached = sum(row.cached for row in self.rows[::self.asked.n])
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    def cancel(self) -> None:
        """Free the slots."""
        self.served.batcher.cancel(self.rows)

    async def response(self) -> dict[str, Any]:
        """The body of the answer, when all rows have ended. Raises the error of a row."""
        while not all(row.ended for row in self.rows):
            await self.changed.wait()
            self.changed.clear()
        choices = []
        for index, row in enumerate(self.rows):
            if row.error is not None:
                raise row.error
            message, reason = self.message(index, finished=True)
            content = {"message": message} if self.is_chat else {"text": message["content"]}
            choices.append({"index": index, **content, "finish_reason": reason, "logprobs": self.logprobs(row)})
        return self.envelope(choices) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The pieces of the answer, as they are generated. Raises the error of a row."""
        sent: dict[int, Message] = {index: {} for index in range(len(self.rows))}  # of the rows that are open
        for index in sent if self.is_chat else []:
            yield self.envelope([{"index": index, "delta": {"role": "assistant", "content": ""},
                                  "finish_reason": None}], ".chunk")
        while sent:
            await self.changed.wait()
            self.changed.clear()
            for index in list(sent):
                row, finished = self.rows[index], self.rows[index].ended
                if row.error is not None:
                    raise row.error
                now, reason = self.message(index, finished)
                delta = added(sent[index], now)
                sent[index] = now
                if finished:
                    del sent[index]
                if delta or finished:
                    content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
                    yield self.envelope([{"index": index, **content, "finish_reason": reason}], ".chunk")
        if (self.asked.stream_options or {}).get("include_usage"):
            yield self.envelope([], ".chunk") | {"usage": self.usage}
