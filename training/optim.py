"""Optimizers: AdamW for tables and vectors, Muon for the hidden matrices; and the learning-rate schedule.

    optimizers = make_optimizers(model, cfg)             # every group carries its lr_multiplier
    set_learning_rate(optimizers, learning_rate_at(cfg, step))

Both take one learning rate: Muon's update is scaled to AdamW's typical size (0.2 RMS per entry; arXiv
2502.16982).
"""

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from configurator import UserError
from modeling.devices import gather_full, shard_like

BATCH_ELEMENTS = 2**26  # matrices orthogonalised in one batch: 256 MiB of float32


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the update (kellerjordan.github.io/posts/muon, 2024).

    torch.optim.Muon orthogonalises in bfloat16 everywhere, which a CPU without bfloat16 units emulates 50
    times slower than float32; and one matrix at a time. This one runs in float32 on the CPU and in bfloat16
    on a GPU, all matrices of a shape in one batch. Sharded matrices (FSDP2) are gathered, orthogonalised
    whole, and cut again.

    `found_inf`: a device scalar set from outside (as torch's GradScaler does); where it is 1 the step changes
    nothing.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 steps: int = 5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                at_once = max(1, BATCH_ELEMENTS // math.prod(shape))
                for start in range(0, len(parameters), at_once):
                    self.update(parameters[start:start + at_once], group)

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step for matrices of one shape."""
        skip = getattr(self, "found_inf", None)
        go = 1.0 if skip is None else 1.0 - skip  # 0 where the step must change nothing
        directions = []
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = self.state[parameter]["momentum_buffer"]
            grad = parameter.grad if skip is None else torch.where(skip > 0, 0.0, parameter.grad)
            momentum.add_((grad - momentum) * (go * (1 - group["momentum"])))
            directions.append(gather_full(grad.lerp(momentum, group["momentum"])))  # Nesterov
        rate = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        orthogonal = orthogonalize(torch.stack(directions), group["steps"])
        for parameter, direction in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1 - go * (group["lr"] * group["weight_decay"]))
            parameter.sub_(shard_like(parameter, direction * (go * rate)))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of (n, rows, columns) to about 1 by Newton-Schulz iteration; float32.

    The quintic a X + b X X^T X + c (X X^T)^2 X with Jordan's coefficients: steep at 0, so five steps do, at
    the price of ending anywhere in about 0.7 to 1.2. Works on the smaller of the two Gram matrices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, small, small)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def multipliers(model: nn.Module, patterns: dict[str, float]) -> dict[str, float]:
    """{parameter name: learning-rate factor}, that of the first pattern found in the name, else 1.

    Raises UserError for a pattern that is no regular expression or matches no parameter, and for a factor
    that is no number or negative.
    """
    for pattern, factor in patterns.items():
        if not isinstance(pattern, str) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise UserError(f"lr_multipliers: {pattern!r}: {factor!r}: must be a regular expression and "
                            "a factor of at least 0")
    table, matched = {}, set()
    for name, _ in model.named_parameters():
        table[name] = 1.0
        for pattern, factor in patterns.items():
            try:
                found = re.search(pattern, name)
            except re.error as error:
                raise UserError(f"lr_multipliers: {pattern!r} is no regular expression: {error}") from None
            if found:
                matched.add(pattern)
                table[name] = float(factor)
                break
    if unused := [pattern for pattern in patterns if pattern not in matched]:
        raise UserError(f"lr_multipliers: {unused[0]!r} decides over no parameter")
    return table


def multipliers_text(table: dict[str, float]) -> str:
    """A line for each factor and kind of parameter, layers together, and one for all that keep the rate."""
    kinds = Counter((factor, re.sub(r"\.\d+\.", ".*.", name)) for name, factor in table.items())
    lines = [f"lr x {factor:<5g}{name}" + f"  ({count} layers)" * (count > 1)
             for (factor, name), count in kinds.items() if factor != 1]
    others = sum(factor == 1 for factor in table.values())
    return "\n".join([*lines, f"lr x 1    the other {others} parameters"])


def make_optimizers(model: nn.Module, cfg: Any) -> list[torch.optim.Optimizer]:
    """AdamW, and before it Muon for the blocks' matrices if cfg.optimizer is "muon".

    Decays matrices only. Parameters whose multiplier is 0 stop requiring gradients and belong to no
    optimizer. Each group carries "lr_multiplier"; its "lr" is set before every step.
    """
    table = multipliers(model, cfg.lr_multipliers)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table[name] > 0)
        is_matrix = parameter.ndim >= 2
        for_muon = cfg.optimizer == "muon" and is_matrix and ".layers." in name
        if table[name] > 0:
            groups.setdefault((for_muon, is_matrix, table[name]), []).append(parameter)
    described: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (for_muon, is_matrix, factor), parameters in groups.items():
        described[for_muon].append({"params": parameters, "lr_multiplier": factor,
                                    "weight_decay": cfg.weight_decay if is_matrix else 0.0})
    optimizers: list[torch.optim.Optimizer] = []
    if described[True]:
        optimizers.append(Muon(described[True], lr=cfg.learning_rate, momentum=cfg.beta1))
    if described[False]:
        optimizers.append(torch.optim.AdamW(described[False], lr=cfg.learning_rate,
                                            betas=(cfg.beta1, cfg.beta2), fused=True))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]


def learning_rate_at(cfg: Any, step: int, total: int) -> float:
    """The rate of step 0 ... total - 1: linear warmup to learning_rate, then cfg.schedule to min_lr.

    warmup_steps and decay_steps default to 2 % and 30 % of total. wsd (arXiv 2404.06395): constant, then
    linear down over decay_steps. linear and cosine fall from the end of the warmup.
    """
    warmup = cfg.warmup_steps if cfg.warmup_steps is not None else total // 50
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    decay = {"constant": 0, "wsd": cfg.decay_steps if cfg.decay_steps is not None else int(0.3 * total)}.get(
        cfg.schedule, total - warmup)
    done = (step - (total - decay)) / decay if step >= total - decay else 0.0  # share of the decay, 0 ... 1
    shape = (1 + math.cos(math.pi * done)) / 2 if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * shape


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer],
                    keep: bool = True) -> dict[str, dict[str, Any]]:
    """{parameter name: {"exp_avg": whole tensor on the CPU, ...}}.

    All ranks call it, since shards are gathered; one that need not `keep` the result gets None for tensors.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    result: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            gathered = ((key, gather_full(value)) for key, value in state.items())
            result[names[parameter]] = {key: value.cpu() if keep else None for key, value in gathered}
    return result


def load_optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer],
                         saved: dict[str, dict[str, Tensor]]) -> None:
    """Give every parameter that is trained now its saved state; one without begins anew."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in saved.get(names[parameter], {}).items():
                    value = value.to(parameter.device)
                    is_sharded = value.shape == parameter.shape  # as all but the step count are
                    optimizer.state[parameter][key] = shard_like(parameter, value) if is_sharded else value
