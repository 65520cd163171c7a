"""Linear layers whose weights are -1, 0 or 1 times a scale: log2(3) = 1.58 bits each.

    layer = TernaryLinear(256, 1024, bias=False, eps=1e-5)   # where nn.Linear(256, 1024, bias=False) stood
    codes, scale = quantize_weights(layer.weight)            # what it multiplies with is codes * scale
    packed = pack(codes)                                     # 2 bits each; unpack(packed) are the codes again

BitNet b1.58, arXiv 2402.17764; BitNet, 2310.11453, has the norm in front, the 8-bit activations and the
straight-through gradient. The layer trains and is saved in full precision, as a matrix like any other, and
rounds anew in each forward pass: an optimizer's steps are far smaller than one from 0 to 1. Only an export
keeps the rounded weights alone. Left out: integer kernels. The products here are a plain layer's, with
numbers that few bits can hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError

LEVELS = 127  # 8 bits, with as many levels below zero as above
PACKING = "ternary: 0, 1, 2 for -1, 0, 1 in 2 bits, four a byte, the first in the lowest; 3 ends a row"
SMALLEST = 1e-5  # no scale is below this, as in the authors' code: zeros stay zeros, not 0 / 0


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to 8 bits: x (..., n_in) -> levels (..., n_in) and step (..., 1), for levels * step.

    levels: float32, whole numbers from -127 to 127; levels * step is within half a step of x. step: float32,
    in units of x: the token's largest magnitude / 127. arXiv 2310.11453, equations 4 and 5, but per token, as
    arXiv 2402.17764, section 2, has it.
    """
    x = x.float()
    step = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LEVELS  # (..., 1)
    return (x / step).round(), step


def quantize_weights(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to three values: w (n_out, n_in) -> codes (n_out, n_in) and scale (), for codes * scale.

    codes: float32, each -1, 0 or 1: what is below half the scale in magnitude becomes 0. scale: float32, in
    units of w: the mean magnitude of the whole matrix. arXiv 2402.17764, equations 1 to 3.
    """
    w = w.float()
    scale = w.abs().mean().clamp(min=SMALLEST)  # ()
    return (w / scale).round().clamp(-1, 1), scale


def pack_codes(codes: Tensor) -> Tensor:
    """codes (n_out, n_in), each -1, 0 or 1 -> uint8 (n_out, n_in / 4, rounded up), as PACKING says."""
    fields = F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[1] % 4), value=3)
    fields = fields.unflatten(1, (-1, 4))  # (n_out, n, 4)
    return (fields << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: codes (n_out, n_in), float32."""
    fields = packed[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3  # (n_out, n, 4)
    fields = fields.flatten(1)
    return fields[:, :fields.shape[1] - int((fields[0] == 3).sum())].float() - 1


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` as the value, in x's dtype, but the gradient goes to x as if nothing had been rounded.

    arXiv 1308.3432. The same as x + (rounded - x).detach(), which is off by the rounding of a sum: in
    bfloat16, weights would have far more than three values.
    """
    return rounded.detach().to(x.dtype) + (x - x.detach())


class TernaryLinear(nn.Linear):
    """x W^T + b, with x normalised and rounded to 8 bits, W to three values. (..., n_in) -> (..., n_out).

    The norm is RMSNorm without a weight of its own, so that the parameters are nn.Linear's. It stands in
    every layer, since what enters o_proj and down_proj has passed no norm of the block. The bias is not
    rounded.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, eps: float):
        """eps: added to the mean square in the norm."""
        super().__init__(n_in, n_out, bias=bias)
        self.eps = eps
        self.rounded = False  # the weight was loaded as codes * scale: what it was rounded from is not known

    def train(self, mode: bool = True) -> "TernaryLinear":
        if mode and self.rounded:
            raise UserError("packed ternary weights cannot be trained; the run they were exported from can")
        return super().train(mode)

    def codes_and_scale(self) -> tuple[Tensor, Tensor]:
        """`quantize_weights` of the weight, also where it is rounded already."""
        if self.rounded:
            return self.weight.sign(), self.weight.abs().max()
        return quantize_weights(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Means, scales and rounding are float32's; the product is autocast's, else in the dtype of x."""
        normed = F.rms_norm(x.float(), (self.in_features,), eps=self.eps)  # (..., n_in)
        levels, step = quantize_activations(normed)
        inputs = straight_through(normed, levels * step).to(x.dtype)
        if self.rounded:
            return F.linear(inputs, self.weight, self.bias)
        codes, scale = quantize_weights(self.weight)
        return F.linear(inputs, straight_through(self.weight, codes * scale), self.bias)
