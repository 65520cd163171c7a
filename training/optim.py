"""Optimizers: AdamW for tables and vectors, Muon for the hidden matrices; and the learning-rate schedule.

    optimizers = make_optimizers(model, cfg)             # every group carries its lr_multiplier
    set_learning_rate(optimizers, learning_rate_at(cfg, step, total))

Both take one learning rate: Muon's update is scaled to AdamW's typical size, an RMS of 0.2 per entry (arXiv
2502.16982).
"""

import math
import re
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configurator import UserError
from model import GPT
from modeling.devices import gather_full, shard_like
from training.config import RunConfig

BATCH_ELEMENTS = 2**26  # entries orthogonalised in one batch of matrices: 256 MiB of float32


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the update (kellerjordan.github.io/posts/muon, 2024).

    torch.optim.Muon orthogonalises one matrix at a time, always in bfloat16. A CPU without bfloat16 units
    emulates that 50 times slower than float32. This one runs in float32 on the CPU and in bfloat16 on a GPU,
    and batches all matrices of one shape. Sharded matrices (FSDP2) are gathered, orthogonalised whole, and
    sharded again.

    `found_inf` is a device scalar set by `skip_if`, as torch's GradScaler sets it. Where it is 1, the step
    changes nothing.
    """

    _step_supports_amp_scaling = True  # tells GradScaler that step() reads found_inf itself

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, in batches of matrices of one shape. No closure."""
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                batch_size = max(1, BATCH_ELEMENTS // math.prod(shape))
                for start in range(0, len(parameters), batch_size):
                    self.update(parameters[start:start + batch_size], group)

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step for matrices of one shape (rows, columns)."""
        found_inf = getattr(self, "found_inf", None)
        go = 1.0 if found_inf is None else 1.0 - found_inf  # 0 where the step must change nothing
        directions = []
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momentum, grad = self.state[parameter]["momentum_buffer"], parameter.grad
            assert grad is not None
            if found_inf is not None:
                grad = torch.where(found_inf > 0, 0.0, grad)  # 0 * nan would be nan
            momentum.add_((grad - momentum) * (go * (1 - group["momentum"])))  # the running mean of gradients
            directions.append(gather_full(grad.lerp(momentum, group["momentum"])))  # Nesterov
        orthogonal = orthogonalize(torch.stack(directions))  # (n, rows, columns)
        # An orthogonal matrix has an RMS of 1 / sqrt(longer side); scale it to 0.2.
        rate = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, direction in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1 - go * (group["lr"] * group["weight_decay"]))
            parameter.sub_(shard_like(parameter, direction * (go * rate)))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of (n, rows, columns) to about 1 by Newton-Schulz iteration; float32.

    One iteration is the quintic a X + b X X^T X + c (X X^T)^2 X with Jordan's coefficients. They are steep at
    0, so five iterations suffice, but the singular values end anywhere from about 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]  # transpose, so that the Gram matrix is the smaller one
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, small, small)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def multipliers(model: GPT, patterns: dict[str, float]) -> dict[str, float]:
    """{parameter name: learning-rate factor}: the factor of the first pattern found in the name, else 1; 0 if
    the model does not let it be trained.

    Raises UserError for a pattern that is not a regular expression or decides for no parameter, and for a
    factor that is not a number of at least 0.
    """
    for pattern, factor in patterns.items():
        if not isinstance(pattern, str) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise UserError(f"lr_multipliers: {pattern!r}: {factor!r}: must be a regular expression and "
                            "a factor of at least 0")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"lr_multipliers: {pattern!r} is not a regular expression: {error}") from None
    # {trained parameter: the pattern that decides, or None}
    first = {name: next((pattern for pattern in patterns if re.search(pattern, name)), None)
             for name, _ in model.named_parameters() if model.is_trained(name)}
    if unused := [pattern for pattern in patterns if pattern not in first.values()]:
        raise UserError(f"lr_multipliers: pattern {unused[0]!r} matches no parameter (or an earlier pattern "
                        "took them all)")
    factors: dict[Any, float] = {**patterns, None: 1.0}
    table = {name: float(factors[first[name]]) if name in first else 0.0
             for name, _ in model.named_parameters()}
    if not any(table.values()):
        raise UserError("lr_multipliers: freezes every parameter; leave a factor above 0 for at least one")
    return table


def multipliers_text(table: dict[str, float]) -> str:
    """One line per factor and kind of parameter, with layers counted together. One line counts the frozen
    parameters, and one all others."""
    kinds = Counter((factor, re.sub(r"\.\d+\.", ".*.", name)) for name, factor in table.items())
    lines = [f"lr x {factor:<5g}{name}" + (f"  ({count} layers)" if count > 1 else "")
             for (factor, name), count in kinds.items() if factor not in (0, 1)]
    for factor, what in ((0, "frozen: "), (1, "the other ")):
        if count := sum(each == factor for each in table.values()):
            lines.append(f"lr x {factor}    {what}{count} parameter{'s' if count > 1 else ''}")
    return "\n".join(lines)


def make_optimizers(model: GPT, cfg: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon before it for the blocks' matrices if cfg.optimizer is "muon".

    Only matrices decay. A parameter with multiplier 0 is frozen: it requires no gradient and belongs to no
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
    muon, adamw = list[dict[str, Any]](), list[dict[str, Any]]()  # the groups of each optimizer
    for (for_muon, is_matrix, factor), parameters in groups.items():
        (muon if for_muon else adamw).append({"params": parameters, "lr_multiplier": factor,
                                              "weight_decay": cfg.weight_decay if is_matrix else 0.0})
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, lr=cfg.learning_rate, momentum=cfg.beta1))
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                            fused=True))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set every group's "lr" to rate times its lr_multiplier."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]


def skip_if(optimizers: list[torch.optim.Optimizer], bad: Tensor) -> None:
    """Let the next step of every optimizer change nothing if the device scalar `bad` is true.

    torch's optimizers read these attributes inside their kernels, so the CPU does not wait for the flag.
    """
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]


def learning_rate_at(cfg: RunConfig, step: int, total: int) -> float:
    """The learning rate of step 0 to total - 1: linear warmup to learning_rate, then cfg.schedule to min_lr.

    warmup_steps and decay_steps default to 2 % and 30 % of total. wsd (arXiv 2404.06395) stays constant, then
    falls linearly over decay_steps, or fewer if the warmup has left no more. linear and cosine fall from the
    end of the warmup.
    """
    warmup = cfg.warmup_steps if cfg.warmup_steps is not None else total // 50
    if step < warmup:
        return cfg.learning_rate * (step + 1) / warmup
    if cfg.schedule == "wsd":
        decay = cfg.decay_steps if cfg.decay_steps is not None else int(0.3 * total)
    else:
        decay = 0 if cfg.schedule == "constant" else total - warmup
    decay = min(decay, total - warmup)
    done = (step - (total - decay)) / decay if step >= total - decay else 0.0  # share of the decay, 0 to 1
    shape = (1 + math.cos(math.pi * done)) / 2 if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * shape


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients by one factor, so that their global norm is at most `limit`; 0 leaves them alone.

    Returns the norm before, a float32 scalar on the device. With FSDP it is the norm of all shards together.
    A CPU sums the squares in float64. torch adds a million float32 squares one after the other there: that is
    off by up to 6e-5, and by another amount if the tensors are sharded. A GPU adds them pairwise.
    """
    # A frozen parameter has no gradient, and neither has one that this step has not used.
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if grads[0].device.type != "cpu":
        return gather_full(nn.utils.clip_grad_norm_(parameters, limit or math.inf))
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    norms = [torch.linalg.vector_norm(shard, dtype=torch.float64) for shard in shards]
    total = torch.stack(norms).square().sum()
    if isinstance(grads[0], DTensor):
        dist.all_reduce(total, group=grads[0].device_mesh.get_group())
    norm = total.sqrt().float()
    if limit:
        torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))  # 1e-6 as in torch's function
    return norm


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer],
                    keep: bool = True) -> dict[str, dict[str, Any]]:
    """{parameter name: {"exp_avg": full tensor on the CPU, ...}}.

    All ranks call it, because shards are gathered. A rank with keep=False gets None in place of each tensor.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    result: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            gathered = ((key, gather_full(value)) for key, value in state.items())
            result[names[parameter]] = {key: value.cpu() if keep else None for key, value in gathered}
    return result


def load_optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer],
                         saved: dict[str, dict[str, Tensor]]) -> None:
    """Give every parameter that is trained now its saved state; one without saved state starts new."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in saved.get(names[parameter], {}).items():
                    value = value.to(parameter.device)
                    is_sharded = value.shape == parameter.shape  # everything but the step count
                    optimizer.state[parameter][key] = shard_like(parameter, value) if is_sharded else value
