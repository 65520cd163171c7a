"""The body of a request of OpenAI's API -> checked keys, and a conversation in our form.

    asked = parse({"messages": [{"role": "user", "content": "Hi"}]}, Asked(max_tokens=200), is_chat=True)
    messages = read_messages(asked)        # with the system message that offers the tools

The keys are those of /v1/chat/completions and /v1/completions (platform.openai.com/docs/api-reference), and
top_k, min_p, repetition_penalty and best_of. A key that would change the answer and is not implemented is
refused by name. Left out: images, audio, logit_bias, penalties, log-probabilities of chats and streams.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from configurator import UserError, coerce_field, require
from dataset.conversations import message_of
from dataset.sources import Skip
from dataset.tool_problems import offer
from generation.generate import MOST_NEW_TOKENS, Sampling

MOST_CHOICES = 128  # answers to one prompt
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
