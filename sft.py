"""Stage 3, supervised fine-tuning: a base model learns to answer, from conversations.

    python sft.py                                        # out/base learns the embedded problems -> out/sft
    python sft.py --dataset=chats:0.5,code:0.25,math:0.25 --out_dir=out/mine
    python sft.py config/sft_lora.py --dataset=chats     # an adapter for an open model
    python sft.py --init_from=out/base --lora_rank=16 --learning_rate=2e-3 --out_dir=out/lora
    python sample.py --model=out/sft --chat=True

Reads folders that `prepare.py --kind=chat --tokenizer=<init_from>` makes; the embedded problems are made
here. Writes out_dir as train.py does; its checkpoints carry the chat template. Only the assistant's tokens
are trained on. Several conversations are packed into a row, and none of them sees another:

    row       <user> 2+2? <assistant> 4 <end>   <user> Capital of France? <assistant> Paris <end>
    trained   .      .    .           4 <end>   .      .       .  .       .           Paris <end>

With --lora_rank the model's weights are frozen, and a checkpoint is an adapter in PEFT's format
(training/lora.py). With --quantize_base=nf4 the frozen weights are kept in 4 bits (QLoRA).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from configurator import run_script
from dataset.chat_rows import ChatRows, UnpackedChatRows, chat_batch
from evals.all_tasks import with_tasks
from generation.samples import print_answers
from loop import fit, start_run
from model import GPT
from prepare import prepare_problems
from training.finetuning import PostTrainingConfig, chat_model, finish, require_context
from training.losses import linear_cross_entropy
from training.staged_data import MixEvaluation, StagedData, chat_rows_text, prepare_default
from training.stages import configure_run


@dataclass(frozen=True, kw_only=True)
class SFTConfig(PostTrainingConfig):
    """The keys of a run, of an adapter, and of fine-tuning."""

    out_dir: str = "out/sft"  # folder for checkpoints and logs; the same command again continues the run
    dataset: str = "problems_chat"  # folders under data/ (or paths), mixed by weight: a:0.5,b:0.25,c:0.25
    max_steps: int = 800  # optimizer steps; if stages are listed, the sum of their steps counts instead
    eval_interval: int = 400  # steps between evaluations; 0 evaluates only at the end of each stage
    save_interval: int = 400  # steps between checkpoints; 0 saves only at the end of each stage
    packing: bool = True  # pack several conversations into a row; none sees another. False: one per row
    overlong: Literal["cut", "drop"] = "cut"  # cut conversations at block_size, or leave them out

    stage_fixed = PostTrainingConfig.stage_fixed | {"packing", "overlong"}


# ---- Data -------------------------------------------------------------------------------------------------

def batches_at(data: StagedData[SFTConfig], step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    cfg, mix, first, count = data.shard_for_step(step)
    rows = mix.samples(first, count)  # (count, 3, T): inputs, targets, conversation numbers
    # Micro-batches differ in their number of targets. The loop divides by the count of the whole step.
    return [chat_batch(micro) for micro in np.split(rows, count // cfg.micro_batch_size)]


# ---- Loss -------------------------------------------------------------------------------------------------

def loss_fn(model: nn.Module, batch: dict[str, Any], vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over the assistant's tokens."""
    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # Only these positions predict a token of an answer, so only they need logits.
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # (B, T, C) -> (targets, C)
        return linear_cross_entropy(hidden, weight, batch["targets"], vocab_size)

    # document_ids numbers the conversations of a row: attention stays within each of them.
    loss, nll = model(batch["input_ids"], document_ids=batch["document_ids"], head=head)  # scalars
    return loss, {"loss": nll}


# ---- Evaluation -------------------------------------------------------------------------------------------

class ChatEvaluation(MixEvaluation[SFTConfig]):
    """Loss and perplexity of the validation conversations: the weighted mean over a mix's folders."""

    def __call__(self, model: GPT, last: bool) -> dict[str, float]:
        print_answers(self.run, model, self.mix.tokenizer, self.rows[0], self.cfg.sample_answers)
        means = self.means(lambda rows: self.values(model, rows))
        return means | {"val_perplexity": math.exp(min(means["val_loss"], 700))}

    def values(self, model: nn.Module, rows: ChatRows) -> dict[str, float]:
        """Nats per target over one folder's validation rows; the ranks share the work."""
        def measure(batch: dict[str, Any]) -> tuple[Tensor, int]:
            return loss_fn(model, batch, self.mix.tokenizer.vocab_size)[1]["loss"], batch["count"]

        nats, targets = self.sums(rows, lambda numbers: chat_batch(rows.read(numbers)), measure)
        return {"val_loss": nats / targets}


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure_run(SFTConfig, argv, usage=__doc__)
    with start_run(cfg) as run:
        # Data: the embedded problems are tokenized for this model.
        require_context(cfg)
        prepare_default(cfg, run, "problems_chat", lambda: prepare_problems("chat", cfg.init_from))
        # Packing fills rows with whole conversations; without it most of a row is padding.
        kind = partial(ChatRows if cfg.packing else UnpackedChatRows, overlong=cfg.overlong)
        data = StagedData(cfg, kind, run.rank, run.world_size)
        run.tokenizer = data.tokenizer  # the base's, plus the chat tokens; saved with every checkpoint
        # Do all checks first: with overwrite=True, write_run_json deletes the old run.
        model, identity = chat_model(cfg, data.tokenizer, run)
        evaluation = ChatEvaluation(data.stages[-1].cfg, data.last_mix, kind, run)
        evaluate = with_tasks(cfg, run, evaluation)
        run.write_run_json(cfg, data.tokens(), data=data.hashes(), **identity)
        for rows in [*(rows for rows, _ in data.used()), *evaluation.rows]:
            run.print(chat_rows_text(rows, "; --overlong=drop leaves them out"))
        # Train. With an adapter, everything else is frozen. The lambdas bind arguments that the loop does not
        # know.
        results = fit(data.cfg, model, lambda step: batches_at(data, step),
                      lambda module, batch: loss_fn(module, batch, data.tokenizer.vocab_size),
                      evaluate, run)
        finish(cfg, run, results, "loss {val_loss:.4f}, perplexity {val_perplexity:.2f}",
               f"python sample.py --model={run.quoted} --chat=True", run.next_stage("dpo.py", "out/sft"))


if __name__ == "__main__":
    run_script(main)
