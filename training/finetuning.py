"""What the stages after pre-training share: a start from a model, an adapter, and the end of a run.

    cfg, _ = configure_run(SFTConfig, argv, usage=__doc__)  # SFTConfig is a PostTrainingConfig
    model, identity = chat_model(cfg, tokenizer, run)       # on the meta device, with the chat tokens
    results = fit(cfg, model, ...)                          # trains the adapter alone, if there is one
    finish(cfg, run, results, "loss {val_loss:.4f}", "python sample.py --model=out/sft")

The adapter itself is in training/lora.py, the frozen reference of DPO and GRPO in training/reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import UserError, optional_import, require, require_not_negative, require_positive
from formats import hf, peft
from formats.chat_format import with_chat_tokens
from formats.files import atomic_folder
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from modeling.devices import pick_dtype
from modeling.linear import cast_frozen
from training.config import RunConfig
from training.curves import print_end
from training.lora import AdaptedGPT, targets_of
from training.run import Run
from training.stages import require_multipliers, stage_configs


@dataclass(frozen=True, kw_only=True)
class PostTrainingConfig(RunConfig):
    """The keys of a run and of an adapter."""

    init_from: str = "out/base"  # model folder, out_dir or hub id to start from
    block_size: int = 128  # tokens per training row; the model's own context does not change
    # ---- Samples to read
    sample_answers: int = 2  # validation prompts answered at each evaluation, to be read; 0 prints none
    # ---- Adapter
    lora_rank: int = 0  # rank of a LoRA adapter, the only part that is then trained; 0 trains all weights
    lora_alpha: float = 16.0  # the adapter's output is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # dropout on the adapter's input
    lora_targets: str = "_proj$"  # regular expression; linear modules with a matching name get an adapter
    rslora: bool = False  # scale by lora_alpha / sqrt(lora_rank) instead (rsLoRA)
    quantize_base: Literal["nf4"] | None = None  # keep the adapted matrices in 4 bits (QLoRA)
    merge: bool = False  # at the end also write the base with the adapter merged in, to out_dir/merged

    stage_fixed = frozenset({"lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora",
                             "quantize_base", "merge"})
    resume_free = frozenset({"merge", "sample_answers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "lora_rank", "sample_answers")
        require_positive(self, "lora_alpha")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        for key in ("merge", "quantize_base"):
            if getattr(self, key) and not self.lora_rank:
                raise UserError(f"{key}={getattr(self, key)}: only works with an adapter; set lora_rank")
        if self.quantize_base:
            if self.parallel == "fsdp":
                raise UserError("quantize_base: 4-bit matrices cannot be sharded; use parallel=ddp")
            optional_import("bitsandbytes", "quantize_base=nf4")


def require_no_adapter(cfg: PostTrainingConfig, folder: Path) -> None:
    """Raise UserError if the model to start from is an adapter: a new one cannot be put on top of it."""
    if peft.is_adapter(folder):
        raise UserError(f"init_from={cfg.init_from}: is an adapter itself; run its command again with "
                        "--merge=True and start from out_dir/merged")


def require_context(cfg: PostTrainingConfig) -> None:
    """Raise UserError if rows are longer than the context of the model to start from."""
    context = hf.read_config(hf.find_folder(cfg.init_from))["block_size"]
    for stage in stage_configs(cfg):
        if stage.block_size > context:
            raise UserError(f"block_size={stage.block_size}: {cfg.init_from} has a context of "
                            f"{context} tokens")


def with_adapter(cfg: PostTrainingConfig, plain: GPT, base: dict[str, str]) -> GPT:
    """The model with a new adapter if cfg.lora_rank is set. base: the path and the hashes of the model below.

    Raises UserError if PEFT cannot represent an adapter for this architecture.
    """
    if not cfg.lora_rank:
        return plain
    if hf.architecture(plain.config) in ("nanollama", *hf.EXPERT_KEYS):
        raise UserError(f"lora_rank={cfg.lora_rank}: PEFT cannot represent an adapter for a model with "
                        f"{hf.unusual(plain.config)}; without lora_rank all weights are trained")
    folder = Path(base["path"])
    require_no_adapter(cfg, folder)
    # New tokens have rows in the tables that the base does not have, so the tables are trained and saved too.
    grown = plain.config.vocab_size > hf.read_config(folder)["vocab_size"]
    tables = ("embed_tokens",) if plain.config.tie_embeddings else ("embed_tokens", "lm_head")
    spec = peft.AdapterSpec(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout,
                            targets_of(plain, cfg.lora_targets), cfg.rslora, tables if grown else ())
    return AdaptedGPT(plain.config, spec, base, cfg.seed, quantize=cfg.quantize_base == "nf4")


def chat_model(cfg: PostTrainingConfig, tokenizer: Tokenizer, run: Run,
               adapt: Callable[[Any, GPT, dict[str, str]], GPT] = with_adapter,
               **changes: Any) -> tuple[GPT, dict[str, str]]:
    """The model of cfg.init_from on the meta device, and the identity of what it starts from, for run.json.

    tokenizer: the data's; the model grows by its chat tokens. adapt: adds the trained parts to the model.
    changes: fields of the GPTConfig to replace. Raises UserError if the data was made with another tokenizer,
    if rows are longer than the model's context, or if lr_multipliers do not fit the model.
    """
    folder = hf.find_folder(cfg.init_from)
    before = Tokenizer.load(folder)
    if tokenizer.definition not in (before.definition, with_chat_tokens(before, ours=True).definition):
        raise UserError(f"dataset={cfg.dataset}: made with another tokenizer than that of "
                        f"init_from={cfg.init_from} (prepare.py --tokenizer={cfg.init_from})")
    require_context(cfg)
    config = GPTConfig.read(folder)
    config = replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size), **changes)
    base = run.run_on_rank0(lambda: {
        "path": str(folder.resolve()), "sha256": peft.weights_sha256(folder),
        "config_sha256": hf.config_sha256(folder)})
    with torch.device("meta"):
        model = adapt(cfg, GPT(config), base)
    require_multipliers(cfg, model)
    text = ""
    if isinstance(model, AdaptedGPT):  # trains the adapter and perhaps tables, but no linear layer
        cast_frozen(model, pick_dtype(cfg.dtype, run.device))
        text = f"; {model.num_saved():,} of them are trained"
    run.print(f"model     {model.num_parameters():,} parameters, from {folder}{text}")
    return model, {"base": base["sha256"], "base_config": base["config_sha256"]}


def write_merged(run: Run) -> None:
    """Write the best checkpoint's adapter, merged into its base, as a model folder out_dir/merged."""
    def write() -> None:
        assert run.tokenizer is not None
        with atomic_folder(run.out_dir / "merged", marker="config.json", kind="model") as folder:
            GPT.from_pretrained(run.out_dir).save_pretrained(folder, eos_token_id=run.tokenizer.end_ids)
            run.tokenizer.save(folder)

    run.run_on_rank0(write)
    run.print(f"merged    {run.out_dir / 'merged'}")


def finish(cfg: PostTrainingConfig, run: Run, results: dict[str, float], text: str, *commands: str) -> None:
    """End a run: the merged adapter if there is one, the last evaluation, and what to do next.

    results: of the last evaluation; {} if the run was finished before. text: a template of their names.
    """
    if cfg.merge:
        write_merged(run)
    if results:
        run.print(f"\nvalidation  {text.format(**results)}")
        print_end(run, *commands)
