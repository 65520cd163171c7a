"""Compare a teacher and its student on one Markdown page: size, loss, speed, agreement, and what they write.

    python -m tools.compare out/base out/distilled       # the teacher, then the student
    python -m tools.compare out/base out/free --dataset=books --prompts=prompts.txt --temperature=0

The losses are those of distill.py's log, if its rows are as long as the shorter of the two contexts. Speed is
that of one greedy row, the best of three runs. Both models must have an architecture of model.py.
Left out: memory, because one process cannot measure it separately for two models.
"""

import timeit
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
from formats.files import content_errors, write_text
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
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    prompts: str | None = None  # a text file with one prompt per line; None takes three of Python
    out: str | None = None  # the page; None is compare.md in the student's folder
    max_new_tokens: int = 100  # most tokens of a continuation
    eval_tokens: int | None = None  # use the first validation tokens only, this many; None uses all

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "max_new_tokens", "eval_tokens")


# ---- Measurements -----------------------------------------------------------------------------------------

def tokens_per_second(model: GPT, start: list[int], tokens: int) -> float:
    """Speed of one greedy row, the best of three runs."""
    list(generate(model, [start], 4, GREEDY))  # warm up
    seconds = timeit.repeat(lambda: list(generate(model, [start], tokens, GREEDY)), repeat=3, number=1)
    return tokens / min(seconds)


def comparison(folders: list[Path], models: list[GPT], cfg: DistillConfig, mix: Mix) -> str:
    """The table of measurements, teacher first, and a sentence on how similar the models are."""
    kind, run = row_kind(cfg), Run(Path("."), models[0].head_weight.device)
    teacher, student = models
    with torch.no_grad():
        results = [
            StudentEvaluation(cfg, mix, kind, judge, run, cfg.packing, cfg.document_mask)(model, last=True)
            for model, judge in ((teacher, None), (student, teacher))]
    # A .gguf file is a model, too.
    files = [[folder] if folder.is_file() else folder.glob("*.safetensors") for folder in folders]
    sizes = [sum(path.stat().st_size for path in paths if path.name != PROJECTIONS) for paths in files]
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
    with content_errors(f"prompts={path}", "not text"):
        lines = PROMPTS if path is None else Path(path).read_text("utf-8-sig").split("\n")
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={path}: no prompts in it")
    return prompts


def writing(cfg: CompareConfig, folders: list[Path], models: list[GPT], tokenizer: Tokenizer,
            prompts: list[str]) -> list[str]:
    """The parts of the page that show what both models write after each prompt."""
    end_ids = {tokenizer.eot_id, *(i for folder in folders for i in hf.end_ids(folder))}
    texts = {name: complete(model, tokenizer, prompts, cfg.max_new_tokens, cfg, end_ids)
             for name, model in zip(("Teacher", "Student"), models, strict=True)}
    parts = [f"## What they write\n\nAt most {cfg.max_new_tokens:,} tokens after each prompt, at temperature "
             f"{cfg.temperature}, seed {cfg.seed}."]
    for number, prompt in enumerate(prompts):
        parts += [f"### Prompt {number + 1}", fenced(prompt)]
        for name, written in texts.items():
            parts += [f"{name}:", fenced(written[number])]
    return parts


# ---- The page ---------------------------------------------------------------------------------------------

def load(cfg: CompareConfig, folder: Path, tokenizer: Tokenizer) -> GPT:
    """The model of a folder. Raises UserError if its token ids are not those of the data."""
    model, own = GPT.from_pretrained(folder, pick_device(None)).eval(), Tokenizer.load(folder)
    if pieces(own) != pieces(tokenizer) or model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{folder}: its token ids are not those of dataset={cfg.dataset}; name its "
                        "own with --dataset=")
    return model


def page(cfg: CompareConfig, folders: list[Path], command: str) -> str:
    """The whole page. Raises UserError if the models, the data or the prompts do not fit together."""
    shorter = min(hf.read_config(folder)["block_size"] for folder in folders)
    run_cfg = DistillConfig(dataset=cfg.dataset, block_size=shorter, eval_tokens=cfg.eval_tokens)
    prompts, mix = read_prompts(cfg.prompts), Mix(cfg.dataset, shorter, run_cfg.seed, row_kind(run_cfg))
    models = [load(cfg, folder, mix.tokenizer) for folder in folders]
    extent = f"the first {cfg.eval_tokens:,} tokens" if cfg.eval_tokens else "all of them"
    parts = ["# Teacher and student", fenced(command),
             f"Teacher `{folders[0]}`, student `{folders[1]}`; validation rows of {shorter:,} tokens of "
             f"{cfg.dataset}, {extent}; {device_name(pick_device(None))}, float32, torch "
             f"{torch.__version__}.",
             comparison(folders, models, run_cfg, mix),
             *writing(cfg, folders, models, mix.tokenizer, prompts)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    # Arguments without -- are models here, not config files.
    cfg, _ = configure(CompareConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    models = [arg for arg in argv if not arg.startswith("-")]
    if len(models) != 2:
        raise UserError("name two models: python -m tools.compare TEACHER STUDENT")
    out = Path(cfg.out or Path(models[1]) / "compare.md")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: {out.parent} is no folder; give the place of the page with --out=")
    folders = [hf.find_folder(model) for model in models]
    text = page(cfg, folders, " ".join(["python -m tools.compare", *argv]))
    write_text(out, text)
    print(text.partition("\n\n## ")[0], f"{out}: written", sep="\n\n")


if __name__ == "__main__":
    run_script(main)
