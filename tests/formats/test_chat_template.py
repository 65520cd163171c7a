"""Models' own chat formats: ids and masks equal those of transformers, and text stays text.

The templates are those that TRL ships, which are read from the installed package, SmolLM2's, and small ones in
the style of other models. TRL's files with {% generation %} are references for the masks.
"""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken

from configurator import UserError
from formats import template_process
from formats.chat_format import (
    encode_chat,
    encode_content,
    encode_documents,
    encode_pair,
    encode_prompt,
    end_of_turn,
    read_answer,
    require_chat,
    turn_frame,
    with_chat_tokens,
)
from formats.chat_template import TemplateChat, own_template
from formats.tokenizer import QWEN2_SPLIT, Tokenizer
from tests.formats.test_tokenizer_kinds import LLAMA_SETTINGS, byte_level, sentencepiece

TRL = pytest.importorskip("trl").__path__[0]
FILES = sorted(Path(TRL, "chat_templates").glob("*.jinja"))
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|\[/?[A-Z_]{2,20}\]|<[a-z]+_of_[a-z]+>"
                     r"|<\|[a-z_]+>|<[a-z_]+\|>|</s>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # not special, as in Qwen3's tokenizer
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>"
           "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
           "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# In the style of other models: a BOS token per exchange, roles in plain text, a system prompt inside the first
# user's turn, alternating roles only, and an end-of-text token that closes training texts.
STYLES = {
    "smollm2": SMOLLM2,
    "llama2": """\
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
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
    "phi3": """\
{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "gemma": """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
}
SENTENCEPIECE = ("llama2", "zephyr", "mistral", "gemma")
TEMPLATES = STYLES | {path.stem: path.read_text(encoding="utf-8") for path in FILES}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds \u00e9.", "parameters": {
    "type": "object", "properties": {"a": {"type": "number", "description": "first"}}, "required": ["a"]}}}]


def make_tokenizer(name, folder):
    """A small tokenizer with the template and all its control tokens, saved in a folder."""
    template = TEMPLATES[name]
    controls = sorted({*CONTROL.findall(template)} | {"<|im_start|>", "<|im_end|>", "<|endoftext|>"})
    if name in SENTENCEPIECE:
        import tokenizers
        hf = sentencepiece("bpe", tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
        settings = LLAMA_SETTINGS
        controls = [each for each in controls if each in ("<start_of_turn>", "<end_of_turn>", "</s>")]
        controls += ["<start_of_turn>", "<end_of_turn>"] if name == "gemma" else []
    else:
        hf = byte_level(QWEN2_SPLIT)
        settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        if name == "smollm2":
            settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    # Phi-3's control tokens take the white space after them along.
    hf.add_special_tokens([AddedToken(each, rstrip=name.startswith("phi3"), normalized=False)
                           for each in controls])
    hf.add_tokens([AddedToken(each, normalized=False) for each in ADDED])
    tokenizer = Tokenizer(json.loads(hf.to_str()), settings | {
        "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False})
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """name -> (our tokenizer, transformers'), made when first asked for."""
    import transformers
    made, base = {}, tmp_path_factory.mktemp("formats")

    def get(name):
        if name not in made:
            ours = make_tokenizer(name, base / name)
            made[name] = ours, transformers.AutoTokenizer.from_pretrained(base / name)
        return made[name]

    return get


WORDS = ["a", "Hello world", "caf\u00e9 \u4e2d\u6587", " ", "  two", "\n", "\n\n", "12 * 30?", "\ue000", "\U0001f600",
         "{{ x }}", "{% if %}", "<|im_", "end|>", "<|", "|>", "</think>", "<think>", "\u2028", "user\n", "[INST", "\t",
         "<tool_call>", "\"quoted\"", "\\n", "'", "<s", "assistant", "_token", "<start_of"]


def draw_text(draw, more=()):
    """A text at random. It has a control token only if `more` has: then one may also come together by chance."""
    text = "".join(draw.choice([*WORDS, *more]) for _ in range(draw.randint(0, 5)))
    return text if more or not CONTROL.search(text) else draw_text(draw)


def draw_chat(draw, name, more=()):
    """(messages, tools) at random, in transformers' form."""
    template = TEMPLATES[name]
    messages = [{"role": "system", "content": draw_text(draw, more).strip() or "x"}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw_text(draw, more)})
        turn = {"role": "assistant", "content": draw_text(draw, more)}
        if "reasoning_content" in template and draw.random() < 0.4:
            turn["reasoning_content"] = draw_text(draw, more) + "x"
        if "tool_calls" in template and draw.random() < 0.3:
            call = {"name": "add", "arguments": {"a": draw_text(draw, more), "b\u00e9": [1, 2.5, None]}}
            calls = [{"type": "function", "function": call}]
            messages += [turn | {"tool_calls": calls}, {"role": "tool", "content": draw_text(draw, more)}]
            turn = {"role": "assistant", "content": draw_text(draw, more)}
        messages.append(turn)
    if draw.random() < 0.1:
        messages.pop()
    if name.startswith("llava") or ("'text'" in template and draw.random() < 0.3):  # lists of text parts
        for message in messages:
            message["content"] = [{"type": "text", "text": part} for part in (message["content"], "end")]
        return messages, None
    return messages, TOOLS if "tools" in template and draw.random() < 0.3 else None


def with_tools(messages, tools):
    """The same conversation as dataset/conversations.py gives it to us."""
    if not tools:
        return messages
    text = json.dumps(tools)
    first = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": f"{first}\n\n{text}".strip(), "tools": text}, *rest]


def whole_characters(mask, tokenizer, text):
    """A mask of transformers, which leaves out the further tokens of a character that ends a span."""
    spans = tokenizer.hf.encode(text, add_special_tokens=False).offsets
    for n in range(1, len(mask)):
        mask[n] |= mask[n - 1] if spans[n] == spans[n - 1] else 0
    return mask


def compare(name, formats, count, seed):
    """The number of conversations that both accept; every id, mask and refusal must be equal."""
    (ours, theirs), draw, accepted = formats(name), random.Random(f"{name}{seed}"), 0
    tagged = re.search(r"\{%-?\s*generation", TEMPLATES[name])
    for _ in range(count):
        messages, tools = draw_chat(draw, name)
        chat, opened = with_tools(messages, tools), draw.random() < 0.3
        try:
            if opened:
                expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
            else:
                expected = theirs.apply_chat_template(messages, tools=tools, return_dict=True,
                                                      return_assistant_tokens_mask=bool(tagged))
        except Exception as error:
            with pytest.raises(UserError, match="chat template: "):
                encode_prompt(ours, chat) if opened else encode_chat(ours, chat)
            assert type(error).__module__.startswith(("jinja2", "builtins")), error
            continue
        accepted += 1
        if opened:
            assert encode_prompt(ours, chat) == expected, messages
            continue
        ids, mask = encode_chat(ours, chat)
        assert ids == expected["input_ids"], messages
        assert len(mask) == len(ids)
        if tagged:
            text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
            assert mask == whole_characters(expected["assistant_masks"], ours, text), messages
    return accepted


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_of_transformers(name, formats):
    assert compare(name, formats, 12, seed=1) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_3000_conversations(name, formats):
    assert compare(name, formats, 3000, seed=2) > 300
