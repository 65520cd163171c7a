"""Stage 4, preference optimisation: learn from pairs of answers, one of which is better.

    python dpo.py                                        # out/sft on the embedded pairs -> out/dpo
    python dpo.py --init_from=out/sft --dataset=pairs --beta=0.1 --out_dir=out/mine
    python dpo.py --loss=ipo --lora_rank=16 --reference=adapter_off --out_dir=out/ipo

Reads folders that `prepare.py --kind=preference --tokenizer=<init_from>` makes; the embedded pairs are made
here. Writes out_dir as train.py does. Batch sizes count pairs. Dropout is off. A pair whose prompt and longer
answer do not fit block_size is left out and counted.

DPO (arXiv 2305.18290) makes the chosen answer likelier than the rejected one, relative to the reference: a
frozen copy of the model at the start. The reference's log-probabilities are computed once, before training,
and stored in the data folder. With ratio = log p(answer) - log p_reference(answer), the loss of a pair is

    -log sigmoid(beta * (ratio of chosen - ratio of rejected)) + nll_weight * (-log p(chosen) per token)

Both answers follow the same prompt, so the prompt is stored and computed only once. A pair is one row of
tokens with two paths through it, and each token attends along its own path:

    row         p0  p1  p2  c0  c1  r0  r1  r2
    chosen      p0  p1  p2  c0  c1                    log p(c0 c1 | p0 p1 p2)
    rejected    p0  p1  p2          r0  r1  r2        log p(r0 r1 r2 | p0 p1 p2)

Left out: sampling new pairs from the model during training.
"""

import hashlib
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, require, require_not_negative, require_positive, run_script
from dataset.chat_rows import PairRows, pair_batch
from dataset.dataloader import Mix, rank_batches, validation_rows
from evals.all_tasks import with_tasks
from formats.files import content_errors, file_sha256, write_bytes
from generation.samples import print_answers
from loop import Run, fit, start_run
from model import GPT
from modeling.devices import pick_dtype, to_device
from prepare import prepare_problems
from training.finetuning import PostTrainingConfig, chat_model, finish, require_context
from training.losses import preference_loss
from training.reference import ReferenceModel, check_reference, token_log_probs
from training.staged_data import MixEvaluation, StagedData, prepare_default
from training.stages import configure_run

ReferenceKind = Literal["precomputed", "device", "cpu", "adapter_off"]  # see Reference


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PostTrainingConfig):
    """The keys of a run, of an adapter, and of preference optimisation."""

    out_dir: str = "out/dpo"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str = "out/sft"  # model folder, out_dir or hub id to start from; also the reference
    dataset: str = "problems_preference"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    max_steps: int = 60  # optimizer steps; if stages are listed, the sum of their steps counts instead
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon trains the blocks' matrices, AdamW everything else
    learning_rate: float = 6e-5  # peak learning rate
    weight_decay: float = 0.0  # weight decay, applied to matrices only
    eval_tokens: int | None = 2**16  # validation tokens per evaluation, always the first ones; None uses all
    loss: Literal["dpo", "ipo"] = "dpo"  # ipo pulls the margin to a fixed target; dpo lets it grow
    beta: float = 0.1  # strength of the pull towards the reference
    nll_weight: float = 10.0  # weight of the chosen answer's per-token NLL, added to the loss; 0 is plain DPO
    label_smoothing: float = 0.0  # assumed share of pairs with swapped answers; only with loss=dpo
    reference: ReferenceKind = "precomputed"  # its log-probabilities: from disk, a second model, or the base

    stage_fixed = PostTrainingConfig.stage_fixed | {"loss", "beta", "nll_weight", "label_smoothing",
                                                    "reference"}
    log_line_without = frozenset({"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        require_not_negative(self, "nll_weight")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5")
        if self.label_smoothing and self.loss == "ipo":
            raise UserError("label_smoothing: only works with loss=dpo")
        check_reference(self, self.reference)


# ---- Loss -------------------------------------------------------------------------------------------------

def answer_log_probs(model: nn.Module, batch: dict[str, Any], vocab_size: int) -> Tensor:
    """log p(answer | prompt), summed over the answer's tokens: (2, n), row 0 chosen and row 1 rejected."""
    log_probs = token_log_probs(model, batch, vocab_size)  # (targets,)
    # The targets are in the order chosen, rejected, chosen, ...: sum each answer's.
    sums = torch.segment_reduce(log_probs, "sum", lengths=batch["lengths"].flatten(), unsafe=True)  # (2n,)
    return sums.view(-1, 2).T  # (2, n)


def loss_fn(model: nn.Module, batch: dict[str, Any], reference: Tensor, cfg: DPOConfig,
            vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the n pairs, and summed metrics. reference: its `answer_log_probs`, (2, n).

    The preference loss looks only at the difference between the answers, so it may make both less likely. The
    second term, the chosen answer's NLL per token, keeps it likely (RPO, arXiv 2404.19733, equation 1).
    """
    log_probs, lengths = answer_log_probs(model, batch, vocab_size), batch["lengths"].T  # (2, n) each
    # How much more likely the policy finds each answer than the reference does, in nats. They start equal, so
    # the ratios start at 0 and the DPO loss at ln 2.
    ratios = log_probs - reference  # (2, n)
    losses = preference_loss(ratios, lengths, cfg.beta, cfg.label_smoothing, cfg.loss)  # (n,)
    # Per token, as in fine-tuning, so that long answers do not count more.
    nll = -log_probs[0] / lengths[0]  # (n,)
    total = (losses + cfg.nll_weight * nll).sum()
    # The reward that a policy implies: equation 5 of the paper, up to a term that all answers share.
    rewards = cfg.beta * ratios.detach()  # (2, n)
    margins = rewards[0] - rewards[1]  # (n,)
    return total, {
        "loss": total, f"loss/{cfg.loss}": losses.sum(), "loss/nll": nll.sum(),
        "rewards/accuracies": (margins > 0).float().sum(), "rewards/margins": margins.sum(),
        "rewards/chosen": rewards[0].sum(), "rewards/rejected": rewards[1].sum(),
        "logps/chosen": log_probs[0].sum(), "logps/rejected": log_probs[1].sum()}


# ---- The reference ----------------------------------------------------------------------------------------

def read_table(path: Path, rows: int) -> np.ndarray:
    """(rows, 2) float32 from a file; all NaN if there is no file. Raises UserError if it is damaged."""
    if not path.is_file():
        return np.full((rows, 2), np.nan, np.float32)
    with content_errors(path, "damaged; delete it, and it is computed again"):
        table = np.load(path, allow_pickle=False)  # a pickle could execute code
        if table.shape != (rows, 2) or table.dtype != np.float32:
            raise ValueError(f"{table.dtype} of shape {table.shape}")
        return table


def save_array(path: Path, table: np.ndarray) -> None:
    """Write a table in one step, because several runs may do so at the same time."""
    content = io.BytesIO()
    np.save(content, table)
    write_bytes(path, content.getvalue())


class Reference:
    """Looks up log p_reference of every answer in a table, or computes it for each batch.

    cfg.reference decides: precomputed fills the table before training; device and cpu keep a second model in
    memory; adapter_off switches the policy's own adapter off, which needs no second model.
    """

    def __init__(self, cfg: DPOConfig, policy: GPT, base: dict[str, str], vocab_size: int, run: Run):
        """base: the identity of the model that the policy starts from. vocab_size: the tokenizer's."""
        self.cfg, self.run, self.base = cfg, run, base
        self.vocab_size, self.dtype = vocab_size, pick_dtype(cfg.dtype, run.device)
        self.frozen = ReferenceModel(policy, cfg.init_from, cfg.reference, run.device, self.dtype)
        self.tables: dict[PairRows, Tensor] = {}  # {rows: their table, (len(rows), 2) float32}

    def compute(self, batch: dict[str, Any]) -> Tensor:
        """(2, n) for a batch, whose tensors may be on any device."""
        def log_probs(model: GPT) -> Tensor:
            return answer_log_probs(model, to_device(batch, model.head_weight.device), self.vocab_size)

        return self.frozen.compute(log_probs)

    def precompute(self, rows: PairRows, indices: np.ndarray) -> None:
        """Fill the table of these rows at `indices`: from the file in the data folder, the rest computed now.

        All ranks share the work, and rank 0 writes the file. NaN marks an entry that no run has needed yet.
        The file's name is a hash of everything that the numbers depend on: the base model, the data,
        block_size, the dtype, and "shared prompt" for the method, because the method affects the last bits.
        """
        identity = (self.base, file_sha256(rows.data.folder / "meta.json"), rows.split, rows.T,
                    str(self.dtype), "shared prompt")
        name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        path = rows.data.folder / f"reference_{name}.npy"
        table = self.run.run_on_rank0(lambda: read_table(path, len(rows)))
        # A longer run, or another seed, needs pairs that earlier runs have not computed.
        missing = indices[np.isnan(table[indices, 0])]
        if len(missing):
            log_probs = np.zeros((len(missing), 2))
            for mine in rank_batches(len(missing), self.cfg.micro_batch_size, self.run.rank,
                                     self.run.world_size):
                if len(mine):
                    batch = pair_batch([rows.pair(number) for number in missing[mine]])
                    log_probs[mine] = self.compute(batch).T.cpu()  # (2, n) -> (n, 2)
            # Each rank has zeros where the others computed, so the sum is everyone's result.
            table[missing] = np.array(self.run.sum(log_probs.flatten().tolist())).reshape(-1, 2)
            self.run.run_on_rank0(lambda: save_array(path, table))
        self.tables[rows] = torch.from_numpy(table)

    def batch(self, pairs: list[tuple[PairRows, int]]) -> dict[str, Any]:
        """The batch of these pairs, given as (rows, number). If precomputed it has "reference" (2, n)."""
        batch = pair_batch([rows.pair(number) for rows, number in pairs])
        # The prefetching thread calls this, so the model itself must not be used here.
        if self.cfg.reference == "precomputed":
            entries = [self.tables[rows][number] for rows, number in pairs]  # (2,) each
            batch["reference"] = torch.stack(entries, dim=1)  # (2, n)
        return batch


def pair_loss(model: nn.Module, batch: dict[str, Any], reference: Reference,
              cfg: DPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_fn` with the reference's log-probabilities from the batch, or computed now."""
    log_probs = batch["reference"] if "reference" in batch else reference.compute(batch)  # (2, n)
    return loss_fn(model, batch, log_probs.to(batch["input_ids"].device), cfg, reference.vocab_size)


# ---- Data and evaluation ----------------------------------------------------------------------------------

def batches_at(data: StagedData[DPOConfig], reference: Reference, step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    cfg, mix, first, count = data.shard_for_step(step)
    # Pairs have no fixed length, so the mix only gives their numbers.
    pairs = [(mix.rows[folder], number) for folder, number in zip(*mix.locate(first, count), strict=True)]
    size = cfg.micro_batch_size
    return [reference.batch(pairs[start:start + size]) for start in range(0, count, size)]


class PreferenceEvaluation(MixEvaluation[DPOConfig]):
    """Losses, accuracy and margin over the validation pairs of the last stage's mix."""

    def __init__(self, cfg: DPOConfig, mix: Mix, reference: Reference, run: Run):
        super().__init__(cfg, mix, PairRows, run)
        self.reference = reference
        self.names = ("loss", f"loss/{cfg.loss}", "loss/nll", "rewards/accuracies", "rewards/margins")

    def num_rows(self, rows: PairRows) -> int:
        """The number of pairs in a folder's first cfg.eval_tokens; a pair counts as two rows."""
        return validation_rows(rows, self.cfg.eval_tokens and max(1, self.cfg.eval_tokens // 2))

    def __call__(self, model: GPT, last: bool) -> dict[str, float]:
        """{"val_loss": ..., "val_loss/dpo": ...}: means over the folders, by their weights in the mix."""
        print_answers(self.run, model, self.mix.tokenizer, self.rows[0], self.cfg.sample_answers)
        return self.means(lambda rows: self.values(model, rows))

    def values(self, model: nn.Module, rows: PairRows) -> dict[str, float]:
        """Means over the pairs of one folder."""
        def measure(batch: dict[str, Any]) -> list[Tensor | int]:
            metrics = pair_loss(model, batch, self.reference, self.cfg)[1]
            return [*(metrics[name] for name in self.names), batch["count"]]

        *totals, pairs = self.sums(
            rows, lambda numbers: self.reference.batch([(rows, number) for number in numbers]), measure)
        return {f"val_{name}": total / pairs for name, total in zip(self.names, totals, strict=True)}


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure_run(DPOConfig, argv, usage=__doc__)
    with start_run(cfg) as run:
        # Data: the embedded pairs are tokenized for this model.
        require_context(cfg)
        prepare_default(cfg, run, "problems_preference",
                        lambda: prepare_problems("preference", cfg.init_from))
        data = StagedData(cfg, PairRows, run.rank, run.world_size)
        run.tokenizer = data.tokenizer  # saved with every checkpoint
        # The model. Dropout would make the policy differ from the reference before the first step.
        model, identity = chat_model(cfg, data.tokenizer, run, dropout=0.0)
        # The policy and the reference start from the same model, which `identity` names.
        reference = Reference(cfg, model, identity, data.tokenizer.vocab_size, run)
        evaluation = PreferenceEvaluation(data.stages[-1].cfg, data.last_mix, reference, run)
        evaluate = with_tasks(cfg, run, evaluation)
        run.write_run_json(cfg, data.tokens(), data=data.hashes(), **identity)
        # The reference: every pair that training or evaluation reads. Later runs find the table in the data
        # folder, so only the first run on these pairs pays for it.
        evaluated = [(rows, np.arange(evaluation.num_rows(rows))) for rows in evaluation.rows]
        for rows, indices in [*data.used(), *evaluated]:
            if cfg.reference == "precomputed":
                reference.precompute(rows, indices)
            run.print(f"data      {rows.data.folder}: {len(rows):,} {rows.split} pairs")
            if rows.left_out:
                run.print(f"          {rows.left_out:,} pairs left out: longer than {rows.T} tokens")
        if cfg.reference == "precomputed":
            reference.frozen.model = None  # free its memory
        # Train. With an adapter, everything else is frozen.
        results = fit(data.cfg, model, lambda step: batches_at(data, reference, step),
                      lambda module, batch: pair_loss(module, batch, reference, cfg), evaluate, run)
        finish(cfg, run, results, "loss {val_loss:.4f}, the chosen answer is preferred in "
                                  "{val_rewards/accuracies:.1%} of pairs",
               f"python eval.py --model={run.quoted} --compare={shlex.quote(cfg.init_from)}",
               f"python export.py --model={run.quoted} --format=gguf --quantize=q8_0")


if __name__ == "__main__":
    run_script(main)
