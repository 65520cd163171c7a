"""How many key/value heads does a model need? Memory of the cache, decoding speed, and loss.

    python -m bench.gqa --seeds=3 --json=docs/results/gqa.json

Trains models with 8 query heads and 8, 4, 2 and 1 key/value heads (GQA, arXiv 2305.13245; 1 is MQA) on the
standard library. Then it decodes greedily with untrained models of width 256 and 4 layers after prompts of
448 tokens, with 1, 16 and 64 rows. Speeds are tokens per second of CPU time, the median of the rounds, in
which the variants take turns. Finished runs in out_dir are kept.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.measure import text_table
from configurator import configure, require_positive, run_script
from formats.files import read_json, write_json
from generation.generate import Sampling, generate
from model import GPT, GPTConfig
from tools.arms import mean_and_range, run_arms, run_once

HEADS, ROWS, PROMPT, NEW = (8, 4, 2, 1), (1, 16, 64), 448, 12
ARGV = ["--n_layer=2", "--n_embd=96", "--head_dim=16", "--n_head=8", "--intermediate_size=256",
        "--block_size=64", "--max_steps=150", "--sample_tokens=0", "--save_interval=0", "--eval_interval=0",
        "--eval_tokens=32768", "--log_interval=50", "--device=cpu"]


@dataclass(frozen=True, kw_only=True)
class GqaConfig:
    seeds: int = 3  # trained models per number of heads, with seeds 1, 2, ..
    rounds: int = 3  # turns of the timing
    out_dir: str = "out/gqa"  # folder for the models and the speeds
    json: str | None = None  # write the results to this file

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "rounds")


def decoding_speed(heads: int, rows: int) -> float:
    """Tokens per second of CPU time, without the first token, which reads the prompts."""
    model = GPT(GPTConfig(n_layer=4, n_head=8, n_kv_head=heads, n_embd=256, block_size=512)).eval()
    prompts = torch.randint(4096, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    steps = generate(model, prompts, NEW + 1, Sampling(temperature=0))
    next(steps)
    begin = time.process_time()
    list(steps)
    return rows * NEW / (time.process_time() - begin)


def cache_bytes(heads: int) -> int:
    """Bytes of the cache per token of context, in float32, of the model that is timed."""
    return 2 * 4 * heads * 32 * 4  # keys and values, layers, heads, head_dim, bytes


def main(argv: list[str]) -> int:
    cfg, _ = configure(GqaConfig, argv, usage=__doc__)
    file = Path(cfg.out_dir) / "speeds.json"
    if not file.is_file():
        turns = [{f"{heads}/{rows}": decoding_speed(heads, rows) for rows in ROWS for heads in HEADS}
                 for _ in range(cfg.rounds)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {key: [turn[key] for turn in turns] for key in turns[0]})
    speeds = read_json(file)
    logs = run_arms({str(heads): lambda seed, heads=heads: run_once(
        "train.py", [*ARGV, f"--n_kv_head={heads}", f"--seed={seed}"], Path(cfg.out_dir) / f"{heads}_{seed}",
        steps=150, threads=1) for heads in HEADS}, range(1, cfg.seeds + 1))
    losses = {heads: [log[-1]["val_loss"] for log in each] for heads, each in logs.items()}
    rows = [[str(heads), f"{cache_bytes(heads):,}", *(f"{statistics.median(speeds[f'{heads}/{rows}']):,.0f}"
                                                 for rows in ROWS),
             mean_and_range(losses[str(heads)]),
             f"{statistics.mean(losses[str(heads)]) - statistics.mean(losses['8']):+.3f}"] for heads in HEADS]
    print(text_table(["k/v heads", "cache bytes/token", *(f"tok/s, {rows} rows" for rows in ROWS), "val loss",
                      "- 8 heads"], rows))
    if cfg.json:
        write_json(Path(cfg.json), {"speeds": speeds, "losses": losses, "torch": torch.__version__})
    return 0


if __name__ == "__main__":
    run_script(main)
