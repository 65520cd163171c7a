"""Random and hostile conversations in the chat format of every model: do ids and masks equal the references'?

    python -m bench.chat_templates --count=100
    python -m bench.chat_templates --count=3000 --models=out/smollm2 --json=docs/results/chat_templates.json

The formats are our own, SmolLM2's, small ones in the style of Llama 2, Zephyr, Mistral, Gemma and Phi-3, and
every template that the installed TRL ships. Each gets a small tokenizer that has all its control tokens.
--models adds models with their own tokenizer and template. A conversation has system prompts, tools, tool
calls and answers, thoughts, lists of text parts, empty and blank texts, text of many scripts, and in a
quarter of them roles in any order. Half of the conversations are hostile: texts have names of control tokens,
whole, or cut in two by the end of a text part. The references:

    ids    transformers' apply_chat_template. A hostile conversation is rendered by transformers with one
           unused character for each control name that a user wrote. The text is split at the control tokens
           that remain, which are the template's; between them the names are put back, and transformers'
           tokenizer encodes each part without looking for special tokens.
    masks  templates with {% generation %}: transformers' return_assistant_tokens_mask. Templates of TRL
           without these marks: our masks, from renderings with and without an answer, compared with TRL's
           template for training, where both write the same ids. White space and an end-of-text token around
           a turn, and the token that opens it, may differ: TRL marks them in some formats.

A conversation that transformers refuses must be refused by us, too, with a UserError. Finished formats are
kept in the JSON; the same command goes on with the others. It exits with 1 if anything differs.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2

from bench.chat_formats import Draw, Format, small_formats, templates, with_tools
from bench.measure import text_table, versions
from configurator import UserError, configure, require_positive, run_script
from formats.chat_format import encode_documents, encode_prompt
from formats.files import read_json, write_json
from formats.hf import find_folder
from formats.tokenizer import Tokenizer

# What TRL marks around a turn: white space, an end of text, and the opening that a prompt ends with.
AROUND = re.compile(r"(?:\s|<\uff5c(Assistant|tool\u2581outputs\u2581end)\uff5c>|<\|start\|>assistant"
                    r"|</?think>|<\|endoftext\|>)*")
# What Gemma 4 writes, and TRL does not mark: the token that ends a call (it is among the eos_token_id of its
# generation_config.json), and an opening of the turn that is not in the prompt after a tool's answer.
GEMMA_4 = re.compile(r"<\|tool_response>|<\|turn>model\n")


@dataclass(frozen=True, kw_only=True)
class Config:
    count: int = 3000  # conversations per format
    formats: str = ""  # only these formats, separated by commas
    models: str = ""  # also these models, with their own tokenizers: folders or GGUF files
    seed: int = 1  # of the conversations
    json: str | None = None  # write the results to this file, after each format

    def __post_init__(self) -> None:
        require_positive(self, "count")


# ---- References -------------------------------------------------------------------------------------------

def overlaps(begin: int, end: int, spans: list[tuple[int, int]]) -> int:
    return int(any(begin < last and first < end for first, last in spans))


def hostile_reference(form: Format, messages: list[dict], tools: Any,
                      opened: bool) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation in which unused characters stand for the names of control tokens."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in each.items() if value is not None} for each in messages]
    [text], spans = render_jinja_template(
        [messages], tools, chat_template=form.template, return_assistant_tokens_mask=form.has_marks,
        add_generation_prompt=opened, **form.theirs.special_tokens_map)
    spans = spans[0] if form.has_marks else []
    ids, mask, last = list[int](), list[int](), 0
    for control in [*form.pattern.finditer(text), None]:
        part = text[last:control.start() if control else len(text)]
        encoding = form.plain.encode((form.front if last else "") + part.translate(form.shown),
                                     add_special_tokens=False)
        skip = 1 if last and form.front else 0
        inside = [tuple(skip * len(form.front) + len(part[:max(0, place - last)].translate(form.shown))
                        for place in span) for span in spans if span[0] < last + len(part) and last < span[1]]
        ids += encoding.ids[skip:]
        mask += [overlaps(*offset, inside) for offset in encoding.offsets[skip:]]
        if control:
            last = control.end()
            ids.append(form.theirs.convert_tokens_to_ids(control[0].rstrip()))
            mask.append(overlaps(control.start(), last, spans))
    return ids, mask


def clean_reference(form: Format, messages: list[dict], tools: Any, opened: bool,
                    template: str | None = None) -> tuple[list[int], list[int]]:
    """transformers' (ids, mask). A character of several tokens that ends a span is in the mask as a whole."""
    result = form.theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=opened, chat_template=template, return_dict=True,
        return_assistant_tokens_mask=bool(template or form.has_marks),
        tokenizer_kwargs={"return_offsets_mapping": True})
    ids, spans = result["input_ids"], result["offset_mapping"]
    mask = result.get("assistant_masks", [0] * len(ids))
    for n, (before, span) in enumerate(pairwise(spans), 1):
        mask[n] |= mask[n - 1] if span == before else 0
    return ids, mask


def runs(mask: list[int]) -> list[tuple[int, int]]:
    """Where the runs of ones in a mask begin and end."""
    places, position = [], 0
    for value, group in groupby(mask):
        begin, position = position, position + len(list(group))
        places += [(begin, position)] if value else []
    return places


def is_left_of(rest: str, turns: str) -> bool:
    """True if some text is left of turns after parts of them were dropped."""
    letters = iter(turns)
    return all(letter in letters for letter in rest)


def is_trls_mask(form: Format, documents: list[tuple[list[int], list[int]]], theirs: list[int]) -> bool:
    """True if the targets in our first document are TRL's, but for what is around a turn.

    Some templates drop parts of earlier turns: thoughts, white space. Such a turn is a target in another of
    our documents, where it may end in another way: gpt-oss ends the last turn with <|return|>, others with
    <|end|>.
    """
    (ids, ours), decode = documents[0], form.ours.decode
    elsewhere = "".join(decode(other[begin:end]) for other, mask in reversed(documents[1:])
                        for begin, end in runs(mask))
    for begin, end in runs([int(here < there) for here, there in zip(ours, theirs, strict=True)]):
        rest = AROUND.sub("", decode(ids[begin:end]))
        rest = "".join(form.pattern.sub("", rest).split()) if documents[1:] else rest
        if not is_left_of(rest, elsewhere):
            return False
    extra = runs([int(here > there) for here, there in zip(ours, theirs, strict=True)])
    return all(GEMMA_4.fullmatch(decode(ids[begin:end])) for begin, end in extra)


def has_refused_turn(form: Format, messages: list[dict], tools: Any) -> bool:
    """True if nothing can ask for one of the answers: it is the first message, or the template refuses a
    conversation that ends with it."""
    if messages[0]["role"] == "assistant":
        return True
    for number, message in enumerate(messages, 1):
        try:
            if message["role"] == "assistant":
                form.theirs.apply_chat_template(messages[:number], tools=tools, tokenize=False)
        except jinja2.TemplateError:
            return True
    return False


# ---- Comparison -------------------------------------------------------------------------------------------

@dataclass
class Tally:
    """The counts of one format, and the first conversations that differ."""

    counts: Counter = field(default_factory=Counter)
    examples: list[Any] = field(default_factory=list)

    def differs(self, what: str, *example: Any) -> None:
        self.counts[what] += 1
        if len(self.examples) < 3:
            self.examples.append([what, *example])


def compare_one(form: Format, draw: Draw, tally: Tally) -> None:
    """Draw a conversation, and count what both sides do with it."""
    hidden_messages, hidden_tools = draw.chat()
    opened = draw.random() < 0.3
    messages, tools = (form.show(each) for each in (hidden_messages, hidden_tools))
    is_hostile = messages != hidden_messages or tools != hidden_tools
    example = messages, tools, opened
    reference = partial(hostile_reference if is_hostile else clean_reference, form)
    tally.counts["hostile"] += is_hostile
    try:
        expected, error = reference(hidden_messages, hidden_tools, opened), None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as refusal:
        expected, error = None, refusal
    try:
        chat = with_tools(messages, tools)
        documents = [(encode_prompt(form.ours, chat), [])] if opened else encode_documents(form.ours, chat)
    except UserError as refusal:
        if expected:
            tally.differs("refusals differ", str(refusal), *example)
        tally.counts["refused by both"] += not expected
        return
    if not expected:
        tally.differs("refusals differ", repr(error), *example)
        return
    tally.counts["rendered"] += 1
    (ids, mask), (their_ids, their_mask) = documents[0], expected
    if ids != their_ids:
        tally.differs("ids differ", *example)
    elif form.has_marks and not opened:
        tally.counts["masks"] += 1
        if mask != their_mask:
            tally.differs("masks differ", *example, mask, their_mask)
    elif form.marked and not opened and not is_hostile and (draw.reads_parts or not draw.has_parts):
        compare_with_twin(form, documents, example, tally)


def compare_with_twin(form: Format, documents: list, example: tuple, tally: Tally) -> None:
    """Compare our masks with those of TRL's template for training, if it writes the same ids."""
    try:
        ids, mask = clean_reference(form, *example, template=form.marked)
    except (jinja2.TemplateError, TypeError, ValueError):
        return
    if ids == documents[0][0]:
        tally.counts["masks"] += 1
        if not is_trls_mask(form, documents, mask) and not has_refused_turn(form, *example[:2]):
            tally.differs("masks differ", *example, runs(documents[0][1]), runs(mask))


def compare(form: Format, count: int, seed: object = 1) -> Tally:
    """The counts of `count` random conversations in one format."""
    draw, tally = Draw(form, seed), Tally()
    for _ in range(count):
        compare_one(form, draw, tally)
    return tally


# ---- The command ------------------------------------------------------------------------------------------

COLUMNS = ("hostile", "rendered", "refused by both", "refusals differ", "ids differ", "masks", "masks differ")
DIFFERENCES = [name for name in COLUMNS if name.endswith("differ")]


def table(results: dict[str, dict[str, Any]]) -> str:
    total = {name: sum(each[name] for each in results.values()) for name in ("conversations", *COLUMNS)}
    rows = [[name, *(f"{each[column]:,}" for column in ("conversations", *COLUMNS))]
            for name, each in [*results.items(), ("all", total)]]
    return text_table(["format", "conversations", *COLUMNS], rows)


def all_formats(cfg: Config, base: Path, done: set[str]) -> Iterator[Format]:
    only = set(filter(None, cfg.formats.split(","))) or set(templates())
    yield from small_formats(base, only - done) if only - done else ()
    for number, model in enumerate(filter(None, cfg.models.split(","))):
        if model not in done:
            tokenizer, folder = Tokenizer.load(find_folder(model)), base / f"model_{number}"
            folder.mkdir()
            tokenizer.save(folder)
            yield Format(model, tokenizer, folder)


def main(argv: list[str]) -> int:
    cfg, _ = configure(Config, argv, usage=__doc__)
    old = read_json(Path(cfg.json)) if cfg.json else {}
    is_same = (old.get("count"), old.get("seed")) == (cfg.count, cfg.seed)
    results: dict[str, dict[str, Any]] = old["formats"] if is_same else {}
    command = f"python -m bench.chat_templates {' '.join(argv)}"
    with tempfile.TemporaryDirectory() as base:
        for form in all_formats(cfg, Path(base), set(results)):
            tally = compare(form, cfg.count, cfg.seed)
            counts = {name: tally.counts[name] for name in COLUMNS}
            results[form.name] = {"conversations": cfg.count, **counts, "examples": tally.examples}
            print(form.name, {key: value for key, value in tally.counts.items() if value}, flush=True)
            if cfg.json:
                write_json(Path(cfg.json), {"command": command, "versions": versions(cfg), "count": cfg.count,
                                            "seed": cfg.seed, "formats": results})
    print(table(results))
    return int(any(each[name] for each in results.values() for name in DIFFERENCES))


if __name__ == "__main__":
    run_script(main)
