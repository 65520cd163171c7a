"""Generation: continue prompts with any model folder, one prompt or a file of them, or chat in the terminal.

    python sample.py --model=out/base --prompt="def main(" --max_new_tokens=100 --temperature=0.7
    python sample.py --model=out/base --num_samples=4 --seed=7                   # from an empty prompt
    python sample.py --model=path/to/Qwen3-0.6B --prompt_file=prompts.jsonl > completions.jsonl
    python sample.py --model=out/sft --chat=True --system="You can call calculator(expression)."

Only generated text goes to stdout. The prompt (on a terminal) and the speed go to stderr.

A prompt is plain text: names of special tokens in it are read as ordinary text. An empty prompt starts after
the end-of-text token. If a prompt is longer than the context, the model reads only its last block_size
tokens. A sample ends with the end-of-text token, with a --stop text (which is not shown), or after
max_new_tokens. If the context becomes full, generation goes on from its last half. temperature, top_k, top_p
and the other keys of sampling are explained in generation/generate.py and by --help.

Each line of prompt_file is {"prompt": "..."}, or {"messages": [...]} for a chat model to answer; other keys
are copied to the output. The output has one line per sample, in order: the input's keys, "completion" and
"finish_reason" (stop or length); for messages also "replies", with calls of the calculator and their results.
With a --verifier (verifier.py), only the best scored of num_samples answers is printed, with its "score".

Left out: beam search.
"""

import codecs
import io
import json
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from configurator import UserError, configure, require, run_script
from dataset.conversations import first_value, listed
from dataset.sources import Row, Skip, json_lines, require_utf8, row_value, usable_rows, without_mark
from formats import hf
from formats.chat_format import end_of_turn, require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant, Message
from generation.constraints import ConstraintKeys, constraint_of
from generation.generate import MOST_NEW_TOKENS, Options, TextEnd, TextSampling, append_tokens, generate
from generation.terminal import converse, edit_lines, escaped
from generation.verifier import Verifier
from model import GPT
from modeling.devices import open_device


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TextSampling, ConstraintKeys):
    model: str = "out/base"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    prompt: str = ""  # the text to continue
    prompt_file: str | None = None  # JSON lines, each with a "prompt" or "messages", in place of prompt
    chat: bool = False  # hold a conversation in the terminal
    system: str = ""  # the first message of a chat, from the role "system"
    num_samples: int = 1  # number of samples per prompt
    verifier: str = ""  # out_dir of verifier.py; of num_samples answers to messages only the best is printed
    max_new_tokens: int = 200  # longest sample, in tokens
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


# ---- Prompts ----------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """A text to continue, or messages to answer."""

    place: str  # "file:line"
    keys: dict[str, Any]  # of its row; they are copied to the output
    messages: list[Message] | None  # None continues the text keys["prompt"]


def prompt_of(row: Row) -> Prompt:
    """Return the prompt of a row. Raises Skip if it has neither a prompt nor messages."""
    keys = row_value(row)
    # Messages win over a prompt: a row for chat models may carry the text of its question as well.
    if isinstance(keys, dict) and first_value(keys, "messages") is not None:
        return Prompt(row.place, keys, listed(keys))
    if not isinstance(keys, dict) or not isinstance(keys.get("prompt"), str):
        raise Skip('needs the key "prompt" with a text, or "messages"')
    require_utf8(keys["prompt"])  # JSON may hold half of a surrogate pair, which no tokenizer reads
    return Prompt(row.place, keys, None)


def read_prompts(path: str) -> list[Prompt]:
    """Read a JSON lines file: texts, or else messages in every row. UserError names the line of a bad row."""
    with open(path, "rb") as file:  # bytes: a line that is not UTF-8 gets a message with its number
        prompts = [prompt for _, prompt in usable_rows(json_lines(without_mark(file), Path(path)), prompt_of)]
    if not prompts:
        raise UserError(f"{path}: contains no prompts")
    # Texts and messages are generated by different functions, and the output keeps the order of the file.
    texts = [prompt for prompt in prompts if prompt.messages is None]
    if 0 < len(texts) < len(prompts):
        raise UserError(f'{texts[0].place}: has no "messages", but other rows of the file have them')
    return prompts


# ---- Generation -------------------------------------------------------------------------------------------

class Sampler:
    """A model with its tokenizer, and the rules that end a sample. tokens: the number generated so far."""

    def __init__(self, cfg: SampleConfig):
        self.cfg, self.tokens = cfg, 0
        device, dtype = open_device(cfg.device, cfg.threads, cfg.dtype)
        folder = hf.find_folder(cfg.model)  # an out_dir's best checkpoint, or a download
        self.tokenizer = Tokenizer.load(folder)
        self.model = GPT.from_pretrained(folder, device, dtype).eval()
        self.model.compiled_steps = cfg.compile
        # A chat model may name several end tokens: one ends a turn, another a text.
        self.end = TextEnd(self.tokenizer, {self.tokenizer.eot_id, *hf.end_ids(folder)}, cfg.stops)
        self.constraint = constraint_of(self.tokenizer, self.end.end_ids, cfg)
        self.assistant = Assistant(self.model, self.tokenizer, cfg, cfg.max_new_tokens, self.constraint)
        self.verifier = Verifier(cfg.verifier, self.tokenizer, device) if cfg.verifier else None

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a text, at least one; print a note if the model cannot read all of them."""
        # What the model saw before every text: BOS or sink tokens, if it has them.
        ids = self.tokenizer.prefix_ids + self.tokenizer.encode(prompt.keys["prompt"])
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            note(f"{prompt.place}: {len(ids):,} tokens; the model reads the last {block_size:,}")
        return ids or [self.tokenizer.eot_id]  # in training, a new document follows this token

    def run(self, prompts: list[list[int]], first: int, stream: bool) -> list[dict[str, Any]]:
        """Continue texts; return each sample's "completion" and "finish_reason".

        first: number of the first sample. stream: print the text of the first row as it is generated.
        """
        new: list[list[int]] = [[] for _ in prompts]
        printed = ""  # the text that is on the screen already
        numbers = range(first, first + len(prompts))  # they seed the rows' random numbers
        guide = self.constraint.guide([None] * len(prompts)) if self.constraint else None
        options = Options(vocab_size=self.tokenizer.vocab_size, row_numbers=numbers, guide=guide)
        for tokens in generate(self.model, prompts, self.cfg.max_new_tokens, self.cfg,
                               lambda row, ids: self.end.is_reached(ids), options):
            append_tokens(new, tokens)
            if stream:
                text = self.end.text(new[0], finished=False)
                print_text(text[len(printed):], end="")
                printed = max(printed, text, key=len)  # the next token may begin a stop text, which is hidden
        if stream:  # what was hidden because it might have changed
            print_text(self.end.text(new[0])[len(printed):])
        self.tokens += sum(map(len, new))  # for the speed at the end
        return [{"completion": self.end.text(row),
                 "finish_reason": "stop" if row and self.end.is_reached(row) else "length"} for row in new]

    def answer(self, conversations: list[list[Message]], first: int) -> list[dict[str, Any]]:
        """Answer messages: as `run`, with "replies" and, from a verifier, the "score"."""
        samples = []
        # Several replies, if the model calls the calculator: the call, its result, and then the answer.
        for replies in self.assistant.reply(conversations, first=first):
            # "cut" marks an answer that max_new_tokens ended; it is no part of the message.
            reason = "length" if replies[-1].pop("cut", False) else "stop"
            samples.append({"completion": replies[-1]["content"], "replies": replies,
                            "finish_reason": reason})
        self.tokens = self.assistant.tokens
        if self.verifier:  # it reads the sampled ids themselves; encoding the text again may give others
            scores = self.verifier.score_rows(self.assistant.rows, self.assistant.sampled).tolist()
            samples = [sample | {"score": score} for sample, score in zip(samples, scores, strict=True)]
        return samples


def print_samples(sampler: Sampler, prompts: list[Prompt]) -> None:
    """Print num_samples samples of every prompt, or only the best of them if there is a verifier.

    A sample draws its random numbers by its own number, so the batch size changes no text.
    """
    cfg, pending = sampler.cfg, list[dict[str, Any]]()
    stream = cfg.num_samples == 1 and not cfg.prompt_file  # a single sample is printed token by token
    if stream and sys.stdout.isatty():
        note(f"\x1b[2m{cfg.prompt}\x1b[0m", end="")  # dim, because the prompt is not generated
    texts = [[] if prompt.messages else sampler.encode(prompt) for prompt in prompts]
    # Samples of the same prompt are neighbours. A batch may end between them.
    numbers = [number for number in range(len(prompts)) for _ in range(cfg.num_samples)]
    for first in range(0, len(numbers), cfg.batch_size):
        batch = numbers[first:first + cfg.batch_size]
        conversations = [messages for number in batch if (messages := prompts[number].messages)]
        samples = (sampler.answer(conversations, first) if conversations else
                   sampler.run([texts[number] for number in batch], first, stream))
        for number, each in zip(batch, samples, strict=True):
            # A verifier chooses as soon as all samples of a prompt are there, perhaps in a later batch.
            pending.append(each)
            if sampler.verifier and len(pending) < cfg.num_samples:
                continue
            best, pending = max(pending, key=lambda sample: sample.get("score", 0.0)), []
            if cfg.prompt_file:
                print_json(prompts[number].keys | best)
            elif not stream:
                print_text(best["completion"])
                note("---------------")


# ---- Output -----------------------------------------------------------------------------------------------

def note(text: str, end: str = "\n") -> None:
    """Print to stderr, since stdout is for generated text only."""
    print(text, end=end, file=sys.stderr, flush=True)


def print_text(text: str, end: str = "\n") -> None:
    """Print generated text; on a terminal with escapes for control characters."""
    print(escaped(text) if sys.stdout.isatty() else text, end=end, flush=True)


def print_json(keys: dict[str, Any]) -> None:
    # In another encoding, letters are written as JSON's own escapes, so that every line stays valid JSON.
    encoding = sys.stdout.encoding or "utf-8"
    print(json.dumps(keys, ensure_ascii=codecs.lookup(encoding).name != "utf-8"))


def next_step(sampler: Sampler) -> str:
    """The command that may follow: fine-tuning for a base model, a conversation for a chat model."""
    model = shlex.quote(sampler.cfg.model)
    # Only a model with chat tokens has an end of turn.
    if end_of_turn(sampler.tokenizer) is None:
        return f"next        python sft.py --init_from={model}"
    return f"next        python sample.py --model={model} --chat=True"


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure(SampleConfig, argv, usage=__doc__)
    prompts = (read_prompts(cfg.prompt_file) if cfg.prompt_file else
               [Prompt("prompt", {"prompt": cfg.prompt}, None)])
    # What can be wrong is checked before the model is loaded, as far as that is possible.
    if cfg.chat and sys.stdin is None:
        raise UserError("--chat=True reads questions from stdin, which is closed")
    if cfg.stops and prompts[0].messages:
        raise UserError("stop only works with prompts; an answer to messages ends by itself")
    if cfg.verifier and not prompts[0].messages:
        raise UserError(f"verifier={cfg.verifier}: scores answers to messages, in a --prompt_file")
    sampler = Sampler(cfg)
    if cfg.chat or prompts[0].messages:
        require_chat(sampler.tokenizer, cfg.model)
    if cfg.chat:
        if sys.stdin.isatty():  # questions from a file or a pipe need no editor
            edit_lines()
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Refuse only the line that is not UTF-8. A strict stream would also drop the lines read with it.
            sys.stdin.reconfigure(errors="surrogateescape")
        write = partial(print, end="", flush=True)
        converse(sampler.assistant, cfg.system, input, write, sys.stdout.isatty())
        return
    begin = time.perf_counter()
    print_samples(sampler, prompts)
    seconds = time.perf_counter() - begin
    note(f"{sampler.tokens:,} tokens in {seconds:.1f} s, "
         f"{sampler.tokens / max(seconds, 1e-9):,.0f} tokens/s")
    if not cfg.prompt_file:
        note(next_step(sampler))


if __name__ == "__main__":
    run_script(main)
