"""Stages: keys of the configuration that change during a run.

    stages = [dict(steps=500), dict(steps=100, block_size=256, learning_rate=1e-3)]     # in a config file

    stages = plan_stages(cfg)                # the listed stages, or a single one of max_steps
    stage = stage_at(stages, step)           # stage.cfg is the configuration during this step

Such a list describes a curriculum or a multi-stage training. The learning-rate schedule spans the whole run,
unless a stage has restart=True; then a new schedule begins there, with new optimizer state.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from configurator import UserError, configure, override
from formats import hf
from model import GPT, GPTConfig
from training.config import RunConfig
from training.optim import multipliers

Config = TypeVar("Config", bound=RunConfig)  # the configuration class of a script

# A stage may change these shared keys, and every key of the script's own that is not in its stage_fixed.
STAGE_OVERRIDABLE = {"dataset", "global_batch_size", "micro_batch_size", "learning_rate", "min_lr",
                     "warmup_steps", "schedule", "decay_steps", "beta1", "beta2", "weight_decay", "grad_clip",
                     "lr_multipliers", "block_size", "rope_theta", "rope_scaling"}


@dataclass(frozen=True)
class Stage(Generic[Config]):
    """Steps `first` to `last` - 1 run under `cfg`. The learning-rate schedule that they belong to spans steps
    `begin` to `end` - 1."""

    cfg: Config
    changes: dict[str, Any]  # the keys that the stage lists, with their values
    first: int
    last: int
    begin: int
    end: int

    def rope_theta_at(self, step: int) -> float:
        """The rotary base in step `step`, counted from 0 over the run. A pair of values is a geometric ramp.

        Step k of the stage's n steps (from 0) has start^(1 - x) end^x with x = (k + 1) / n.
        """
        assert isinstance(self.cfg, GPTConfig)  # only a configuration with an architecture has the key
        ramp_ends = self.changes.get("rope_theta")
        if not isinstance(ramp_ends, tuple | list):
            return self.cfg.rope_theta
        # With this form the last step has exactly `end`, where the next stage continues. The equal form
        # start (end / start)^x would miss it by rounding.
        x = (step + 1 - self.first) / (self.last - self.first)
        return ramp_ends[0] ** (1 - x) * ramp_ends[1] ** x


def stage_config(cfg: Config, number: int) -> tuple[Config, dict[str, Any]]:
    """The configuration during stages[number], and the keys that this stage changes."""
    place, entry = f"stages[{number}]", cfg.stages[number]
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry) or \
            ("steps" in entry) == ("epochs" in entry):
        raise UserError(f"{place}: must be a dict with steps or epochs, such as dict(steps=100, key=value)")
    if type(entry.get("restart", False)) is not bool:
        raise UserError(f"{place}: restart={entry['restart']!r}: must be True or False")
    changes = {key: value for key, value in entry.items() if key not in ("steps", "epochs", "restart")}
    shared = {each.name for schema in (RunConfig, GPTConfig) for each in dataclasses.fields(schema)}
    if forbidden := ((shared - STAGE_OVERRIDABLE) | cfg.stage_fixed) & changes.keys():
        raise UserError(f"{place}: {min(forbidden)} cannot change during a run")
    if isinstance(cfg, GPTConfig) and cfg.position != "rope" and \
            {"rope_theta", "rope_scaling"} & changes.keys():
        raise UserError(f"{place}: position={cfg.position} has no rotary base to change")
    values, theta = dict(changes), changes.get("rope_theta")
    if isinstance(theta, tuple | list):
        if len(theta) != 2 or not all(type(end) in (int, float) and 0 < end < 1e30 for end in theta):
            raise UserError(f"{place}: rope_theta={theta}: a ramp is two positive numbers")
        values["rope_theta"] = theta[1]
    return override(cfg, values, place), changes


def stage_configs(cfg: Config) -> list[Config]:
    """The configuration of each stage; [cfg] if none are listed."""
    return [stage_config(cfg, number)[0] for number in range(len(cfg.stages))] or [cfg]


def plan_stages(cfg: Config) -> list[Stage[Config]]:
    """The stages of a run; a single stage of max_steps if none are listed. Raises UserError for a bad one."""
    if not cfg.stages:
        return [Stage(cfg, {}, 0, cfg.max_steps, 0, cfg.max_steps)]
    stages, begins, first = [], [0], 0
    for number, entry in enumerate(cfg.stages):
        stage_cfg, changes = stage_config(cfg, number)
        # None, which configure_run sets, is max_steps. That makes sense for a single stage only.
        steps = cfg.max_steps if entry["steps"] is None and len(cfg.stages) == 1 else entry["steps"]
        if type(steps) is not int or not 0 < steps < 2**63:
            raise UserError(f"stages[{number}]: steps={steps}: must be a positive whole number")
        if entry.get("restart") and first:
            begins.append(first)
        # The end of the schedule is known only after the last stage.
        stages.append(Stage(stage_cfg, changes, first, first + steps, begins[-1], 0))
        first += steps
    ends = [*begins[1:], first]  # a schedule ends where the next one begins
    return [dataclasses.replace(stage, end=ends[begins.index(stage.begin)]) for stage in stages]


def stage_at(stages: list[Stage[Config]], step: int) -> Stage[Config]:
    """The stage of step `step`, counted from 0; the last stage after the end."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def with_steps(cfg: Config, steps_in_epoch: Callable[[Config], float]) -> Config:
    """`cfg` with the epochs of its stages turned into steps; steps_in_epoch(stage's cfg) is the factor."""
    stages = []
    for number, entry in enumerate(cfg.stages):
        stage_cfg, _ = stage_config(cfg, number)
        if "epochs" in entry:
            if type(entry["epochs"]) not in (int, float) or not 0 < entry["epochs"] < 2**31:
                raise UserError(f"stages[{number}]: epochs={entry['epochs']}: must be a positive number")
            steps = max(1, round(entry["epochs"] * steps_in_epoch(stage_cfg)))
            entry = {key: value for key, value in entry.items() if key != "epochs"} | {"steps": steps}
        stages.append(entry)
    return dataclasses.replace(cfg, stages=stages)


def configure_run(schema: type[Config], argv: list[str], usage: str) -> tuple[Config, dict[str, str]]:
    """`configure`, with --max_steps in place of the steps or epochs of a config file's only stage."""
    cfg, provenance = configure(schema, argv, usage)
    place = provenance.get("max_steps")
    if not cfg.stages or not place:
        return cfg, provenance
    if len(cfg.stages) > 1 or place != "command line":
        raise UserError(f"{place}: max_steps is the sum of the stages' steps; remove it")
    stage_config(cfg, 0)  # raises UserError if the entry is no stage
    entry = {key: value for key, value in cfg.stages[0].items() if key != "epochs"} | {"steps": None}
    return dataclasses.replace(cfg, stages=[entry]), provenance


def require_multipliers(cfg: RunConfig, model: GPT) -> None:
    """Raise UserError if the lr_multipliers of a stage do not fit the model."""
    for stage in stage_configs(cfg):
        multipliers(model, stage.lr_multipliers)


def require_free_keys(provenance: dict[str, str], source: str, free: set[str]) -> None:
    """Raise UserError if the user set a key of the architecture, which the model folder of `source` brings.

    free: the keys that may be set nevertheless. A user's n_layer could contradict the weights in the folder.
    """
    architecture = {field.name for field in dataclasses.fields(GPTConfig)}
    if user_keys := sorted(architecture & (provenance.keys() - free)):
        key = user_keys[0]
        raise UserError(f"{provenance[key]}: {key} comes with {source} and cannot be given")


def context_length(cfg: RunConfig, source: str | None) -> int:
    """The block_size of a run's model: the longest rows of any stage, and at least that of a model folder."""
    lengths = [stage.block_size for stage in stage_configs(cfg)]
    if source:
        lengths.append(hf.read_config(hf.find_folder(source))["block_size"])
    return max(lengths)
