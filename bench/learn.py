"""Which recipe learns more from the same text, ours or nanoGPT's? Equal data, parameters and tokens.

    python -m bench.learn --nanogpt=../nanoGPT --source=input.txt --json=docs/results/learn_shakespeare.json

nanoGPT is a folder of the user. Its train.py runs in a copy, with the arguments that its README gives for a
CPU (4 layers, 4 heads, width 128, rows of 64 tokens, 12 rows per step, 2,000 steps; AdamW at 1e-3, cosine).
Ours is train.py with the default recipe at that size and context. Both read the same shards of bytes (256 ids
and the end of text), and both are measured on the same rows of validation text. Further arms: ours with fewer
tokens (a complete run with its own schedule), and ours with one part of the recipe taken back (one seed).
"""

import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.measure import run_benchmark, text_table
from bench.peers import run_nanogpt
from configurator import UserError, run_script
from dataset.dataloader import Rows
from dataset.shards import DataFolder
from model import GPT
from prepare import PrepareConfig, prepare
from tools.arms import mean_and_range, run_arms, run_once

LAYERS, HEADS, WIDTH, T, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
EVAL_TOKENS = 200_000  # validation tokens that every arm is measured on
NANOGPT = "nanoGPT's README"
THEIR_ARGV = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
              "--eval_iters=20", f"--eval_interval={STEPS}", f"--block_size={T}", f"--batch_size={BATCH}",
              f"--n_layer={LAYERS}", f"--n_head={HEADS}", f"--n_embd={WIDTH}", f"--max_iters={STEPS}",
              f"--lr_decay_iters={STEPS}", "--dropout=0.0", "--always_save_checkpoint=True"]
# An MLP of width 341 makes a Llama block as large as a GPT-2 block: 4 + 8 = 4 + 3 x 341 / 128 squared widths.
OUR_ARGV = [f"--n_layer={LAYERS}", f"--n_head={HEADS}", f"--n_embd={WIDTH}", "--intermediate_size=344",
            f"--block_size={T}", f"--global_batch_size={BATCH}", f"--micro_batch_size={BATCH}",
            "--sample_tokens=0", "--eval_interval=0", "--save_interval=0", "--log_interval=100",
            "--device=cpu"]
ARMS = {  # {name: (share of the tokens, arguments of train.py)}
    "ours": (1.0, []),
    "ours, 0.8 of the tokens": (0.8, []),
    "ours, 0.5 of the tokens": (0.5, [])}
ABLATIONS = {
    "ours, but AdamW at 1e-3": (1.0, ["--optimizer=adamw", "--learning_rate=1e-3", "--lr_multipliers={}"]),
    "ours, but the table at 1 x": (1.0, ["--lr_multipliers={}"]),
    "ours, but cosine to a tenth": (1.0, ["--schedule=cosine", "--min_lr=6e-4"]),
    "ours, but GPT-2's block": (1.0, ["--position=learned", "--norm=layernorm", "--mlp=gelu", "--bias=all",
                                      f"--intermediate_size={4 * WIDTH}"])}


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    nanogpt: str = ""  # nanoGPT's folder
    source: str = "pystdlib"  # the text, in any form that prepare.py reads, of which 20 M tokens are used
    seeds: int = 3  # runs per arm; ablations run once
    ablate: bool = True  # also run the arms with one part of the recipe taken back
    jobs: int = 2  # runs at a time, with one thread each
    json: str | None = None  # also write the results to this file

    def __post_init__(self) -> None:
        if not (Path(self.nanogpt) / "train.py").is_file():
            raise UserError(f"nanogpt={self.nanogpt}: must be a folder with nanoGPT's train.py and model.py")


def train_nanogpt(cfg: LearnConfig, data: DataFolder, seed: int) -> dict[str, float]:
    """Run nanoGPT's own train.py, and measure its model as ours."""
    _, model = run_nanogpt(cfg.nanogpt, data, THEIR_ARGV, data.meta["vocab_size"], seed)
    return {"val_loss": nanogpt_loss(model, data), "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": STEPS * BATCH * T}


@torch.no_grad()
def nanogpt_loss(model: torch.nn.Module, data: DataFolder) -> float:
    """Mean loss of a nanoGPT model in nats per token, on the rows that train.py evaluates."""
    rows = Rows(data, "val", T)
    ids = torch.from_numpy(rows.read(np.arange(min(len(rows), EVAL_TOKENS // T))))  # (n, T + 1)
    nats = sum(model(part[:, :-1], part[:, 1:].contiguous())[1].item() * len(part) for part in ids.split(64))
    return nats / len(ids)


def train_ours(data: DataFolder, folder: Path, arm: tuple[float, list[str]], seed: int) -> dict[str, float]:
    """Run our train.py; its last evaluation reads the same rows."""
    share, argv = arm
    log = run_once("train.py", [*OUR_ARGV, f"--max_steps={round(STEPS * share)}", f"--seed={seed}",
                                f"--dataset={data.folder}", f"--eval_tokens={EVAL_TOKENS}", *argv],
                   folder, threads=1)
    return {"val_loss": log[-1]["val_loss"], "parameters": GPT.from_pretrained(folder).num_parameters(),
            "tokens": log[-2]["tokens"]}


def measure(cfg: LearnConfig) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Train every arm with every seed: {arm: [{"seed", "val_loss", "parameters", "tokens"} per seed]}."""
    with tempfile.TemporaryDirectory() as scratch:
        prepare(PrepareConfig(source=cfg.source, out=f"{scratch}/data", vocab_size=257, val_fraction=0.1,
                              max_tokens=20_000_000))
        data = DataFolder(f"{scratch}/data")

        def run(name: str, seed: int) -> dict[str, float]:
            folder, arm = Path(scratch) / f"{name}_{seed}", (ARMS | ABLATIONS).get(name)
            result = train_ours(data, folder, arm, seed) if arm else train_nanogpt(cfg, data, seed)
            print(f"{name:30} seed {seed}: {result['val_loss']:.4f}", flush=True)
            return {"seed": seed, **result}

        results = run_arms({name: partial(run, name) for name in [NANOGPT, *ARMS]}, range(1, cfg.seeds + 1),
                           cfg.jobs)
        if cfg.ablate:
            results |= run_arms({name: partial(run, name) for name in ABLATIONS}, [1], cfg.jobs)
    return {"arms": results}


def report(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """One line per arm: mean loss in nats per byte with its range, and the difference to nanoGPT's mean."""
    arms = results["arms"]
    means = {arm: statistics.mean(run["val_loss"] for run in runs) for arm, runs in arms.items()}
    return text_table(
        ["", "parameters", "tokens", "val loss (min - max)", "- nanoGPT"],
        [[arm, f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}",
          mean_and_range([run["val_loss"] for run in runs], 4), f"{means[arm] - means[NANOGPT]:+.4f}"]
         for arm, runs in arms.items()])


def main(argv: list[str]) -> int:
    run_benchmark("bench.learn", LearnConfig, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
