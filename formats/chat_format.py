"""The chat format: conversation -> token ids and a training mask, and generated ids -> message.

    tokenizer = with_chat_tokens(tokenizer)         # six special tokens, and a template for other programs
    ids, mask = encode_chat(tokenizer, messages)    # mask is 1 for the ids that are trained on
    ids = encode_prompt(tokenizer, messages)        # ... followed by the opening of an assistant's turn
    message = read_answer(tokenizer, new_ids)       # generated ids as a message

A message is {"role": "system" | "user" | "assistant" | "tool", "content": text}. An assistant's message may
also have "thought" (text) and "tool_calls" ([{"name": text, "arguments": {..}}]). Messages are written as
ChatML:

    <|im_start|>user
    12 * 30?<|im_end|>
    <|im_start|>assistant
    <|start_thought|>12 * 3 = 36<|end_thought|>360<|im_end|>

With a tool call:

    <|im_start|>assistant
    <|tool_call|>{"name": "calculator", "arguments": {"expression": "12 * 30"}}<|im_end|>
    <|im_start|>tool
    <|tool_response|>360<|im_end|>

A conversation begins with the tokenizer's `prefix_ids` (Llama's <s>), as every text does.

Training targets are everything in an assistant's turn after its first line, including <|im_end|>.

A model that comes with a chat template of its own keeps its format. formats/chat_template.py renders both
kinds, with the ids of transformers' apply_chat_template. No text of a message becomes a special token,
whatever it contains.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from configurator import UserError
from formats.chat_template import TemplateChat, answer_pieces, own_template, template_end_of_turn, template_of
from formats.tokenizer import END_OF_TEXT, END_OF_TURN, Tokenizer

START, END = "<|im_start|>", END_OF_TURN
THOUGHT, THOUGHT_END = "<|start_thought|>", "<|end_thought|>"
CALL, RESPONSE = "<|tool_call|>", "<|tool_response|>"
CHAT_TOKENS = [START, END, THOUGHT, THOUGHT_END, CALL, RESPONSE]
ROLES = ("system", "user", "assistant", "tool")

# In chat_format.jinja, `generation` marks the assistant's tokens, for a loss on these alone (transformers).
TEMPLATE = Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8")


def with_chat_tokens(tokenizer: Tokenizer, ours: bool = False) -> Tokenizer:
    """The tokenizer with the six special tokens after its vocabulary, and with our chat template.

    A tokenizer with a chat template of its own is returned as it is, unless `ours` is True. Tokens that exist
    keep their ids (Qwen's tokenizer has two of the six). If one token ends both a text and a turn,
    <|endoftext|> ends a text from now on: the end of a turn must not look like the end of a text.
    """
    if own_template(tokenizer) and not ours:
        return tokenizer
    prefix = "".join(f"{{{{- {tokenizer.hf.id_to_token(index)!r} -}}}}" for index in tokenizer.prefix_ids)
    if tokenizer.eot_id != tokenizer.hf.token_to_id(END):
        return tokenizer.extended(CHAT_TOKENS, {"chat_template": prefix + TEMPLATE})
    settings = {"chat_template": prefix + TEMPLATE, "eos_token": END_OF_TEXT}
    return tokenizer.extended([*CHAT_TOKENS, END_OF_TEXT], settings)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id that ends a turn, or None for a tokenizer without a chat template or with a broken one."""
    try:
        return template_end_of_turn(tokenizer) if template_of(tokenizer) else None
    except UserError:
        return None


def answer_ends(tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer: those that end a text, and the one that ends a turn."""
    ends = tokenizer.end_ids
    ids = {*(ends if isinstance(ends, list) else [ends]), end_of_turn(tokenizer)}
    return {each for each in ids if each is not None}


def require_chat(tokenizer: Tokenizer, place: str) -> None:
    """Raise UserError unless the tokenizer has a chat template that works."""
    if not template_of(tokenizer):
        raise UserError(f"{place}: its tokenizer has no chat tokens; sft.py makes a chat model of a base")
    template_end_of_turn(tokenizer)


# ---- Messages -> ids --------------------------------------------------------------------------------------

def call_text(call: dict[str, Any]) -> str:
    """A tool call as JSON: {"name": .., "arguments": ..}, spelled as transformers' templates spell it."""
    call = call.get("function") or call
    return json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)


def encode_documents(tokenizer: Tokenizer,
                     messages: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each document that a conversation becomes in training, each of equal length.

    mask is 1 for training targets, else 0. There is one document, unless the model's own template changes
    earlier turns (formats/chat_template.py). The tokenizer comes from `with_chat_tokens`. Raises
    UnicodeEncodeError for a lone surrogate, UserError if the template refuses the messages.
    """
    return TemplateChat(tokenizer, messages).documents()


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """(ids, mask) of the whole conversation: the first of `encode_documents`."""
    return encode_documents(tokenizer, messages)[0]


def encode_prompt(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """The ids of a conversation, followed by the opening of an assistant's turn."""
    return TemplateChat(tokenizer, messages).encode_prompt()


def encode_answer(tokenizer: Tokenizer, message: dict[str, Any]) -> list[int]:
    """The ids of an assistant's message after `encode_prompt`: the training targets of its turn."""
    ids, mask = encode_chat(tokenizer, [message])
    return [index for index, is_target in zip(ids, mask, strict=True) if is_target]


def encode_pair(tokenizer: Tokenizer, prompt: list[dict[str, Any]],
                answers: tuple[dict[str, Any], dict[str, Any]]) -> tuple[list[int], list[int]]:
    """(ids, mask) of a prompt and two answers to it. mask is 0, 1 or 2 for the ids of each of them."""
    sides, begins = [], []
    for answer in answers:
        ids, mask = encode_chat(tokenizer, [*prompt, answer])
        sides.append(ids[:len(ids) - mask[::-1].index(1)])  # without what follows the answer
        begins.append(len(sides[-1]) - mask[:len(sides[-1])][::-1].index(0))
    # The prompt is what both sides share, and at most what is before an answer: two answers may begin alike.
    shared = min(len(os.path.commonprefix(sides)), *begins)
    parts = [sides[0][:shared], *(ids[shared:] for ids in sides)]
    return sum(parts, []), [value for value, part in enumerate(parts) for _ in part]


# ---- Texts in a turn --------------------------------------------------------------------------------------

def encode_with(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    """The ids of a prompt whose last message is the text, or of an exchange whose answer is the text."""
    if role == "user":
        return encode_prompt(tokenizer, [{"role": role, "content": text}])
    return encode_chat(tokenizer, [{"role": "user", "content": "x"}, {"role": role, "content": text}])[0]


@lru_cache(maxsize=8)
def turn_frame(tokenizer: Tokenizer, role: str = "user") -> tuple[list[int], list[int]]:
    """The ids before and after a text in `encode_with`: what two texts have in common.

    For a user's text, the assistant's answer begins after them.
    """
    # The space before a frequent word is a part of its token, so it is not a part of the frame.
    one, other = (encode_with(tokenizer, role, text) for text in ("the", "5"))
    before, after = os.path.commonprefix((one, other)), os.path.commonprefix((one[::-1], other[::-1]))[::-1]
    return list(before), list(after)


def encode_content(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    """The ids of a text as the content of a turn: a user's message, or an answer. "" has none."""
    before, after = turn_frame(tokenizer, role)
    ids = encode_with(tokenizer, role, text)
    return ids[len(before):len(ids) - len(after)] if text else []


# ---- Ids -> messages --------------------------------------------------------------------------------------

def read_call(text: str) -> dict[str, Any] | None:
    """{"name", "arguments"} from the JSON of a tool call, or None if it is malformed."""
    try:
        call = json.loads(text)
        call = {"name": call["name"], "arguments": call["arguments"]}
        call_text(call).encode("utf-8")  # JSON can spell a lone surrogate, which cannot be encoded
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return call if isinstance(call["name"], str) else None


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> dict[str, list[str]]:
    """The texts in an assistant's ids, up to the end of its turn, by the kind of piece."""
    pieces: dict[str, list[str]] = {"content": [], "thought": [], "calls": [], "malformed": []}
    kind, run = "content", list[int]()  # the kind of piece that is being read, and its ids so far
    names = {tokenizer.token_id(name): name for name in CHAT_TOKENS}
    for token in [*ids, tokenizer.token_id(END)]:
        name = names.get(token)
        if name is None:
            run += [] if token == tokenizer.eot_id else [token]
            continue
        # A chat token ends the piece before it. Only THOUGHT_END may end a thought.
        unfinished = kind == "thought" and name != THOUGHT_END
        pieces["malformed" if unfinished else kind].append(tokenizer.decode(run))
        kind, run = {THOUGHT: "thought", CALL: "calls"}.get(name, "content"), []
        if name == END:
            break
    return pieces


def read_answer(tokenizer: Tokenizer, ids: list[int]) -> dict[str, Any]:
    """An assistant's ids, up to the end of its turn, as a message: the inverse of `encode_answer`.

    "thought" and "tool_calls" are present only if the answer has them. A tool call that is not a JSON object
    with a name and arguments, and a thought without an end, are listed as texts in "malformed" instead.
    """
    pieces = answer_pieces(tokenizer, ids) if own_template(tokenizer) else pieces_of(tokenizer, ids)
    calls = [read_call(text) for text in pieces["calls"]]
    pieces["malformed"] += [text for text, call in zip(pieces["calls"], calls, strict=True) if call is None]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(pieces["content"]).strip()}
    message |= {"thought": "".join(pieces["thought"]).strip()} if any(pieces["thought"]) else {}
    message |= {"tool_calls": [call for call in calls if call]} if any(calls) else {}
    return message | ({"malformed": pieces["malformed"]} if pieces["malformed"] else {})
