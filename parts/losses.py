"""Loss heads: from the last hidden states to a summed loss, chunk by chunk, with no (B, T, V) tensor.

    loss, nll = linear_cross_entropy(hidden, weight, targets, vocab_size)     # inside model(ids, head=...)

Each chunk computes its logits, its loss and at once its gradients for `hidden` and `weight`; only those are
kept for the backward pass. Sums, never means: the loop divides by the global count. All reductions are in
float32. Shapes: N = B * T positions, C n_embd, V vocab_size, P the table's rows (V and padding).
"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # target of a position that is not trained on, as in torch's and Hugging Face's losses


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                         z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets, plus z_loss * logsumexp^2 at the same ones.

    hidden: (..., C) in the compute dtype. weight: (P, C); rows from vocab_size on are left out of the
    softmax. targets: (...) int64, IGNORE where nothing is trained. Returns (loss with the z term, which
    carries the gradient; loss without it, for the log), float32 scalars; 0 where no target is. z-loss: PaLM,
    arXiv 2204.02311, section 5.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1),
                                        vocab_size, z_loss, dtype, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The autograd side of `linear_cross_entropy`: the forward pass already computes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float,
                dtype: torch.dtype, with_grad: bool) -> tuple[Tensor, Tensor]:
        matrix = weight.to(dtype)  # (P, C)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        nll = hidden.new_zeros((), dtype=torch.float32)
        z_term = hidden.new_zeros((), dtype=torch.float32)
        rows = 2048 if hidden.is_cuda else 512  # a chunk fills a GPU, or keeps its logits near a CPU's cache
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            h, target = hidden[chunk].to(dtype), targets[chunk]  # (n, C), (n,)
            logits = (h @ matrix.T).float()  # (n, P)
            logits[:, vocab_size:] = -torch.inf
            wanted = target != IGNORE  # (n,)
            index = torch.where(wanted, target, 0)[:, None]  # (n, 1)
            at_target = logits.gather(1, index)[:, 0]  # (n,)
            largest = logits.amax(dim=-1)  # (n,)
            exponentials = logits.sub_(largest[:, None]).exp_()  # in place: memory traffic is the cost here
            total = exponentials.sum(dim=-1)  # (n,)
            log_z = total.log() + largest  # logsumexp
            nll += torch.where(wanted, log_z - at_target, 0.0).sum()
            z_term += z_loss * torch.where(wanted, log_z.square(), 0.0).sum()
            if with_grad:
                # d nll / d logits = softmax - one_hot;  d z / d logits = 2 z_loss log_z softmax
                weights = wanted * (1 + 2 * z_loss * log_z) / total
                d_logits = exponentials.mul_(weights[:, None])  # (n, P)
                d_logits.scatter_add_(1, index, -wanted.float()[:, None])
                d_logits = d_logits.to(dtype)
                grad_hidden[chunk] = d_logits @ matrix  # (n, C)
                if dtype == torch.float32:
                    grad_weight.addmm_(d_logits.T, h)  # (P, C), added without a temporary
                else:
                    grad_weight += d_logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll + z_term, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None, None
