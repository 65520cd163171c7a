"""Generation: continue prompts with any model folder, one by one or a file of them.

    python sample.py --model=out/base --prompt="def main(" --max_new_tokens=100 --temperature=0.7
    python sample.py --model=out/base --num_samples=4 --seed=7                   # from nothing
    python sample.py --model=path/to/Qwen3-0.6B --prompt_file=prompts.jsonl > completions.jsonl
    python sample.py --model=out/sft --chat=True --system="You can call calculator(expression)."

Only generated text goes to stdout; the rest (the prompt on a terminal, tokens/s) goes to stderr. A prompt is
text: the name of a special token in it is not that token. An empty prompt starts behind the end-of-text
token. Of a prompt longer than the model's context the end is read. A sample ends with the end-of-text token,
a --stop text (not shown), or after max_new_tokens; when the context is full on the way, its last half is read
anew.

A line of prompt_file is {"prompt": "..."}, or {"messages": [...]} for a chat model to answer, and may have
other keys; a line of output is that with "completion" and "finish_reason" (stop or length), a line a sample,
in order; for messages also with "replies", the calls of the calculator and their results among them. With
--chat=True it is a conversation in the terminal. Left out: beam search.
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from configurator import UserError, configure, require_not_negative, require_positive, run_script
from dataset.conversations import listed
from dataset.sources import Skip, parse_json
from formats import hf
from formats.chat_format import require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.generate import Sampling, generate
from generation.terminal import converse
from model import GPT
from modeling.devices import DTYPES, pick_device


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    model: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    prompt: str = ""  # what to continue
    prompt_file: str | None = None  # JSON lines with a "prompt" or "messages" each, in place of prompt
    chat: bool = False  # hold a conversation in the terminal
    system: str = ""  # of a chat: the message that opens it
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 200  # most tokens of a continuation
    stop: list | str | None = None  # text that ends a sample, or a list of such: '["\\n\\n", "def "]'
    batch_size: int = 16  # rows generated together
    device: str | None = None  # cpu, cuda, mps; None: the best there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; None: bfloat16 on cuda
    compile: bool = False  # torch.compile the step of a token: for long runs of one row or a few

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_samples", "batch_size")
        require_not_negative(self, "max_new_tokens")
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file: give one of them")
        if self.chat and (self.prompt or self.prompt_file or self.stop or self.num_samples > 1):
            raise UserError("chat=True: takes no prompt, prompt_file, stop or num_samples")
        try:
            self.system.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("system: is not UTF-8") from None
        if self.system and not self.chat:
            raise UserError("system: is of --chat=True; in a prompt_file it is a message")
        if any(not isinstance(text, str) or not text for text in self.stops):
            raise UserError(f"stop={self.stop!r}: must be a text, or a list of texts, none of them empty")

    @property
    def stops(self) -> list[str]:
        return self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]


class Sampler:
    """A model with its tokenizer, and the rules by which a sample ends."""

    def __init__(self, cfg: SampleConfig):
        self.cfg = cfg
        device = pick_device(cfg.device)
        folder = hf.find_folder(cfg.model)
        self.tokenizer = Tokenizer.load(folder)
        dtype = cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.model = GPT.from_pretrained(folder, device, DTYPES[dtype]).eval()
        self.model.compiled_steps = cfg.compile
        self.end_ids = {self.tokenizer.eot_id, *hf.end_ids(folder)}
        self.assistant = Assistant(self.model, self.tokenizer, cfg, cfg.max_new_tokens)

    def encode(self, prompt: str, place: str) -> list[int]:
        """Ids of a prompt, never empty; says so where the model will not read all of them."""
        try:
            ids = self.tokenizer.prefix_ids + self.tokenizer.encode(prompt)
        except UnicodeEncodeError:
            raise UserError(f"{place}: the prompt holds a lone surrogate, which is not text") from None
        if len(ids) > self.model.config.block_size:
            note(f"{place}: {len(ids):,} tokens; the model reads the last {self.model.config.block_size:,}")
        return ids or [self.tokenizer.eot_id]

    def shown(self, new: list[int], finished: bool) -> str:
        """The text of a sample so far. While it is unfinished, what may still change is left out: an
        incomplete character, or the beginning of a stop text."""
        text = self.tokenizer.decode([i for i in new if i not in self.end_ids])
        ends = [text.find(stop) for stop in self.cfg.stops if stop in text]
        if ends:
            return text[:min(ends)]
        if finished:
            return text
        begun = [n for stop in self.cfg.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[:len(text) - max(begun, default=0)].rstrip("\N{REPLACEMENT CHARACTER}")

    def is_done(self, row: int, new: list[int]) -> bool:
        if new[-1] in self.end_ids or not self.cfg.stops:
            return new[-1] in self.end_ids
        text = self.tokenizer.decode(new)
        return any(stop in text for stop in self.cfg.stops)

    def run(self, prompts: list[list[int]], first_row: int, stream: bool) -> list[tuple[str, str, int]]:
        """(text, finish reason, tokens) of each prompt; `stream` writes the first row's text as it comes."""
        new: list[list[int]] = [[] for _ in prompts]
        written = ""
        for tokens in generate(self.model, prompts, self.cfg.max_new_tokens, self.cfg, self.is_done,
                               self.tokenizer.vocab_size, range(first_row, first_row + len(prompts))):
            for row, token in enumerate(tokens):
                new[row] += [] if token is None else [token]
            if stream:
                text = self.shown(new[0], finished=False)
                sys.stdout.write(text[len(written):])
                sys.stdout.flush()
                written = max(written, text, key=len)
        texts = [self.shown(row, finished=True) for row in new]
        if stream:
            print(texts[0][len(written):], flush=True)
        reasons = ["stop" if row and self.is_done(0, row) else "length" for row in new]
        return [(text, reason, len(row)) for text, reason, row in zip(texts, reasons, new, strict=True)]


def read_prompts(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) of a JSON lines file with a prompt or messages in each; UserError for another."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.removeprefix(b"\xef\xbb\xbf"))
            except Skip as reason:
                raise UserError(f"{path}:{number}: {reason}") from None
            if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or "messages" in row):
                raise UserError(f'{path}:{number}: needs the key "prompt" with a text, or "messages"')
            rows.append((f"{path}:{number}", row))
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    return rows


def answer_file(cfg: SampleConfig, sampler: Sampler, rows: list[tuple[str, dict[str, Any]]]) -> int:
    """Answer a file of conversations, and print the rows with what was said; returns the tokens written."""
    require_chat(sampler.tokenizer, cfg.model)
    if cfg.stops:
        raise UserError("stop: a conversation's answers end by themselves")
    conversations = []
    for place, row in rows:
        try:
            conversations.append(listed(row))
        except Skip as reason:
            raise UserError(f"{place}: {reason}") from None
        if conversations[-1] is None:
            raise UserError(f"{place}: has no messages, as other rows have")
    work = [n for n in range(len(rows)) for _ in range(cfg.num_samples)]  # the conversation of each sample
    for first in range(0, len(work), cfg.batch_size):
        batch = work[first:first + cfg.batch_size]
        answers = sampler.assistant.reply([conversations[n] for n in batch], first=first)
        for number, replies in zip(batch, answers, strict=True):
            reason = "length" if replies[-1].pop("cut", False) else "stop"
            print(json.dumps(rows[number][1] | {"completion": replies[-1]["content"], "replies": replies,
                                                "finish_reason": reason}, ensure_ascii=False))
    return sampler.assistant.tokens


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def report(tokens: int, seconds: float) -> None:
    note(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s")


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    cfg, _ = configure(SampleConfig, argv, usage=__doc__)
    rows = read_prompts(cfg.prompt_file) if cfg.prompt_file else [("prompt", {"prompt": cfg.prompt})]
    sampler = Sampler(cfg)
    if cfg.chat:
        require_chat(sampler.tokenizer, cfg.model)
        converse(sampler.assistant, cfg.system, input, write_now, sys.stdout.isatty())
        return 0
    if any("messages" in row for _, row in rows):
        begin = time.perf_counter()
        report(answer_file(cfg, sampler, rows), time.perf_counter() - begin)
        return 0
    prompts = [sampler.encode(row["prompt"], place) for place, row in rows]
    work = [n for n in range(len(rows)) for _ in range(cfg.num_samples)]  # the prompt of each sample
    total, begin = 0, time.perf_counter()
    for first in range(0, len(work), cfg.batch_size):
        batch = work[first:first + cfg.batch_size]
        stream = len(work) == 1 and not cfg.prompt_file
        if stream and sys.stdout.isatty():
            note(f"\x1b[2m{cfg.prompt}\x1b[0m", end="")  # dim: the prompt is not generated
        samples = sampler.run([prompts[number] for number in batch], first, stream)
        for number, (text, reason, tokens) in zip(batch, samples, strict=True):
            total += tokens
            if cfg.prompt_file:
                row = rows[number][1] | {"completion": text, "finish_reason": reason}
                print(json.dumps(row, ensure_ascii=False))
            elif not stream:
                print(text)
                note("---------------")
    report(total, time.perf_counter() - begin)
    return 0


if __name__ == "__main__":
    run_script(main)
