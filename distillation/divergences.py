"""What a student loses against its teacher: a loss head that, as training/losses.py's, never holds (B, T, V).

    loss, ce, kd = linear_distillation(hidden, weight, targets, teacher, vocab_size, objective)
    loss, gradient = divergence(log_p, log_q, "forward_kl")            # of one chunk

With z the student's logits and p = softmax(z / T), any loss L(p) has the gradient (s - p sum(s)) / T by z,
where s = p dL/dp. So a divergence is its value and its gradient, a line or two each. The teacher's q, of
the same temperature T, is computed chunk by chunk from its hidden states, or comes from a cache
(distillation/teacher_cache.py). The whole is (1 - alpha) cross-entropy + alpha T^2 divergence (arXiv
1503.02531: T^2 keeps the size of the gradient), summed over the targets. All in float32. Shapes: N
positions, n of a chunk, C the student's width, V vocab_size, P rows of an output matrix, k entries of a
cached row."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dataset.dataloader import IGNORE
from modeling.devices import autocast_dtype
from training.losses import chunk_rows

Kind = Literal["forward_kl", "reverse_kl", "jsd", "tv", "mse"]
MIN_LOG_PROB = -100.0  # nats: no token is less likely to a teacher, so that none costs infinitely much


class Objective(NamedTuple):
    """(1 - alpha) * cross-entropy + alpha * T^2 * divergence."""

    alpha: float = 0.5
    temperature: float = 1.0
    kind: Kind = "forward_kl"
    beta: float = 0.5  # of jsd: the teacher's share of the mixture


class DenseTeacher(NamedTuple):
    """A teacher at N positions: logits are hidden @ weight.T, or, without a weight, `hidden` itself."""

    hidden: Tensor  # (N, teacher's C)
    weight: Tensor | None  # (teacher's P, C)

    def logits(self, chunk: slice, vocab_size: int) -> Tensor:
        """(n, V) float32; columns from V on, its padding, are cut."""
        hidden = self.hidden[chunk]
        if self.weight is not None:
            hidden = hidden @ self.weight[:vocab_size].to(hidden.dtype).T
        return hidden[:, :vocab_size].float()


class SparseTeacher(NamedTuple):
    """A teacher at N positions, at temperature T: some tokens and their probabilities.

    tail: what the tokens leave to all others, (N,): then they are the k likeliest, each once. None: they are
    samples, whose shares estimate the probabilities without bias (arXiv 2503.16870).
    """

    ids: Tensor  # (N, k) int64
    probs: Tensor  # (N, k) float32
    tail: Tensor | None = None


def divergence(log_p: Tensor, log_q: Tensor, kind: Kind, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """((n,) loss in nats, (n, V) its gradient by z / T) of the student's log p and the teacher's log q.

    forward_kl: KL(q || p), which covers all that the teacher does. reverse_kl: KL(p || q), which stays where
    the teacher is. jsd: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv
    2306.13649, equation 1), at most ln 2 for beta 1/2. tv: half the sum of |p - q| (arXiv 2307.15190).
    log_p, log_q: (n, V). log_q may hold -inf, and is changed.
    """
    log_q.clamp_(min=MIN_LOG_PROB)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return dot(q, log_q.sub_(log_p)), p.sub_(q)
    if kind == "reverse_kl":
        ratio = log_p - log_q  # (n, V), as all below
        loss = dot(p, ratio)
        return loss, p.mul_(ratio.sub_(loss[:, None]))
    if kind == "jsd":
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
        teacher, ratio = dot(q, log_q.sub_(log_m)), log_p - log_m
        student = dot(p, ratio)
        return beta * teacher + (1 - beta) * student, p.mul_(ratio.sub_(student[:, None])).mul_(1 - beta)
    difference = p - q
    sign = difference.sign()
    return 0.5 * dot(difference, sign), p.mul_(sign - dot(p, sign)[:, None]).mul_(0.5)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row: twice (n, V) -> (n,); on a CPU without a third (n, V)."""
    if a.is_cuda:  # where a matrix product may be in TF32, whose 10 bits are too few for small differences
        return (a * b).sum(-1)
    return (a[:, None] @ b[:, :, None])[:, 0, 0]


def sparse_kl(log_p: Tensor, teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
    """`divergence`'s forward_kl for a cached teacher's n positions.

    Of the k likeliest tokens: KL over k + 1 outcomes, the last of which is "another". Renormalised, without
    that outcome, the student would learn to be too sure. Of samples: their cross-entropy, which is KL but for
    the teacher's entropy, which no student changes.
    """
    ids, probs, tail = teacher
    at, p = log_p.gather(1, ids), log_p.exp()  # (n, k), (n, V)
    if tail is None:
        return -dot(probs, at), p.scatter_add_(1, ids, -probs)
    known = at.exp()  # (n, k)
    left = p.scatter_(1, ids, 0.0).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)  # (n,) of all others
    loss = (torch.special.xlogy(probs, probs) - probs * at).sum(-1) + torch.special.xlogy(tail, tail / left)
    return loss, p.mul_((1 - tail / left)[:, None]).scatter_(1, ids, known - probs)


def soft_loss(logits: Tensor, teacher: DenseTeacher | SparseTeacher, chunk: slice,
              objective: Objective, log_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """((n,) T^2 * divergence, (n, V) its gradient by the student's logits (n, V), which are float32).

    mse: mean over V of the squared difference of the logits themselves, without a temperature. log_p: the
    log-softmax of the logits, where it is known.
    """
    T = objective.temperature
    if objective.kind == "mse":
        difference = logits - teacher.logits(chunk, logits.shape[1])
        return difference.square().mean(-1), difference * (2 / logits.shape[1])
    if log_p is None or T != 1:
        log_p = (logits / T).log_softmax(-1)
    if isinstance(teacher, SparseTeacher):
        part = SparseTeacher(*(None if each is None else each[chunk] for each in teacher))
        loss, gradient = sparse_kl(log_p, part)
    else:
        log_q = (teacher.logits(chunk, logits.shape[1]) / T).log_softmax(-1)
        loss, gradient = divergence(log_p, log_q, objective.kind, objective.beta)
    return T**2 * loss, gradient.mul_(T)


def select_targets(hidden: Tensor, batch: dict[str, Any]) -> Tensor:
    """(B, T, C) -> (N, C): the batch's "positions", where it has them, else all."""
    hidden = hidden.flatten(0, 1)
    return hidden[batch["positions"]] if "positions" in batch else hidden


def linear_distillation(hidden: Tensor, weight: Tensor, targets: Tensor,
                        teacher: DenseTeacher | SparseTeacher, vocab_size: int,
                        objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(loss that carries the gradient; cross-entropy; T^2 * divergence), each summed over the targets.

    hidden: (N, C) in the compute dtype, the student's. weight: (P, C), its output matrix; rows from V on are
    padding. targets: (N,) int64, IGNORE where nothing is trained: position i's is token i + 1, so hard and
    soft targets are of the same positions. What is ignored is computed all the same, because to look for it
    would make a GPU wait: callers leave most of it out. Returns float32 scalars, 0 where no target is.
    """
    dtype = autocast_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearDistillation.apply(hidden, weight, targets, teacher, vocab_size, objective, dtype,
                                        torch.is_grad_enabled())


class LinearDistillation(torch.autograd.Function):
    """The autograd side of `linear_distillation`: the forward pass already computes the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
                teacher: DenseTeacher | SparseTeacher, vocab_size: int, objective: Objective,
                dtype: torch.dtype, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        matrix = weight[:vocab_size].to(dtype)  # (V, C)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        with_weight = with_grad and ctx.needs_input_grad[1]  # not where the table is frozen
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
        ce, kd = hidden.new_zeros((2,), dtype=torch.float32)
        alpha, rows = objective.alpha, chunk_rows(hidden, vocab_size)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            wanted = targets[chunk] != IGNORE  # (n,)
            h = torch.where(wanted[:, None], hidden[chunk].to(dtype), 0)  # (n, C): adds nothing to the weight
            target = torch.where(wanted, targets[chunk], 0)[:, None]  # (n, 1)
            logits = (h @ matrix.T).float()  # (n, V)
            log_p = logits.log_softmax(-1)
            ce -= torch.where(wanted, log_p.gather(1, target)[:, 0], 0).sum()
            d_logits = 0.0
            if alpha > 0:
                loss, d_logits = soft_loss(logits, teacher, chunk, objective, log_p)
                kd += torch.where(wanted, loss, 0).sum()
                d_logits.mul_(alpha)
            if alpha < 1:
                d_logits = log_p.exp_().mul_(1 - alpha).add_(d_logits)
                d_logits.scatter_add_(1, target, torch.full_like(target, alpha - 1, dtype=torch.float32))
            if with_grad:
                d_logits = d_logits.to(dtype)
                grad_hidden[chunk] = torch.where(wanted[:, None], d_logits @ matrix, 0)  # (n, C)
            if with_weight:
                grad_weight[:vocab_size] += d_logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(ce, kd)
        return (1 - alpha) * ce + alpha * kd, ce, kd

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad_loss
        return grad_hidden * grad_loss, grad_weight, None, None, None, None, None, None


@torch.no_grad()
def compared(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: DenseTeacher,
             vocab_size: int) -> Tensor:
    """Over the targets, (5,): how many; the student's nats; the teacher's; KL(teacher || student) in nats;
    how often both hold the same token likeliest. Shapes as for `linear_distillation`."""
    sums, rows = hidden.new_zeros(5, dtype=torch.float64), chunk_rows(hidden, vocab_size)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        wanted = targets[chunk] != IGNORE  # (n,)
        target = torch.where(wanted, targets[chunk], 0)[:, None]  # (n, 1)
        log_p = (hidden[chunk] @ weight[:vocab_size].to(hidden.dtype).T).float().log_softmax(-1)  # (n, V)
        log_q = teacher.logits(chunk, vocab_size).log_softmax(-1)
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        nats = [-log.gather(1, target)[:, 0] for log in (log_p, log_q)]
        kl, _ = divergence(log_p, log_q, "forward_kl")  # changes log_q
        figures = torch.stack([wanted.float(), *nats, kl, agree.float()])  # (5, n)
        sums += torch.where(wanted, figures, 0).sum(-1, dtype=torch.float64)
    return sums
