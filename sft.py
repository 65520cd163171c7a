"""Stage 3, supervised fine-tuning: a base model learns to answer, from conversations.

    python sft.py                                        # out/base learns the embedded problems -> out/sft
    python sft.py --dataset=chats:0.5,code:0.25,math:0.25 --out_dir=out/mine
    python sft.py config/sft_lora.py --dataset=chats     # an open model, with the rates that suit it
    python sft.py --init_from=out/base --lora_rank=16 --learning_rate=2e-3
    python sample.py --model=out/sft --chat=True

Reads folders that `prepare.py --kind=chat --tokenizer=<init_from>` makes (that of the embedded problems is
made here). Writes out_dir as train.py does; its checkpoints carry the chat template. Only what the assistant
says is trained on. Conversations are packed into rows and do not see each other. With --lora_rank the weights
stay as they are, and a checkpoint is an adapter in PEFT's format (training/lora.py); with --quantize_base=nf4
they stay in 4 bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configurator import configure, run_script
from dataset.chat_rows import ChatRows, UnpackedChatRows, chat_batch
from dataset.dataloader import Mix, validation_batches, validation_rows
from loop import Run, fit, stage_configs, start_run
from modeling.devices import to_device
from prepare import prepare_problems
from training.finetuning import PostTrainingConfig, chat_model, write_merged
from training.losses import linear_cross_entropy
from training.staged_data import StagedData, in_epochs


@dataclass(frozen=True, kw_only=True)
class SFTConfig(PostTrainingConfig):
    """A run's keys, an adapter's keys, and those of fine-tuning."""

    out_dir: str = "out/sft"  # checkpoints and logs go here; the same command again continues the run
    dataset: str = "problems_chat"  # folders under data/ (or paths), mixed by weight: a:0.5,b:0.25,c:0.25
    max_steps: int = 800  # optimizer steps; where stages are listed, their sum counts instead
    eval_interval: int = 400  # steps between evaluations; 0: only at the end of a stage
    save_interval: int = 400  # steps between checkpoints; 0: only at the end of a stage
    packing: bool = True  # several conversations a row, each for itself; False: one a row

    stage_fixed = PostTrainingConfig.stage_fixed | {"packing"}


def loss_fn(model: nn.Module, batch: dict[str, Any], vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over what the assistant says; logits are computed there and nowhere else."""
    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # (targets, C)
        return linear_cross_entropy(hidden, weight, batch["targets"], vocab_size)

    loss, nll = model(batch["input_ids"], document_ids=batch["document_ids"], head=head)
    return loss, {"loss": nll}


def batches_at(data: StagedData, step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    cfg, mix, first, count = data.shard_for_step(step)
    return [chat_batch(rows) for rows in np.split(mix.samples(first, count), count // cfg.micro_batch_size)]


class ChatEvaluation:
    """Loss and perplexity of the validation conversations of the last stage's mix, by the weights of it."""

    def __init__(self, cfg: SFTConfig, mix: Mix, kind: Any, run: Run):
        self.cfg, self.mix, self.run = cfg, mix, run
        self.rows = [kind(folder, "val", cfg.block_size) for folder in mix.folders]

    def __call__(self, model: nn.Module, last: bool) -> dict[str, float]:
        loss = sum(weight * self.loss(model, rows)
                   for rows, weight in zip(self.rows, self.mix.weights, strict=True))
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}

    def loss(self, model: nn.Module, rows: Any) -> float:
        """Nats a target over one folder's first cfg.eval_tokens, which the ranks share."""
        run, total = self.run, validation_rows(rows, self.cfg.eval_tokens)
        nll, count = torch.zeros((), device=run.device), 0
        for batch in validation_batches(lambda numbers: chat_batch(rows.read(numbers)), total,
                                        self.cfg.micro_batch_size, run.rank, run.world_size):
            _, metrics = loss_fn(model, to_device(batch, run.device), self.mix.tokenizer.vocab_size)
            if batch["count"]:
                nll += metrics["loss"]
                count += batch["count"]
        nats, targets = run.sum([nll.item(), count])
        return nats / targets


def main(argv: list[str]) -> int:
    cfg, provenance = configure(SFTConfig, argv, usage=__doc__)
    with start_run(cfg, provenance) as run:
        if any(stage.dataset == "problems_chat" for stage in stage_configs(cfg)):  # the embedded default
            run.run_on_rank0(lambda: prepare_problems("chat", cfg.init_from))
        kind = ChatRows if cfg.packing else UnpackedChatRows
        user_cfg, cfg = cfg, in_epochs(cfg, kind)
        data = StagedData(cfg, kind, run.rank, run.world_size)
        run.tokenizer = data.tokenizer
        model = chat_model(cfg, data.tokenizer, run)
        evaluation = ChatEvaluation(data.stages[-1].cfg, data.last_mix, kind, run)
        run.write_run_json(user_cfg, data=data.hashes(), base=model.base_hash)
        for rows in [*(rows for rows, _ in data.used()), *evaluation.rows]:
            run.print(f"data      {rows.data.folder}: {len(rows):,} {rows.split} rows"
                      + f", {rows.left_out:,} conversations left out: no answer in {rows.T} tokens"
                      * bool(rows.left_out))
        results = fit(cfg.frozen_but_adapters(model), model, lambda step: batches_at(data, step),
                      lambda module, batch: loss_fn(module, batch, data.tokenizer.vocab_size),
                      evaluation, run)
        if cfg.merge:
            write_merged(run)
        if results:
            run.print(f"""
validation  loss {results["val_loss"]:.4f}, perplexity {results["val_perplexity"]:.2f}
next        python sample.py --model={run.out_dir} --chat=True
            python eval.py --model={run.out_dir}""")
    return 0


if __name__ == "__main__":
    run_script(main)
