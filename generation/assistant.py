"""A chat model that answers conversations, calls the calculator, and reads its result.

    assistant = Assistant(model, tokenizer, Sampling(temperature=0), max_new_tokens=200)
    replies = assistant.reply([[{"role": "user", "content": "12 * 30?"}], ...])
    conversations[0] += replies[0]                # the answer, after any tool calls and their results

All conversations are answered in one batch. A reply takes up to MOST_CALLS rounds of tool calls:

    user "12 * 30?"  ->  assistant calls calculator("12 * 30")  ->  tool "360"  ->  assistant "It is 360."

A tool is looked up by its name in TOOLS. Nothing that a model writes is run as code.
"""

from collections.abc import Callable
from typing import Any

from formats.chat_format import answer_ends, encode_prompt, read_answer
from formats.tokenizer import Tokenizer
from generation.calculator import calculate
from generation.constraints import Constraint, Guide
from generation.generate import Options, PrefixCache, Sampling, append_tokens, generate
from model import GPT

TOOLS: dict[str, Callable[..., str]] = {"calculator": calculate}
MOST_CALLS = 4  # rounds of tool calls in one reply
ROUND_STRIDE = 2**17  # row numbers of a round: above those of the rounds before, for other random numbers

Message = dict[str, Any]


def call_tool(call: dict[str, Any]) -> str:
    """Return the result of a tool call as text for the model, or "error: " and the reason."""
    tool, arguments = TOOLS.get(call["name"]), call["arguments"]
    if tool is None:
        return f"error: no tool {call['name']!r}"
    if not isinstance(arguments, dict) or set(arguments) != {"expression"}:
        return "error: give {\"expression\": ..}"
    return tool(arguments["expression"])


def read_turn(tokenizer: Tokenizer, ids: list[int], end_ids: set[int],
              may_call: bool | None) -> list[Message]:
    """Return the message that the ids of an assistant's turn are and, if it may call tools, their results.

    The message has "cut": True if it has no end, or if it calls tools and may not. may_call=None: calls are
    the answer; they are not run, and the message is not cut for them.
    """
    message = read_answer(tokenizer, ids)
    calls = message.get("tool_calls", [])
    if (ids and ids[-1] not in end_ids) or (calls and may_call is False):
        message["cut"], calls = True, []
    return [message, *({"role": "tool", "content": call_tool(call)} for call in calls if may_call)]


class Assistant:
    """A model, its tokenizer, and how it samples.

    tokens: the number of tokens generated so far. The last call of `reply` leaves one entry per conversation
    in rows (the ids that were read and generated) and in sampled (True for the generated ids).
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, max_new_tokens: int,
                 constraint: Constraint | None = None):
        tokenizer.require_rows(model.config.vocab_size, model.source)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.tokens, self.constraint = max_new_tokens, 0, constraint
        self.rows: list[list[int]] = []
        self.sampled: list[list[bool]] = []
        self.end_ids = answer_ends(tokenizer)

    def reply(self, conversations: list[list[Message]], show: Callable[[int], None] | None = None,
              prefix: PrefixCache | None = None, first: int = 0, most_calls: int = MOST_CALLS,
              show_result: Callable[[str], None] | None = None) -> list[list[Message]]:
        """Return the messages that follow each conversation: tool calls with their results, then an answer.

        show(id): called with each token of the first conversation as it is generated. prefix: for a single
        conversation, so that its earlier turns are not read again. first: row number of the first
        conversation; each draws its random numbers by its row number. most_calls: rounds of tool calls that
        get a result; with 0 the first message is the whole reply. show_result(text): called with each tool
        result of the first conversation. An unfinished message has "cut": True.
        """
        replies: list[list[Message]] = [[] for _ in conversations]
        self.rows, self.sampled = ([[] for _ in conversations] for _ in range(2))
        open_rows = list(range(len(conversations)))  # the conversations that still need an answer
        for turn in range(most_calls + 1):
            prompts = [encode_prompt(self.tokenizer, conversations[row] + replies[row]) for row in open_rows]
            numbers = [first + row + turn * ROUND_STRIDE for row in open_rows]
            guide = self.constraint and self.constraint.guide([conversations[row] + replies[row]
                                                               for row in open_rows])
            turns = self.generate_turns(prompts, numbers, show if open_rows[0] == 0 else None, prefix, guide)
            still_open = []
            for row, prompt, ids in zip(open_rows, prompts, turns, strict=True):
                before = (self.sampled[row] + [False] * len(prompt))[:len(prompt)]
                self.rows[row], self.sampled[row] = prompt + ids, before + [True] * len(ids)
                message, *results = read_turn(self.tokenizer, ids, self.end_ids,
                                              turn < most_calls if most_calls else None)
                replies[row] += [message, *results]
                if results:  # let the model go on in the next round
                    still_open.append(row)
                for result in results if row == 0 and show_result is not None else ():
                    show_result(result["content"])
            open_rows = still_open
            if not open_rows:
                break
        return replies

    def generate_turns(self, prompts: list[list[int]], row_numbers: list[int],
                       show: Callable[[int], None] | None, prefix: PrefixCache | None,
                       guide: Guide | None = None) -> list[list[int]]:
        """Generate until every row has ended its turn; return the new ids of each row."""
        options = Options(vocab_size=self.tokenizer.vocab_size, row_numbers=row_numbers, prefix=prefix,
                          guide=guide)
        new: list[list[int]] = [[] for _ in prompts]
        for tokens in generate(self.model, prompts, self.max_new_tokens, self.sampling,
                               lambda row, ids: ids[-1] in self.end_ids, options):
            append_tokens(new, tokens)
            if show is not None and tokens[0] is not None:
                show(tokens[0])
        self.tokens += sum(map(len, new))
        return new
