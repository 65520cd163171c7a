"""OpenAI's API without HTTP: a checked request -> prompts -> rows of a batcher -> answers.

    served = Served("out/dpo", torch.device("cpu"), torch.float32, slots=16, context_length=2048)
    job = served.start(asked, is_chat=True)     # asked: generation/requests.py
    body = await job.response()                 # the whole answer; or
    async for chunk in job.chunks(): ...        # its pieces, for "stream": true

Thoughts are "reasoning_content", as DeepSeek's API names them. A tool call is sent when it is complete. With
a seed, the answers are those of sample.py with that seed. Requests without one take consecutive row numbers
of the server's seed, so a question that is asked twice gets two answers.
"""

import asyncio
import functools
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any

import torch

from configurator import UserError
from formats import hf
from formats.chat_format import CALL, THOUGHT_END, encode_prompt, end_of_turn, read_answer, require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import ROUND_STRIDE, Assistant
from generation.batcher import Batcher, Row
from generation.constraints import Constraint, ConstraintKeys, RowGuide, call_schema, grammar
from generation.generate import Sampling
from generation.requests import Asked, Message, Refused, read_messages, schema_of
from generation.verifier import Verifier
from model import GPT

MOST_TOKENS = 2**22  # of the answers to one request: their random numbers are drawn at the start, in 16 MiB
ROW_TOKENS = 256  # an answer counts as this many tokens more, for what else a row keeps
MARKS = ("<think>", "<tool_call>")  # of models with their own chat format: what follows is no content


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

    def start(self, asked: Asked, is_chat: bool, timeout: float) -> "Job":
        """Submit the rows of a request. After `timeout` seconds they are dropped; the job raises Refused."""
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
        size = len(prompts) * max(asked.n, asked.best_of)
        if size * (asked.max_tokens + ROW_TOKENS) > MOST_TOKENS:
            raise Refused(413, f"{size:,} answers of {asked.max_tokens:,} tokens are too many for a request")
        if asked.best_of > asked.n and self.verifier is None:
            raise UserError("best_of: needs a server with --verifier=")
        number = 0 if asked.has_seed else self.number % ROUND_STRIDE
        self.number += 0 if asked.has_seed else size
        job = Job(self, asked, is_chat, prompts)
        job.submit(number + rounds * ROUND_STRIDE, timeout)
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
    known, calls = len(before.get("tool_calls", [])), now.get("tool_calls", [])
    new = [{"index": number} | call for number, call in enumerate(calls)][known:]
    return delta | ({"tool_calls": new} if new else {})


class Job:
    """A request at work: n rows per prompt, or best_of."""

    def __init__(self, served: Served, asked: Asked, is_chat: bool, prompts: list[list[int]]):
        self.served, self.asked, self.is_chat, self.prompts = served, asked, is_chat, prompts
        self.ends, self.tokenizer = served.ends[is_chat], served.tokenizer
        self.id, self.created = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.changed, self.loop = asyncio.Event(), asyncio.get_running_loop()
        self.rows: list[Row] = []

    def submit(self, number: int, timeout: float) -> None:
        """Give the rows to the batcher. number: row number of the first one. timeout: in seconds."""
        asked, served = self.asked, self.served
        sampling = Sampling(**{field.name: getattr(asked, field.name) for field in fields(Sampling)})
        for prompt in self.prompts:
            first = None  # the other rows of a prompt wait until it has read the prompt
            for _ in range(max(asked.n, asked.best_of)):
                self.rows.append(Row(
                    prompt=prompt, max_new_tokens=asked.max_tokens, sampling=sampling, first=first,
                    number=number + len(self.rows), is_done=self.is_done, wake=self.wake, top=asked.logprobs,
                    echo=asked.echo and asked.logprobs is not None,
                    guide=served.guide(asked)))
                first = first or self.rows[-1]
        served.batcher.submit(self.rows)
        self.expired, self.timer = False, self.loop.call_later(timeout, self.expire)

    def wake(self, row: Row) -> None:
        """Called in the batcher's thread."""
        if self.asked.stream or row.ended:
            self.loop.call_soon_threadsafe(self.changed.set)

    def expire(self) -> None:
        """Called when the time is up, even if the client of a stream does not read on."""
        self.expired = True
        self.cancel()
        self.changed.set()

    def cancel(self) -> None:
        """Free the slots of rows that still run."""
        self.timer.cancel()
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

    def choice(self, index: int, row: Row, finished: bool) -> tuple[Message, str | None]:
        """A row's message so far in OpenAI's form, and its finish_reason once it is finished."""
        message, stops = self.read(row.new, finished), self.asked.stops
        hidden = [] if finished or not self.is_chat else MARKS
        sent: Message = {"role": "assistant"}
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
        name = functools.partial(self.tokenizer.decode, inside=True)
        tokens = [name([index]) for index in [*(row.prompt if row.echo else []), *row.new]]
        scores = [*([None] if row.echo else []), *row.scores]  # nothing predicts a prompt's first token
        return {"tokens": tokens, "token_logprobs": [each and each[0] for each in scores],
                "top_logprobs": [each and {name([index]): value for index, value in each[1].items()}
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

    async def best(self) -> list[Row]:
        """The rows with the n best answers to each prompt, by the verifier."""
        best: list[Row] = []
        for first in range(0, len(self.rows), self.asked.best_of):
            group = self.rows[first:first + self.asked.best_of]
            scores = await asyncio.to_thread(
                self.served.verifier.score, group[0].prompt, [row.new for row in group])
            best += [group[place] for place in scores.argsort(descending=True)[:self.asked.n].tolist()]
        return best

    async def changes(self) -> AsyncIterator[tuple[int, Row, bool]]:
        """Yield (number of the choice, its row, has ended) for each row that may have changed, until all end.

        With best_of, yield the chosen rows when all have ended. Raises the error of a row.
        """
        left, has_best = list(self.rows), self.asked.best_of > self.asked.n
        while left:
            await self.changed.wait()
            self.changed.clear()
            if self.expired:
                raise Refused(408, "the answer took too long")
            for row in list(left):
                if ended := row.ended:
                    left.remove(row)
                if row.error is not None:
                    raise row.error
                if not has_best:
                    yield self.rows.index(row), row, ended
        for index, row in enumerate(await self.best() if has_best else []):
            yield index, row, True

    async def response(self) -> dict[str, Any]:
        """The body of the answer, when all rows have ended."""
        choices: dict[int, dict[str, Any]] = {}
        async for index, row, ended in self.changes():
            if ended:
                message, reason = self.choice(index, row, True)
                content = {"message": message} if self.is_chat else {"text": message["content"]}
                choices[index] = {"index": index, **content, "finish_reason": reason,
                                  "logprobs": self.logprobs(row)}
        return self.envelope([choices[index] for index in sorted(choices)]) | {"usage": self.usage}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The pieces of the answer, as they are generated; with best_of, whole answers at the end."""
        opening = {"role": "assistant", "content": ""}
        sent: dict[int, Message] = {}
        async for index, row, ended in self.changes():
            now, reason = self.choice(index, row, ended)
            delta = ({} if index in sent else opening) | added(sent.get(index, {}), now)
            sent[index] = now
            if delta or reason:
                content = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
                yield self.envelope([{"index": index, **content, "finish_reason": reason}], True)
        if (self.asked.stream_options or {}).get("include_usage"):
            yield self.envelope([], True) | {"usage": self.usage}
