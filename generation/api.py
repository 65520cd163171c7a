"""OpenAI's API without HTTP: a request's body -> prompts -> rows of a batcher -> answers, whole or in pieces.

    served = Served("out/dpo", torch.device("cpu"), torch.float32, slots=16, context_length=2048)
    asked = parse({"messages": [..]}, Asked(max_tokens=200), is_chat=True)
    job = served.start(asked, is_chat=True)
    body = await job.response()            # or, for "stream": true:  async for chunk in job.chunks(): ...

The keys are those of /v1/chat/completions and /v1/completions (platform.openai.com/docs/api-reference), and
top_k, min_p and repetition_penalty. A key that would change the answer and is not implemented is refused by
name. Thoughts are "reasoning_content", as DeepSeek's API names them. A tool call is sent when it is complete.

With a seed, the answers are those of sample.py with that seed. Requests without one take consecutive row
numbers of the server's seed, so a question that is asked twice gets two answers.

Left out: images, audio, logit_bias, and log-probabilities of chats and streams.
"""

import asyncio
import functools
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from configurator import UserError, coerce_field, require
from dataset.conversations import message_of
from dataset.sources import Skip
from dataset.tool_problems import offer
from formats import hf
from formats.chat_format import CALL, THOUGHT_END, encode_prompt, end_of_turn, read_answer, require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import ROUND_STRIDE, Assistant
from generation.batcher import Batcher, Row
from generation.constraints import Constraint, ConstraintKeys, RowGuide, call_schema, grammar
from generation.generate import MOST_NEW_TOKENS, Sampling
from generation.verifier import Verifier
from model import GPT

MOST_CHOICES = 128  # answers to one prompt
MARKS = ("<think>", "<tool_call>")  # of models with their own chat format: what follows is no content
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
           "prompt_cache_key"}  # keys that change no answer
CHAT_ONLY = {"messages", "tools", "tool_choice", "response_format"}
TEXT_ONLY = {"prompt", "echo", "logprobs"}

Message = dict[str, Any]


class Refused(UserError):
    """A request that is answered with another HTTP status than 400."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ---- Requests ---------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Asked(Sampling):
    """The body of a request."""

    model: str | None = None  # None is the first one
    messages: list | None = None
    prompt: str | list = ""  # a text, a list of ids, or a list of these
    max_tokens: int = 16
    n: int = 1  # answers per prompt
    best_of: int = 1  # answers to generate per prompt; the verifier chooses the n best
    stop: str | list | None = None
    stream: bool = False
    stream_options: dict | None = None
    echo: bool = False  # repeat the prompt before the answer
    logprobs: int | None = None  # log-probabilities of the tokens, and of this many of the likeliest
    tools: list | None = None
    tool_choice: str | dict | None = None
    response_format: dict | None = None
    has_seed: bool = False  # whether the request has a seed; no key of the API

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, low, high in (("n", 1, MOST_CHOICES), ("best_of", 1, MOST_CHOICES), ("logprobs", 0, 20),
                               ("max_tokens", 0, MOST_NEW_TOKENS)):
            value = getattr(self, key)
            require(self, key, value is None or low <= value <= high, f"from {low} to {high:,}")
        fits = all(isinstance(text, str) and text for text in self.stops) and len(self.stops) <= 16
        require(self, "stop", fits, "a text or a list of at most 16 texts, none of them empty")
        if self.stream and self.logprobs is not None:
            raise UserError("logprobs: not supported in a stream")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def parse(body: Any, defaults: Asked, is_chat: bool) -> Asked:
    """Check the body of a request. Raises UserError that names the key."""
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    keys = {key: value for key, value in body.items() if key not in IGNORED and value is not None}
    if "max_completion_tokens" in keys:  # OpenAI's newer name
        keys["max_tokens"] = keys.pop("max_completion_tokens")
    known = {field.name for field in fields(Asked)} - {"has_seed", "sinks", "window"}
    known -= TEXT_ONLY if is_chat else CHAT_ONLY
    if unknown := sorted(keys.keys() - known):
        raise UserError(f"{unknown[0]}: not supported")
    given = {key: coerce_field(Asked, key, value, "body") for key, value in keys.items()}
    return replace(defaults, has_seed="seed" in given, **given)


def read_message(value: Any) -> Message:
    """A message in our form from one in OpenAI's. Raises UserError."""
    value = value if isinstance(value, dict) else {}
    content = value.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError("messages: only parts of type text are supported")
        content = "".join(part["text"] for part in content)
    role = "system" if value.get("role") == "developer" else value.get("role")
    thought = value.get("reasoning_content")
    try:
        return message_of(value | {"role": role, "content": content, "thought": thought})
    except Skip as error:
        raise UserError(f"messages: {error}") from None


def tools_text(tools: list) -> str:
    """The text that offers the tools of a request: a line for each, and its description if it has one."""
    try:
        functions = [tool["function"] for tool in tools]
        texts = [offer({"parameters": {"properties": {}}} | function) for function in functions]
        return "\n".join(text if function.get("description") else text.partition("\n")[0]
                         for text, function in zip(texts, functions, strict=True))
    except (KeyError, TypeError):
        raise UserError("tools: each needs a function with a name and, for parameters, properties") from None


def read_messages(asked: Asked) -> list[Message]:
    """The conversation of a request; its first system message also offers the tools."""
    if not asked.messages:
        raise UserError("messages: must be a list with at least one message")
    messages = [read_message(value) for value in asked.messages]
    if asked.tools and asked.tool_choice != "none":
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        content = "\n\n".join(filter(None, (system, tools_text(asked.tools))))
        messages.insert(0, {"role": "system", "content": content})
    return messages


def schema_of(response_format: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a request."""
    schema = (response_format.get("json_schema") or {}).get("schema")
    if response_format.get("type") == "json_object":
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise UserError('response_format: must be text, json_object, or json_schema with a "schema"')
    return dict(schema)


# ---- Models -----------------------------------------------------------------------------------------------

class Served:
    """A model that answers requests. name: what requests call it."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, slots: int, context_length: int):
        folder = hf.find_folder(name)
        self.name, self.tokenizer = name, Tokenizer.load(folder)
        model = GPT.from_pretrained(folder, device, dtype).eval()
        self.is_chat = end_of_turn(self.tokenizer) is not None
        # Assistant refuses a tokenizer with more ids than the model, and knows which tokens end a turn.
        self.ends = {True: Assistant(model, self.tokenizer, Sampling(), 0).end_ids,
                     False: {self.tokenizer.eot_id, *hf.end_ids(folder)}}  # by is_chat
        self.context_length = min(context_length, model.config.block_size)
        self.number = 0  # row number of the next request without a seed
        self.verifier: Verifier | None = None
        self.batcher = Batcher(model, self.tokenizer.vocab_size, slots, self.context_length)

    def read_prompts(self, given: str | list) -> list[list[int]]:
        """The ids of the prompts of a completion: one text or list of ids, or a list of these."""
        is_one = isinstance(given, str) or bool(given) and all(type(each) is int for each in given)
        prompts = [self.encode(each) for each in ([given] if is_one else given)]
        if not prompts:
            raise UserError("prompt: an empty list")
        return prompts

    def encode(self, prompt: Any) -> list[int]:
        """The ids of one prompt, at least one: an empty text starts after the end-of-text token."""
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            return tokenizer.prefix_ids + tokenizer.encode(prompt) or [tokenizer.eot_id]
        if not isinstance(prompt, list) or not prompt or \
                not all(type(each) is int and 0 <= each < tokenizer.vocab_size for each in prompt):
            raise UserError(f"prompt: must be a text or a list of ids below {tokenizer.vocab_size:,}")
        return prompt

    @functools.cached_property
    def constraint(self) -> Constraint:
        """Raises UserError if llguidance is absent."""
        return Constraint(self.tokenizer, self.ends[True], ConstraintKeys())

    def guide(self, asked: Asked) -> RowGuide | None:
        """The grammar that an answer must fit: a JSON schema, or calls if tool_choice asks for them."""
        if asked.response_format and asked.response_format.get("type") != "text":
            rules = grammar("json", schema_of(asked.response_format))
            return self.constraint.row_of(rules, "response_format")
        if asked.tool_choice in (None, "none", "auto"):
            return None
        choice = asked.tool_choice if isinstance(asked.tool_choice, dict) else {}
        name = choice.get("function", {}).get("name")  # None: "required", any of the tools
        functions = [tool["function"] for tool in asked.tools or []]
        functions = [function for function in functions if name in (None, function["name"])]
        if not functions or self.tokenizer.hf.token_to_id(CALL) is None:
            raise UserError("tool_choice: no such tool, or the model has no tokens for calls")
        schemas = [call_schema({"parameters": {}} | function) for function in functions]
        rules = grammar("call" if name else "call+", {"anyOf": schemas}, self.tokenizer)
        return self.constraint.row_of(rules, "tools")

    def start(self, asked: Asked, is_chat: bool) -> "Job":
        """Submit the rows of a request."""
        rounds = 0
        if is_chat:
            require_chat(self.tokenizer, self.name)
            messages = read_messages(asked)
            # As in Assistant.reply, the rounds after a tool's result draw other random numbers.
            questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
            rounds = sum(each["role"] == "assistant" for each in messages[max(questions, default=0):])
            prompts = [encode_prompt(self.tokenizer, messages)]
        else:
            prompts = self.read_prompts(asked.prompt)
        if (longest := max(map(len, prompts))) > self.context_length:
            raise Refused(413, f"the prompt has {longest:,} tokens, and the context {self.context_length:,}")
        if asked.best_of > asked.n and self.verifier is None:
            raise UserError("best_of: needs a server with --verifier=")
        number = 0 if asked.has_seed else self.number % ROUND_STRIDE
        self.number += 0 if asked.has_seed else len(prompts) * max(asked.n, asked.best_of)
        return Job(self, asked, is_chat, prompts, number + rounds * ROUND_STRIDE)


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
    known, calls = len(before.get("tool_calls", [])), now.get("tool_calls", [])
    new = [{"index": number} | call for number, call in enumerate(calls)][known:]
    return delta | ({"tool_calls": new} if new else {})


async def each_ended(places: Iterable[int]) -> AsyncIterator[tuple[int, bool]]:
    """What `Job.changes` yields of rows that have ended."""
    for place in places:
        yield place, True


class Job:
    """A request at work: n rows per prompt, or best_of."""

    def __init__(self, served: Served, asked: Asked, is_chat: bool, prompts: list[list[int]], number: int):
        """Submit the rows. number: row number of the first."""
        self.served, self.asked, self.is_chat, self.prompts = served, asked, is_chat, prompts
        self.ends, self.tokenizer = served.ends[is_chat], served.tokenizer
        self.id, self.created = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.changed, self.loop = asyncio.Event(), asyncio.get_running_loop()
        sampling = Sampling(**{field.name: getattr(asked, field.name) for field in fields(Sampling)})
        self.rows: list[Row] = []
        for prompt in prompts:
            first = None  # the other rows of a prompt wait until it has read the prompt
            for _ in range(max(asked.n, asked.best_of)):
                self.rows.append(Row(
                    prompt=prompt, max_new_tokens=asked.max_tokens, sampling=sampling, first=first,
                    number=number + len(self.rows), is_done=self.is_done, wake=self.wake, top=asked.logprobs,
                    echo=asked.echo and asked.logprobs is not None,
                    guide=served.guide(asked)))
                first = first or self.rows[-1]
        served.batcher.submit(self.rows)

    def wake(self, row: Row) -> None:
        """Called in the batcher's thread."""
        if self.asked.stream or row.ended:
            self.loop.call_soon_threadsafe(self.changed.set)

    def cancel(self) -> None:
        """Free the slots of rows that still run."""
        self.served.batcher.cancel(self.rows)

    def is_done(self, new: list[int]) -> bool:
        if new[-1] in self.ends or not self.asked.stops:
            return new[-1] in self.ends
        content = self.read(new, False)["content"]  # a stop text may begin or end within a token
        return any(stop in content for stop in self.asked.stops)

    def read(self, new: list[int], finished: bool) -> Message:
        """Generated ids as a message in our form. A completion has content only."""
        if not self.is_chat:
            return {"content": self.tokenizer.decode([i for i in new if i not in self.ends], inside=True)}
        # A thought that has not ended yet is a thought already. A call that has not ended may become one.
        end = self.tokenizer.hf.token_to_id(THOUGHT_END)
        message = read_answer(self.tokenizer, new if end is None else [*new, end])
        malformed = "".join(message.get("malformed", [])).lstrip()
        if malformed.startswith(MARKS[0]):
            message["thought"] = malformed.removeprefix(MARKS[0]).strip()
        elif finished:
            message["content"] += malformed
        return message

    def message(self, index: int, finished: bool) -> tuple[Message, str | None]:
        """A row's message so far in OpenAI's form, and its finish_reason once it is finished."""
        row, stops = self.rows[index], self.asked.stops
        message = self.read(row.new, finished)
        sent: Message = {"role": "assistant"}
        hidden = [] if finished or not self.is_chat else MARKS
        sent["content"] = visible_text(message["content"], [*stops, *hidden], finished)
        if not self.is_chat and self.asked.echo:
            sent["content"] = self.tokenizer.decode(row.prompt) + sent["content"]
        if message.get("thought"):
            sent["reasoning_content"] = visible_text(message["thought"], MARKS, finished)
        if calls := message.get("tool_calls"):
            sent["tool_calls"] = [
                {"id": f"call_{self.id[-12:]}_{index}_{number}", "type": "function", "function": {
                    "name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for number, call in enumerate(calls)]
        stopped = self.ends.intersection(row.new[-1:]) or any(stop in message["content"] for stop in stops)
        reason = "length" if not stopped else "tool_calls" if calls else "stop"
        return sent, reason if finished else None

    def logprobs(self, row: Row) -> dict[str, Any] | None:
        """The log-probabilities of a completion's tokens; with echo also those of the prompt."""
        if row.top is None:
            return None
        name = lambda index: self.tokenizer.decode([index], inside=True)  # noqa: E731
        tokens = [*map(name, [*(row.prompt if row.echo else []), *row.new])]
        scores = [*([None] if row.echo else []), *row.scores]  # nothing predicts a prompt's first token
        return {"tokens": tokens, "token_logprobs": [each and each[0] for each in scores],
                "top_logprobs": [each and {name(index): value for index, value in each[1].items()}
                                 for each in scores],
                "text_offset": [0, *itertools.accumulate(map(len, tokens[:-1]))]}

    def envelope(self, choices: list[dict[str, Any]], is_chunk: bool = False) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if is_chunk else ''}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name,
                "choices": choices}

    @property
    def usage(self) -> dict[str, Any]:
        prompt, new = sum(map(len, self.prompts)), sum(len(row.new) for row in self.rows)
        cached = sum(row.cached for row in self.rows if row.first is None)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "prompt_tokens_details": {"cached_tokens": cached}}

    async def changes(self) -> AsyncIterator[tuple[int, bool]]:
        """Yield (number, has ended) of each row that may have changed, until all have ended.

        Raises the error of a row.
        """
        left = list(range(len(self.rows)))
        while left:
            await self.changed.wait()
            self.changed.clear()
            for index in list(left):
                if ended := self.rows[index].ended:
                    left.remove(index)
                if (error := self.rows[index].error) is not None:
                    raise error
                yield index, ended

    async def best(self) -> list[int]:
        """The numbers of the rows to return, when all have ended: those that the verifier scores highest."""
        async for _ in self.changes():
            pass
        numbers, verifier = range(len(self.rows)), self.served.verifier
        size = len(numbers) // len(self.prompts)
        if verifier is None or size == self.asked.n:
            return list(numbers)
        best: list[int] = []
        for prompt, first in zip(self.prompts, numbers[::size], strict=True):
            answers = [row.new for row in self.rows[first:first + size]]
            scores = await asyncio.to_thread(verifier.score, prompt, answers)
            best += (first + scores.argsort(descending=True, stable=True)[:self.asked.n]).tolist()
        return best

    async def response(self) -> dict[str, Any]:
        """The body of the answer, when all rows have ended."""
        choices = []
        for index, number in enumerate(await self.best()):
            message, reason = self.message(number, finished=True)
            content = {"message": message} if self.is_chat else {"text": message["content"]}
            choices.append({"index": index, **content, "finish_reason": reason,
                            "logprobs": self.logprobs(self.rows[number])})
        return self.envelope(choices) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The pieces of the answer, as they are generated; with best_of, whole answers at the end."""
        places = range(len(self.prompts) * self.asked.n)  # of the choices
        sent: dict[int, Message] = {index: {} for index in places}
        for index in sent if self.is_chat else []:
            delta = {"role": "assistant", "content": ""}
            yield self.envelope([{"index": index, "delta": delta, "finish_reason": None}], True)
        numbers = await self.best() if len(self.rows) > len(places) else list(places)
        async for index, ended in self.changes() if len(self.rows) == len(places) else each_ended(places):
            now, reason = self.message(numbers[index], ended)
            delta = added(sent[index], now)
            sent[index] = now
            if delta or reason:
                content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
                yield self.envelope([{"index": index, **content, "finish_reason": reason}], True)
        if (self.asked.stream_options or {}).get("include_usage"):
            yield self.envelope([], True) | {"usage": self.usage}
