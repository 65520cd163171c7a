"""An assistant: a chat model that answers conversations, calls the calculator, and reads its result.

    assistant = Assistant(model, tokenizer, Sampling(temperature=0), max_new_tokens=200)
    replies = assistant.reply([[{"role": "user", "content": "12 * 30?"}], ...])      # what to append to each

All conversations are written on together. A tool is called by its name in TOOLS and by nothing else; what a
model writes is never run as code.
"""

from collections.abc import Callable
from typing import Any

from formats.chat_format import encode_prompt, end_of_turn, read_answer
from formats.tokenizer import Tokenizer
from generation.calculator import calculate
from generation.generate import PrefixCache, Sampling, generate
from model import GPT

TOOLS: dict[str, Callable[..., str]] = {"calculator": calculate}
MOST_CALLS = 4  # rounds of tool calls in one reply

Message = dict[str, Any]


class Assistant:
    """A model, its tokenizer, and how it writes. `tokens` counts what it has written."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.tokens = max_new_tokens, 0
        ends = tokenizer.end_ids
        self.end_ids = {*(ends if isinstance(ends, list) else [ends]), end_of_turn(tokenizer)} - {None}

    def reply(self, conversations: list[list[Message]], show: Callable[[int], None] = lambda token: None,
              past: PrefixCache | None = None, first: int = 0, most_calls: int = MOST_CALLS) -> list[list[Message]]:
        """The messages that follow each conversation: an answer, behind the calls and results it took.

        show(id): called with each token of the first conversation as it comes. past: of a single
        conversation, so that its beginning is not read again at every turn. first: number of the first
        conversation; each draws by its own number. most_calls: rounds of calls that are answered. "cut" marks
        a message that would have gone on.
        """
        replies: list[list[Message]] = [[] for _ in conversations]
        open_rows = list(range(len(conversations)))
        for turn in range(most_calls + 1):
            prompts = [encode_prompt(self.tokenizer, conversations[row] + replies[row]) for row in open_rows]
            new: list[list[int]] = [[] for _ in open_rows]
            numbers = [first + row + turn * 2**17 for row in open_rows]  # other draws at every turn
            for tokens in generate(self.model, prompts, self.max_new_tokens, self.sampling,
                                   lambda row, ids: ids[-1] in self.end_ids, self.tokenizer.vocab_size,
                                   numbers, past):
                for row, token in enumerate(tokens):
                    new[row] += [] if token is None else [token]
                if open_rows[0] == 0 and tokens[0] is not None:
                    show(tokens[0])
            still_open = []
            for row, ids in zip(open_rows, new, strict=True):
                self.tokens += len(ids)
                replies[row].append(read_answer(self.tokenizer, ids))
                calls = replies[row][-1].get("tool_calls", [])
                if (ids and ids[-1] not in self.end_ids) or (calls and turn == most_calls):
                    replies[row][-1]["cut"] = True
                    continue
                results = [call_tool(call) for call in calls]
                replies[row] += [{"role": "tool", "content": result} for result in results]
                still_open += [row] if results else []
            open_rows = still_open
            if not open_rows:
                break
        return replies


def call_tool(call: dict[str, Any]) -> str:
    """The result of a tool call, or what is wrong with it, as text for the model."""
    tool, arguments = TOOLS.get(call["name"]), call["arguments"]
    if tool is None:
        return f"error: no tool {call['name']!r}"
    if not isinstance(arguments, dict) or set(arguments) != {"expression"}:
        return "error: give {\"expression\": ..}"
    return tool(arguments["expression"])
