"""Chat formats with small tokenizers, and random conversations in them.

    for form in small_formats(Path(folder), {"qwen3", "llama2"}):
        messages, tools = Draw(form, seed=1).chat()

bench/chat_templates.py and the tests read this. The templates are those that the installed TRL ships,
SmolLM2's, ours, and small ones in the style of Llama 2, Zephyr, Mistral, Gemma and Phi-3. Each format gets a
byte-level BPE, or one of the sentencepiece kind, with all control tokens of its template.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from configurator import UserError
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer

CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|\[/?[A-Z_]{2,20}\]|<[a-z]+_of_[a-z]+>"
    r"|<\|[a-z_]+>|<[a-z_]+\|>|</s>")
PARTS_ONLY = ("idefics3", "llava", "smolvlm")  # these templates drop a content that is a string
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # not special, as in Qwen3's tokenizer
MARKS = re.compile(r"\{%[-+]?\s*generation")
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>"
    "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# In the style of other models: a BOS token per exchange, roles in plain text, a system prompt inside the
# first user's turn, alternating roles only, and an end-of-text token that closes training texts.
STYLES = {
    "nanollama": "",  # with_chat_tokens adds it
    "smollm2": SMOLLM2,
    "llama2": """\
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('alternate') }}{%- endif -%}
    {%- if m.role == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' -}}
    {%- else -%}{{- ' ' + m.content.strip() + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}""",
    "zephyr": """\
{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "mistral": """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}{{- m.content + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}
{%- endfor %}""",
    "phi3_style": """\
{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "gemma_style": """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
}
SENTENCEPIECE = ("llama2", "zephyr", "mistral", "gemma", "gemma_style")
WORDS = ["a", "Hello world", "caf\u00e9 \u4e2d\u6587", " ", "  two", "\n", "\n\n", "12 * 30?", "\ue000",
         "\U0001f600", "{{ x }}", "{% if %}", "<|im_", "end|>", "<|", "|>", "</think>", "<think>", "\u2028",
         "user\n", "[INST", "\t", "<tool_call>", '"quoted"', "\\n", "'", "<s", "assistant", "_token",
         "<start_of", "e\u0301", "\u05e9\u05dc", "\u200b", "\r\n", "\x00", "\U000f0000", "<", "\u00a0"]
CORPUS = [Path(__file__).read_text(encoding="utf-8")] * 3
UNUSED = 0xAC00  # the first of the characters that stand for control names; repr() does not escape them


# ---- Formats ----------------------------------------------------------------------------------------------

def templates() -> dict[str, str]:
    """{name: template} of the styles above, and of the installed TRL."""
    try:
        import trl
    except ImportError:
        raise UserError("bench.chat_templates reads TRL's templates: pip install trl") from None
    files = sorted(Path(trl.__path__[0], "chat_templates").glob("*.jinja"))
    return STYLES | {path.stem: path.read_text(encoding="utf-8") for path in files}


@cache
def byte_level_json() -> str:
    """A small byte-level BPE: a tokenizer.json."""
    return json.dumps(Tokenizer.train(CORPUS, 400).definition)


@cache
def sentencepiece_json() -> str:
    """A small BPE with byte fallback and the marker of a text's first word, as Llama 2 and Mistral have."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    hf.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                                       special_tokens=special))
    definition = json.loads(hf.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    definition["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    hf = tokenizers.Tokenizer.from_str(json.dumps(definition))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    hf.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                      special_tokens=[("<s>", 1)])
    return hf.to_str()


def make_tokenizer(name: str, known: dict[str, str], folder: Path) -> Tokenizer:
    """A small tokenizer with a template and all control tokens in it, saved in a folder."""
    base = name.removesuffix("_training")
    # A template and its twin for training have the same tokens, so that their ids can be compared.
    controls = {*CONTROL.findall(known[base] + known.get(f"{base}_training", ""))}
    controls |= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if base in SENTENCEPIECE:
        hf = tokenizers.Tokenizer.from_str(sentencepiece_json())
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        controls &= {"<start_of_turn>", "<end_of_turn>", "</s>"}
    else:
        hf = tokenizers.Tokenizer.from_str(byte_level_json())
        if name == "smollm2":
            settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    # Phi-3's control tokens take the white space after them along.
    hf.add_special_tokens([AddedToken(each, rstrip=name.startswith("phi3"), normalized=False)
                           for each in sorted(controls)])
    hf.add_tokens([AddedToken(each, normalized=False) for each in ADDED])
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"chat_template": known[name]} if known[name] else {}
    folder.mkdir(parents=True, exist_ok=True)
    with_chat_tokens(Tokenizer(json.loads(hf.to_str()), settings)).save(folder)
    return Tokenizer.load(folder)


class Format:
    """A chat format: our tokenizer and transformers', and what conversations may have in it."""

    def __init__(self, name: str, ours: Tokenizer, folder: Path, marked: str | None = None):
        """marked: TRL's template with {% generation %}, if this is the one without."""
        import transformers

        self.name, self.ours, self.marked = name, ours, marked
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)
        self.template = ours.settings["chat_template"]
        self.has_marks = bool(MARKS.search(self.template))
        added = self.theirs.added_tokens_decoder.values()
        special = {token.content: token for token in added if token.special}
        names = sorted(special)
        self.pattern = re.compile("|".join(  # with the white space that Phi-3's tokens take along
            re.escape(each) + r"\s*" * special[each].rstrip for each in sorted(names, key=len, reverse=True)))
        cuts = sorted({each[:end] for each in names for end in range(1, len(each))})
        # A quotation mark in a name is not hidden: Python's repr, which some templates write, depends on it.
        parts = dict.fromkeys(part for each in [*names, *cuts] for part in each.split('"'))
        letters = {part: chr(UNUSED + n) if part else "" for n, part in enumerate(parts)}
        self.hidden = {each: '"'.join(letters[part] for part in each.split('"')) for each in [*names, *cuts]}
        self.shown = {ord(letter): part for part, letter in letters.items() if letter}
        self.shown_in_json = {letter: json.dumps(each, ensure_ascii=False)[1:-1]
                              for letter, each in self.shown.items()}
        self.names = names
        # `plain` finds no special tokens. An added token in front makes a text no beginning.
        self.plain = tokenizers.Tokenizer.from_str(self.theirs.backend_tokenizer.to_str())
        self.plain.encode_special_tokens = True
        self.front = "" if ours.is_byte_level else ADDED[0]

    def show(self, value: Any) -> Any:
        """The value with the control names that unused characters stand for."""
        return json.loads(json.dumps(value, ensure_ascii=False).translate(self.shown_in_json))


def small_formats(base: Path, only: set[str] = frozenset()) -> Iterator["Format"]:
    """The formats of `templates`, or only some, with tokenizers in folders of `base`. UserError otherwise."""
    known = templates()
    if only - known.keys():
        raise UserError(f"formats: {', '.join(sorted(only - known.keys()))} not among {', '.join(known)}")
    for name in known:
        if not only or name in only:
            yield Format(name, make_tokenizer(name, known, base / name), base / name,
                         known.get(f"{name}_training"))


# ---- Conversations ----------------------------------------------------------------------------------------

class Draw(random.Random):
    """A random source of conversations in one format, in transformers' form.

    They are written with unused characters instead of control names; `Format.show` puts the names there.
    """

    def __init__(self, form: Format, seed: object):
        super().__init__(f"{form.name} {seed}")
        self.is_hostile = self.has_parts = False  # of the current conversation
        self.form, self.names = form, [form.hidden[name] for name in form.names]
        template = form.template
        self.thoughts = "thought" if ".thought" in template else "reasoning_content"
        self.has_thoughts = bool(re.search(r"\.thought\b|reasoning_content|(?<!\w)thinking\b", template))
        self.has_calls, self.has_tools = "tool_calls" in template, "tools" in template
        self.reads_parts = "'text'" in template
        self.share_of_parts = 1.0 if form.name.startswith(PARTS_ONLY) else 0.3 if self.reads_parts else 0.02

    def text(self) -> str:
        words = [self.choice(self.names) if self.is_hostile and self.random() < 0.3 else self.choice(WORDS)
                 for _ in range(self.randint(0, 5))]
        text = "".join(words)
        return self.text() if self.form.pattern.search(text) else text

    def content(self) -> str | list[dict[str, str]]:
        text = self.text()
        if not self.has_parts:
            return text
        cut = self.randint(0, len(text))
        parts = [text[:cut], text[cut:]]
        if self.is_hostile and self.random() < 0.5:  # both parts together are a control name
            name = self.choice(self.form.names)
            cut = self.randint(1, len(name) - 1)
            parts = [parts[0] + self.form.hidden[name[:cut]], name[cut:] + parts[1]]
        return [{"type": "text", "text": part} for part in parts]

    def value(self) -> Any:
        return self.choice([self.text(), [1, 2.5, None, self.text()], {"b": self.text()}, True, -3, None])

    def call(self) -> dict[str, Any]:
        names = self.sample(["a", "b\u00e9", "c d"], self.randint(0, 3))
        call = {"name": self.choice(["add", "f", self.text()]), "arguments": {n: self.value() for n in names}}
        return {"type": "function", "id": f"call{self.randint(10000, 99999)}", "function": call}

    def tool(self) -> dict[str, Any]:
        kinds = [{"type": "number", "description": self.text()},
                 {"type": "string", "enum": ["a", self.text()]},
                 {"type": "array", "items": {"type": "string"}},
                 {"type": "object", "properties": {"x": {"type": "boolean", "description": "y"}}}]
        names = self.sample(["a", "b\u00e9", "c"], self.randint(0, 3))
        return {"type": "function", "function": {
            "name": self.choice(["add", "f"]), "description": self.text() or "Adds \u00e9.",
            "parameters": {"type": "object", "properties": {name: self.choice(kinds) for name in names},
                           "required": names[:1]}}}

    def message(self, role: str) -> dict[str, Any]:
        message = {"role": role, "content": self.content()}
        if role == "assistant" and self.has_thoughts and self.random() < 0.4:
            message[self.thoughts] = self.text()
        return message

    def answer(self) -> list[dict[str, Any]]:
        """An assistant's messages: sometimes with calls, and the tools' answers to them, before the last."""
        messages = []
        while self.has_calls and self.random() < 0.25:
            calls = [self.call() for _ in range(self.randint(1, 2))]
            turn = self.message("assistant") | {"tool_calls": calls}
            if self.random() < 0.2:
                turn["content"] = None
            answers = [self.message("tool") | {"tool_call_id": call["id"]} for call in calls]
            messages += [turn, *answers]
        return [*messages, self.message("assistant")]

    def chat(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """(messages, tools)."""
        self.is_hostile, self.has_parts = self.random() < 0.5, self.random() < self.share_of_parts
        messages = [self.message("system")] if self.random() < 0.3 else []
        if self.random() < 0.25:
            roles = self.choices(["user", "assistant", "system", "tool"], [4, 4, 1, 1], k=self.randint(1, 5))
            messages += map(self.message, roles)
        else:
            for _ in range(self.randint(1, 3)):
                messages += [self.message("user"), *self.answer()]
            if self.random() < 0.15:
                messages.pop()
        tools = None
        if self.has_tools and self.random() < 0.3:
            tools = [self.tool() for _ in range(self.randint(1, 2))]
            if messages and messages[0]["role"] == "system":  # where dataset/conversations.py puts the tools
                messages[0]["content"] = self.text().strip() or "x"
        return messages or [self.message("user")], tools


def with_tools(messages: list[dict], tools: list[dict] | None) -> list[dict]:
    """The same conversation as dataset/conversations.py gives it to our code."""
    if not tools:
        return messages
    text = json.dumps(tools, ensure_ascii=False)
    first = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": f"{first}\n\n{text}".strip(), "tools": text}, *rest]
