"""The table of model sizes: what each pre-training config makes and takes, as Markdown.

    python -m tools.sizes                                # the defaults and config/train_*.py
    python -m tools.sizes config/train_gpt2_124m.py --n_layer=24

FLOPs are those of the forward and backward pass for one token (`GPT.flops_per_token`). Memory is that of
weights, gradients and AdamW's two moments in float32, 16 bytes a parameter, without activations; FSDP divides
it by the number of GPUs.
"""

from pathlib import Path

import torch

from configurator import configure, run_script
from loop import plan_stages
from model import GPT, GPTConfig
from prepare import PrepareConfig
from train import TrainConfig


def row(argv: list[str]) -> str:
    """The table's line for the run that these words describe. Raises UserError as train.py does."""
    cfg, _ = configure(TrainConfig, argv, usage=__doc__)
    with torch.device("meta"):
        model = GPT(GPTConfig.from_keys(cfg, vocab_size=cfg.vocab_size or PrepareConfig().vocab_size))
    config, parameters = model.config, model.num_parameters()
    tokens = sum((s.last - s.first) * s.cfg.global_batch_size * s.cfg.block_size for s in plan_stages(cfg))
    cells = (" ".join(argv) or "the defaults", f"{parameters / 1e6:,.1f} M", config.n_layer, config.n_embd,
             f"{config.n_head}/{config.n_kv_head}", config.intermediate_size, f"{config.vocab_size:,}",
             f"{config.block_size:,}", f"{tokens / 1e6:,.1f} M", f"{16 * parameters / 1e9:.2f} GB",
             f"{model.flops_per_token(config.block_size) / 1e6:,.0f} M")
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str]) -> int:
    names = ("run", "parameters", "layers", "width", "heads (q/kv)", "MLP", "vocabulary", "context", "tokens",
             "memory", "FLOPs a token")
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    runs = [argv] if argv else [[], *([str(path)] for path in sorted(Path("config").glob("train_*.py")))]
    for words in runs:
        print(row(words))
    return 0


if __name__ == "__main__":
    run_script(main)
