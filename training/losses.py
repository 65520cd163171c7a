"""Loss heads: from the last hidden states to a summed loss, chunk by chunk, with no (B, T, V) tensor.

    loss, nll = linear_cross_entropy(hidden, weight, targets, vocab_size)     # inside model(ids, head=...)
    log_probs = linear_log_probs(hidden, weight, targets, vocab_size)         # of single tokens, for DPO

Each chunk of the cross-entropy computes its logits, its loss and at once its gradients for `hidden` and
`weight`; only those are kept for the backward pass. Sums, never means: the loop divides by the global count.
All reductions are in float32. Shapes: N = B * T positions, C n_embd, V vocab_size, P the table's rows (V and
padding).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.dataloader import IGNORE
from modeling.devices import autocast_dtype


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                         z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets, plus z_loss * logsumexp^2 at the same ones.

    hidden: (..., C) in the compute dtype. weight: (P, C); rows from vocab_size on are left out of the
    softmax. targets: (...) int64, IGNORE where nothing is trained. Returns (loss with the z term, which
    carries the gradient; loss without it, for the log), float32 scalars; 0 where no target is. z-loss: PaLM,
    arXiv 2204.02311, section 5.
    """
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1),
                                        vocab_size, z_loss, dtype, torch.is_grad_enabled())


def chunk_rows(hidden: Tensor, vocab_size: int) -> int:
    """Positions in a chunk: it fills a GPU, or keeps its logits, 16 MB, near a CPU's cache."""
    return 2048 if hidden.is_cuda else min(512, max(32, 2**22 // vocab_size))


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of (n, V): the probabilities and the logsumexp, (n, V) and (n,), float32.

    Memory traffic is the cost of a large vocabulary. Softmax is one kernel, where logsumexp is four; and as
    the largest probability is e^max / e^logsumexp, the latter need not be computed from the logits.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)  # (n, V)
    return probabilities, logits.amax(dim=-1).float() - probabilities.amax(dim=-1).log()


class LinearCrossEntropy(torch.autograd.Function):
    """The autograd side of `linear_cross_entropy`: the forward pass already computes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float,
                dtype: torch.dtype, with_grad: bool) -> tuple[Tensor, Tensor]:
        matrix = weight.to(dtype)  # (P, C)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        with_weight = with_grad and ctx.needs_input_grad[1]  # not where the table is frozen
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
        nll = hidden.new_zeros((), dtype=torch.float32)
        z_term = hidden.new_zeros((), dtype=torch.float32)
        rows = chunk_rows(hidden, vocab_size)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            wanted = targets[chunk] != IGNORE  # (n,)
            h = torch.where(wanted[:, None], hidden[chunk].to(dtype), 0)  # (n, C): adds nothing to the weight
            target = torch.where(wanted, targets[chunk], 0)[:, None]  # (n, 1)
            logits = h @ matrix.T  # (n, P)
            logits[:, vocab_size:] = -torch.inf
            probabilities, log_z = softmax(logits)  # (n, P), (n,)
            nll += torch.where(wanted, log_z - logits.gather(1, target)[:, 0], 0.0).sum()
            z_term += z_loss * torch.where(wanted, log_z.square(), 0.0).sum()
            if with_grad:
                # d nll / d logits = softmax - one_hot;  d z / d logits = 2 z_loss log_z softmax
                d_logits = probabilities.mul_(1 + 2 * z_loss * log_z[:, None]) if z_loss else probabilities
                d_logits.scatter_add_(1, target, d_logits.new_full((len(h), 1), -1.0))
                d_logits = d_logits.to(dtype)
                grad_hidden[chunk] = torch.where(wanted[:, None], d_logits @ matrix, 0)  # (n, C)
                if not with_weight:
                    continue
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
        grad_weight = None if grad_weight is None else grad_weight * grad_loss
        return grad_hidden * grad_loss, grad_weight, None, None, None, None, None


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """log p(target) at each position: hidden (N, C), weight (P, C), targets (N,) int64 -> (N,) float32.

    What the positions will count for is not known here, so the backward pass computes the logits once more,
    chunk by chunk: a fourth product in place of (N, V) in memory.
    """
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogProbs.apply(hidden, weight, targets, vocab_size, dtype)


class LinearLogProbs(torch.autograd.Function):
    """The autograd side of `linear_log_probs`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                dtype: torch.dtype) -> Tensor:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        matrix = weight.to(dtype)[:vocab_size]  # (V, C)
        rows = chunk_rows(hidden, vocab_size)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = hidden[chunk].to(dtype) @ matrix.T  # (n, V)
            log_probs[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - softmax(logits)[1]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.vocab_size, ctx.dtype = vocab_size, dtype
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, targets = ctx.saved_tensors
        matrix = weight.to(ctx.dtype)[:ctx.vocab_size]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        rows = chunk_rows(hidden, ctx.vocab_size)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            h, g = hidden[chunk].to(ctx.dtype), grad[chunk, None]  # (n, C), (n, 1)
            # d log p(target) / d logits = one_hot - softmax
            d_logits = (h @ matrix.T).softmax(dim=-1, dtype=torch.float32).mul_(-g)  # (n, V)
            d_logits.scatter_add_(1, targets[chunk, None], g)
            d_logits = d_logits.to(ctx.dtype)
            grad_hidden[chunk] = d_logits @ matrix
            if grad_weight is not None:
                grad_weight[:ctx.vocab_size] += d_logits.T @ h
        return grad_hidden, grad_weight, None, None, None


def preference_loss(log_ratios: Tensor, lengths: Tensor, beta: float, label_smoothing: float = 0.0,
                    kind: Literal["dpo", "ipo"] = "dpo") -> Tensor:
    """The loss of each of n pairs, (n,), from how much likelier the policy made their answers.

    log_ratios: (2, n), log p(answer) - log p_reference(answer), each summed over the answer's tokens, of the
    chosen answers and of the rejected ones. lengths: (2, n), those tokens. beta: how much it costs to leave
    the reference. dpo: arXiv 2305.18290, equation 7; with label_smoothing, the share of pairs that are the
    wrong way round, conservative DPO (ericmitchell.ai/cdpo.pdf, 2023). ipo: arXiv 2310.12036, equation 17, on
    ratios a token, as its authors have it.
    """
    if kind == "ipo":
        chosen, rejected = log_ratios / lengths
        return (chosen - rejected - 1 / (2 * beta)).square()
    margin = beta * (log_ratios[0] - log_ratios[1])  # (n,)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
