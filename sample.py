"""Generation: continue prompts with any model folder, one prompt or a file of them, or chat in the terminal.

    python sample.py --model=out/base --prompt="def main(" --max_new_tokens=100 --temperature=0.7
    python sample.py --model=out/base --num_samples=4 --seed=7                   # from an empty prompt
    python sample.py --model=path/to/Qwen3-0.6B --prompt_file=prompts.jsonl > completions.jsonl
    python sample.py --model=out/sft --chat=True --system="You can call calculator(expression)."

Only generated text goes to stdout. The prompt (on a terminal) and the speed go to stderr.

A prompt is plain text: names of special tokens in it are read as ordinary text. An empty prompt starts after
the end-of-text token. If a prompt is longer than the context, the model reads only its last block_size
tokens. A sample ends with the end-of-text token, with a --stop text (which is not shown), or after
max_new_tokens. If the context becomes full, generation goes on from its last half.

Each line of prompt_file is {"prompt": "..."}, or {"messages": [...]} for a chat model to answer; other keys
are copied to the output. The output has one line per sample, in order: the input's keys, "completion" and
"finish_reason" (stop or length); for messages also "replies", with calls of the calculator and their results.
With a --verifier (verifier.py), only the best scored of num_samples answers is printed, with its "score".

Left out: beam search.
"""

import codecs
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from configurator import UserError, configure, require, run_script
from dataset.conversations import first_value, listed
from dataset.sources import Row, Skip, json_lines, require_utf8, row_value, usable_rows
from formats import hf
from formats.chat_format import end_of_turn, require_chat
from formats.tokenizer import Tokenizer
from generation.api import visible_text
from generation.assistant import Assistant
from generation.constraints import ConstraintKeys, constraint_of
from generation.generate import MOST_NEW_TOKENS, Options, Sampling, append_tokens, generate
from generation.terminal import converse
from generation.verifier import Verifier
from model import GPT
from modeling.devices import DTYPES, pick_device, use_threads


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling, ConstraintKeys):
    model: str = "out/base"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    prompt: str = ""  # the text to continue
    prompt_file: str | None = None  # JSON lines, each with a "prompt" or "messages", in place of prompt
    chat: bool = False  # hold a conversation in the terminal
    system: str = ""  # the first message of a chat, from the role "system"
    num_samples: int = 1  # number of samples per prompt
    verifier: str = ""  # out_dir of verifier.py; of num_samples answers to messages only the best is printed
    max_new_tokens: int = 200  # longest sample, in tokens
    stop: list | str | None = None  # text that ends a sample, or a list of texts: '["\\n\\n", "def "]'
    batch_size: int = 16  # number of samples generated together
    device: str | None = None  # cpu, cuda or mps; None is the best available
    threads: int | None = None  # CPU threads; None takes every core the process may use
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None is bfloat16 on cuda
    compile: bool = False  # compile the step of one token; pays in long runs of one or a few rows

    def __post_init__(self) -> None:
        super().__post_init__()
        # Every sample has a random number of its own, and all random numbers are drawn at the start.
        for key, low, high in (("num_samples", 1, 2**17), ("batch_size", 1, 2**14),
                               ("max_new_tokens", 0, MOST_NEW_TOKENS)):
            require(self, key, low <= getattr(self, key) <= high, f"between {low} and {high:,}")
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file: set only one of them")
        if self.chat and (self.prompt or self.prompt_file or self.stop or self.num_samples > 1):
            raise UserError("--chat=True does not work with prompt, prompt_file, stop or num_samples")
        if self.system and not self.chat:
            raise UserError("--system needs --chat=True; in a prompt file use a system message")
        if any(not isinstance(text, str) or not text for text in self.stops):
            raise UserError(f"stop={self.stop!r}: must be a text or a list of texts, none of them empty")

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return self.stop if isinstance(self.stop, list) else [self.stop]


# ---- Prompts ----------------------------------------------------------------------------------------------

def prompt_keys(row: Row) -> dict[str, Any]:
    """Return the keys of a row of the prompt file. Raises Skip if it has neither a prompt nor messages."""
    keys = row_value(row)
    if isinstance(keys, dict) and isinstance(keys.get("prompt"), str):
        require_utf8(keys["prompt"])
    elif not isinstance(keys, dict) or first_value(keys, "messages") is None:
        raise Skip('needs the key "prompt" with a text, or "messages"')
    return keys


def row_messages(row: Row) -> list[dict[str, Any]]:
    """Return the messages of a row. Raises Skip for a row without them, or with a bad message."""
    messages = listed(row.content)
    if messages is None:
        raise Skip('has no "messages", but other rows of the file have them')
    return messages


def read_prompts(path: str) -> list[Row]:
    """Read a JSON lines file; the content of a row is a dict. UserError names the line of a bad row."""
    with open(path, "rb") as file:
        pairs = list(usable_rows(json_lines(file, Path(path)), prompt_keys))
    if not pairs:
        raise UserError(f"{path}: contains no prompts")
    return [row._replace(content=keys) for row, keys in pairs]


def batches(cfg: SampleConfig, rows: list[Row]) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of the first sample, row of each sample) for batches of num_samples samples per row.

    A sample draws its random numbers by its own number, so the batch size changes no text.
    """
    numbers = [number for number in range(len(rows)) for _ in range(cfg.num_samples)]
    for first in range(0, len(numbers), cfg.batch_size):
        yield first, numbers[first:first + cfg.batch_size]


# ---- Generation -------------------------------------------------------------------------------------------

class Sampler:
    """A model with its tokenizer, and the rules that end a sample. cfg is also its Sampling."""

    def __init__(self, cfg: SampleConfig):
        self.cfg = cfg
        device = pick_device(cfg.device)
        if device.type == "cpu" and (text := use_threads(cfg.threads)):
            note(text)
        folder = hf.find_folder(cfg.model)  # an out_dir's best checkpoint, or a download
        self.tokenizer = Tokenizer.load(folder)
        dtype = cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.model = GPT.from_pretrained(folder, device, DTYPES[dtype]).eval()
        self.model.compiled_steps = cfg.compile
        # A chat model may name several end tokens: one ends a turn, another a text.
        self.end_ids = {self.tokenizer.eot_id, *hf.end_ids(folder)}
        self.constraint = constraint_of(self.tokenizer, self.end_ids, cfg)
        self.assistant = Assistant(self.model, self.tokenizer, cfg, cfg.max_new_tokens, self.constraint)

    def encode(self, row: Row) -> list[int]:
        """Return the ids of a prompt, at least one; print a note if the model cannot read all of them."""
        ids = self.tokenizer.prefix_ids + self.tokenizer.encode(row.content["prompt"])
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            note(f"{row.place}: {len(ids):,} tokens; the model reads the last {block_size:,}")
        return ids or [self.tokenizer.eot_id]

    def is_done(self, row: int, new: list[int]) -> bool:
        """True if the last token ends the sample, or if the text contains a stop text."""
        if new[-1] in self.end_ids or not self.cfg.stops:
            return new[-1] in self.end_ids
        # A stop text may begin or end within a token, so it is looked for in the text.
        text = self.tokenizer.decode(new, inside=True)
        return any(stop in text for stop in self.cfg.stops)

    def visible_text(self, new: list[int], finished: bool) -> str:
        """Return the text of a sample so far, up to a stop text, without an end that may still change."""
        text = self.tokenizer.decode([i for i in new if i not in self.end_ids], inside=True)
        return visible_text(text, self.cfg.stops, finished)

    def run(self, prompts: list[list[int]], first: int, stream: bool) -> list[tuple[str, str, int]]:
        """Return (text, finish reason, number of tokens) per prompt.

        first: number of the first sample. stream: print the text of the first row as it is generated.
        """
        new: list[list[int]] = [[] for _ in prompts]
        printed = ""  # the text that is on the screen already
        numbers = range(first, first + len(prompts))
        guide = self.constraint.guide([None] * len(prompts)) if self.constraint else None
        options = Options(vocab_size=self.tokenizer.vocab_size, row_numbers=numbers, guide=guide)
        for tokens in generate(self.model, prompts, self.cfg.max_new_tokens, self.cfg, self.is_done, options):
            append_tokens(new, tokens)
            if stream:
                text = self.visible_text(new[0], finished=False)
                print(text[len(printed):], end="", flush=True)
                printed = max(printed, text, key=len)  # the next token may begin a stop text, which is hidden
        # What was hidden because it might have changed is shown now.
        texts = [self.visible_text(row, finished=True) for row in new]
        if stream:
            print(texts[0][len(printed):], flush=True)
        reasons = ["stop" if row and self.is_done(0, row) else "length" for row in new]
        return [(text, reason, len(row)) for text, reason, row in zip(texts, reasons, new, strict=True)]


def complete_prompts(sampler: Sampler, rows: list[Row]) -> int:
    """Print the samples of every prompt; return the number of generated tokens."""
    cfg, total = sampler.cfg, 0
    prompts = [sampler.encode(row) for row in rows]
    stream = cfg.num_samples == 1 and not cfg.prompt_file  # a single sample is printed token by token
    if stream and sys.stdout.isatty():
        note(f"\x1b[2m{cfg.prompt}\x1b[0m", end="")  # dim, because the prompt is not generated
    for first, numbers in batches(cfg, rows):
        samples = sampler.run([prompts[number] for number in numbers], first, stream)
        for number, (text, reason, tokens) in zip(numbers, samples, strict=True):
            total += tokens
            if cfg.prompt_file:
                print_json(rows[number], completion=text, finish_reason=reason)
            elif not stream:
                print(text)
                note("---------------")
    return total


def answer_conversations(sampler: Sampler, rows: list[Row]) -> int:
    """Print an answer to every conversation of a prompt file; return the number of generated tokens."""
    cfg = sampler.cfg
    require_chat(sampler.tokenizer, cfg.model)
    if cfg.stops:
        raise UserError("stop only works with prompts; an answer to messages ends by itself")
    # Check all rows before the first answer, so that a bad row costs no time.
    conversations = [messages for _, messages in usable_rows(rows, row_messages)]
    assistant, scored = sampler.assistant, dict[int, list[tuple[float, list[dict[str, Any]]]]]()
    verifier = None
    if cfg.verifier:
        verifier = Verifier(cfg.verifier, sampler.tokenizer, sampler.model.head_weight.device)
    for first, numbers in batches(cfg, rows):
        answers = assistant.reply([conversations[number] for number in numbers], first=first)
        scores = [0.0] * len(numbers)
        if verifier:
            scores = verifier.score_rows(assistant.rows, assistant.sampled).tolist()
        for number, replies, score in zip(numbers, answers, scores, strict=True):
            if verifier:  # a row's answers may be in two batches: wait for the last one
                row = scored.setdefault(number, [])
                row.append((score, replies))
                if len(row) < cfg.num_samples:
                    continue
                score, replies = max(scored.pop(number), key=lambda pair: pair[0])
            # "cut" marks an answer that max_new_tokens ended; it is no part of the message.
            reason = "length" if replies[-1].pop("cut", False) else "stop"
            print_json(rows[number], completion=replies[-1]["content"], replies=replies, finish_reason=reason,
                       **({"score": score} if verifier else {}))
    return assistant.tokens


# ---- Output -----------------------------------------------------------------------------------------------

def note(text: str, end: str = "\n") -> None:
    """Print to stderr, since stdout is for generated text only."""
    print(text, end=end, file=sys.stderr, flush=True)


def print_json(row: Row, **results: Any) -> None:
    # In another encoding, letters are written as JSON's own escapes, so that every line stays valid JSON.
    encoding = sys.stdout.encoding or "utf-8"
    print(json.dumps(row.content | results, ensure_ascii=codecs.lookup(encoding).name != "utf-8"))


def next_step(sampler: Sampler) -> str:
    """The command that may follow: fine-tuning for a base model, a conversation for a chat model."""
    model = shlex.quote(sampler.cfg.model)
    if end_of_turn(sampler.tokenizer) is None:
        return f"next        python sft.py --init_from={model}"
    return f"next        python sample.py --model={model} --chat=True"


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, _ = configure(SampleConfig, argv, usage=__doc__)
    rows = [Row("prompt", "value", {"prompt": cfg.prompt})]
    if cfg.prompt_file:
        rows = read_prompts(cfg.prompt_file)
    if cfg.chat and sys.stdin is None:
        raise UserError("--chat=True reads questions from stdin, which is closed")
    sampler = Sampler(cfg)
    # A conversation, until the user leaves.
    if cfg.chat:
        require_chat(sampler.tokenizer, cfg.model)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # some Pythons are built without it
                import readline  # noqa: F401  from now on, input() edits lines and recalls earlier ones
        write = partial(print, end="", flush=True)
        converse(sampler.assistant, cfg.system, input, write, sys.stdout.isatty())
        return 0
    # Continuations, or answers: if one row of the file has messages, all rows must have them.
    begin = time.perf_counter()
    has_messages = any(first_value(row.content, "messages") is not None for row in rows)
    if cfg.verifier and not has_messages:
        raise UserError(f"verifier={cfg.verifier}: scores answers to messages, in a --prompt_file")
    tokens = (answer_conversations if has_messages else complete_prompts)(sampler, rows)
    seconds = time.perf_counter() - begin
    note(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
    if not cfg.prompt_file:
        note(next_step(sampler))
    return 0


if __name__ == "__main__":
    run_script(main)
