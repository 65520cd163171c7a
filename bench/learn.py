"""Which recipe learns more from the same text: ours, or nanoGPT's own? Equal data, parameters and tokens.

    python -m bench.learn --nanogpt=../nanoGPT --source=input.txt --json=docs/results/learn_shakespeare.json

nanoGPT is a folder of the user's. Its train.py runs in a copy, with the words its README gives for a CPU (4
layers, 4 heads, 128 wide, rows of 64, 12 a step, 2,000 steps; AdamW at 1e-3, cosine). Ours runs train.py with
the default recipe at that size and that context. Both read the same shards of bytes (256 ids and the end of
text), and the same rows of validation text measure both. Further arms: ours with a part of the tokens, which
is also a whole run with a schedule of its own, and ours with one part of the recipe taken back (one seed).
"""

import importlib.util
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import UserError, configure, run_script
from dataset.dataloader import Rows
from dataset.shards import DataFolder
from formats.files import write_json
from model import GPT
from prepare import PrepareConfig, prepare

LAYERS, HEADS, WIDTH, T, STEPS, TOKENS = 4, 4, 128, 64, 2000, 12 * 64 * 2000
# An MLP of 341 would make a Llama block as large as a GPT-2 block: 4 + 8 = 4 + 3 x 341 / 128 squared widths.
OURS = [f"--n_layer={LAYERS}", f"--n_head={HEADS}", f"--n_embd={WIDTH}", "--intermediate_size=344",
        f"--block_size={T}", "--global_batch_size=12", "--micro_batch_size=12", "--sample_tokens=0",
        "--eval_interval=0", "--save_interval=0", "--log_interval=100", "--device=cpu"]
ARMS = {  # name: (share of the tokens, words for train.py)
    "ours": (1.0, []),
    "ours, 0.8 of the tokens": (0.8, []),
    "ours, 0.5 of the tokens": (0.5, []),
    "ours, but AdamW at 1e-3": (1.0, ["--optimizer=adamw", "--learning_rate=1e-3", "--lr_multipliers={}"]),
    "ours, but the table at 1 x": (1.0, ["--lr_multipliers={}"]),
    "ours, but cosine to a tenth": (1.0, ["--schedule=cosine", "--min_lr=6e-4"]),
    "ours, but GPT-2's block": (1.0, ["--position=learned", "--norm=layernorm", "--mlp=gelu", "--bias=all",
                                      f"--intermediate_size={4 * WIDTH}"]),
}


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    nanogpt: str = ""  # nanoGPT's folder
    source: str = "pystdlib"  # the text, as prepare.py takes it
    max_tokens: int = 20_000_000  # of it are read
    eval_tokens: int = 200_000  # validation tokens that measure every arm
    seeds: int = 3  # runs of each arm; those with a part of the recipe taken back run once
    ablate: bool = True  # also run the arms with a part of the recipe taken back
    jobs: int = 2  # runs at a time, one thread each
    json: str | None = None  # also write the figures here

    def __post_init__(self) -> None:
        if not (Path(self.nanogpt) / "train.py").is_file():
            raise UserError(f"nanogpt={self.nanogpt}: must be a folder with nanoGPT's train.py and model.py")


def train_nanogpt(cfg: LearnConfig, data: DataFolder, seed: int, folder: Path) -> dict[str, float]:
    """Its own train.py in a copy, in which only the seed is replaced; its model on our validation rows."""
    shutil.copytree(cfg.nanogpt, folder, ignore=lambda _, names: {"data", ".git", "assets"} & set(names))
    (folder / "data" / "same").mkdir(parents=True)
    for split, shards in data.shards.items():
        np.concatenate(shards).astype(np.uint16).tofile(folder / "data" / "same" / f"{split}.bin")
    script = (folder / "train.py").read_text(encoding="utf-8")
    script = script.replace("manual_seed(1337", f"manual_seed({seed}")
    (folder / "train.py").write_text(script, encoding="utf-8")
    (folder / "data" / "same" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.meta["vocab_size"]}))
    launch([sys.executable, "train.py", "config/train_shakespeare_char.py", "--dataset=same", "--device=cpu",
            "--compile=False", "--eval_iters=20", f"--eval_interval={STEPS}", f"--block_size={T}",
            "--batch_size=12", f"--n_layer={LAYERS}", f"--n_head={HEADS}", f"--n_embd={WIDTH}",
            f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--dropout=0.0",
            "--always_save_checkpoint=True", f"--out_dir={folder / 'out'}"], folder)
    saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # the user's own nanoGPT
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    rows, nats = validation_rows(cfg, data), 0.0
    with torch.no_grad():
        for part in torch.from_numpy(rows).split(64):
            nats += model(part[:, :-1], part[:, 1:].contiguous())[1].item() * len(part)
    return {"val_loss": nats / len(rows), "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": saved["iter_num"] * 12 * T}


def train_ours(cfg: LearnConfig, data: DataFolder, seed: int, folder: Path, arm: str) -> dict[str, float]:
    """Our train.py; its last evaluation reads the same rows."""
    share, words = ARMS[arm]
    launch([sys.executable, "train.py", *OURS, f"--max_steps={round(STEPS * share)}", f"--seed={seed}",
            f"--dataset={data.folder}", f"--out_dir={folder}", f"--eval_tokens={cfg.eval_tokens}", *words],
           Path("."))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"val_loss": events[-1]["val_loss"], "parameters": GPT.from_pretrained(folder).num_parameters(),
            "tokens": events[-2]["tokens"]}


def validation_rows(cfg: LearnConfig, data: DataFolder) -> np.ndarray:
    """The rows that our evaluation reads: (rows, T + 1)."""
    rows = Rows(data, "val", T)
    return rows.read(np.arange(min(len(rows), cfg.eval_tokens // T)))


def launch(words: list[str], folder: Path) -> None:
    """Run a command on one thread. UserError with the end of what it said if it fails."""
    found = subprocess.run(words, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                           text=True)
    if found.returncode:
        raise UserError(f"{' '.join(words[:3])}: exit code {found.returncode}: {found.stderr[-500:]}")


def learn(cfg: LearnConfig, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Every arm with every seed: {arm: [{"val_loss", "parameters", "tokens"}, a dict a seed]}."""
    prepare(PrepareConfig(source=cfg.source, out=str(folder / "data"), vocab_size=257, val_fraction=0.1,
                          max_tokens=cfg.max_tokens))
    data, results = DataFolder(folder / "data"), {}
    with ThreadPoolExecutor(cfg.jobs) as pool:
        waiting = {}
        for seed in range(1, cfg.seeds + 1):
            out = folder / f"nanogpt_{seed}"
            waiting["nanoGPT's README", seed] = pool.submit(train_nanogpt, cfg, data, seed, out)
            for number, arm in enumerate(ARMS):
                if "but" in arm and (seed > 1 or not cfg.ablate):
                    continue
                out = folder / f"ours_{number}_{seed}"
                waiting[arm, seed] = pool.submit(train_ours, cfg, data, seed, out, arm)
        for (arm, seed), run in waiting.items():
            results.setdefault(arm, []).append({"seed": seed, **run.result()})
            print(f"{arm:30} seed {seed}: {results[arm][-1]['val_loss']:.4f}", flush=True)
    return results


def report(results: dict[str, list[dict[str, float]]]) -> str:
    """A line an arm: mean loss in nats a byte, lowest to highest, and what that is beside nanoGPT's."""
    baseline = statistics.mean(run["val_loss"] for run in results["nanoGPT's README"])
    lines = [f"{'':30} {'parameters':>11} {'tokens':>10} {'val loss':>9} {'(min - max)':>17} "
             f"{'- nanoGPT':>10}"]
    for arm, runs in results.items():
        losses = [run["val_loss"] for run in runs]
        spread = f"({min(losses):.4f} - {max(losses):.4f})"
        mean = statistics.mean(losses)
        lines.append(f"{arm:30} {runs[0]['parameters']:11,} {runs[0]['tokens']:10,} {mean:9.4f} {spread:>17} "
                     f"{mean - baseline:+10.4f}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    cfg, _ = configure(LearnConfig, argv, usage=__doc__)
    with tempfile.TemporaryDirectory() as name:
        results: dict[str, Any] = learn(cfg, Path(name))
    print(report(results))
    if cfg.json:
        write_json(Path(cfg.json), {"command": f"python -m bench.learn {' '.join(argv)}",
                                    "torch": torch.__version__, "arms": results})
    return 0


if __name__ == "__main__":
    run_script(main)
