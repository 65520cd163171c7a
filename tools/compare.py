"""Compare a teacher and its student on one Markdown page: size, loss, speed, agreement, and what they write.

    python -m tools.compare out/base out/distilled       # the teacher, then the student
    python -m tools.compare --teacher=out/base --student=out/free --prompts=prompts.txt --out=compare.md

The losses are those of distill.py's log, if block_size, eval_tokens, packing and document_mask are the same.
Speed is that of one greedy row, the best of three runs. Both models must have an architecture of model.py.
Left out: memory, because one process cannot measure it separately for two models.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, configure, require_positive, run_script
from dataset.dataloader import Mix
from distill import DistillConfig, row_kind
from distillation.evaluation import StudentEvaluation
from distillation.student import PROJECTIONS
from distillation.teacher import pieces
from formats import hf
from formats.files import write_text
from formats.markdown import fenced, table
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, complete, generate
from model import GPT
from modeling.devices import device_name, pick_device
from training.run import Run

PROMPTS = ["import os", "def main(", "class Stack:"]
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Sampling):
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    student: str = "out/distilled"  # the same kinds of places
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    prompts: str | None = None  # a text file with one prompt per line; None takes three of Python
    out: str | None = None  # write the page to this file; None is compare.md in the student's folder
    max_new_tokens: int = 100  # most tokens of a continuation
    block_size: int | None = None  # tokens per validation row; None is the shorter of the two contexts
    eval_tokens: int | None = None  # use the first validation tokens only, this many; None uses all
    packing: bool = True  # chats: several conversations per row, each attending to itself only
    document_mask: bool = False  # text: attend within documents only
    batch_size: int = 16  # rows that are read together
    device: str | None = None  # cpu, cuda, mps; None is the best one available

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_new_tokens", "block_size", "eval_tokens", "batch_size")


# ---- Measurements -----------------------------------------------------------------------------------------

def tokens_per_second(model: GPT, start: list[int], tokens: int) -> float:
    """Speed of one greedy row, the best of three runs."""
    times = []
    list(generate(model, [start], 4, GREEDY))  # warm up
    for _ in range(3):
        begin = time.perf_counter()
        list(generate(model, [start], tokens, GREEDY))
        times.append(time.perf_counter() - begin)
    return tokens / min(times)


def comparison(folders: list[Path], models: list[GPT], cfg: DistillConfig, mix: Mix) -> str:
    """The table of measurements, teacher first, and a sentence on how similar the models are."""
    kind, run = row_kind(cfg), Run(Path("."), models[0].head_weight.device)
    teacher, student = models
    with torch.no_grad():
        results = [StudentEvaluation(cfg, mix, kind, None, run)(teacher, last=True),
                   StudentEvaluation(cfg, mix, kind, teacher, run)(student, last=True)]
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != PROJECTIONS)
             for folder in folders]
    start, tokens = mix.tokenizer.prefix_ids or [mix.tokenizer.eot_id], min(128, cfg.block_size)
    rows = [["parameters", *(f"{model.num_parameters():,}" for model in models)],
            ["weights on disk, MB", *(f"{size / 1e6:,.2f}" for size in sizes)],
            ["validation loss, nats per token", *(f"{result['val_loss']:.4f}" for result in results)],
            ["perplexity", *(f"{result['val_perplexity']:,.2f}" for result in results)]]
    if "val_bits_per_byte" in results[0]:  # chats have none
        rows.append(["bits per byte", *(f"{result['val_bits_per_byte']:.4f}" for result in results)])
    rows.append(["greedy tokens/s", *(f"{tokens_per_second(model, start, tokens):,.0f}" for model in models)])
    return table(["", "teacher", "student"], rows, "-rr") + (
        f"\n\nKL(teacher || student) is {results[1]['val_kl']:.4f} nats per token; both models have the same "
        f"most likely token at {100 * results[1]['val_agreement']:.1f} % of the positions.")


# ---- What the models write --------------------------------------------------------------------------------

def read_prompts(path: str | None) -> list[str]:
    """The lines that are not blank. Raises UserError if there is none, or if the file is not UTF-8."""
    try:
        lines = PROMPTS if path is None else Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"prompts={path}: not UTF-8") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path}: no prompts in it")
    return prompts


def writing(cfg: CompareConfig, folders: list[Path], models: list[GPT], tokenizer: Tokenizer,
            prompts: list[str]) -> list[str]:
    """The parts of the page that show what both models write after each prompt."""
    end_ids = {tokenizer.eot_id, *(i for folder in folders for i in hf.end_ids(folder))}
    texts = {f"{name}, {how}": complete(model, tokenizer, prompts, cfg.max_new_tokens, sampling, end_ids)
             for how, sampling in (("greedy", GREEDY), ("sampled", cfg))
             for name, model in zip(("Teacher", "Student"), models, strict=True)}
    parts = [f"## What they write\n\nAt most {cfg.max_new_tokens:,} tokens after each prompt. Sampled: "
             f"temperature {cfg.temperature}, seed {cfg.seed}."]
    for number, prompt in enumerate(prompts):
        parts += [f"### Prompt {number + 1}", fenced(prompt)]
        for name, written in texts.items():
            parts += [f"{name}:", fenced(written[number])]
    return parts


# ---- The page ---------------------------------------------------------------------------------------------

def validation_data(cfg: CompareConfig, folders: list[Path]) -> tuple[DistillConfig, Mix]:
    """The config of a distill.py run with these settings, and its data. Raises UserError if the rows are
    longer than a model's context."""
    shorter = min(hf.read_config(folder)["block_size"] for folder in folders)
    if (cfg.block_size or 0) > shorter:
        raise UserError(f"block_size={cfg.block_size}: one of the models has a context of {shorter:,} tokens")
    run_cfg = DistillConfig(dataset=cfg.dataset, block_size=cfg.block_size or shorter, packing=cfg.packing,
                            micro_batch_size=cfg.batch_size, eval_tokens=cfg.eval_tokens,
                            document_mask=cfg.document_mask)
    return run_cfg, Mix(run_cfg.dataset, run_cfg.block_size, run_cfg.seed, row_kind(run_cfg))


def load(cfg: CompareConfig, folder: Path, tokenizer: Tokenizer) -> GPT:
    """The model of a folder. Raises UserError if its token ids are not those of the data."""
    model, own = GPT.from_pretrained(folder, pick_device(cfg.device)).eval(), Tokenizer.load(folder)
    if pieces(own) != pieces(tokenizer) or model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{folder}: its token ids are not those of dataset={cfg.dataset}; name its "
                        "own with --dataset=")
    return model


def page(cfg: CompareConfig, command: str) -> str:
    """The whole page. Raises UserError if the models, the data or the prompts do not fit together."""
    folders = [hf.find_folder(name) for name in (cfg.teacher, cfg.student)]
    prompts, (run_cfg, mix) = read_prompts(cfg.prompts), validation_data(cfg, folders)
    models = [load(cfg, folder, mix.tokenizer) for folder in folders]
    extent = f"the first {cfg.eval_tokens:,} tokens" if cfg.eval_tokens else "all of them"
    parts = ["# Teacher and student", fenced(command),
             f"Teacher `{folders[0]}`, student `{folders[1]}`; validation rows of {run_cfg.block_size:,} "
             f"tokens of {cfg.dataset}, {extent}; {device_name(pick_device(cfg.device))}, float32, torch "
             f"{torch.__version__}.",
             comparison(folders, models, run_cfg, mix),
             *writing(cfg, folders, models, mix.tokenizer, prompts)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    # Two arguments without -- are the models; a name that ends in .py is a config file.
    folders = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    if len(folders) not in (0, 2):
        raise UserError("name two models: python -m tools.compare TEACHER STUDENT")
    models = [f"--{key}={folder}" for key, folder in zip(("teacher", "student"), folders, strict=False)]
    cfg, _ = configure(CompareConfig, [*models, *(arg for arg in argv if arg not in folders)], usage=__doc__)
    if not cfg.out and not Path(cfg.student).is_dir():
        raise UserError(f"student={cfg.student}: not a folder here; give the place of the page with --out=")
    out = Path(cfg.out) if cfg.out else Path(cfg.student) / "compare.md"
    text = page(cfg, " ".join(["python -m tools.compare", *argv]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(text.partition("\n\n## ")[0], f"{out}: written", sep="\n\n")
    return 0


if __name__ == "__main__":
    run_script(main)
