"""Teacher and student on one Markdown page: how large, how good, how fast, how alike, and what they write.

    python -m tools.compare --teacher=out/base --student=out/distilled
    python -m tools.compare --teacher=out/base --student=out/free --prompts=prompts.txt --out=compare.md

Losses are of the validation rows of --dataset, measured as distill.py does: with its block_size, eval_tokens,
packing and document_mask they are the figures of its log. Speed is that of one greedy row, the best of three
times. Both models have to be of an architecture that model.py has. Left out: memory, which one process cannot
tell apart for two models.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, configure, require_positive, run_script
from dataset.dataloader import Mix
from distill import DistillConfig, row_kind
from distillation.evaluation import StudentEvaluation
from distillation.student import PROJECTIONS
from distillation.teacher import spelled
from formats import hf
from formats.files import write_text
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from modeling.devices import device_name, pick_device
from training.run import Run

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
        require_positive(self, "max_new_tokens", "block_size", "eval_tokens", "batch_size")


# ---- Figures ----------------------------------------------------------------------------------------------

def table(folders: list[Path], models: list[GPT], told: DistillConfig, mix: Mix) -> str:
    """A line a figure, the teacher's and the student's; below it, how alike they are."""
    kind, run = row_kind(told), Run(Path("."), models[0].head_weight.device)
    with torch.no_grad():
        figures = [StudentEvaluation(told, mix, kind, other, run)(model, last=True)  # the teacher's by itself
                   for model, other in zip(models, (None, models[0]), strict=True)]
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != PROJECTIONS)
             for folder in folders]
    start, tokens = mix.tokenizer.prefix_ids or [mix.tokenizer.eot_id], min(128, told.block_size)
    rows = {"parameters": [f"{model.num_parameters():,}" for model in models],
            "weights on disk, MB": [f"{size / 1e6:,.2f}" for size in sizes],
            "validation loss, nats a token": [f"{each['val_loss']:.4f}" for each in figures],
            "perplexity": [f"{each['val_perplexity']:,.2f}" for each in figures]}
    if "val_bits_per_byte" in figures[0]:  # chats have none
        rows["bits per byte"] = [f"{each['val_bits_per_byte']:.4f}" for each in figures]
    rows["greedy tokens/s"] = [f"{tokens_per_second(model, start, tokens):,.0f}" for model in models]
    lines = ["| | teacher | student |", "|---|---:|---:|",
             *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]
    return "\n".join(lines) + (
        f"\n\nKL(teacher || student) is {figures[1]['val_kl']:.4f} nats a token; both hold the same token "
        f"likeliest at {100 * figures[1]['val_agreement']:.1f} % of the places.")


def tokens_per_second(model: GPT, start: list[int], tokens: int) -> float:
    """Of one greedy row, the best of three times; the first tokens warm up."""
    greedy, times = Sampling(temperature=0), []
    list(generate(model, [start], 4, greedy))
    for _ in range(3):
        begin = time.perf_counter()
        list(generate(model, [start], tokens, greedy))
        times.append(time.perf_counter() - begin)
    return tokens / min(times)


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


def continued(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, ends: set[int],
              sampling: Sampling) -> list[str]:
    """What the model writes behind each prompt, to the end of the text or max_new_tokens."""
    ids = [tokenizer.prefix_ids + tokenizer.encode(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in generate(model, ids, max_new_tokens, sampling, lambda row, new: new[-1] in ends,
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


# ---- The page ---------------------------------------------------------------------------------------------

def validation(cfg: CompareConfig, folders: list[Path]) -> tuple[DistillConfig, Mix]:
    """What distill.py would be told, and the data. UserError for rows that one of the models cannot read."""
    shorter = min(hf.read_config(folder)["block_size"] for folder in folders)
    if (cfg.block_size or 0) > shorter:
        raise UserError(f"block_size={cfg.block_size}: one of the models reads no more than {shorter:,}")
    told = DistillConfig(dataset=cfg.dataset, block_size=cfg.block_size or shorter, packing=cfg.packing,
                         micro_batch_size=cfg.batch_size, eval_tokens=cfg.eval_tokens,
                         document_mask=cfg.document_mask)
    return told, Mix(told.dataset, told.block_size, told.seed, row_kind(told))


def load(cfg: CompareConfig, folder: Path, tokenizer: Tokenizer) -> GPT:
    """A model. UserError if its ids are not those of the data."""
    model, own = GPT.from_pretrained(folder, pick_device(cfg.device)).eval(), Tokenizer.load(folder)
    if spelled(own) != spelled(tokenizer) or model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{folder}: its token ids are not those of dataset={cfg.dataset}")
    return model


def page(cfg: CompareConfig, command: str) -> str:
    """The whole of it. UserError where the models, the data or the prompts do not fit together."""
    folders = [hf.find_folder(name) for name in (cfg.teacher, cfg.student)]
    prompts, (told, mix) = read_prompts(cfg.prompts), validation(cfg, folders)
    models = [load(cfg, folder, mix.tokenizer) for folder in folders]
    extent = f"the first {cfg.eval_tokens:,} tokens" if cfg.eval_tokens else "all of them"
    parts = ["# Teacher and student", fenced(command), f"Teacher `{folders[0]}`, student `{folders[1]}`; "
             f"validation rows of {told.block_size:,} tokens of {cfg.dataset}, {extent}; "
             f"{device_name(pick_device(cfg.device))}, float32, torch {torch.__version__}.",
             table(folders, models, told, mix),
             f"## What they write\n\nAt most {cfg.max_new_tokens:,} tokens behind each prompt. Sampled: "
             f"temperature {cfg.temperature}, seed {cfg.seed}."]
    ends = {mix.tokenizer.eot_id, *(i for folder in folders for i in hf.end_ids(folder))}
    written = {name: [continued(model, mix.tokenizer, prompts, cfg.max_new_tokens, ends, sampling)
                      for model in models]
               for name, sampling in (("greedy", Sampling(temperature=0)), ("sampled", cfg))}
    for number, prompt in enumerate(prompts):
        rows = [beside(name, [texts[number] for texts in both]) for name, both in written.items()]
        parts += [fenced(prompt), "\n".join(["<table>", "<tr><th></th><th>teacher</th><th>student</th></tr>",
                                             *rows, "</table>"])]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    cfg, _ = configure(CompareConfig, argv, usage=__doc__)
    if not cfg.out and not Path(cfg.student).is_dir():
        raise UserError(f"student={cfg.student}: is no folder here; say where the page goes with --out=")
    out = Path(cfg.out) if cfg.out else Path(cfg.student) / "compare.md"
    text = page(cfg, " ".join(["python -m tools.compare", *argv]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(text.partition("\n\n## ")[0], f"{out}: written", sep="\n\n")
    return 0


if __name__ == "__main__":
    run_script(main)
