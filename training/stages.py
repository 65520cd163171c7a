"""What a run is told: the keys that all its kinds share, and the stages that change them on the way.

    stages = plan(cfg)                       # one, or those the config file lists
    stage = stage_at(stages, step)           # stage.cfg, and which steps it spans
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from configurator import UserError, coerce, override, require, require_not_negative, require_positive
from model import GPTConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The keys of every stage. The defaults are those of the run that `python train.py` does."""

    out_dir: str = "out/base"  # checkpoints and logs go here; the same command again continues the run
    init_from: str | None = None  # model folder, out_dir or hub id to start from; None: random weights
    dataset: str = "pystdlib"  # folders under data/ (or paths), mixed by weight: a:0.7,b:0.3
    seed: int = 1337  # of the weights, the order of the data, and dropout
    device: str | None = None  # cpu, cuda, cuda:1, mps; None: the best there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # computing; None: bfloat16 on cuda
    compile: bool | None = None  # torch.compile each block; None: on cuda, if the run is long enough
    parallel: Literal["none", "ddp", "fsdp"] = "ddp"  # how torchrun's processes share the work
    reshard_after_forward: bool = True  # fsdp: gather a block's weights twice a step, to save memory
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # fsdp: in which gradients travel and are summed
    activation_checkpointing: bool = False  # recompute blocks in the backward pass, to save memory
    global_batch_size: int = 16  # sequences a step, over all ranks
    micro_batch_size: int = 16  # sequences a rank puts through the model at a time
    max_steps: int = 550  # optimizer steps; where stages are listed, their sum counts instead
    learning_rate: float = 6e-3  # peak
    min_lr: float = 0.0  # at the end of the decay
    warmup_steps: int | None = None  # None: 2 % of max_steps
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "linear"  # wsd: warmup, stable, linear decay
    decay_steps: int | None = None  # of wsd; None: 30 % of max_steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the blocks' matrices, AdamW for the rest
    beta1: float = 0.9  # of AdamW, and the momentum of Muon
    beta2: float = 0.98  # of AdamW
    weight_decay: float = 0.2  # on matrices
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    lr_multipliers: dict = field(default_factory=dict)  # {regex of names: factor}, first match, 0 freezes
    stages: list = field(default_factory=list)  # [dict(steps=.. or epochs=.., key=value, ..), ..]
    eval_interval: int = 275  # steps between evaluations; 0: only at the end of a stage
    eval_tokens: int | None = None  # validation tokens of an evaluation, always the first ones; None: all
    save_interval: int = 275  # steps between checkpoints; 0: only at the end of a stage
    keep_checkpoints: int = 2  # the newest ones; the best, and those that end a stage, stay as well
    max_rollbacks: int = 0  # times to go back to a checkpoint, at half the rate, from a loss not finite
    log_interval: int = 10  # steps between log lines
    wandb: bool = False  # mirror the log to Weights & Biases
    wandb_project: str = "nanollama"  # its project
    run_name: str | None = None  # its name there; None: the name of out_dir
    overwrite: bool = False  # delete what is in out_dir and start anew

    stage_fixed = frozenset()  # a script's own keys that no stage can change; not a key itself, as the next is none
    resume_free = frozenset()  # a script's own keys that may differ when a run is resumed

    def __post_init__(self) -> None:
        """UserError for a value outside its range."""
        require_positive(self, "global_batch_size", "micro_batch_size", "max_steps", "learning_rate", "keep_checkpoints", "log_interval")
        require_not_negative(self, "min_lr", "weight_decay", "grad_clip", "eval_interval", "save_interval", "seed", "warmup_steps", "decay_steps", "eval_tokens", "max_rollbacks")
        for key in ("beta1", "beta2"):
            require(self, key, 0 <= getattr(self, key) < 1, "at least 0 and below 1")


# These may differ when a run is resumed: they change where, how fast and how long it runs, and of what it
# computes the rounding at most (bfloat16 on a GPU); a larger max_steps stretches the schedule.
RESUMABLE_CHANGES = {"device", "parallel", "micro_batch_size", "compile", "reshard_after_forward",
               "activation_checkpointing", "max_steps", "eval_interval", "save_interval", "keep_checkpoints",
               "max_rollbacks", "log_interval", "wandb", "wandb_project", "run_name", "out_dir", "overwrite"}
# What a stage may change, of the keys above and of the architecture; the keys of its own script are free.
STAGE_OVERRIDABLE = {"dataset", "global_batch_size", "micro_batch_size", "learning_rate", "min_lr", "warmup_steps",
              "schedule", "decay_steps", "beta1", "beta2", "weight_decay", "grad_clip", "lr_multipliers",
              "block_size", "rope_theta", "rope_scaling"}


# ---- Stages: keys that change during a run ----------------------------------------------------------------

@dataclass(frozen=True)
class Stage:
    """Steps `first` up to, not including, `last`, under `cfg`. Its schedule spans steps `begin` to `end`."""

    cfg: Any
    changes: dict[str, Any]
    first: int
    last: int
    begin: int
    end: int

    def rope_theta_at(self, step: int) -> float:
        """The rotary base of step `step`, counted from 0 over the run; a pair moves geometrically."""
        ends = self.changes.get("rope_theta")
        if not isinstance(ends, tuple | list):
            return self.cfg.rope_theta
        # Step k of n (from 0) has start^(1 - x) end^x with x = (k + 1) / n: the stage's last step has exactly
        # `end`, where start (end / start)^x would miss it by rounding, and the next stage goes on from there.
        share = (step + 1 - self.first) / (self.last - self.first)
        return ends[0] ** (1 - share) * ends[1] ** share


def plan_stages(cfg: Any) -> list[Stage]:
    """The stages of a run; one of max_steps where none are listed. UserError for what a stage cannot say."""
    if not cfg.stages:
        return [Stage(cfg, {}, 0, cfg.max_steps, 0, cfg.max_steps)]
    stages, begins, first = [], [0], 0
    for number, entry in enumerate(cfg.stages):
        stage_cfg, changes = stage_config(cfg, number)
        if type(entry["steps"]) is not int or not 0 < entry["steps"] < 2**63:
            raise UserError(f"stages[{number}]: steps={entry['steps']}: must be a positive whole number")
        if entry.get("restart") and first:
            begins.append(first)
        stages.append(Stage(stage_cfg, changes, first, first + entry["steps"], begins[-1], 0))
        first += entry["steps"]
    ends = [*begins[1:], first]
    return [dataclasses.replace(stage, end=ends[begins.index(stage.begin)]) for stage in stages]


def stage_configs(cfg: Any) -> list[Any]:
    """The configuration of each stage; `cfg` itself where none are listed."""
    return [stage_config(cfg, number)[0] for number in range(len(cfg.stages))] or [cfg]


def stage_config(cfg: Any, number: int) -> tuple[Any, dict[str, Any]]:
    """The configuration inside stages[number], and the keys it changes."""
    entry = cfg.stages[number]
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry) or \
            ("steps" in entry) == ("epochs" in entry):
        raise UserError(f"stages[{number}]: must be a dict with steps or epochs, as dict(steps=100, ..)")
    changes = {key: value for key, value in entry.items() if key not in ("steps", "epochs", "restart")}
    common = {each.name for schema in (RunConfig, GPTConfig) for each in dataclasses.fields(schema)}
    if forbidden := (common - STAGE_OVERRIDABLE | cfg.stage_fixed) & changes.keys():
        raise UserError(f"stages[{number}]: {min(forbidden)} cannot change during a run")
    if {"rope_theta", "rope_scaling"} & changes.keys() and getattr(cfg, "position", None) == "learned":
        raise UserError(f"stages[{number}]: position=learned has no rotary base to change")
    values, theta = dict(changes), changes.get("rope_theta")
    if isinstance(theta, tuple | list):
        values["rope_theta"] = ramp(theta, f"stages[{number}]")[1]
    return override(cfg, values, f"stages[{number}]"), changes


def ramp(theta: tuple | list, place: str) -> tuple[float, float]:
    """The two ends of a stage's rotary base. UserError unless they are two positive, finite numbers."""
    try:
        start, end = (coerce(each, float) for each in theta)
    except (TypeError, ValueError):
        start = end = 0.0
    if min(start, end) <= 0:
        raise UserError(f"{place}: rope_theta={theta}: a ramp is two positive numbers")
    return start, end


def with_steps(cfg: Any, steps_in_epoch: Callable[[Any], float]) -> Any:
    """`cfg` with every stage's epochs turned into steps; steps_in_epoch(stage's cfg): how many one takes."""
    stages = []
    for number, entry in enumerate(cfg.stages):
        stage_cfg, _ = stage_config(cfg, number)
        if "epochs" in entry:
            if not isinstance(entry["epochs"], int | float) or not 0 < entry["epochs"] < 2**31:
                raise UserError(f"stages[{number}]: epochs={entry['epochs']}: must be a positive number")
            steps = max(1, round(entry["epochs"] * steps_in_epoch(stage_cfg)))
            entry = {key: value for key, value in entry.items() if key != "epochs"} | {"steps": steps}
        stages.append(entry)
    return dataclasses.replace(cfg, stages=stages)


def stage_at(stages: list[Stage], step: int) -> Stage:
    return next(stage for stage in stages if step < stage.last)
