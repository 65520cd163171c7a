"""Stage 1, pre-training: next-token prediction on packed text.

    python train.py                                      # a small Llama on the standard library's source
    python train.py config/train_shakespeare.py --max_steps=500
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_124m.py

Reads data/<dataset>/, which prepare.py makes (the default one is made here when it is missing). Writes
out_dir: checkpoints that transformers loads, run.json, metrics.jsonl. The same command again goes on where
the run stopped. Left out: everything a chat needs (sft.py) and a teacher gives (distill.py).
"""

import dataclasses
import gzip
import lzma
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, configure, run_script
from dataset.dataloader import Mix, Rows, text_batch, validation_batches, validation_rows
from dataset.shards import DataFolder
from formats import hf
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from loop import Run, RunConfig, fit, stage_configs, start_run
from model import GPT, GPTConfig
from modeling.devices import to_device
from prepare import PrepareConfig, prepare
from training.losses import linear_cross_entropy
from training.staged_data import StagedData, in_epochs


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, GPTConfig):
    """A run's keys, an architecture's keys, and those of pre-training."""

    vocab_size: int | None = None  # token ids the model has; None: as many as the data's tokenizer
    lr_multipliers: dict = field(  # {regex of names: factor}, first match, 0 freezes; the table learns fast
        default_factory=lambda: {"embed_tokens": 5.0})
    z_loss: float = 0.0  # weight of logsumexp^2, which keeps logits small; PaLM's is 1e-4
    document_mask: bool = False  # attend within documents only
    sample_tokens: int = 64  # length of the sample printed with each evaluation; 0: none

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        GPTConfig.from_keys(self, vocab_size=self.vocab_size or 64)
        if self.z_loss < 0 or self.sample_tokens < 0:
            raise UserError(f"z_loss={self.z_loss}, sample_tokens={self.sample_tokens}: must not be negative")


# ---- Data -------------------------------------------------------------------------------------------------

def batches_at(data: StagedData, step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    cfg, mix, first, count = data.shard_for_step(step)
    eot_id = mix.tokenizer.eot_id if cfg.document_mask else None
    return [text_batch(rows, eot_id) | {"z_loss": cfg.z_loss}
            for rows in np.split(mix.samples(first, count), count // cfg.micro_batch_size)]


# ---- Loss -------------------------------------------------------------------------------------------------

def next_token_loss(model: nn.Module, batch: dict[str, Any],
                    vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy (and z-loss) summed over the batch's targets; the metric "loss" is without the z term."""
    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, batch["targets"], vocab_size, batch.get("z_loss", 0.0))

    loss, nll = model(batch["input_ids"], document_ids=batch.get("document_ids"), head=head)
    return loss, {"loss": nll}


# ---- Evaluation -------------------------------------------------------------------------------------------

class TextEvaluation:
    """Loss, perplexity and bits per byte of a mix's validation text, and a sample to read.

    A run has one, made from its last stage: the same text, rows and masks at every step, whatever stage that
    step is in. So the figures at the borders of stages compare, and so do those that "best" is chosen by. The
    model has the rotary base of the step. What a stage of longer rows does behind these rows' end, this does
    not see: tools/context.py does.
    """

    def __init__(self, cfg: TrainConfig, mix: Mix, run: Run):
        """Raises UserError, on all ranks, for too little validation text or an id outside the vocabulary."""
        self.cfg, self.mix, self.run = cfg, mix, run
        self.byte_counts = torch.tensor([len(token) for token in mix.tokenizer.token_bytes()])  # (V,)
        self.rows = [Rows(folder, "val", cfg.block_size) for folder in mix.folders]
        for rows in self.rows:
            for _ in validation_batches(rows.read, validation_rows(rows, cfg.eval_tokens), 1024, 0, 1):
                pass  # reading checks the ids

    def __call__(self, model: GPT, last: bool) -> dict[str, float]:
        """Read each folder's first cfg.eval_tokens validation tokens; the ranks share them.

        A mix's figures are its folders', by their weights in training. Rows do not overlap, so a token sees
        half a context on average, where a file compressor sees all that came before.
        """
        if self.cfg.sample_tokens and not last:
            self.run.print(f"sample    {sample_text(model, self.mix.tokenizer, self.cfg.sample_tokens)!r}")
        results = {"val_loss": 0.0, "val_perplexity": 0.0, "val_bits_per_byte": 0.0}
        for rows, weight in zip(self.rows, self.mix.weights, strict=True):
            nll, targets, text_bytes = self.sums(model, rows)
            loss, bits = nll / targets, nll / math.log(2) / max(text_bytes, 1)
            results["val_loss"] += weight * loss
            results["val_bits_per_byte"] += weight * bits
            if len(self.mix.folders) > 1:
                name = rows.data.folder.name
                results |= {f"val_loss/{name}": loss, f"val_bits_per_byte/{name}": bits}
        return results | {"val_perplexity": math.exp(min(results["val_loss"], 700))}

    def sums(self, model: GPT, rows: Rows) -> list[float]:
        """Over one folder's validation targets and all ranks: nats, targets, bytes of text."""
        nll, count, text_bytes = torch.zeros((), device=self.run.device), 0, 0
        tokenizer = self.mix.tokenizer
        eot_id = tokenizer.eot_id if self.cfg.document_mask else None
        for batch in validation_batches(lambda numbers: text_batch(rows.read(numbers), eot_id),
                                        validation_rows(rows, self.cfg.eval_tokens),
                                        self.cfg.micro_batch_size, self.run.rank, self.run.world_size):
            _, metrics = next_token_loss(model, to_device(batch, self.run.device), tokenizer.vocab_size)
            if batch["count"]:
                nll += metrics["loss"]
                count += batch["count"]
                text_bytes += int(self.byte_counts[batch["targets"]].sum())
        return self.run.sum([nll.item(), count, text_bytes])


def sample_text(model: GPT, tokenizer: Tokenizer, length: int) -> str:
    """At most `length` tokens written from nothing, that is, behind the end-of-text token."""
    eot_id = tokenizer.eot_id
    steps = generate(model, [[eot_id]], length, Sampling(top_p=0.95), lambda row, new: new[-1] == eot_id,
                     tokenizer.vocab_size)
    return tokenizer.decode([tokens[0] for tokens in steps if tokens[0] != eot_id])


def compressed_bits(folder: DataFolder, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte that file compressors need for the validation text; {} where it is over 16 MB."""
    if folder.meta["bytes"]["val"] > 16e6:
        return {}
    table = tokenizer.token_bytes()
    text = b"".join(table[i] for shard in folder.shards["val"] for i in shard.tolist())
    sizes = {"gzip -9": len(gzip.compress(text, 9)),
             "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


# ---- Go ---------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, provenance = configure(TrainConfig, argv, usage=__doc__)
    if cfg.init_from:
        cfg = with_architecture_of(cfg.init_from, cfg, provenance)
    with start_run(cfg, provenance) as run:
        if any(stage.dataset == "pystdlib" for stage in stage_configs(cfg)):
            run.run_on_rank0(lambda: prepare(PrepareConfig()))  # the embedded default, or nothing to do
        user_cfg, cfg = cfg, in_epochs(cfg)
        data = StagedData(cfg, rank=run.rank, world_size=run.world_size)
        tokenizer = run.tokenizer = data.tokenizer
        check_vocabulary(cfg, data)
        evaluation = TextEvaluation(data.stages[-1].cfg, data.last_mix, run)
        run.write_run_json(user_cfg, data=data.hashes())
        with torch.device("meta"):  # no memory yet: fit gives each rank its part of the weights
            model = GPT(GPTConfig.from_keys(
                cfg, vocab_size=cfg.vocab_size or tokenizer.vocab_size, block_size=context_length(cfg)))
        run.print(f"model     {model.num_parameters():,} parameters, "
                  f"{model.flops_per_token(cfg.block_size) / 1e6:,.1f} MFLOP a token; "
                  f"a step is {cfg.global_batch_size} x {cfg.block_size} tokens")
        results = fit(cfg, model, lambda step: batches_at(data, step),
                      lambda module, batch: next_token_loss(module, batch, tokenizer.vocab_size),
                      evaluation, run)
        print_summary(model.eval(), data, results, run)
    return 0


def with_architecture_of(source: str, cfg: TrainConfig, provenance: dict[str, str]) -> TrainConfig:
    """`cfg` with the architecture of a model folder. UserError if the user gave some of it as well.

    Only block_size may be given: rows may be shorter than the model's context, or, with RoPE, longer.
    """
    fields = hf.read_config(hf.find_folder(source))
    if both := sorted({each.name for each in dataclasses.fields(GPTConfig)} & provenance.keys() - {"block_size"}):
        raise UserError(f"{provenance[both[0]]}: {both[0]} comes with init_from={source} and cannot be given")
    if "block_size" in provenance:
        fields["block_size"] = cfg.block_size
    return dataclasses.replace(cfg, **fields)


def context_length(cfg: TrainConfig) -> int:
    """The model's block_size: that of the longest rows, and of the model it starts from at the least."""
    lengths = [stage.block_size for stage in stage_configs(cfg)]
    if cfg.init_from:
        lengths.append(hf.read_config(hf.find_folder(cfg.init_from))["block_size"])
    return max(lengths)


def check_vocabulary(cfg: TrainConfig, data: StagedData) -> None:
    """UserError unless the data and the model agree in what an id means."""
    tokenizer = data.tokenizer
    if cfg.vocab_size and cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(f"vocab_size={cfg.vocab_size}: the data's tokenizer has {tokenizer.vocab_size} ids")
    if cfg.init_from and Tokenizer.load(hf.find_folder(cfg.init_from)).definition != tokenizer.definition:
        raise UserError(f"init_from={cfg.init_from}: its tokenizer is not that of dataset={cfg.dataset}")


def print_summary(model: GPT, data: StagedData, results: dict[str, float], run: Run) -> None:
    """What was trained, how good it is beside file compressors, how it writes, and what to do next."""
    tokenizer, folder = data.tokenizer, data.last_mix.folders[0]
    sample = sample_text(model, tokenizer, 128)  # before any rank returns: a sharded model needs them all
    if run.rank > 0 or not results:
        return
    event = run.last_event("tokens_per_second") or {"tokens": 0, "seconds": 0.0}  # the log may be lost
    others = compressed_bits(folder, tokenizer) if len(data.last_mix.folders) == 1 else {}
    beside = "".join(f"   {name} {bits:.3f}" for name, bits in others.items())
    run.print(f"""
trained     {model.num_parameters():,} parameters on {event["tokens"]:,} tokens in {event["seconds"]:,.0f} s \
({event["tokens"] / max(event["seconds"], 1e-9):,.0f} tokens/s)
validation  loss {results["val_loss"]:.4f}, perplexity {results["val_perplexity"]:.2f}
bits/byte   this model {results["val_bits_per_byte"]:.3f}{beside}
sample      {sample}

next        python sample.py --model={run.out_dir} --prompt="import os"
            python train.py --help""")


if __name__ == "__main__":
    run_script(main)
