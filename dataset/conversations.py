"""Rows of public data sets -> messages: which row forms are accepted.

    messages = conversation({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    prompt, chosen, rejected = preference({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})

Chats (--kind=chat):

    keys of the row                             becomes
    messages: [{role, content}, ..]             these messages
    conversations: [{from, value}, ..]          these messages (ShareGPT); ROLE_NAMES lists the role names
    instruction, input (may be absent), output  user: instruction, blank line, input (Alpaca)
                                                assistant: output
    question, answer                            user: question; assistant: answer
    prompt: [{role, content}, ..], completion   these messages; assistant: completion

    "instruction", "prompt" and "question" are interchangeable, and so are "output", "response", "completion"
    and "answer". A message may also have thought (text) and tool_calls ([{name, arguments}], or OpenAI's
    [{function: {name, arguments}}]). ShareGPT's function_call becomes a tool call.

Preferences (--kind=preference):

    keys of the row                             becomes
    a chat form without its answer,             prompt, chosen answer, rejected answer
      + chosen, rejected: text, a message,
      or a list of one message
    chosen, rejected: [{role, content}, ..]     prompt: the messages at the beginning that both share
    chosen, rejected: "\\n\\nHuman: ..           the same, from transcripts as text (HH-RLHF)
      \\n\\nAssistant: .."

In both, "system" and "tools" (texts; tools may be a list of functions) become a system message at the
beginning. A model's own chat template gets such a list as its `tools`. All other keys are ignored, and --keys
maps other names to these. A row in any other form raises Skip; its message is the reason under which the row
is counted.

Values: null, [] and {} count as if the key were absent. A number is a text: 0 is "0", 2.0 is "2". NaN and
infinity, and other values where a text belongs, raise Skip. docs/data.md has the whole table.
"""

import contextlib
import json
import math
import os
import re
from typing import Any

from dataset.sources import Skip, require_utf8
from formats.chat_format import ROLES, read_call

ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant",
              "model": "assistant", "chatgpt": "assistant", "function_call": "assistant",
              "observation": "tool", "function": "tool", "ipython": "tool", "developer": "system"}
QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("output", "response", "completion", "answer")

Message = dict[str, Any]


# ---- Values -----------------------------------------------------------------------------------------------

def is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def require_text(value: Any, what: str) -> str:
    """A text, or a number as text (2.0 is "2"). Raises Skip, which names `what`, for any other value."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Skip(f"{what} is NaN or infinite")
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A float of 2^53 or more has lost its last digits.
        return str(int(value) if value == value // 1 and abs(value) < 2**53 else value)
    if not isinstance(value, str):
        raise Skip(f"{what} is not a string")
    return require_utf8(value)


def first_value(row: dict[str, Any], *keys: str) -> Any:
    """The value of the first of these keys that has one, or None. null, [] and {} are no values; 0 is."""
    return next((row[key] for key in keys if row.get(key) not in (None, [], {})), None)


def optional_text(row: dict[str, Any], *keys: str) -> str:
    """The text of the first of these keys that has a value, or "". A list of text parts is one text."""
    for key in keys:
        value = first_value(row, key)
        if is_list_of_dicts(value) and all(part.get("type") == "text" for part in value):
            return "".join(require_text(part.get("text"), f"a part of {key!r}") for part in value)
        if value is not None:
            return require_text(value, repr(key))
    return ""


def json_text(value: Any, what: str) -> str:
    """The value as JSON. Raises Skip, which names `what`, if JSON or UTF-8 cannot hold it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # bytes and dates of Parquet; NaN; a very deep list
        raise Skip(f"{what} not JSON") from None
    return require_utf8(text)


def tools_text(row: dict[str, Any]) -> tuple[str, bool]:
    """The key "tools" of a row as text, and whether that is a JSON list of functions."""
    value = first_value(row, "tools")
    if is_list_of_dicts(value):
        return json_text(value, "'tools' is"), True
    text = optional_text(row, "tools")
    with contextlib.suppress(ValueError, RecursionError):
        return text, is_list_of_dicts(json.loads(text))
    return text, False


def without_nulls(value: Any) -> Any:
    """The value without the keys of its dicts whose value is None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inside) for key, inside in value.items() if inside is not None}
    return [without_nulls(inside) for inside in value] if isinstance(value, list) else value


def rename_keys(row: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The row with its values under our names, too. keys: {our name: the row's}. Skip if a key is missing."""
    for theirs in keys.values():
        if theirs not in row:
            raise Skip(f"no key {theirs!r}")
    return row | {ours: row[theirs] for ours, theirs in keys.items()}


# ---- Messages ---------------------------------------------------------------------------------------------

def require_json(call: dict[str, Any]) -> dict[str, Any]:
    """The same tool call. Raises Skip if its arguments cannot be written as JSON in UTF-8."""
    json_text(call, "a tool call's arguments are")
    return call


def tool_call(call: Any) -> dict[str, Any]:
    """{"name", "arguments"} of a tool call. OpenAI's arguments, which are JSON in a string, are parsed."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise Skip("a tool call without a name and arguments")
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Skip("a tool call's arguments are not JSON") from None
    return require_json({"name": call["name"], "arguments": arguments})


def message_of(value: dict[str, Any]) -> Message:
    """A message in our form, from either spelling: role and content, or from and value."""
    name = first_value(value, "role", "from")
    role = ROLE_NAMES.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        raise Skip(f"unknown role {str(name)[:40]!r}")
    content = optional_text(value, "content", "value")
    thought = optional_text(value, "thought", "reasoning_content").strip()
    if name == "function_call":
        call = read_call(content)
        if call is None:
            raise Skip("a function call that is not JSON with a name and arguments")
        return {"role": role, "content": "", "tool_calls": [require_json(call)]}
    message: Message = {"role": role, "content": content.strip()}
    if thought:
        message["thought"] = thought
    if (calls := first_value(value, "tool_calls")) is not None:
        if not is_list_of_dicts(calls):
            raise Skip("tool_calls is no list of calls")
        message["tool_calls"] = [tool_call(call.get("function") or call) for call in calls]
    return message


def listed(row: dict[str, Any]) -> list[Message] | None:
    """The messages that a row lists, or None if it has no list of messages."""
    for key in ("messages", "conversations"):
        if (messages := first_value(row, key)) is not None:
            if not is_list_of_dicts(messages):
                raise Skip(f"{key!r} is no list of messages")
            return [message_of(each) for each in messages]
    return None


def system_message(row: dict[str, Any]) -> list[Message]:
    """The system message that the keys "system" and "tools" make, as a list of at most one message."""
    tools, is_json = tools_text(row)
    texts = [*filter(None, (optional_text(row, "system"), tools))]
    message = {"role": "system", "content": "\n\n".join(texts)} | ({"tools": tools} if is_json else {})
    return [message] if texts else []


def opening(row: dict[str, Any]) -> list[Message]:
    """The row's system message, then its listed messages or its question; [] if it has neither of the two."""
    system = system_message(row)
    if (messages := listed(row)) is not None:
        if system and messages[0]["role"] == "system":
            raise Skip("two system messages")
        return system + messages
    question = first_value(row, *QUESTIONS)
    if question is None:
        return []
    if is_list_of_dicts(question):
        return system + [message_of(each) for each in question]
    texts = [require_text(question, "the question").strip(), optional_text(row, "input").strip()]
    if not texts[0]:
        raise Skip("empty question")
    return [*system, {"role": "user", "content": "\n\n".join(filter(None, texts))}]


def require_answers(messages: list[Message]) -> None:
    """Skip if a message of the assistant has neither text nor a tool call."""
    if any(message["role"] == "assistant" and not message["content"] and not message.get("tool_calls")
           for message in messages):
        raise Skip("empty answer")


# ---- Rows -------------------------------------------------------------------------------------------------

def conversation(row: dict[str, Any]) -> list[Message]:
    """The messages of a chat row. At least one is the assistant's, and none of the assistant's is empty."""
    messages = opening(row)
    if not messages:
        raise Skip(f"no conversation (keys: {', '.join(map(str, row))[:100]})")
    if listed(row) is None:
        answer = first_value(row, *ANSWERS)
        if answer is None:
            raise Skip(f"no answer (none of {', '.join(ANSWERS)})")
        messages.append({"role": "assistant", "content": require_text(answer, "the answer").strip()})
    if not any(message["role"] == "assistant" for message in messages):
        raise Skip("no turn of an assistant")
    require_answers(messages)
    return messages


def answer_messages(value: Any) -> list[Message]:
    """One side of a preference as messages: one answer, or a whole conversation."""
    if is_list_of_dicts(value):
        return [message_of(each) for each in value]
    if isinstance(value, dict):
        return [message_of(value)]
    text = require_text(value, "an answer")
    turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)  # ["", "Human", " ..", "Assistant", " ..", ...]
    if turns[0].strip() or len(turns) < 5:  # no transcript, which has at least two turns
        return [{"role": "assistant", "content": text.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": said.strip()}
            for name, said in zip(turns[1::2], turns[2::2], strict=True)]


def preference(row: dict[str, Any]) -> tuple[list[Message], Message, Message]:
    """(messages before the answer, chosen answer, rejected answer) of a preference row."""
    answers = [first_value(row, key) for key in ("chosen", "rejected")]
    if None in answers:
        raise Skip("no 'chosen' and 'rejected'")
    prompt, sides = opening(row), [answer_messages(answer) for answer in answers]
    if max(map(len, sides)) > 1:  # whole conversations: what they share is the prompt
        shared = os.path.commonprefix([[*map(json.dumps, side)] for side in sides])
        prompt, sides = system_message(row) + sides[0][:len(shared)], [side[len(shared):] for side in sides]
        if not any(sides):
            raise Skip("chosen and rejected are equal")
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in sides):
        raise Skip("chosen and rejected are not two answers to one prompt")
    if not prompt:
        raise Skip("no prompt")
    chosen, rejected = sides[0][0], sides[1][0]
    require_answers([chosen, rejected])
    if chosen == rejected:
        raise Skip("chosen and rejected are equal")
    return prompt, chosen, rejected
