"""What fine-tuning and preference optimisation share: they start from a model, and may train only an adapter.

    cfg, given = configure(SFTConfig, argv)              # a PostTrainingConfig
    model = chat_model(cfg, tokenizer, run)              # on the meta device, with the tokens of a chat
    fit(cfg.frozen_but_adapters(model), model, ...)
"""

import dataclasses
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import UserError, require
from formats import hf
from formats import peft as adapters
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from training.lora import AdaptedGPT, targets_of
from training.run import Run
from training.stages import RunConfig, stage_configs


@dataclass(frozen=True, kw_only=True)
class PostTrainingConfig(RunConfig):
    """A run's keys, and an adapter's."""

    init_from: str = "out/base"  # model folder, out_dir or hub id to start from
    block_size: int = 128  # tokens of a row; the model's context stays what it is
    lora_rank: int = 0  # train an adapter of this rank, and nothing else; 0: train all weights
    lora_alpha: float = 16.0  # the adapter counts alpha / rank
    lora_dropout: float = 0.0  # on what enters it
    lora_targets: str = "_proj$"  # regular expression of the linear modules that get one
    rslora: bool = False  # the adapter counts alpha / sqrt(rank)
    quantize_base: Literal["nf4"] | None = None  # keep what has an adapter in 4 bits (QLoRA)
    merge: bool = False  # of an adapter: in the end also write the whole model to out_dir/merged

    stage_fixed = frozenset({"lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "quantize_base",
                       "merge"})
    resume_free = frozenset({"merge"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "block_size", self.block_size > 0, "positive")
        require(self, "lora_rank", self.lora_rank >= 0, "at least 0")
        require(self, "lora_alpha", self.lora_alpha > 0, "positive")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        for key in ("merge", "quantize_base"):
            if getattr(self, key) and not self.lora_rank:
                raise UserError(f"{key}={getattr(self, key)}: there is no adapter without lora_rank")
        if self.quantize_base:
            if self.parallel == "fsdp":
                raise UserError("quantize_base: its 4-bit matrices are not sharded; use parallel=ddp")
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError("quantize_base=nf4: needs the package bitsandbytes "
                                "(pip install bitsandbytes)")

    def frozen_but_adapters(self, model: GPT) -> "PostTrainingConfig":
        """This configuration for `fit`: with an adapter, in every stage, all else keeps its weights."""
        if not self.lora_rank:
            return self
        trained = "|".join(["lora_", *(rf"{table}\.weight" for table in model.spec.tables)])
        frozen = {rf"^(?!.*({trained}))": 0.0}  # first, so that no pattern of the user's comes before it
        stages = [entry | {"lr_multipliers": frozen | entry["lr_multipliers"]}
                  if "lr_multipliers" in entry else entry for entry in self.stages]
        return dataclasses.replace(self, lr_multipliers=frozen | self.lr_multipliers, stages=stages)


def chat_model(cfg: PostTrainingConfig, tokenizer: Tokenizer, run: Run, **changes: Any) -> GPT:
    """The model of cfg.init_from for the data's tokenizer, on the meta device: a GPT, or an AdaptedGPT.

    changes: fields of its GPTConfig that are to be others. Its attribute `base_hash` names the weights it
    starts from. Raises UserError where the data was made with another tokenizer, or rows are longer than the
    model's context.
    """
    folder = hf.find_folder(cfg.init_from)
    if cfg.overwrite and folder.resolve().is_relative_to(Path(cfg.out_dir).resolve()):
        raise UserError(f"overwrite=True: out_dir={cfg.out_dir} holds the model to start from; give another")
    before = Tokenizer.load(folder)
    if tokenizer.definition not in (before.definition, with_chat_tokens(before).definition):
        raise UserError(f"dataset={cfg.dataset}: made with another tokenizer than that of "
                        f"init_from={cfg.init_from} (prepare.py --tokenizer={cfg.init_from})")
    fields = hf.read_config(folder)
    for stage in stage_configs(cfg):
        if stage.block_size > fields["block_size"]:
            raise UserError(f"block_size={stage.block_size}: {cfg.init_from} has a context of "
                            f"{fields['block_size']} tokens")
    fields |= {"vocab_size": max(fields["vocab_size"], tokenizer.vocab_size)} | changes
    config = GPTConfig(**fields)
    base_hash = run.run_on_rank0(lambda: adapters.weights_sha256(folder))
    with torch.device("meta"):
        model = GPT(config)
        if cfg.lora_rank:
            model = adapted(cfg, model, folder, base_hash)
    model.base_hash = base_hash
    run.print(f"model     {model.num_parameters():,} parameters, from {folder}" + (
        f"; trained are {sum(p.numel() for n, p in model.named_parameters() if model.is_adapter(n)):,}"
        if cfg.lora_rank else ""))
    return model


def adapted(cfg: PostTrainingConfig, plain: GPT, folder: Path, base_hash: str) -> AdaptedGPT:
    """The model with a new adapter. UserError where its architecture has no adapters that PEFT could read."""
    if hf.architecture(plain.config) in ("gpt2", "nanollama"):
        raise UserError(f"lora_rank={cfg.lora_rank}: PEFT's files have no place for adapters of this "
                        "architecture (it knows no ternary weights, and GPT-2's q, k and v are one matrix "
                        "there); leave it away to train all")
    if adapters.is_adapter(folder):
        raise UserError(f"init_from={cfg.init_from}: is an adapter itself; --merge=True makes a model of it")
    grown = plain.config.vocab_size > hf.read_config(folder)["vocab_size"]
    tables = ("embed_tokens",) if plain.config.tie_embeddings else ("embed_tokens", "lm_head")
    spec = adapters.AdapterSpec(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout,
                                targets_of(plain, cfg.lora_targets), cfg.rslora, tables if grown else ())
    base = {"path": str(folder.resolve()), "sha256": base_hash}
    return AdaptedGPT(plain.config, spec, base, cfg.seed, quantize=cfg.quantize_base == "nf4")


def write_merged(run: Run) -> None:
    """The best checkpoint's adapter and its base as one model folder, out_dir/merged. Rank 0 writes."""
    def write() -> None:
        folder, beside = run.out_dir / "merged", run.out_dir / ".merged.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        GPT.from_pretrained(run.out_dir).save_pretrained(beside, eos_token_id=run.tokenizer.end_ids)
        run.tokenizer.save(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)

    run.run_on_rank0(write)
    run.print(f"merged    {run.out_dir / 'merged'}")
