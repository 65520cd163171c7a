"""Linear layers whose weights are -1, 0 or 1 times a scale: log2(3) = 1.58 bits per weight.

    layer = TernaryLinear(256, 1024, bias=False, eps=1e-5)   # in place of nn.Linear(256, 1024, bias=False)
    codes, scale = quantize_weights(layer.weight)            # the layer multiplies by codes * scale
    packed = pack_codes(codes)                               # 2 bits per weight
    codes = unpack_codes(packed)                             # the inverse

The method is BitNet b1.58, arXiv 2402.17764. The norm at the input, the 8-bit activations and the
straight-through gradient are from BitNet, arXiv 2310.11453.

Training keeps full-precision weights and rounds them in each forward pass, because one optimizer step is far
smaller than the step from 0 to 1. Checkpoints hold the full-precision weights, too; only export.py
--format=ternary writes the rounded ones. Left out: integer kernels. The products are ordinary matrix
products of numbers that few bits could hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError

LEVELS = 127  # signed 8 bits, with the same number of levels below and above zero
PACKING = "ternary: 0, 1, 2 for -1, 0, 1 in 2 bits, four a byte, the first in the lowest; 3 ends a row"
SMALLEST = 1e-5  # the smallest scale, as in the authors' code: zeros stay zeros and do not become 0 / 0


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to 8 bits: x (..., n_in) -> levels (..., n_in) and step (..., 1); x ~ levels * step.

    levels: float32 integers from -127 to 127. step: float32, in units of x: the token's largest magnitude
    / 127. The rounding error is at most half a step. This is arXiv 2310.11453, equations 4 and 5, applied per
    token as in arXiv 2402.17764, section 2.
    """
    x = x.float()
    step = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / LEVELS  # (..., 1)
    return (x / step).round(), step


def quantize_weights(w: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to three values: w (n_out, n_in) -> codes (n_out, n_in) and scale (); w ~ codes * scale.

    scale: float32, in units of w: the mean magnitude of the whole matrix. codes: float32, each -1, 0 or 1; a
    weight below half the scale in magnitude becomes 0. arXiv 2402.17764, equations 1 to 3.
    """
    w = w.float()
    scale = w.abs().mean().clamp(min=SMALLEST)  # ()
    return (w / scale).round().clamp(-1, 1), scale


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes (n_out, n_in), each -1, 0 or 1, into uint8 (n_out, n_in / 4 rounded up).

    A byte holds four fields of code + 1, the first in the lowest bits; the value 3 fills the end of a row.
    Example: codes 1 -1 0 0 1 -> fields 2 0 1 1, 2 3 3 3 -> bytes 0b01010010, 0b11111110.
    """
    fields = F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[1] % 4), value=3)
    fields = fields.unflatten(1, (-1, 4))  # (n_out, n, 4)
    return (fields << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)  # (n_out, n)


def unpack_codes(packed: Tensor) -> Tensor:
    """Return the codes (n_out, n_in), float32, from their bytes: the inverse of `pack_codes`."""
    fields = packed[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3  # (n_out, n, 4)
    fields = fields.flatten(1)  # (n_out, 4 n)
    return fields[:, :fields.shape[1] - int((fields[0] == 3).sum())].float() - 1


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return the value of `rounded` in x's dtype, with the gradient going to x as if nothing was rounded.

    Source: arXiv 1308.3432. The usual form x + (rounded - x).detach() has the rounding error of that sum: in
    bfloat16 the weights would have far more than three values.
    """
    return rounded.detach().to(x.dtype) + (x - x.detach())


class TernaryLinear(nn.Linear):
    """x W^T + b with x normalised and rounded to 8 bits, and W rounded to three values.

    (..., n_in) -> (..., n_out). The norm is RMSNorm without a weight, so the parameters are those of
    nn.Linear. Every layer needs its own norm, because the inputs of o_proj and down_proj pass through no norm
    of the block. The bias is not rounded.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool, eps: float):
        """eps: added to the mean square in the norm."""
        super().__init__(n_in, n_out, bias=bias)
        self.eps = eps
        self.rounded = False  # True if the weight was loaded as codes * scale, without its full precision

    def train(self, mode: bool = True) -> "TernaryLinear":
        if mode and self.rounded:
            raise UserError("packed ternary weights cannot be trained; train the run they were exported from")
        return super().train(mode)

    def codes_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return `quantize_weights` of the weight, also if the weight is rounded already."""
        if self.rounded:
            return self.weight.sign(), self.weight.abs().max()
        return quantize_weights(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Norm, scales and rounding are in float32; the product is in autocast's dtype, else in x's."""
        normed = F.rms_norm(x.float(), (self.in_features,), eps=self.eps)  # (..., n_in)
        levels, step = quantize_activations(normed)  # (..., n_in), (..., 1)
        inputs = straight_through(normed, levels * step).to(x.dtype)  # (..., n_in)
        if self.rounded:
            return F.linear(inputs, self.weight, self.bias)
        codes, scale = quantize_weights(self.weight)  # (n_out, n_in), ()
        return F.linear(inputs, straight_through(self.weight, codes * scale), self.bias)
