"""Mixture of experts: each token goes through the few MLPs of a block that its router chooses.

    python train.py --n_expert=8 --n_expert_per_token=2 --intermediate_size=384     # files are Mixtral's
    python train.py --n_expert=8 --qk_norm=True --dense_layers=[0]                  # files are Qwen3-MoE's

    mlp = MoE(config, [MLP(config, config.expert_size) for _ in range(8)])     # Block.mlp
    begin_step(model, scale, load)             # loop.py, before the forward passes of a step
    load, metrics = end_step(model)            # after its update: the share of each expert

The router is a linear layer in float32. A token's output is the sum of its experts' outputs, weighted by the
router's probabilities (Mixtral, arXiv 2401.04088). Ties go to the lower index.

Experts must get about the same number of tokens. Both ways count over the *global* batch (arXiv 2501.11873):

    balance=aux    balance_weight * E * sum_e load_e p_e per token is added to the loss (Switch, arXiv
                   2101.03961, equation 4). load is that of the step before. So the loss is a sum over tokens,
                   whatever the number of processes and micro-batches.
    balance=bias   a bias per expert is added where experts are chosen, and nowhere else. After each step it
                   grows by balance_weight if the expert had fewer tokens than the mean, else it falls (arXiv
                   2408.15664). Only this project loads such a model.

The router z-loss, router_z_loss * logsumexp(logits)^2, keeps logits small (ST-MoE, arXiv 2202.08906).

Without a capacity_factor no token is dropped: an expert takes all tokens that choose it. With one, in a
forward pass of training, it takes the first capacity_factor * N k / E choices, rounded up, in the order of
the tokens. (GShard, arXiv 2006.16668, takes all first choices before the second ones. Then tokens depend on
later ones.) A dropped choice adds nothing: a token that loses all its choices keeps only its residual. N is
that of a micro-batch on one process, so what is dropped depends on both. Left out: shared experts and expert
parallelism.

Shapes: B rows, T tokens of a row, N = B T tokens, C n_embd, E experts, k experts per token.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError, require, require_not_negative, require_positive
from modeling.devices import autocast_dtype, gather_full, shard_like


def check_experts(config: Any) -> None:
    """Raise UserError for settings of a GPTConfig that do not fit a mixture of experts. n_expert=0: dense."""
    require_not_negative(config, "n_expert", "balance_weight", "router_z_loss")
    require_positive(config, "capacity_factor")
    require(config, "n_expert", config.n_expert <= 4096, "at most 4,096")
    if not config.n_expert:
        return
    if config.ternary or config.mlp != "swiglu" or config.bias == "all":
        raise UserError("n_expert: experts are SwiGLU layers without bias, and not ternary")
    k, E = config.n_expert_per_token, config.n_expert
    require(config, "n_expert_per_token", 1 <= k <= E, f"from 1 to n_expert={E}")
    require(config, "norm_topk", not config.norm_topk or k > 1 or E == 1,
            "False with n_expert_per_token=1, or the router has no gradient: its weight is always 1")
    require(config, "dense_layers", set(config.dense_layers) < set(range(config.n_layer)),
            f"a list of layers from 0 to {config.n_layer - 1}, and not all")


class AddLoss(torch.autograd.Function):
    """Return x. In the backward pass, `loss` gets the gradient `scale`, as if loss * scale had been added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.saved_tensors[0], None


def grouped_swiglu(rows: Tensor, experts: Any, counts: Tensor) -> Tensor:
    """rows (n, C), sorted by expert: counts[e] go through expert e. Returns (n, C).

    Three grouped matrix products, which wait for no count from the GPU.
    """
    ends = counts.cumsum(0).to(torch.int32)  # (E,)
    matrices = ((each.gate_proj.weight, each.up_proj.weight, each.down_proj.weight) for each in experts)
    # (E, C, inner), (E, C, inner), (E, inner, C)
    gate, up, down = (torch.stack(each).to(rows.dtype).mT for each in zip(*matrices, strict=True))
    hidden = F.silu(torch._grouped_mm(rows, gate, offs=ends)) * torch._grouped_mm(rows, up, offs=ends)
    return torch._grouped_mm(hidden, down, offs=ends)


class MoE(nn.Module):
    """The experts of one block and their router: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: Any, experts: list[nn.Module]):
        """config: a GPTConfig. experts: MLPs with gate_proj, up_proj and down_proj."""
        super().__init__()
        self.config, E = config, config.n_expert
        self.gate = nn.Linear(config.n_embd, E, bias=False)
        self.experts = nn.ModuleList(experts)
        self.expert_bias = None  # saved with the weights, and moved by end_step; no optimizer trains it
        if config.balance == "bias":
            self.expert_bias = nn.Parameter(torch.zeros(E), requires_grad=False)
        # Set by begin_step, float32: the factor of the loss, (), the load of the step before, (E,), and what
        # is counted in this step: the choices of each expert, then those that were dropped, (E + 1,).
        self.scale: Tensor | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, C) -> the router's logits (N, E), and the chosen experts (N, k) with their weights (N, k)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())  # (N, E)
        probabilities = logits.softmax(dim=-1)
        scores = probabilities if self.expert_bias is None else probabilities + self.expert_bias
        chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :self.config.n_expert_per_token]
        weights = probabilities.gather(1, chosen)  # (N, k)
        return logits, chosen, weights / weights.sum(-1, keepdim=True) if self.config.norm_topk else weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, C)
        logits, chosen, weights = self.route(tokens)
        E, k = self.config.n_expert, chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # (N k,): the choices, sorted by expert
        # (E,); bincount would make the CPU wait for a GPU.
        counts = kept = (chosen.flatten()[:, None] == torch.arange(E, device=x.device)).sum(0)
        trains = self.training and self.scale is not None and torch.is_grad_enabled()
        if trains and self.config.capacity_factor is not None:
            capacity = math.ceil(self.config.capacity_factor * len(order) / E)
            order = torch.cat([part[:capacity] for part in order.split(counts.tolist())])  # (n,)
            kept = counts.clamp(max=capacity)
        rows = tokens.to(autocast_dtype(tokens))[order // k]  # (n, C), for the n choices that stay
        if rows.is_cuda and rows.dtype == torch.bfloat16:
            y = grouped_swiglu(rows, self.experts, kept)  # (n, C)
        else:  # An expert without rows is called, too: its gradient has to be 0, not None, on every rank.
            y = torch.cat([expert(part) for expert, part in
                           zip(self.experts, rows.split(kept.tolist()), strict=True)])  # (n, C)
        # Back to the order of the tokens, (N, k, C), with 0 for a dropped choice. A sum over k, unlike
        # index_add, has one result on a GPU, too.
        y = y.new_zeros(chosen.numel(), x.shape[-1]).index_copy(0, order, y).view(-1, k, x.shape[-1])
        y = (y * weights[..., None].to(y.dtype)).sum(1).view(x.shape)  # (N, k, C) -> (B, T, C)
        if not trains:
            return y
        self.counts += torch.cat((counts, (counts - kept).sum(0, keepdim=True)))  # (E + 1,)
        loss = self.config.router_z_loss * logits.logsumexp(-1).square().sum()
        if self.expert_bias is None:
            loss = loss + self.config.balance_weight * E * (logits.softmax(-1) * self.load).sum()
        return AddLoss.apply(y, loss, self.scale)


# ---- Balance over the global batch ------------------------------------------------------------------------

def moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def begin_step(model: nn.Module, scale: Tensor | float, load: Tensor | None) -> None:
    """Tell the experts what the loss is multiplied by, and `load`: what the last `end_step` returned."""
    for number, layer in enumerate(moe_layers(model)):
        E, device = layer.config.n_expert, layer.gate.weight.device
        layer.scale = torch.as_tensor(scale, dtype=torch.float32, device=device)
        layer.load = torch.full((E,), 1 / E, device=device) if load is None else load[number].to(device)
        layer.counts = torch.zeros(E + 1, device=device)


@torch.no_grad()
def end_step(model: nn.Module) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Sum the counts over all ranks and move the biases. All ranks call it.

    Returns the share of the choices that each expert got, (layers, E) float32, and metrics: the largest load
    over the mean and, with a capacity_factor, the share of dropped choices. (None, {}) for a dense model.
    """
    if not (layers := moe_layers(model)):
        return None, {}
    counts = torch.stack([layer.counts for layer in layers])  # (layers, E + 1)
    if dist.is_initialized():
        dist.all_reduce(counts)
    counts, dropped = counts[:, :-1], counts[:, -1]  # (layers, E), (layers,)
    load = counts / counts.sum(1, keepdim=True)
    for layer, shares in zip(layers, load, strict=True):
        if layer.expert_bias is not None:
            step = layer.config.balance_weight * (1 / len(shares) - shares).sign()
            layer.expert_bias.copy_(shard_like(layer.expert_bias, gather_full(layer.expert_bias) + step))
    metrics = {"expert_load": load.max() * load.shape[1]}
    if layers[0].config.capacity_factor is not None:
        metrics["expert_dropped"] = dropped.sum() / counts.sum()
    return load, metrics
