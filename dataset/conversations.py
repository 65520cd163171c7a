"""Rows of the data sets people have -> messages: which keys hold what, in the forms that are about.

    messages = conversation({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    prompt, chosen, rejected = preference({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})

Conversations: messages (role, content) | conversations (from, value) | instruction, input + output | prompt,
instruction or question + response, output, completion or answer; also "system" and "tools", which open the
conversation. Preferences: one of these without its answer, + chosen and rejected (texts, messages or lists of
messages); or two whole conversations, also as the text of one ("\\n\\nHuman: .. \\n\\nAssistant: .."), whose
common beginning is the prompt. Skip says, with a reason to be counted under, what a row lacks.
"""

import json
import os
import re
from typing import Any

from dataset.sources import Skip
from formats.chat_format import ROLES, call_text, read_call

ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
              "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
              "function": "tool", "ipython": "tool"}
QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("output", "response", "completion", "answer")

Message = dict[str, Any]


def rename_keys(row: Any, keys: dict[str, str]) -> dict[str, Any]:
    """The row, with the values of its own keys under ours too. keys: {ours: the row's}. Skip if one lacks."""
    if not isinstance(row, dict):
        raise Skip("not a JSON object")
    for theirs in keys.values():
        if theirs not in row:
            raise Skip(f"no key {theirs!r}")
    return row | {ours: row[theirs] for ours, theirs in keys.items()}


def conversation(row: dict[str, Any]) -> list[Message]:
    """The row's messages, of which one at least is an assistant's and none of those is empty."""
    found = opening(row)
    if not found:
        raise Skip(f"no conversation (keys: {', '.join(map(str, row))[:100]})")
    if listed(row) is None:
        source = row["instances"][0] if is_list_of_dicts(row.get("instances")) else row
        answer = next((source[key] for key in ANSWERS if key in source), None)
        if answer is None:
            raise Skip(f"no answer (none of {', '.join(ANSWERS)})")
        found.append({"role": "assistant", "content": require_text(answer, "the answer").strip()})
    if not any(message["role"] == "assistant" for message in found):
        raise Skip("no turn of an assistant")
    require_answers(found)
    return found


def preference(row: dict[str, Any]) -> tuple[list[Message], Message, Message]:
    """(messages before the answer, the answer preferred, the other one)."""
    if "chosen" not in row or "rejected" not in row:
        raise Skip("no 'chosen' and 'rejected'")
    prompt, sides = opening(row), [answer_messages(row["chosen"]), answer_messages(row["rejected"])]
    if len(sides[0]) > 1 or len(sides[1]) > 1:  # whole conversations: what they share is the prompt
        shared = os.path.commonprefix([[*map(json.dumps, side)] for side in sides])
        prompt, sides = system_of(row) + sides[0][:len(shared)], [side[len(shared):] for side in sides]
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


def opening(row: dict[str, Any]) -> list[Message]:
    """A row's listed messages, or its question as one, behind its system message; [] where there is none."""
    begin = system_of(row)
    if (messages := listed(row)) is not None:
        if begin and messages and messages[0]["role"] == "system":
            raise Skip("two system messages")
        return begin + messages
    question = next((row[key] for key in QUESTIONS if key in row), None)
    if question is None:
        return []
    if is_list_of_dicts(question):
        return begin + [message_of(each) for each in question]
    source = row["instances"][0] if is_list_of_dicts(row.get("instances")) else row
    texts = [require_text(question, "the question").strip(), require_text(source.get("input") or "", "input").strip()]
    if not texts[0]:
        raise Skip("empty question")
    return [*begin, {"role": "user", "content": "\n\n".join(filter(None, texts))}]


def system_of(row: dict[str, Any]) -> list[Message]:
    """The system message that a row's own keys make, or []."""
    texts = [require_text(row[key], key) for key in ("system", "tools") if row.get(key)]
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def listed(row: dict[str, Any]) -> list[Message] | None:
    """The messages that a row lists, or None if it lists none."""
    for key in ("messages", "conversations"):
        if key in row:
            if not is_list_of_dicts(row[key]):
                raise Skip(f"{key!r} is no list of messages")
            return [message_of(each) for each in row[key]]
    return None


def answer_messages(value: Any) -> list[Message]:
    """One side of a preference as messages: an answer, or the whole conversation."""
    if is_list_of_dicts(value):
        return [message_of(each) for each in value]
    if isinstance(value, dict):
        return [message_of(value)]
    text = require_text(value, "an answer")
    turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if turns[0].strip() or len(turns) < 5:  # no transcript with two turns at least
        return [{"role": "assistant", "content": text.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[turns[i]], "content": turns[i + 1].strip()} for i in range(1, len(turns), 2)]


def message_of(value: dict[str, Any]) -> Message:
    """A message in either spelling, role and content or from and value, as chat.py has them."""
    name = value.get("role", value.get("from"))
    role = ROLE_NAMES.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        raise Skip(f"unknown role {str(name)[:40]!r}")
    content = require_text(value.get("content", value.get("value")) or "", "a message")
    message: Message = {"role": role, "content": content.strip()}
    if name == "function_call":
        call = read_call(content)
        if call is None:
            raise Skip("a function call that is not JSON with a name and arguments")
        return message | {"content": "", "tool_calls": [call]}
    if value.get("thought"):
        message["thought"] = require_text(value["thought"], "a thought").strip()
    if value.get("tool_calls"):
        if not is_list_of_dicts(value["tool_calls"]):
            raise Skip("tool_calls is no list of calls")
        message["tool_calls"] = [called(call.get("function") or call) for call in value["tool_calls"]]
    return message


def called(call: Any) -> dict[str, Any]:
    """A tool call whose arguments, if they are JSON in a text as OpenAI spells them, are unpacked."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise Skip("a tool call without a name and arguments")
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Skip("a tool call's arguments are not JSON") from None
    call = {"name": call["name"], "arguments": arguments}
    require_text(call_text(call), "a tool call")
    return call


def require_answers(messages: list[Message]) -> None:
    for message in messages:
        empty = not message["content"] and not message.get("tool_calls")
        if empty and message["role"] == "assistant":
            raise Skip("empty answer")


def is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def require_text(value: Any, what: str) -> str:
    """A text, or a number as one (2.0 is "2"). Skip for anything else, and for what UTF-8 cannot hold."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if value == value // 1 else str(value)
    if not isinstance(value, str):
        raise Skip(f"{what} is not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Skip("lone surrogate") from None
    return value
