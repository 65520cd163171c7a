"""Stage 1, pre-training: learn to predict the next token of a text.

    python train.py                                      # a small Llama on Python's standard library
    python train.py config/train_shakespeare.py --max_steps=500
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_124m.py

Reads data/<dataset>/, which prepare.py makes; the default data set is made here if it is missing. Writes
out_dir: checkpoints that transformers loads, run.json, metrics.jsonl. The same command again continues a
stopped run, if its data and settings are still the same. Left out: chats (sft.py) and learning from a larger
model (distill.py).
"""
# mypy: disable-error-code="assignment"
# (here vocab_size may be None, which GPTConfig does not allow)

import dataclasses
import gzip
import lzma
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configurator import require, require_not_negative, run_script
from dataset.dataloader import IGNORE, Mix, Rows, rank_batches, text_batch
from dataset.shards import DataFolder
from evals.all_tasks import with_tasks
from formats import hf
from formats.tokenizer import Tokenizer
from generation.generate import Options, Sampling, generate
from generation.samples import log_text
from loop import Run, RunConfig, fit, start_run
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare
from training.curves import print_end
from training.losses import linear_cross_entropy
from training.staged_data import MixEvaluation, StagedData, check_vocabulary, prepare_default
from training.stages import configure_run, context_length, require_free_keys, require_multipliers


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, GPTConfig):
    """The keys of a run, of an architecture, and of pre-training."""

    vocab_size: int | None = None  # token ids of the model; None takes the number of the data's tokenizer
    lr_multipliers: dict = field(  # {name regex: factor}; first match wins, 0 freezes
        # Measured on the default run: the embedding table learns best at a higher rate (docs/log.md).
        default_factory=lambda: {"embed_tokens": 5.0})
    z_loss: float = 0.0  # weight of logsumexp^2, which keeps logits small; PaLM uses 1e-4
    document_mask: bool = False  # attend only within a document
    sink_tokens: int = 0  # end-of-text tokens before each row, to be attended to; they predict nothing
    sample_tokens: int = 64  # length of the sample printed with each evaluation; 0 prints none

    resume_free = frozenset({"sample_tokens"})  # may change when a stopped run goes on (training/run.py)
    stage_fixed = frozenset({"sink_tokens"})  # may not change from stage to stage (training/stages.py)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        GPTConfig.from_keys(self, vocab_size=self.vocab_size or 64)  # checks the architecture's keys
        require_not_negative(self, "z_loss", "sample_tokens", "sink_tokens")
        require(self, "sink_tokens", self.sink_tokens < self.block_size, "less than block_size")
        require(self, "sink_tokens", not (self.sink_tokens and self.document_mask),
                "0 with document_mask=True, which hides them from all documents")


# ---- Data -------------------------------------------------------------------------------------------------

def make_batch(rows: np.ndarray, tokenizer: Tokenizer, cfg: TrainConfig) -> dict[str, Any]:
    """The batch of rows of ids, (B, T + 1); they are n shorter if n sink tokens come before each row."""
    # Without a mask, a token also attends to the documents that are packed before its own in the row.
    return text_batch(rows, tokenizer.eot_id if cfg.document_mask else None,
                      [tokenizer.eot_id] * cfg.sink_tokens)


def batches_at(data: StagedData[TrainConfig], step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step."""
    # global_batch_size is what all ranks read together; `count` rows of it, from `first` on, are this rank's.
    cfg, mix, first, count = data.shard_for_step(step)
    rows = mix.samples(first, count)  # (count, T + 1 - sink_tokens)
    # z_loss travels with the batch because a stage may change it.
    return [make_batch(micro, mix.tokenizer, cfg) | {"z_loss": cfg.z_loss}
            for micro in np.split(rows, count // cfg.micro_batch_size)]


# ---- Loss -------------------------------------------------------------------------------------------------

def next_token_loss(model: nn.Module, batch: dict[str, Any],
                    vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and z-loss summed over the batch's targets; the metric "loss" is without the z term."""
    # The head runs inside the forward pass, where FSDP has gathered `weight`. No (B, T, V) tensor is made.
    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, batch["targets"], vocab_size, batch.get("z_loss", 0.0))

    loss, nll = model(batch["input_ids"], document_ids=batch.get("document_ids"), head=head)  # scalars
    return loss, {"loss": nll}


# ---- Evaluation -------------------------------------------------------------------------------------------

def sample_text(model: GPT, tokenizer: Tokenizer, length: int) -> str:
    """A text of at most `length` tokens, sampled from an empty prompt."""
    # In packed training data, a new document follows an end-of-text token.
    eot_id = tokenizer.eot_id
    start = tokenizer.prefix_ids or [eot_id]
    # Every rank samples, because a sharded model needs them all, and with the same seed they sample the same.
    steps = generate(model, [start], length, Sampling(top_p=0.95), lambda row, new: new[-1] == eot_id,
                     Options(vocab_size=tokenizer.vocab_size))
    return tokenizer.decode([token for (token,) in steps if token is not None and token != eot_id])


class TextEvaluation(MixEvaluation[TrainConfig]):
    """Loss, perplexity and bits per byte of a mix's validation text, and a sample to read.

    Rows and masks are those of the last stage; only the rotary base is that of the current step. Positions
    beyond this row length, which a stage with longer rows trains, are not evaluated here;
    `eval.py --tasks=context_length` does that.
    """

    def __init__(self, cfg: TrainConfig, mix: Mix, run: Run):
        """Raises UserError, on all ranks, for too little validation text or an id that does not exist."""
        super().__init__(cfg, mix, partial(Rows, sink_tokens=cfg.sink_tokens), run)
        # Read everything once: `read` checks the ids, and hours of training should not end in a bad id.
        for rows in self.rows:
            for numbers in rank_batches(self.num_rows(rows), 1024, rank=0, world_size=1):
                rows.read(numbers)

    def __call__(self, model: GPT, last: bool) -> dict[str, float]:
        """Evaluate the first cfg.eval_tokens validation tokens of each folder; the ranks share the work.

        Rows do not overlap, so a token sees half a row of context on average; a file compressor sees
        everything before it.
        """
        # The sample shows progress better than a number. The last one is longer, and part of the summary.
        if self.cfg.sample_tokens and not last:
            text = sample_text(model, self.mix.tokenizer, self.cfg.sample_tokens)
            self.run.print(log_text("sample    ", text))
        means = self.means(lambda rows: self.values(model, rows))
        # math.exp overflows above 709; a diverged run should still get its log line.
        loss = means["val_loss"]
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))} | means

    def values(self, model: GPT, rows: Rows) -> dict[str, float]:
        """Loss and bits per byte of one folder's validation rows."""
        tokenizer = self.mix.tokenizer

        def measure(batch: dict[str, Any]) -> tuple[Tensor, int, Tensor]:
            nll, targets = next_token_loss(model, batch, tokenizer.vocab_size)[1]["loss"], batch["targets"]
            return nll, batch["count"], self.byte_counts[targets[targets != IGNORE]].sum()

        nll, targets, text_bytes = self.sums(
            rows, lambda numbers: make_batch(rows.read(numbers), tokenizer, self.cfg), measure)
        # nats / ln 2 = bits. Bits per byte, unlike the loss, compare between tokenizers.
        return {"val_loss": nll / targets, "val_bits_per_byte": nll / math.log(2) / max(text_bytes, 1)}


def compressed_bits(folder: DataFolder, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of file compressors on the validation text; {} if it has more than 16 MB."""
    if folder.meta["bytes"]["val"] > 16e6:  # xz -9e takes too long
        return {}
    # Decode the ids, so that the compressors get the text that the model sees, with the same number of bytes.
    table = tokenizer.token_bytes()
    text = b"".join(table[i] for shard in folder.shards["val"] for i in shard.tolist())
    sizes = {"gzip -9": len(gzip.compress(text, 9)),
             "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


# ---- Main -------------------------------------------------------------------------------------------------

def with_architecture_of(source: str, cfg: TrainConfig, provenance: dict[str, str]) -> TrainConfig:
    """`cfg` with the architecture of a model folder. Raises UserError if the user set a part of it as well.

    Only block_size may be set: rows may be shorter than the model's context or, with RoPE, longer.
    """
    folder = hf.find_folder(source)
    GPTConfig.read(folder)  # raises UserError for a key that GPTConfig does not have
    fields = hf.read_config(folder)
    require_free_keys(provenance, f"init_from={source}", {"block_size"})
    if "block_size" in provenance:
        fields["block_size"] = cfg.block_size
    return dataclasses.replace(cfg, **fields)


def make_model(cfg: TrainConfig, tokenizer: Tokenizer, run: Run) -> GPT:
    """The model on the meta device, without memory: `fit` gives each rank its part of the weights."""
    # All stages use one model, so its context is the longest one.
    with torch.device("meta"):
        model = GPT(GPTConfig.from_keys(
            cfg, vocab_size=cfg.vocab_size or tokenizer.vocab_size,
            block_size=context_length(cfg, cfg.init_from)))
    require_multipliers(cfg, model)
    run.print(f"model     {model.num_parameters():,} parameters, "
              f"{model.flops_per_token(cfg.block_size) / 1e6:,.1f} MFLOP per token; "
              f"a step is {cfg.global_batch_size} x {cfg.block_size} tokens")
    return model


def print_summary(cfg: TrainConfig, model: GPT, data: StagedData, results: dict[str, float],
                  run: Run) -> None:
    """Print the run's size and speed, its loss compared with compressors, a sample, and the next command."""
    tokenizer, folder, sample = data.tokenizer, data.last_mix.folders[0], ""
    if cfg.sample_tokens and results:  # before any rank returns: a sharded model needs them all
        sample = "\n" + log_text("sample      ", sample_text(model, tokenizer, 128))
    if run.rank > 0 or not results:
        return
    # Read the totals from the log, because the run may have been resumed. The log may be missing.
    event = run.last_event("tokens_per_second") or {"tokens": 0, "seconds": 0.0}
    # A mix is more than one text; compressing its folders one by one would compare with something else.
    compressors = compressed_bits(folder, tokenizer) if len(data.last_mix.folders) == 1 else {}
    others = "".join(f"   {name} {bits:.3f}" for name, bits in compressors.items())
    run.print(f"""
trained     {model.num_parameters():,} parameters on {event["tokens"]:,} tokens in {event["seconds"]:,.0f} s \
({event["tokens"] / max(event["seconds"], 1e-9):,.0f} tokens/s)
validation  loss {results["val_loss"]:.4f}, perplexity {results["val_perplexity"]:.2f}
bits/byte   this model {results["val_bits_per_byte"]:.3f}{others}{sample}""")
    prompt = ' --prompt="def read(self"' if folder.folder.name == "pystdlib" else ""
    print_end(run, f"python -m tools.plot {run.quoted}", f"python sample.py --model={run.quoted}{prompt}",
              run.next_stage("sft.py", "out/base"))


def main(argv: list[str]) -> None:
    cfg, provenance = configure_run(TrainConfig, argv, usage=__doc__)
    if cfg.init_from:
        cfg = with_architecture_of(cfg.init_from, cfg, provenance)
    with start_run(cfg) as run:
        # Data: the default set is made on the spot.
        prepare_default(cfg, run, "pystdlib", lambda: prepare(PrepareConfig()))
        data = StagedData(cfg, partial(Rows, sink_tokens=cfg.sink_tokens), run.rank, run.world_size)
        # The tokenizer is saved with every checkpoint, so all that read it put the sinks before a prompt.
        run.tokenizer = data.tokenizer = data.last_mix.tokenizer = data.tokenizer.with_sinks(cfg.sink_tokens)
        # Do all checks first: with overwrite=True, write_run_json deletes the old run.
        check_vocabulary(cfg, cfg.vocab_size, data.tokenizer)
        evaluate = with_tasks(cfg, run, TextEvaluation(data.stages[-1].cfg, data.last_mix, run))
        model = make_model(cfg, data.tokenizer, run)
        run.write_run_json(cfg, data.tokens(), data=data.hashes())
        # Train.
        results = fit(data.cfg, model, lambda step: batches_at(data, step),
                      lambda module, batch: next_token_loss(module, batch, data.tokenizer.vocab_size),
                      evaluate, run)
        print_summary(cfg, model.eval(), data, results, run)


if __name__ == "__main__":
    run_script(main)
