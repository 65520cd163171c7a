"""Stage 4, preference optimisation: of two answers a model learns to give the better one.

    python dpo.py                                        # out/sft on the embedded pairs -> out/dpo
    python dpo.py --init_from=out/sft --dataset=pairs --beta=0.1 --out_dir=out/mine
    python dpo.py --loss=ipo --lora_rank=16 --reference=adapter_off

Reads folders that `prepare.py --kind=preference --tokenizer=<init_from>` makes (that of the embedded problems
is made here). Writes out_dir as train.py does. DPO, arXiv 2305.18290, holds the model to the one it starts
from, the reference: its log-probabilities are computed once, before training, and kept beside the data. Batch
sizes count pairs; a prompt is computed once for both its answers. Dropout is off. A pair whose prompt and
either answer do not fit block_size is left out and counted.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, configure, require, run_script
from dataset.chat_rows import PairRows, pair_batch
from dataset.dataloader import Mix, shares, validation_batches, validation_rows
from formats import hf
from formats.files import file_sha256, write_bytes
from loop import Run, fit, stage_configs, start_run, training_dtype
from model import GPT
from modeling.devices import to_device
from prepare import prepare_problems
from training.finetuning import PostTrainingConfig, chat_model, write_merged
from training.losses import linear_log_probs, preference_loss
from training.staged_data import StagedData, in_epochs


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PostTrainingConfig):
    """A run's keys, an adapter's keys, and those of preference optimisation."""

    out_dir: str = "out/dpo"  # checkpoints and logs go here; the same command again continues the run
    init_from: str = "out/sft"  # model folder, out_dir or hub id to start from, which is also the reference
    dataset: str = "problems_preference"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    max_steps: int = 60  # optimizer steps; where stages are listed, their sum counts instead
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    learning_rate: float = 6e-5  # peak
    weight_decay: float = 0.0  # on matrices
    eval_tokens: int | None = 2**16  # validation tokens of an evaluation, always the first ones; None: all
    loss: Literal["dpo", "ipo"] = "dpo"  # ipo: its margin does not grow without end
    beta: float = 0.1  # how much it costs to leave the reference
    nll_weight: float = 10.0  # what the chosen answers' own cross-entropy a token counts beside; 0: plain DPO
    label_smoothing: float = 0.0  # dpo: the share of pairs that may be the wrong way round
    reference: Literal["precomputed", "device", "cpu", "adapter_off"] = "precomputed"  # where it is computed

    stage_fixed = PostTrainingConfig.stage_fixed | {"loss", "beta", "nll_weight", "label_smoothing", "reference"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta", self.beta > 0, "positive")
        require(self, "nll_weight", self.nll_weight >= 0, "at least 0")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5")
        if self.label_smoothing and self.loss == "ipo":
            raise UserError("label_smoothing: is of loss=dpo")
        if self.reference == "adapter_off" and not self.lora_rank:
            raise UserError("reference=adapter_off: there is no adapter without lora_rank")
        if self.quantize_base and self.reference != "adapter_off":
            raise UserError(f"reference={self.reference}: is not in 4 bits; with quantize_base give "
                            "adapter_off")
        if self.lora_dropout:
            raise UserError("lora_dropout: policy and reference have to compute the same; leave it at 0")


# ---- Loss -------------------------------------------------------------------------------------------------

def answer_log_probs(model: nn.Module, batch: dict[str, Any], vocab_size: int) -> Tensor:
    """log p(answer | prompt), summed over the answer's tokens: (2, n), of the chosen and the rejected."""
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # (targets, C)
        return linear_log_probs(hidden, weight, batch["targets"], vocab_size)

    log_probs = model(batch["input_ids"], paths=batch["paths"], head=head)  # (targets,)
    sums = torch.segment_reduce(log_probs, "sum", lengths=batch["lengths"].flatten(), unsafe=True)  # (2n,)
    return sums.view(-1, 2).T


def loss_fn(model: nn.Module, batch: dict[str, Any], reference: Tensor, cfg: DPOConfig,
            vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the n pairs; reference: its `answer_log_probs`, (2, n).

    Preferences alone only part the two answers, and may make both unlikelier; the second term, the chosen
    answer's nats a token, keeps it likely (arXiv 2404.19733, equation 1).
    kl: log p_reference - log p of the answers, which estimates KL(reference || policy), in nats an answer,
    where the answers are the reference's own.
    """
    log_probs, lengths = answer_log_probs(model, batch, vocab_size), batch["lengths"].T  # (2, n)
    ratios = log_probs - reference
    losses = preference_loss(ratios, lengths, cfg.beta, cfg.label_smoothing, cfg.loss)  # (n,)
    nll = -log_probs[0] / lengths[0]  # (n,)
    losses = losses + cfg.nll_weight * nll
    rewards = cfg.beta * ratios.detach()  # equation 5 of the paper, up to a term that all answers share
    margins = rewards[0] - rewards[1]
    return losses.sum(), {
        "loss": losses.sum(), "accuracy": (margins > 0).float().sum(), "margin": margins.sum(),
        "nll": nll.detach().sum(), "kl": -ratios.detach().mean(0).sum(), "rewards/chosen": rewards[0].sum(),
        "rewards/rejected": rewards[1].sum(), "logps/chosen": log_probs[0].sum(),
        "logps/rejected": log_probs[1].sum()}


# ---- The reference ----------------------------------------------------------------------------------------

class Reference:
    """log p_reference of every answer: looked up, or computed when asked for."""

    def __init__(self, cfg: DPOConfig, policy: GPT, run: Run):
        self.cfg, self.run, self.policy, self.model = cfg, run, policy, None
        self.vocab_size, self.dtype = run.tokenizer.vocab_size, training_dtype(cfg, run)
        self.tables: dict[int, Tensor] = {}  # of the rows with this id(): (rows, 2) float32

    def load(self) -> GPT:
        """The frozen reference, with the policy's vocabulary, on the device that computes it."""
        if self.model is None:
            device = "cpu" if self.cfg.reference == "cpu" else self.run.device
            with torch.device("meta"):
                self.model = GPT(self.policy.config)
            self.model.to_empty(device=device)
            self.model.load(hf.find_folder(self.cfg.init_from))
            self.model.eval().requires_grad_(False)
        return self.model

    @torch.no_grad()
    def compute(self, batch: dict[str, Any]) -> Tensor:
        """(2, n) for a batch, whose tensors may be on any device."""
        if self.cfg.reference == "adapter_off":
            self.policy.use_adapter(False)
            try:
                return answer_log_probs(self.policy, batch, self.vocab_size)
            finally:
                self.policy.use_adapter(True)
        model = self.load()
        device = model.head_weight.device
        batch = to_device(batch, device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            return answer_log_probs(model, batch, self.vocab_size)

    def precompute(self, rows: PairRows, indices: np.ndarray) -> None:
        """Have the table of these rows, with the entries `indices`: from beside the data, or computed now,
        all ranks together, and written there; NaN is an entry that no run has needed yet.

        The file's name says what it follows from: the weights, the data, block_size, the dtype and, to the
        last bit, that both answers share a prompt.
        """
        identity = (self.policy.base_hash, file_sha256(rows.data.folder / "meta.json"), rows.split, rows.T,
                    str(self.dtype), "shared prompt")
        name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        path = rows.data.folder / f"reference_{name}.npy"
        table = self.run.run_on_rank0(lambda: read_table(path, len(rows)))
        missing = indices[np.isnan(table[indices, 0])]
        if len(missing):
            found = np.zeros((len(missing), 2))
            for mine in shares(len(missing), self.cfg.micro_batch_size, self.run.rank, self.run.world_size):
                if len(mine):
                    pairs = [rows.pair(number) for number in missing[mine]]
                    found[mine] = self.compute(pair_batch(pairs)).T.cpu()
            table[missing] = np.array(self.run.sum(found.flatten().tolist())).reshape(-1, 2)
            self.run.run_on_rank0(lambda: save_array(path, table))
        self.tables[id(rows)] = torch.from_numpy(table)

    def batch(self, pairs: list[tuple[PairRows, int]]) -> dict[str, Any]:
        """The batch of these pairs, by rows and number, with "reference" (2, n) where it is precomputed."""
        batch = pair_batch([rows.pair(number) for rows, number in pairs])
        if self.cfg.reference == "precomputed":
            batch["reference"] = torch.stack([self.tables[id(rows)][number] for rows, number in pairs], dim=1)
        return batch


def read_table(path: Path, rows: int) -> np.ndarray:
    """(rows, 2) float32 from a file, NaN where there is none. UserError for a file that is damaged."""
    if not path.is_file():
        return np.full((rows, 2), np.nan, np.float32)
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and it is computed anew") from None
    if table.shape != (rows, 2) or table.dtype != np.float32:
        raise UserError(f"{path}: damaged (its shape is {table.shape}); delete it, and it is computed anew")
    return table


def save_array(path: Path, table: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, table)
    write_bytes(path, content.getvalue())  # several runs may do so at once


# ---- Data and evaluation ----------------------------------------------------------------------------------

def batches_at(data: StagedData, reference: Reference, step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    cfg, mix, first, count = data.shard_for_step(step)
    pairs = [(mix.rows[folder], number) for folder, number in zip(*mix.locate(first, count), strict=True)]
    size = cfg.micro_batch_size
    return [reference.batch(pairs[start:start + size]) for start in range(0, count, size)]


class PreferenceEvaluation:
    """Loss, accuracy and margin over the validation pairs of the last stage's mix."""

    def __init__(self, cfg: DPOConfig, mix: Mix, reference: Reference, run: Run):
        self.cfg, self.run, self.reference, self.mix = cfg, run, reference, mix
        self.rows = [PairRows(folder, "val", cfg.block_size) for folder in mix.folders]

    def pairs(self, rows: PairRows) -> int:
        """The number of a folder's pairs that hold the first cfg.eval_tokens; a pair has two rows."""
        return validation_rows(rows, self.cfg.eval_tokens and max(1, self.cfg.eval_tokens // 2))

    def __call__(self, model: nn.Module, last: bool) -> dict[str, float]:
        results: dict[str, float] = {}
        run, size = self.run, self.cfg.micro_batch_size
        for rows, weight in zip(self.rows, self.mix.weights, strict=True):
            sums, count = torch.zeros(3, device=run.device), 0
            for batch in validation_batches(
                    lambda numbers, rows=rows: self.reference.batch([(rows, number) for number in numbers]),
                    self.pairs(rows), size, run.rank, run.world_size):
                _, found = pair_loss(model, to_device(batch, run.device), self.reference, self.cfg)
                if batch["count"]:
                    sums += torch.stack([found["loss"], found["accuracy"], found["margin"]])
                    count += batch["count"]
            *totals, pairs = run.sum([*sums.tolist(), count])
            for name, total in zip(("val_loss", "val_accuracy", "val_margin"), totals, strict=True):
                results[name] = results.get(name, 0.0) + weight * total / pairs
        return results


def pair_loss(model: nn.Module, batch: dict[str, Any], reference: Reference,
              cfg: DPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss_fn` with the reference that the batch brings, or that is computed now."""
    found = batch["reference"] if "reference" in batch else reference.compute(batch)
    return loss_fn(model, batch, found.to(batch["input_ids"].device), cfg, reference.vocab_size)


# ---- Go ---------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, provenance = configure(DPOConfig, argv, usage=__doc__)
    with start_run(cfg, provenance) as run:
        if any(stage.dataset == "problems_preference" for stage in stage_configs(cfg)):  # embedded
            run.run_on_rank0(lambda: prepare_problems("preference", cfg.init_from))
        user_cfg, cfg = cfg, in_epochs(cfg, PairRows)
        data = StagedData(cfg, PairRows, run.rank, run.world_size)
        run.tokenizer = data.tokenizer
        model = chat_model(cfg, data.tokenizer, run, dropout=0.0)
        if cfg.reference == "adapter_off" and model.spec.tables:
            raise UserError(f"reference=adapter_off: {cfg.init_from} has no chat tokens, so the adapter "
                            "changes more than can be switched off; begin with sft.py")
        reference = Reference(cfg, model, run)
        evaluation = PreferenceEvaluation(data.stages[-1].cfg, data.last_mix, reference, run)
        run.write_run_json(user_cfg, data=data.hashes(), base=model.base_hash)
        used = [*data.used(), *((rows, np.arange(evaluation.pairs(rows))) for rows in evaluation.rows)]
        for rows, indices in used:
            if cfg.reference == "precomputed":
                reference.precompute(rows, indices)
            run.print(f"data      {rows.data.folder}: {len(rows):,} {rows.split} pairs"
                      + f", {rows.left_out:,} left out: over {rows.T} tokens" * bool(rows.left_out))
        if cfg.reference == "precomputed":
            reference.model = None  # its work is done, its memory free
        results = fit(cfg.frozen_but_adapters(model), model, lambda step: batches_at(data, reference, step),
                      lambda module, batch: pair_loss(module, batch, reference, cfg), evaluation, run)
        if cfg.merge:
            write_merged(run)
        if results:
            run.print(f"\nvalidation  loss {results['val_loss']:.4f}, the better answer is preferred in "
                      f"{100 * results['val_accuracy']:.1f} % of pairs"
                      f"\nnext        python eval.py --model={cfg.init_from} --compare={run.out_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
