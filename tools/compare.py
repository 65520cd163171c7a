"""Teacher and student on one Markdown page: how large, how good, how fast, how alike, and what they write.

    python -m tools.compare --teacher=out/base --student=out/distilled
    python -m tools.compare --teacher=out/base --student=out/free --prompts=prompts.txt --out=compare.md

Losses are of the validation rows of --dataset, measured as distill.py does: with its block_size, eval_tokens,
packing and document_mask they are the figures of its log. Speed is that of one greedy row, the best of three
times. Both models have to be of an architecture that model.py has. Left out: memory, which one process cannot
tell apart for two models.
"""

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configurator import UserError, configure, run_script
from distill import DistillConfig, Evaluation, row_kind
from model import GPT
from parts import hf
from parts.data import Mix
from parts.generate import Sampling, generate
from parts.run import Run, device_name, pick_device
from parts.shards import naming, sync_folder
from parts.student import PROJECTIONS
from parts.teacher import spelled
from parts.tokenizer import Tokenizer

PROMPTS = ["import os", "def main(", "class Stack:"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Sampling):
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    student: str = "out/distilled"  # likewise
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    prompts: str | None = None  # a text file with a prompt a line; None: three of Python
    out: str | None = None  # the page; None: compare.md in the student's folder
    max_new_tokens: int = 100  # most tokens of a continuation
    block_size: int | None = None  # tokens of a validation row; None: the shorter of the two contexts
    eval_tokens: int | None = None  # validation tokens, always the first ones; None: all
    packing: bool = True  # of chats: several conversations a row, each for itself
    document_mask: bool = False  # of text: attend within documents only
    batch_size: int = 16  # rows read together
    device: str | None = None  # cpu, cuda, mps; None: the best there is

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_new_tokens", "block_size", "eval_tokens", "batch_size"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: must be positive")

    @property
    def page(self) -> Path:
        if not self.out and not Path(self.student).is_dir():
            raise UserError(f"student={self.student}: no folder here for the page; say where with --out=")
        return Path(self.out) if self.out else Path(self.student) / "compare.md"


# ---- Figures ----------------------------------------------------------------------------------------------

def evaluated(cfg: CompareConfig, mix: Mix, told: DistillConfig, teacher: GPT,
              student: GPT) -> tuple[dict[str, float], dict[str, float]]:
    """distill.py's figures of the teacher by itself, and of the student beside it."""
    kind, run = row_kind(told), Run(Path("."), pick_device(cfg.device))
    with torch.no_grad():
        return (Evaluation(told, mix, kind, None, run)(teacher, last=True),
                Evaluation(told, mix, kind, teacher, run)(student, last=True))


def tokens_per_second(model: GPT, start: list[int], tokens: int) -> float:
    """Of one greedy row, the best of three times; the first tokens warm up."""
    greedy, times = Sampling(temperature=0), []
    list(generate(model, [start], 4, greedy))
    for _ in range(3):
        begin = time.perf_counter()
        list(generate(model, [start], tokens, greedy))
        times.append(time.perf_counter() - begin)
    return tokens / min(times)


def load(cfg: CompareConfig, key: str, tokenizer: Tokenizer) -> GPT:
    """The model of cfg.teacher or cfg.student. UserError if its ids are not those of the data."""
    folder = hf.find_folder(getattr(cfg, key))
    model = GPT.from_pretrained(folder, pick_device(cfg.device)).eval()
    if spelled(Tokenizer.load(folder)) != spelled(tokenizer) or model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{key}={getattr(cfg, key)}: its token ids are not those of dataset={cfg.dataset}")
    return model


def table(folders: list[Path], models: list[GPT], figures: list[dict[str, float]],
          speeds: list[float]) -> str:
    """A line a figure, the teacher's and the student's."""
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != PROJECTIONS)
             for folder in folders]
    rows = [("parameters", [f"{model.num_parameters():,}" for model in models]),
            ("weights on disk, MB", [f"{size / 1e6:,.2f}" for size in sizes]),
            ("validation loss, nats a token", [f"{each['val_loss']:.4f}" for each in figures]),
            ("perplexity", [f"{each['val_perplexity']:,.2f}" for each in figures]),
            ("bits per byte", [f"{each.get('val_bits_per_byte', math.nan):.4f}" for each in figures]),
            ("greedy tokens/s", [f"{speed:,.0f}" for speed in speeds])]
    return "\n".join(["| | teacher | student |", "|---|---:|---:|"]
                     + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows if "nan" not in cells])


# ---- What they write --------------------------------------------------------------------------------------

def read_prompts(path: str | None) -> list[str]:
    """The lines that are not blank. UserError where there is none, or the file is not UTF-8."""
    try:
        lines = PROMPTS if path is None else Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"prompts={path}: not UTF-8") from None
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path}: no prompts in it")
    return prompts


def continued(model: GPT, tokenizer: Tokenizer, prompts: list[str], cfg: CompareConfig, ends: set[int],
              sampling: Sampling) -> list[str]:
    """What the model writes behind each prompt, to the end of the text or cfg.max_new_tokens."""
    ids = [tokenizer.prefix_ids + tokenizer.encode(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(model, ids, cfg.max_new_tokens, sampling, lambda row, new: new[-1] in ends,
                           tokenizer.vocab_size):
        for row, token in zip(new, tokens, strict=True):
            row += [] if token is None else [token]
    return [tokenizer.decode([i for i in row if i not in ends]) for row in new]


def fenced(text: str) -> str:
    """A code block that the text cannot leave: its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def beside(name: str, texts: list[str]) -> str:
    """The teacher's and the student's text in the cells of a table. The blank lines make Markdown of them."""
    cells = "\n".join(f"<td valign=\"top\">\n\n{fenced(text)}\n\n</td>" for text in texts)
    return f"<tr><th>{name}</th>\n{cells}\n</tr>"


def write_page(path: Path, text: str) -> None:
    """Replace the page in one step: it is old or new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# ---- The page ---------------------------------------------------------------------------------------------

def compare(cfg: CompareConfig, command: str) -> tuple[str, dict[str, Any]]:
    """(the page, {"teacher", "student": what `evaluated` found})."""
    folders = [hf.find_folder(name) for name in (cfg.teacher, cfg.student)]
    shorter = min(hf.read_config(folder)["block_size"] for folder in folders)
    if (cfg.block_size or 0) > shorter:
        raise UserError(f"block_size={cfg.block_size}: one of the models reads no more than {shorter:,}")
    told = DistillConfig(dataset=cfg.dataset, block_size=cfg.block_size or shorter, packing=cfg.packing,
                         micro_batch_size=cfg.batch_size, eval_tokens=cfg.eval_tokens,
                         document_mask=cfg.document_mask)
    mix = Mix(told.dataset, told.block_size, cfg.seed, row_kind(told))
    prompts, tokenizer = read_prompts(cfg.prompts), mix.tokenizer
    models = [load(cfg, key, tokenizer) for key in ("teacher", "student")]
    figures = evaluated(cfg, mix, told, *models)
    start = tokenizer.prefix_ids or [tokenizer.eot_id]
    speeds = [tokens_per_second(model, start, min(128, shorter)) for model in models]
    ends = {tokenizer.eot_id, *(i for folder in folders for i in hf.end_ids(folder))}
    written = {name: [continued(model, tokenizer, prompts, cfg, ends, sampling) for model in models]
               for name, sampling in (("greedy", Sampling(temperature=0)), ("sampled", cfg))}
    lines = ["# Teacher and student", f"- teacher: `{folders[0]}`\n- student: `{folders[1]}`\n- `{command}`",
             table(folders, models, figures, speeds),
             f"KL(teacher || student) is {figures[1]['val_kl']:.4f} nats a token; both hold the same token "
             f"likeliest at {100 * figures[1]['val_agreement']:.1f} % of the places.",
             f"Validation rows of {told.block_size:,} tokens of {cfg.dataset}, "
             + (f"the first {cfg.eval_tokens:,} tokens" if cfg.eval_tokens else "all of them")
             + f"; {device_name(pick_device(cfg.device))}, float32, torch {torch.__version__}.",
             f"## What they write\n\nSampled: temperature {cfg.temperature}, seed {cfg.seed}; at most "
             f"{cfg.max_new_tokens:,} tokens behind each prompt."]
    for number, prompt in enumerate(prompts):
        rows = [beside(name, [texts[number] for texts in both]) for name, both in written.items()]
        lines.append("\n".join([fenced(prompt), "", "<table>", "<tr><th></th><th>teacher</th><th>student</th>"
                                "</tr>", *rows, "</table>"]))
    return "\n\n".join(lines) + "\n", {"teacher": figures[0], "student": figures[1]}


def main(argv: list[str]) -> int:
    cfg, _ = configure(CompareConfig, argv, usage=__doc__)
    path = cfg.page
    page, _ = compare(cfg, f"python -m tools.compare {' '.join(argv)}".strip())
    write_page(path, page)
    print(page.partition("\n\n## ")[0] + f"\n\n{path}: written")
    return 0


if __name__ == "__main__":
    run_script(main)
