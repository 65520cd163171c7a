"""Look at what the heads of a model attend to in one text: a picture, and two numbers per layer.

    python -m tools.attention --model=out/base --prompt="def add(a, b): return a + b" --layer=1 --head=2
    python -m tools.attention --model=path/to/Qwen3-0.6B --prompt_file=book.txt --out=book.png

The picture has every head of every layer (rows are queries, columns are keys, both from the first token), one
head in detail with its tokens, and two curves over the layers: the mean distance from a query to what it
attends to, in tokens, and the sink mass, which is the share that queries give to the first 4 tokens
(arXiv 2309.17453 found it above one half in most layers of large models). Queries among these 4 do not count
for the sink mass.

A long text is drawn in blocks of tokens: a cell is the share that a query of the block gives to all keys of
the other block, on average. So each row of cells sums to 1. With a learned sink logit (modeling/sinks.py) the
rest of the row went to nothing. A text is cut to its first block_size tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from configurator import UserError, configure, require, run_script
from formats import hf
from formats.tokenizer import Tokenizer
from model import GPT

SINKS = 4  # first tokens that count as sinks
TILE, DETAIL = 32, 40  # cells of one head along each axis: among all heads, and in detail


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    model: str = "out/base"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    prompt: str = "import os\n\ndef main(path):\n    return os.listdir(path)\n"  # the text to look at
    prompt_file: str | None = None  # read the text from this file
    layer: int = 0  # layer that is shown in detail, from 0
    head: int = 0  # head that is shown in detail, from 0
    out: str = "attention.png"  # the picture's file


@torch.inference_mode()
def look(model: GPT, ids: list[int], visit: Callable[[int, int, Tensor], None]) -> None:
    """Call visit(layer, head, weights) for every head; weights (T, T) float32: queries, keys."""
    T = len(ids)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def hook(layer: int, module: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
        for head in range(q.shape[1]):  # one at a time, because (H, T, T) may not fit into memory
            keys = k[0, head * k.shape[1] // q.shape[1]].float()  # (T, D)
            scores = (q[0, head].float() @ keys.T / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
            logit = torch.full((T, 1), -torch.inf if module.sinks is None else float(module.sinks[head]))
            visit(layer, head, torch.cat((scores, logit), dim=1).softmax(dim=1)[:, :T])

    for layer, block in enumerate(model.model["layers"]):
        block.self_attn.register_qkv_hook(partial(hook, layer))
    model(torch.tensor([ids]), head=lambda hidden, weight: None)


def edges(length: int, most: int) -> np.ndarray:
    """The first token of each of at most `most` blocks of nearly equal size."""
    return np.linspace(0, length, min(length, most) + 1).astype(int)[:-1]


def block_means(weights: np.ndarray, most: int) -> np.ndarray:
    """Weights (T, T) -> (n, n), n <= most: the mean over the queries of a block, the sum over its keys."""
    firsts = edges(len(weights), most)
    sizes = np.diff([*firsts, len(weights)])
    return np.add.reduceat(np.add.reduceat(weights, firsts, 1), firsts, 0) / sizes[:, None]


def distance_and_sink_mass(weights: Tensor) -> tuple[float, float]:
    """The mean distance from query to key, in tokens, and the mean share on the first SINKS tokens."""
    place = torch.arange(len(weights)).float()
    distance = (weights * (place[:, None] - place)).sum(1) / weights.sum(1)  # (T,)
    return float(distance.mean()), float(weights[SINKS:, :SINKS].sum(1).mean())


def draw(tiles: np.ndarray, numbers: np.ndarray, detail: np.ndarray, labels: list[str],
         cfg: AttentionConfig) -> Figure:
    """tiles: (L, H, n, n). numbers: (L, H, 2), distance and sink mass. detail: (m, m), with m labels."""
    L, H, n, _ = tiles.shape
    figure = Figure(figsize=(15, 12), layout="constrained")
    axes = figure.subplot_mosaic([["heads", "one"], ["distance", "sinks"]], height_ratios=[2, 1])
    style = {"cmap": "magma", "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    wall = padded.transpose(0, 2, 1, 3).reshape(L * (n + 1), H * (n + 1))  # all heads in one image
    axes["heads"].imshow(wall, aspect="auto", **style)
    axes["heads"].set(title="All heads", xlabel="head", ylabel="layer")
    axes["heads"].set_xticks(np.arange(H) * (n + 1) + n / 2, range(H))
    axes["heads"].set_yticks(np.arange(L) * (n + 1) + n / 2, range(L))
    image = axes["one"].imshow(detail, **style)
    axes["one"].set(title=f"Layer {cfg.layer}, head {cfg.head}", xlabel="key", ylabel="query")
    axes["one"].set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
    axes["one"].set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    figure.colorbar(image, ax=axes["one"], label="share of the query's attention", shrink=0.8)
    names = "mean distance (tokens)", f"share on the first {SINKS} tokens"
    for curve, name, values in zip((axes["distance"], axes["sinks"]), names, numbers.transpose(2, 0, 1),
                                   strict=True):
        curve.plot(values, "k.", alpha=0.4)  # (L, H)
        curve.plot(values.mean(1), label="mean of the heads (points)")
        curve.set(xlabel="layer", ylabel=name, ylim=(0, None), xticks=range(0, L, 1 + L // 16))
        curve.grid(alpha=0.3)
        curve.legend()
    return figure


def main(argv: list[str]) -> None:
    cfg, _ = configure(AttentionConfig, argv, usage=__doc__)
    folder = hf.find_folder(cfg.model)
    tokenizer, model = Tokenizer.load(folder), GPT.from_pretrained(folder).eval()
    L, H = model.config.n_layer, model.config.n_head
    require(cfg, "out", cfg.out.endswith(".png"), "the name of a picture, such as attention.png")
    require(cfg, "layer", 0 <= cfg.layer < L, f"from 0 to {L - 1}")
    require(cfg, "head", 0 <= cfg.head < H, f"from 0 to {H - 1}")
    text = Path(cfg.prompt_file).read_text("utf-8", "replace") if cfg.prompt_file else cfg.prompt
    ids = (tokenizer.prefix_ids + tokenizer.encode(text))[:model.config.block_size]
    if len(ids) <= SINKS:
        raise UserError(f"{cfg.prompt_file or 'prompt'}: {len(ids)} tokens; needs at least {SINKS + 1}")
    n, m = min(len(ids), TILE), min(len(ids), DETAIL)
    tiles, numbers, detail = np.zeros((L, H, n, n)), np.zeros((L, H, 2)), np.zeros((m, m))

    def visit(layer: int, head: int, weights: Tensor) -> None:
        tiles[layer, head] = block_means(weights.numpy(), TILE)
        numbers[layer, head] = distance_and_sink_mass(weights)
        if (layer, head) == (cfg.layer, cfg.head):
            detail[:] = block_means(weights.numpy(), DETAIL)

    look(model, ids, visit)
    labels = [f"from {first:,}" for first in edges(len(ids), DETAIL)] if len(ids) > DETAIL else [
        tokenizer.decode([i], inside=True).replace("\n", "\\n").replace(" ", "\u00b7")[:14] for i in ids]
    draw(tiles, numbers, detail, labels, cfg).savefig(cfg.out, dpi=100)
    for layer, (distance, mass) in enumerate(numbers.mean(1)):
        print(f"layer {layer:2}  mean distance {distance:8.1f} tokens  first {SINKS} tokens {mass:.3f}")
    print(f"picture   {cfg.out}")


if __name__ == "__main__":
    run_script(main)
