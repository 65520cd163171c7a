"""Linear layers, and products of several layers with the same input.

    q, k, v = products(x, (self.q_proj, self.k_proj, self.v_proj))     # model.py
    cast_frozen(model, torch.bfloat16)                                 # a model whose layers are not trained

A decoding step on a GPU multiplies every matrix by a single row, so its time is that of reading the weights.
cuBLAS reads small matrices slowly. `row_products` (modeling/kernels.py) reads them faster, and needs one
launch for all layers of a call (docs/log.md has the times). Everywhere else these are plain linear layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_single_row(x: Tensor, weight: Tensor) -> bool:
    """True if x is one row, on a GPU, in the dtype of the weight, and needs no gradient."""
    return (x.is_cuda and x.numel() == x.shape[-1] and x.dtype == weight.dtype
            and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda"))


def row_outputs(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    from modeling.kernels import row_products  # needs Triton, which CPU builds of torch lack
    return row_products(x, weights, biases)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) plus bias (N,) -> (..., N)."""
    return row_outputs(x, [weight], [bias])[0] if is_single_row(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, with another kernel for a single row on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of the linear layers in the dtype that autocast casts them to for every product.

    The products do not change. This saves memory and the casts: autocast repeats the cast of a frozen weight
    for every product, and keeps only those of trained weights. Left alone: embedding tables, MoE's router and
    ternary layers, which compute with float32 weights.
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.weight is not None:  # None: in 4 bits
            module.weight.data = module.weight.data.to(dtype)


def products(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Return the outputs of the layers for the same input x (..., K), one (..., n) for each layer."""
    linears = [layer for layer in layers if type(layer) is Linear]  # a subclass computes something else
    fits = len(linears) == len(layers) and all(len(layer.weight) % 16 == 0 for layer in linears[:-1])
    if fits and is_single_row(x, linears[0].weight):
        return row_outputs(x, [layer.weight for layer in linears], [layer.bias for layer in linears])
    return [layer(x) for layer in layers]
