"""Chat templates: messages -> ids and training mask, and the generated ids of other formats -> message.

    chat = TemplateChat(tokenizer, messages)
    ids, mask = chat.documents()[0]       # the ids of transformers' apply_chat_template
    ids = chat.encode_prompt()            # with add_generation_prompt

formats/chat_format.py calls this for every conversation, also for those in our format. A template is a Jinja
program, perhaps a stranger's. jinja2's sandbox lets it reach nothing but its variables, and it may not take
long, print much, or multiply its way to a huge value. Left out: limits on time and memory in the middle of
one operation (a filter of a huge text), and images.

Which tokens are the assistant's? A template may mark them with {% generation %}. Otherwise it is rendered
three times for each turn, and the differences show where the turn is:

    prompt   <user>Hi<end><assistant>            the messages before it, and the opening of an answer
    text     <user>Hi<end><assistant>Ho<end>     with the turn
    twin     <user>Hi<end><assistant>@<end>      with another content; what follows it is the end of a turn
                                     ^^^^^^      the target: up to the special tokens after the content

Some templates write an earlier turn in another way than the last one: Qwen3 drops its thought. Such a turn
is no target in the whole conversation. `documents` adds a shorter conversation that ends with it, because
that is what the model reads and writes when it answers.

Control tokens in messages stay text. A character that occurs nowhere, the guard, is put into each of them
before rendering, and is dropped after the real control tokens are found. Added tokens that are not special,
such as Qwen3's <think>, are found in every text, as transformers does.
"""

import contextlib
import json
import os
import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from configurator import UserError
from formats.tokenizer import Tokenizer

Message = dict[str, Any]
Span = tuple[int, int]
SECONDS = 1.0  # of CPU time for a text; the templates of known models take about a millisecond
BETWEEN_PARTS = re.escape('"}, {"type": "text", "text": "').join(("(?:", ")?"))  # in JSON
LONGEST = 2**24  # characters of a text, and the largest product in a template
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # marks what the assistant writes


# ---- Jinja ------------------------------------------------------------------------------------------------

def check_time(context: Context) -> None:
    """Raises TimeoutError after the deadline of a rendering."""
    if time.thread_time() > context.parent["deadline"]:
        raise TimeoutError(f"takes more than {SECONDS} s")


@pass_context
def checked(context: Context, values: Iterable) -> Iterator:
    """The values that a loop runs through, as long as there is time."""
    for value in values:
        check_time(context)
        yield value


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a time limit. One multiplication makes no huge number, text or list."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, str | list | tuple) else value for value in (left, right)]
        if operator == "**" or abs(sizes[0] * sizes[1]) > LONGEST:
            raise SecurityError(f"a product of more than {LONGEST:,}, or a power")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, *args: Any, **options: Any) -> Any:
        check_time(context)  # a macro may call itself
        return super().call(context, *args, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """The compiled template, with the settings and helpers that transformers offers to templates.

    Raises jinja2's TemplateError if it is malformed.
    """
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters |= {"checked": checked, "tojson": lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options)}
    del sandbox.globals["lipsum"]  # writes for hours, in one call
    sandbox.globals |= {"raise_exception": raise_exception,
                        "strftime_now": lambda form: datetime.now().strftime(form)}
    # {% generation %}..{% endgeneration %} becomes {% call mark_generation() %}..{% endcall %}.
    tree = sandbox.parse(GENERATION.sub(
        lambda tag: tag[1] + ("endcall" if tag[2] else "call mark_generation()") + tag[3], template))
    for loop in tree.find_all(nodes.For):  # {% for m in messages %} becomes {% for m in messages | checked %}
        loop.iter = nodes.Filter(loop.iter, "checked", [], [], None, None, lineno=loop.lineno)
    return sandbox.from_string(tree)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template. Raises UserError of one line for whatever a template can raise."""
    pieces, length = [], 0
    try:
        for piece in compiled(template).generate(variables, deadline=time.thread_time() + SECONDS):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise SecurityError(f"a text of more than {LONGEST:,} characters")
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"chat template: {reason}") from None
    return "".join(pieces)


# ---- Templates --------------------------------------------------------------------------------------------

def template_of(tokenizer: Tokenizer, tools: Any = None) -> str:
    """Return the chat template, or "". A list of named templates has "default", and "tool_use" for tools."""
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template}
        template = (named.get("tool_use") if tools else None) or named.get("default")
    return template or ""


def own_template(tokenizer: Tokenizer) -> str:
    """The chat template that came with the model; "" if there is none, or if its format is ours."""
    template = template_of(tokenizer)
    return "" if "'<|start_thought|>'" in template else template


@lru_cache(maxsize=8)
def special_pattern(tokenizer: Tokenizer, as_json: bool = False) -> re.Pattern[str]:
    """Finds a run of special tokens' names in a text, or one name in JSON.

    A longer name comes before its beginning. A template may join two parts of a content, and so, in JSON, one
    part may end in the middle of a name.
    """
    names = sorted((name for name, index in tokenizer.hf.get_vocab().items()
                    if index in tokenizer.special_ids), key=len, reverse=True)
    if as_json:
        names = [json.dumps(name, ensure_ascii=False)[1:-1] for name in names]
        return re.compile("|".join(BETWEEN_PARTS.join(map(re.escape, name)) for name in names))
    return re.compile(f"(?:{'|'.join(map(re.escape, names))})+")


@lru_cache(maxsize=8)
def guarded_tokenizer(tokenizer: Tokenizer, guard: str) -> tokenizers.Tokenizer:
    """The tokenizer for texts with guards: it looks for special tokens first, and then drops the guards."""
    steps = [{"type": "Replace", "pattern": {"String": guard}, "content": ""}]
    steps += [step for step in (tokenizer.definition.get("normalizer"),) if step]
    added = [token | {"normalized": token["normalized"] and not token["special"]}
             for token in tokenizer.definition["added_tokens"]]
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition | {
        "normalizer": {"type": "Sequence", "normalizers": steps}, "added_tokens": added}))


def template_message(message: Message, template: str) -> Message:
    """A message with the keys that templates of transformers read.

    Raises UserError for tool calls if the template has none, because they would be lost. A thought becomes a
    paragraph before the answer if the template has no thoughts.
    """
    form = {key: value for key, value in message.items()
            if value is not None and key not in ("tools", "thought")}
    if calls := form.get("tool_calls"):
        if "tool_calls" not in template:
            raise UserError("chat template: has no tool calls")
        form["tool_calls"] = [call if "function" in call else {"type": "function", "function": call}
                              for call in calls]
    thought = form.get("reasoning_content", message.get("thought"))
    if ".thought" in template:
        return form | {"thought": thought}
    if thought is not None and re.search(r"reasoning_content|\bthinking\b", template):
        return form | {"thinking": thought, "reasoning_content": thought}
    if thought and "</think>" in template:
        thought = f"<think>\n{thought}\n</think>"
    return form | {"content": f"{thought}\n\n{form.get('content', '')}"} if thought else form


class TemplateChat:
    """A conversation in the format of its model's template. The first message may have the key "tools"."""

    def __init__(self, tokenizer: Tokenizer, messages: list[Message]):
        """Raises UserError for tool calls that the template cannot write."""
        # JSON, which is also the end of the system message's content.
        tools = messages[0].get("tools") if messages else None
        self.tokenizer, self.template = tokenizer, template_of(tokenizer, tools)
        if not own_template(tokenizer):
            tools = None  # in our format they stay a text
        if tools:
            content = messages[0]["content"].removesuffix(tools).rstrip()
            messages = ([messages[0] | {"content": content}] if content else []) + messages[1:]
        values = json.dumps([[template_message(each, self.template) for each in messages],
                             json.loads(tools) if tools else None], ensure_ascii=False)
        # Characters that occur nowhere. They are printable, so that repr() in a template keeps them.
        used = {*values, *self.template}
        free = (chr(code) for code in range(0xA000, 0x110000)
                if chr(code).isprintable() and chr(code) not in used)
        self.guard, self.filling, *self.marks = islice(free, 4)
        self.messages, self.tools = json.loads(special_pattern(tokenizer, as_json=True).sub(
            lambda found: found[0][0] + self.guard + found[0][1:], values))

    # ---- Text ---------------------------------------------------------------------------------------------

    def render(self, messages: list[Message], opened: bool = False) -> tuple[str, list[Span]]:
        """(text, spans that {% generation %} encloses) of some messages.

        opened: the opening of an answer follows. Raises UserError if the template refuses the messages.
        """
        settings, (first, last) = self.tokenizer.settings, self.marks
        variables = {key: self.tokenizer.named_token(key) for key in settings
                     if key.endswith("_token") and isinstance(settings[key], str | dict)}
        text = render(self.template, variables | {
            "messages": messages, "tools": self.tools, "documents": None, "add_generation_prompt": opened,
            "mark_generation": lambda caller: first + caller() + last})
        parts = re.split("|".join(self.marks), text)
        ends = list(accumulate(map(len, parts)))  # every second part is enclosed
        return "".join(parts), list(zip(ends[::2], ends[1::2], strict=False))

    def begin_of(self, number: int, text: str, twin: str) -> int:
        """Where answer `number` begins in the text that ends with it. text and twin are those of `turn`."""
        before, content = self.messages[:number], self.messages[number].get("content")
        begin = len(os.path.commonprefix((text, twin)))
        # A template may refuse to open an answer without messages, which raises UserError. It may also write
        # the earlier messages in another way here: then look for the last characters of the prompt in the
        # text, which are the opening and a bit before it. An opening that ends within what both texts share
        # belongs to an earlier turn.
        with contextlib.suppress(UserError):
            prompt, _ = self.render(before, opened=True)
            opening = prompt if text.startswith(prompt) else prompt[-64:]
            shared = len(os.path.commonprefix((prompt, text)))
            place = text.rfind(opening, max(0, shared - len(opening)), max(begin, len(prompt)))
            if place >= 0:
                return place + len(opening)
        # The answer and what the template writes for the twin may begin alike: with the < of <think>.
        with contextlib.suppress(UserError):
            if isinstance(content, str):
                message = self.messages[number] | {"content": self.filling + content}
                return len(os.path.commonprefix((text, twin, self.render([*before, message])[0])))
        return begin

    def turn(self, number: int) -> tuple[str, Span]:
        """The text up to and including an answer, and where in it the model writes the answer.

        The span ends one character after the text if no special token ends the answer.
        """
        before, content = self.messages[:number], self.messages[number].get("content")
        other = [{"type": "text", "text": self.filling}] if isinstance(content, list) else self.filling
        text, _ = self.render(self.messages[:number + 1])
        twin, _ = self.render([*before, {"role": "assistant", "content": other}])
        content_end = len(text) - len(os.path.commonprefix((text[::-1], twin[::-1])))
        special = next((found for found in special_pattern(self.tokenizer).finditer(text)
                        if found.end() > content_end), None)  # two control tokens may end alike
        return text, (self.begin_of(number, text, twin), special.end() if special else len(text) + 1)

    def targets(self, text: str, turns: Iterable[tuple[str, Span]]) -> list[Span]:
        """The spans of turns in the text of a conversation that contains them unchanged.

        turns: as `turn` returns them. If no special token ends a turn, the one that opens the next turn does:
        GLM 4 writes <|user|>. If there is no next turn, the span ends with the text.
        """
        spans, special = list[Span](), special_pattern(self.tokenizer)
        for written, (begin, end) in turns:
            spans.append((begin, end if end <= len(written) or special.match(text, end - 1) else end - 1))
        return sorted(spans)

    # ---- Ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str, targets: list[Span]) -> tuple[list[int], list[int]]:
        """(ids, mask) of a rendered text. A token that is partly in a span of targets is a target."""
        text.encode("utf-8")  # raises UnicodeEncodeError for a lone surrogate
        guarded = self.guard in text
        encoder = guarded_tokenizer(self.tokenizer, self.guard) if guarded else self.tokenizer.hf
        encoding = encoder.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets  # the library makes a new list at each access
        mask = [0] * len(ids)
        for begin, end in targets:
            first = bisect_right(offsets, begin, key=lambda span: span[1])
            last = bisect_left(offsets, end, key=lambda span: span[0])
            mask[first:last] = [1] * max(0, last - first)
        return ids, mask

    def encode_prompt(self) -> list[int]:
        """The ids of the conversation, followed by the opening of an answer."""
        return self.encode(self.render(self.messages, opened=True)[0], [])[0]

    def documents(self) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of the conversation, and of shorter ones for turns that it writes in another way."""
        if GENERATION.search(self.template):
            return [self.encode(*self.render(self.messages))]
        turns = dict[int, tuple[str, Span]]()
        for number, message in enumerate(self.messages):
            with contextlib.suppress(UserError):  # a template may refuse that a conversation ends there
                turns |= {number: self.turn(number)} if message["role"] == "assistant" else {}
        found, missing, last = list[tuple[list[int], list[int]]](), set(turns), len(self.messages) - 1
        while missing or not found:
            text = turns[last][0] if last in turns else self.render(self.messages)[0]
            written = {number for number in missing if number <= last
                       and text.startswith(turns[number][0][:turns[number][1][1]])}
            found.append(self.encode(text, self.targets(text, (turns[number] for number in written))))
            missing -= written
            last = max(missing, default=0)
        return found


# ---- Turns ------------------------------------------------------------------------------------------------

@lru_cache(maxsize=8)
def template_end_of_turn(tokenizer: Tokenizer) -> int:
    """The id that ends an answer: a special token, or else the end-of-text token.

    Raises UserError if the template fails in the simplest conversation.
    """
    hello = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    ids, mask = TemplateChat(tokenizer, hello).documents()[-1]  # the others may have no targets
    written = [index for index, is_target in zip(ids, mask, strict=True) if is_target]
    return written[-1] if written and written[-1] in tokenizer.special_ids else tokenizer.eot_id


def answer_pieces(tokenizer: Tokenizer, ids: list[int]) -> dict[str, list[str]]:
    """The texts in an assistant's ids, up to the end of its turn: "content", "thought", "calls", "malformed".

    Thoughts and calls are read as most models write them: <think>..</think>, <tool_call>{..}</tool_call>.
    """
    ends = {tokenizer.eot_id, template_end_of_turn(tokenizer)}
    stop = next((n for n, index in enumerate(ids) if index in ends), len(ids))
    text = tokenizer.decode([i for i in ids[:stop] if i not in tokenizer.special_ids], inside=True)
    thought, closed, content = text.rpartition("</think>")
    if not closed and content.lstrip().startswith("<think>"):  # it never ended
        return {"content": [], "thought": [], "calls": [], "malformed": [content]}
    parts = re.split(r"<tool_call>(.*?)</tool_call>", content, flags=re.DOTALL)
    return {"content": parts[::2], "thought": [thought.strip().removeprefix("<think>")], "calls": parts[1::2],
            "malformed": []}
