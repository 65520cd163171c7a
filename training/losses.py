"""Loss heads: from the last hidden states to a summed loss, chunk by chunk, without a (B, T, V) tensor.

    loss, nll = linear_cross_entropy(hidden, weight, targets, vocab_size)     # inside model(ids, head=...)
    log_probs = linear_log_probs(hidden, weight, targets, vocab_size)         # one per target, for dpo.py

With 32 x 1,024 positions and 50,257 token ids, float32 logits alone would take 6.6 GB. So the cross-entropy
goes through the positions in chunks. For each chunk it computes the logits, the loss and, at once, the
gradients for `hidden` and `weight`; only the gradients are kept for the backward pass.

The losses are sums, never means: loop.py divides by the global count. All reductions are in float32.

Shapes: N = B * T positions, n positions of a chunk, C n_embd, V vocab_size, P rows of the table in memory (V
and padding).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.dataloader import IGNORE
from modeling.devices import autocast_dtype


def chunk_rows(hidden: Tensor, vocab_size: int) -> int:
    """Positions per chunk: enough to fill a GPU; on a CPU about 16 MB of logits, to stay near its cache.

    Each chunk also passes over the gradient of the whole table. With a large vocabulary and less than 256
    positions, that costs more than the matrix products.
    """
    return 4096 if hidden.is_cuda else min(512, max(256, 2**22 // vocab_size))


def chunks(hidden: Tensor, vocab_size: int) -> Iterator[slice]:
    """Cut the positions of `hidden`, (N, C), into chunks."""
    rows = chunk_rows(hidden, vocab_size)
    return (slice(start, start + rows) for start in range(0, len(hidden), rows))


def softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities (n, V) and the logsumexp (n,) of logits (n, V), both float32.

    With a large vocabulary the cost is memory traffic. torch's softmax is one kernel and its logsumexp four.
    The largest probability is e^max / e^logsumexp, so logsumexp = max - log(largest probability).
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)  # (n, V)
    return probabilities, logits.amax(dim=-1).float() - probabilities.amax(dim=-1).log()


def softmax_gradient(logits: Tensor, target: Tensor, weight: Tensor | None, vocab_size: int,
                     z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the gradient of the loss with respect to the logits, and the logsumexp (n,) in float32.

    The loss is the sum of weight * (nll + z_loss * logsumexp^2). logits: (n, P), which may be overwritten.
    target: (n,) int64. weight: (n,) float32; None is 1. The gradient has the logits' shape and dtype.
    """
    if logits.is_cuda:
        from modeling.kernels import softmax_gradient_  # needs Triton, which CPU builds of torch lack
        weight = torch.ones_like(target, dtype=torch.float32) if weight is None else weight
        return logits, softmax_gradient_(logits, target, weight, vocab_size, z_loss)
    logits[:, vocab_size:] = -torch.inf
    gradient, log_z = softmax(logits)  # (n, P), (n,)
    # d nll / d logits = softmax - one_hot;  d z / d logits = 2 z_loss log_z softmax
    if z_loss:
        gradient.mul_(1 + 2 * z_loss * log_z[:, None])
    if weight is not None:
        gradient.mul_(weight[:, None])
    one = gradient.new_ones(len(logits), 1) if weight is None else weight[:, None]
    return gradient.scatter_add_(1, target[:, None], -one).to(logits.dtype), log_z


def log_sum_exp(logits: Tensor, vocab_size: int) -> Tensor:
    """logsumexp of the first vocab_size columns: (n, P) -> (n,) float32. The others may be overwritten."""
    if logits.is_cuda:
        from modeling.kernels import softmax_gradient_
        return softmax_gradient_(logits, None, None, vocab_size)
    logits[:, vocab_size:] = -torch.inf
    return softmax(logits)[1]


def add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> Tensor:
    """Return total + d_logits^T hidden in float32: (P, C), (n, P), (n, C) -> (P, C). `total` may change."""
    if d_logits.dtype == torch.float32:
        return total.addmm_(d_logits.T, hidden)
    if d_logits.is_cuda:
        return torch.addmm(total, d_logits.T, hidden, out_dtype=torch.float32)  # without a rounded temporary
    return total.add_(d_logits.T @ hidden)


class KnownGradients(torch.autograd.Function):
    """Gives a loss that was computed without autograd its gradients with respect to `hidden` and `weight`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, grad_hidden: Tensor,
                grad_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad_loss
        return grad_hidden * grad_loss, grad_weight, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                         z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets, plus z_loss * logsumexp^2 at the same positions.

    hidden: (..., C) in the compute dtype. weight: (P, C); rows from vocab_size on are padding and not part of
    the softmax. targets: (...) int64, IGNORE where nothing is trained.
    Returns two float32 scalars: the loss with the z term, which carries the gradient, and without it, for the
    log. Both are 0 if there is no target. z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (N, C), (N,)
    dtype, with_grad = autocast_dtype(hidden), torch.is_grad_enabled()
    with_weight = with_grad and weight.requires_grad  # a frozen table needs no gradient
    grad_hidden = torch.empty_like(hidden) if with_grad else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
    nll, z_term = hidden.new_zeros((2,), dtype=torch.float32)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)  # (P, C)
        for chunk in chunks(hidden, vocab_size):
            is_target = targets[chunk] != IGNORE  # (n,)
            h = torch.where(is_target[:, None], hidden[chunk].to(dtype), 0)  # (n, C), 0 adds no gradient
            target = torch.where(is_target, targets[chunk], 0)  # (n,)
            logits = h @ matrix.T  # (n, P)
            target_logits = logits.gather(1, target[:, None])[:, 0]  # (n,), before they are overwritten
            if grad_hidden is None:
                log_z = log_sum_exp(logits, vocab_size)
            else:
                d_logits, log_z = softmax_gradient(logits, target, None, vocab_size, z_loss)
                grad_hidden[chunk] = torch.where(is_target[:, None], d_logits @ matrix, 0)  # (n, C)
                if grad_weight is not None:
                    grad_weight = add_product(grad_weight, d_logits, h)
            nll += torch.where(is_target, log_z - target_logits, 0.0).sum()
            z_term += z_loss * torch.where(is_target, log_z.square(), 0.0).sum()
    loss = nll + z_term
    if with_grad:
        loss = KnownGradients.apply(hidden, weight, loss, grad_hidden, grad_weight)
    return loss, nll


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """log p(target) at each position: hidden (N, C), weight (P, C), targets (N,) int64 -> (N,) float32.

    The gradient that arrives at each position is not known in the forward pass. So the backward pass computes
    the logits again, chunk by chunk: a fourth matrix product instead of (N, V) values in memory.
    """
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogProbs.apply(hidden, weight, targets, vocab_size, dtype)


class LinearLogProbs(torch.autograd.Function):
    """The autograd function of `linear_log_probs`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                dtype: torch.dtype) -> Tensor:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,)
        matrix = weight.to(dtype)  # (P, C)
        for chunk in chunks(hidden, vocab_size):
            logits = hidden[chunk].to(dtype) @ matrix.T  # (n, P)
            target_logits = logits.gather(1, targets[chunk, None])[:, 0]  # (n,)
            log_probs[chunk] = target_logits - log_sum_exp(logits, vocab_size)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.vocab_size, ctx.dtype = vocab_size, dtype
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, targets = ctx.saved_tensors
        matrix = weight.to(ctx.dtype)  # (P, C)
        grad_hidden = torch.empty_like(hidden)  # (N, C)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in chunks(hidden, ctx.vocab_size):
            h, g = hidden[chunk].to(ctx.dtype), grad[chunk]  # (n, C), (n,)
            # log p is -nll, so its gradient has the weight -g.
            d_logits, _ = softmax_gradient(h @ matrix.T, targets[chunk], -g, ctx.vocab_size)  # (n, P)
            grad_hidden[chunk] = d_logits @ matrix  # (n, C)
            if grad_weight is not None:
                grad_weight = add_product(grad_weight, d_logits, h)
        return grad_hidden, grad_weight, None, None, None


def preference_loss(log_ratios: Tensor, lengths: Tensor, beta: float, label_smoothing: float = 0.0,
                    kind: Literal["dpo", "ipo"] = "dpo") -> Tensor:
    """The loss of each of n pairs, (n,) float32.

    log_ratios: (2, n), log p(answer) - log p_reference(answer), each log-probability summed over the answer's
    tokens; row 0 is the chosen answers, row 1 the rejected ones. lengths: (2, n), the answers' tokens.
    beta: the strength of the pull towards the reference.
    dpo: arXiv 2305.18290, equation 7. label_smoothing: the assumed share of swapped pairs (conservative DPO,
    ericmitchell.ai/cdpo.pdf, 2023). ipo: arXiv 2310.12036, equation 17, with ratios per token.
    """
    if kind == "ipo":
        chosen, rejected = log_ratios / lengths  # (n,), (n,)
        return (chosen - rejected - 1 / (2 * beta)).square()
    margin = beta * (log_ratios[0] - log_ratios[1])  # (n,)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


# ---- Reinforcement learning -------------------------------------------------------------------------------

def group_advantages(rewards: Tensor, kind: Literal["mean", "grpo", "rloo", "reinforce"],
                     batch_mean: float) -> Tensor:
    """How much better each answer is than the others to its prompt: (P, G) -> (P, G), for P prompts with G
    answers each.

    mean: minus the group's mean, without dividing by the standard deviation (Dr. GRPO, arXiv 2503.20783).
    grpo: divided by it, plus 1e-4 (arXiv 2402.03300). rloo: minus the mean of the other answers (arXiv
    2402.14740). reinforce: minus batch_mean, the mean over all prompts of the step.
    """
    if kind == "reinforce":
        return rewards - batch_mean
    even = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # (P, 1)
    # Rounding in the mean must not turn a group of equal rewards into a gradient.
    centered = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(even, 0)  # (P, G)
    if kind == "grpo":
        return centered / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return centered * rewards.shape[1] / (rewards.shape[1] - 1) if kind == "rloo" else centered


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token (arXiv 1707.06347, equation 7), and whether it is clipped: (N,) each.

    log_probs, old: log-probabilities of the sampled tokens now and when they were sampled, (N,) each.
    advantages: for each token, the advantage of its answer, (N,). A clipped token has no gradient.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio * advantages > clipped * advantages


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The KL divergence from the reference, estimated at each sampled token, (N,): never negative.

    The estimator "k3", r - 1 - log r with r = p_reference / p (Schulman, joschu.net/blog/kl-approx, 2020).
    """
    log_ratio = reference - log_probs
    return log_ratio.exp() - 1 - log_ratio
