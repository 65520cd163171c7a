"""The keys that every training script has: RunConfig.

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig(RunConfig, GPTConfig): ...          # a script adds its own keys
    cfg, provenance = configure_run(TrainConfig, argv, usage=__doc__)

The comment after each field is its --help text, and `# ---- Name` begins a section of --help
(configurator.py). What a stage may change during a run is in training/stages.py.
"""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from configurator import require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The keys of every training script. The defaults are those of `python train.py`."""

    # ---- Model, data and folder
    out_dir: str = "out/base"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str | None = None  # model folder, out_dir or hub id to start from; None: random weights
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    block_size: int = 128  # tokens per training row
    seed: int = 1337  # seed of the weights, the data order and dropout
    # ---- Devices and precision
    device: str | None = None  # cpu, cuda, cuda:1 or mps; None picks the best one available
    threads: int | None = None  # CPU threads of each process; None takes every core the process may use
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None uses bfloat16 on cuda, else float32
    compile: bool | None = None  # torch.compile every block; None compiles on cuda if the run is long enough
    parallel: Literal["none", "ddp", "fsdp"] = "ddp"  # torchrun processes hold copies (ddp) or shards (fsdp)
    reshard_after_forward: bool = True  # with fsdp, free gathered weights between the passes to save memory
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # with fsdp, dtype in which gradients are summed
    activation_checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    # ---- Batches and steps
    global_batch_size: int = 16  # sequences per optimizer step, over all ranks
    micro_batch_size: int = 16  # sequences per forward pass on one rank; changes the dropout masks
    max_steps: int = 550  # optimizer steps, 0 saves the start only; with stages, their sum counts instead
    # ---- Optimizer and stages
    learning_rate: float = 6e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the decay
    warmup_steps: int | None = None  # steps of linear warmup; None is 2 % of max_steps
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "linear"  # wsd: constant, then linear decay
    decay_steps: int | None = None  # steps of wsd's decay; None is 30 % of max_steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon trains the blocks' matrices, AdamW everything else
    beta1: float = 0.9  # AdamW's beta1; also Muon's momentum
    beta2: float = 0.98  # AdamW's beta2
    weight_decay: float = 0.2  # weight decay, applied to matrices only
    grad_clip: float = 1.0  # maximum global gradient norm; 0 turns clipping off
    lr_multipliers: dict = field(default_factory=dict)  # {name regex: factor}; first match wins, 0 freezes
    stages: list = field(default_factory=list)  # keys that change in time: [dict(steps=100, key=value), ..]
    # ---- Evaluation and checkpoints
    eval_interval: int = 275  # steps between evaluations; 0 evaluates only at the end of each stage
    eval_tokens: int | None = None  # validation tokens per evaluation, always the first ones; None uses all
    eval_tasks: str = ""  # tasks of eval.py that are measured at each evaluation, such as problems,hellaswag
    eval_data: str = ""  # folder with their files, and TASK=PLACE, separated by commas; "" reads the hub
    eval_limit: int = 100  # largest number of questions per task
    save_interval: int = 275  # steps between checkpoints; 0 saves only at the end of each stage
    keep_checkpoints: int = 2  # newest checkpoints to keep; the best and each stage's last are kept as well
    patience: int = 0  # end the run after so many evaluations without a lower val_loss; 0 never does
    max_rollbacks: int = 0  # times to return to a checkpoint, at half the rate, when the loss is not finite
    rollback_grad_clip: float | None = None  # grad_clip after a rollback; None keeps grad_clip
    rollback_steps: int | None = None  # steps after the bad one with lower rate and clip; None is the rest
    on_end: str | None = None  # shell command to run at the end, with NANOLLAMA_OUTCOME and others set
    # ---- Log
    log_interval: int = 10  # steps between log lines
    wandb: bool = False  # also log to Weights & Biases
    wandb_project: str = "nanollama"  # Weights & Biases project
    tensorboard: bool = False  # also log to out_dir/tensorboard (needs the package tensorboard)
    run_name: str | None = None  # Weights & Biases run name; None uses the name of out_dir
    # ---- Starting over
    overwrite: bool = False  # delete the checkpoints in out_dir and start over

    # Class attributes, not config fields: a script lists its own keys here.
    model_keys: ClassVar[tuple[str, ...]] = ("init_from",)  # keys that name a model which the run reads
    stage_fixed: ClassVar[Set[str]] = frozenset()  # keys that a stage may not change
    log_line_without: ClassVar[Set[str]] = frozenset()  # metrics that are in metrics.jsonl only
    resume_free: ClassVar[Set[str]] = frozenset()  # keys that may change when a run is resumed

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        require_positive(self, "global_batch_size", "micro_batch_size", "block_size", "learning_rate",
                         "keep_checkpoints", "log_interval", "eval_limit")
        require_not_negative(self, "min_lr", "weight_decay", "grad_clip", "eval_interval", "save_interval",
                             "seed", "warmup_steps", "decay_steps", "eval_tokens", "max_rollbacks",
                             "patience", "rollback_grad_clip", "rollback_steps", "max_steps")
        require(self, "min_lr", self.min_lr <= self.learning_rate,
                f"at most learning_rate={self.learning_rate}")
        for key in ("global_batch_size", "block_size"):  # a mistyped size must not fill the memory
            require(self, key, getattr(self, key) <= 2**24, f"at most {2**24:,}")
        for key in ("beta1", "beta2"):
            require(self, key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")


# A resumed run may change these keys. They change where, how fast and how long the run computes. The results
# differ at most by rounding (bfloat16 on a GPU), with two exceptions. Dropout is drawn per rank and
# micro-batch, so another micro_batch_size draws other masks. On-policy distillation samples text, and
# rounding may change a sampled token. A larger max_steps stretches the schedule.
RESUMABLE_CHANGES = {"device", "parallel", "micro_batch_size", "compile", "reshard_after_forward",
                     "activation_checkpointing", "max_steps", "eval_interval", "save_interval",
                     "keep_checkpoints", "patience", "max_rollbacks", "rollback_grad_clip",
                     "rollback_steps", "on_end", "log_interval", "wandb", "wandb_project",
                     "tensorboard", "threads", "run_name", "out_dir", "overwrite", "eval_tasks", "eval_data",
                     "eval_limit"}
