"""Distillation losses: from the last hidden states of student and teacher to a summed loss, chunk by chunk.

    loss, ce, kd = linear_distillation(hidden, weight, targets, teacher, vocab_size, objective)
    value, gradient = divergence(log_p, log_q, "forward_kl")            # for one chunk of positions

The loss is (1 - alpha) cross-entropy + alpha T^2 divergence, summed over the targets (Hinton et al., arXiv
1503.02531; the factor T^2 keeps the size of the gradient as the temperature T grows). As in
training/losses.py, no (B, T, V) tensor is made: each chunk of positions computes its logits, its loss and
its gradients at once. The teacher's probabilities come from its hidden states, also chunk by chunk, or from
a cache (distillation/teacher_cache.py). Everything is computed in float32.

Each divergence is written as its value and its gradient. Let z be the student's logits, p = softmax(z / T),
and q the teacher's probabilities. A loss L(p) has the gradient s - p sum(s) with respect to z / T, where
s = p dL/dp. For example KL(q || p) has dL/dp = -q / p, so s = -q, and the gradient is p - q.

Shapes: N positions, n positions of a chunk, C width of the student, V vocab_size, P rows of an output matrix
(V and padding), k entries of a cached position.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dataset.dataloader import IGNORE
from modeling.devices import autocast_dtype
from training.losses import KnownGradients, chunks

Kind = Literal["forward_kl", "reverse_kl", "jsd", "tv", "mse"]
MIN_LOG_PROB = -100.0  # nats: floor of the teacher's log-probabilities, which keeps every loss finite


class Objective(NamedTuple):
    """The loss (1 - alpha) * cross-entropy + alpha * T^2 * divergence."""

    alpha: float = 0.5
    temperature: float = 1.0
    kind: Kind = "forward_kl"
    beta: float = 0.5  # weight of the teacher in the mixture of jsd


class DenseTeacher(NamedTuple):
    """A teacher at N positions. Its logits are hidden @ weight.T, or `hidden` itself if weight is None."""

    hidden: Tensor  # (N, width of the teacher)
    weight: Tensor | None  # (P of the teacher, its width)

    def logits(self, chunk: slice | Tensor, vocab_size: int) -> Tensor:
        """The logits at some positions, (n, V) float32, without the columns of the teacher's padding."""
        hidden = self.hidden[chunk]
        if self.weight is not None:
            hidden = hidden @ self.weight[:vocab_size].to(hidden.dtype).T  # (n, V)
        return hidden[:, :vocab_size].float()

    def log_probs(self, chunk: slice, vocab_size: int, temperature: float) -> Tensor:
        """The log-probabilities of a chunk, (n, V) float32."""
        return (self.logits(chunk, vocab_size) / temperature).log_softmax(-1)


class SparseTeacher(NamedTuple):
    """A cached teacher at N positions, at temperature T: a few tokens and their probabilities.

    If tail is a tensor, the tokens are the k most likely ones, and tail is the probability of all other
    tokens together. If tail is None, the tokens are samples from the teacher; the share of a token among the
    samples is an unbiased estimate of its probability (arXiv 2503.16870).
    """

    ids: Tensor  # (N, k) int64
    probs: Tensor  # (N, k) float32
    tail: Tensor | None = None  # (N,) float32


class Groups(NamedTuple):
    """Groups of the student's tokens. A group has the id of one of its tokens, and so has a part of it."""

    group: Tensor  # (V,) int64, of each token
    part: Tensor  # (V,) int64, of each token, where its group is split
    several: Tensor  # (K,) int64, the tokens in groups of several

    def members(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """(row, token), (m,) each: every row of `group` (n,) with each token of that group."""
        sizes = self.group.bincount(minlength=len(self.group))  # (V,)
        # The tokens sorted by group: those of one group are neighbours.
        order, counts = self.group.argsort(stable=True), sizes[group]  # (V,), (n,)
        row = torch.arange(len(group), device=group.device).repeat_interleave(counts)  # (m,)
        # Where each row's group begins in `order`, minus where the row's part of the result begins.
        first = (sizes.cumsum(0) - sizes)[group] - (counts.cumsum(0) - counts)  # (n,)
        return row, order[first[row] + torch.arange(len(row), device=group.device)]

    def sum(self, p: Tensor, row: Tensor, token: Tensor) -> Tensor:
        """The probabilities of groups from those of tokens, (n, V): each has the column of its id.

        row, token: (m,) each, the members of the one group of a row that is split.
        """
        out = p.index_fill(1, self.several, 0)  # (n, V): a group of one token keeps its probability
        out.index_add_(1, self.group[self.several], p.index_select(1, self.several))
        out[row, self.group[token]] = 0  # the split group: its parts get columns of their own
        return out.index_put_((row, self.part[token]), p[row, token], accumulate=True)


class AlignedTeacher(NamedTuple):
    """A teacher with another tokenizer, at the first E of N targets (distillation/alignment.py).

    It predicts groups of the student's tokens, and the parts of the target's group where this is split.
    """

    predictions: Any  # a TranslatedTeacher, or a SparseTeacher with ids of the student
    groups: Groups
    is_split: Tensor  # (E,) bool


Teacher = DenseTeacher | SparseTeacher | AlignedTeacher


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row of two (n, V) tensors: (n,)."""
    if a.is_cuda:  # a matrix product may run in TF32, whose 10 bits are too few for small differences
        return (a * b).sum(-1)
    return (a[:, None] @ b[:, :, None])[:, 0, 0]  # on a CPU this makes no third (n, V) tensor


def divergence(log_p: Tensor, log_q: Tensor, kind: Kind, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """How far the student's p is from the teacher's q: (n,) in nats, and the gradient by z / T, (n, V).

    forward_kl  KL(q || p), the mean of log q - log p over the teacher's tokens. It is large wherever the
                teacher is likely and the student is not, so the student learns to cover all of q.
    reverse_kl  KL(p || q), the mean of log p - log q over the student's tokens. It is large wherever the
                student is likely and the teacher is not, so the student keeps to the largest modes of q.
    jsd         beta KL(q || m) + (1 - beta) KL(p || m), where m = beta q + (1 - beta) p (GKD, arXiv
                2306.13649, equation 1). It is at most ln 2 for beta = 1/2.
    tv          total variation: half the sum of |p - q| (arXiv 2307.15190).

    log_p, log_q: (n, V) float32. log_q may hold -inf, and is overwritten.
    """
    log_q.clamp_(min=MIN_LOG_PROB)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return dot(q, log_q.sub_(log_p)), p.sub_(q)  # gradient p - q
    if kind == "reverse_kl":
        ratio = log_p - log_q  # (n, V)
        loss = dot(p, ratio)
        return loss, p.mul_(ratio.sub_(loss[:, None]))  # gradient p (log p/q - loss)
    if kind == "jsd":
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))  # (n, V)
        teacher_kl, ratio = dot(q, log_q.sub_(log_m)), log_p - log_m
        student_kl = dot(p, ratio)
        # gradient (1 - beta) p (log p/m - KL(p || m))
        return (beta * teacher_kl + (1 - beta) * student_kl,
                p.mul_(ratio.sub_(student_kl[:, None])).mul_(1 - beta))
    difference = p - q
    sign = difference.sign()
    # gradient p (sign - mean of sign over p) / 2
    return 0.5 * dot(difference, sign), p.mul_(sign - dot(p, sign)[:, None]).mul_(0.5)


def sparse_kl(log_p: Tensor, teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
    """KL(q || p) for n positions of a cached teacher: (n,) in nats, and the gradient by z / T, (n, V).

    The k most likely tokens: KL over k + 1 outcomes, the last of which is "any other token". Without that
    outcome, with the k probabilities scaled to sum 1, the student would learn to be overconfident.
    Samples: the cross-entropy of the samples. It is KL plus the teacher's entropy, which no student changes.
    """
    ids, probs, tail = teacher
    log_p_kept, p = log_p.gather(1, ids), log_p.exp()  # (n, k), (n, V)
    if tail is None:
        return -dot(probs, log_p_kept), p.scatter_add_(1, ids, -probs)  # gradient p - q
    p_kept = log_p_kept.exp()  # (n, k)
    p_other = p.scatter_(1, ids, 0.0).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)  # (n,)
    loss = ((torch.special.xlogy(probs, probs) - probs * log_p_kept).sum(-1)
            + torch.special.xlogy(tail, tail / p_other))
    # The gradient is p - q for a kept token, and p (1 - tail / p_other) for each of the others.
    return loss, p.mul_((1 - tail / p_other)[:, None]).scatter_(1, ids, p_kept - probs)


def soft_loss(logits: Tensor, teacher: DenseTeacher | SparseTeacher, chunk: slice, objective: Objective,
              log_p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """T^2 * divergence from the teacher, (n,), and its gradient by the student's logits, (n, V).

    logits: (n, V) float32. log_p: their log-softmax, if the caller has it. With kind "mse" the loss is the
    squared difference of the logits, averaged over V, without a temperature.
    """
    T, V = objective.temperature, logits.shape[1]
    if objective.kind == "mse" and isinstance(teacher, DenseTeacher):
        difference = logits - teacher.logits(chunk, V)
        return difference.square().mean(-1), difference * (2 / V)
    if log_p is None or T != 1:
        log_p = (logits / T).log_softmax(-1)
    loss, gradient = chunk_divergence(log_p, teacher, chunk, objective)
    return T**2 * loss, gradient.mul_(T)  # T^2 times the gradient by z / T, divided by T


def chunk_divergence(log_p: Tensor, teacher: Any, chunk: slice,
                     objective: Objective) -> tuple[Tensor, Tensor]:
    """`divergence` or `sparse_kl` from the teacher at a chunk of positions. log_p: (n, V)."""
    if isinstance(teacher, SparseTeacher):
        tail = None if teacher.tail is None else teacher.tail[chunk]
        return sparse_kl(log_p, SparseTeacher(teacher.ids[chunk], teacher.probs[chunk], tail))
    log_q = teacher.log_probs(chunk, log_p.shape[1], objective.temperature)
    return divergence(log_p, log_q, objective.kind, objective.beta)


def group_loss(logits: Tensor, targets: Tensor, teacher: AlignedTeacher, chunk: slice,
               objective: Objective) -> tuple[Tensor, Tensor]:
    """`soft_loss` for groups of tokens, plus the cross-entropy of each target within its group or part.

    targets: (n,). The gradient of a token is that of its group, times its probability within the group. The
    cross-entropy has no temperature, and is left out if alpha is 1: then nothing is learned from the text.
    """
    T, tiny = objective.temperature, torch.finfo(torch.float32).tiny
    groups, is_split = teacher.groups, teacher.is_split[chunk]  # is_split: (n,)
    row, token = groups.members(groups.group[targets])  # (m,) each, of the targets' groups
    apart = row[is_split[row]], token[is_split[row]]  # of those that are split
    p = (logits / T).softmax(-1)  # (n, V), of tokens
    whole = groups.sum(p, *apart)  # (n, V), of groups and parts
    log_p = whole.clamp(min=1e-35).log_()  # columns without a group have 0, and smaller numbers are slow
    loss, by_group = chunk_divergence(log_p, teacher.predictions, chunk, objective)  # (n,), (n, V)
    whole.clamp_(min=tiny)
    # From groups to tokens: a token's share of its group, or of its part where the group is split.
    column, several = (apart[0], groups.part[apart[1]]), groups.group[groups.several]
    split = by_group[column] * p[apart] / whole[column]  # one entry per member of a split group
    gradient = by_group.index_copy(1, groups.several, by_group.index_select(1, several).mul_(
        p.index_select(1, groups.several)).div_(whole.index_select(1, several)))  # (n, V)
    gradient[apart] = split
    loss, gradient = T**2 * loss, gradient.mul_(T)
    if objective.alpha < 1:
        # The cross-entropy of a softmax over the tokens of the group, or of the part.
        together = ~is_split[row] | (groups.part[token] == groups.part[targets][row])
        row, token = row[together], token[together]
        p = p if T == 1 else logits.softmax(-1)
        own = p[row, token]  # (m,)
        total = torch.zeros_like(loss).index_add_(0, row, own).clamp_(min=tiny)  # (n,)
        gradient[row, token] += own / total[row]
        here = torch.arange(len(targets), device=targets.device), targets
        gradient[here] -= 1
        loss -= (p[here] / total).clamp(min=tiny).log()
    return loss, gradient


def select_targets(hidden: Tensor, batch: dict[str, Any]) -> Tensor:
    """Flatten (B, T, C) to (N, C): the batch's "positions" if it has any, else all positions."""
    hidden = hidden.flatten(0, 1)  # (B T, C)
    return hidden[batch["positions"]] if "positions" in batch else hidden


def chunk_loss(logits: Tensor, targets: Tensor, teacher: Teacher | None, chunk: slice, objective: Objective
               ) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and T^2 * divergence, summed over a chunk; and the gradient of the loss, (n, V).

    logits: the student's, (n, V) float32; the gradient is with respect to them. targets: (n,) of the chunk.
    """
    alpha, is_target = objective.alpha, targets != IGNORE  # (n,)
    target = torch.where(is_target, targets, 0)[:, None]  # (n, 1)
    log_p = logits.log_softmax(-1)
    ce = -torch.where(is_target, log_p.gather(1, target)[:, 0], 0).sum()
    kd, gradient = torch.zeros_like(ce), torch.zeros_like(ce)
    if alpha > 0:
        assert teacher is not None
        if isinstance(teacher, AlignedTeacher):
            loss, gradient = group_loss(logits, targets, teacher, chunk, objective)
        else:
            loss, gradient = soft_loss(logits, teacher, chunk, objective, log_p)
        kd = torch.where(is_target, loss, 0).sum()
        gradient.mul_(alpha)
    if alpha < 1:  # the gradient of the cross-entropy is p - 1 at the target, and p elsewhere
        gradient = log_p.exp_().mul_(1 - alpha).add_(gradient)
        gradient.scatter_add_(1, target, torch.full_like(target, alpha - 1, dtype=torch.float32))
    return ce, kd, gradient


def linear_distillation(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Teacher | None,
                        vocab_size: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, T^2 * divergence), each summed over the targets; only the loss has a gradient.

    hidden: the student's, (N, C) in the compute dtype. weight: its output matrix, (P, C); the rows from V on
    are padding. targets: (N,) int64, IGNORE at positions that are not trained. The target of position i is
    token i + 1, and the teacher's distribution at position i is also for token i + 1. teacher: None only if
    objective.alpha is 0. Returns float32 scalars, which are 0 if there is no target.

    Ignored positions are computed too, because skipping them would make a GPU wait for the mask; callers drop
    most of them beforehand (select_targets).
    """
    if isinstance(teacher, AlignedTeacher) and len(hidden) > len(teacher.is_split):
        return aligned_distillation(hidden, weight, targets, teacher, vocab_size, objective)
    dtype, with_grad = autocast_dtype(hidden), torch.is_grad_enabled()
    with_weight = with_grad and weight.requires_grad  # False if the table is frozen
    grad_hidden = torch.empty_like(hidden) if with_grad else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
    ce, kd = hidden.new_zeros((2,), dtype=torch.float32)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        matrix = weight[:vocab_size].to(dtype)  # (V, C)
        for chunk in chunks(hidden, vocab_size):
            is_target = targets[chunk, None] != IGNORE  # (n, 1)
            h = torch.where(is_target, hidden[chunk].to(dtype), 0)  # (n, C); a 0 adds nothing to grad_weight
            chunk_ce, chunk_kd, d_logits = chunk_loss((h @ matrix.T).float(), targets[chunk], teacher, chunk,
                                                      objective)
            ce += chunk_ce
            kd += chunk_kd
            if grad_hidden is not None:
                d_logits = d_logits.to(dtype)  # (n, V)
                grad_hidden[chunk] = torch.where(is_target, d_logits @ matrix, 0)  # (n, C)
            if grad_weight is not None:
                grad_weight[:vocab_size] += d_logits.T @ h
        loss = (1 - objective.alpha) * ce + objective.alpha * kd
    if with_grad:
        loss = KnownGradients.apply(hidden, weight, loss, grad_hidden, grad_weight)
    return loss, ce, kd


def aligned_distillation(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: AlignedTeacher,
                         vocab_size: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_distillation` with an AlignedTeacher. Targets that it does not predict are learned from the
    text: with the weight 1, which is 1 - alpha + alpha, or not at all if alpha is 1."""
    compared = len(teacher.is_split)
    loss, ce, kd = linear_distillation(hidden[:compared], weight, targets[:compared], teacher, vocab_size,
                                       objective)
    text_loss, text_ce, _ = linear_distillation(hidden[compared:], weight, targets[compared:], None,
                                                vocab_size, Objective(alpha=0.0))
    return loss + float(objective.alpha < 1) * text_loss, ce + text_ce, kd


@torch.no_grad()
def comparison_sums(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: DenseTeacher,
                    vocab_size: int) -> Tensor:
    """Compare student and teacher, summed over the targets: (5,) float64. Arguments as linear_distillation's.

    The entries: number of targets; the student's loss, the teacher's loss and KL(teacher || student), all in
    nats; and how often both models have the same most likely token.
    """
    sums = hidden.new_zeros(5, dtype=torch.float64)
    for chunk in chunks(hidden, vocab_size):
        is_target = targets[chunk] != IGNORE  # (n,)
        target = torch.where(is_target, targets[chunk], 0)[:, None]  # (n, 1)
        log_p = (hidden[chunk] @ weight[:vocab_size].to(hidden.dtype).T).float().log_softmax(-1)  # (n, V)
        log_q = teacher.logits(chunk, vocab_size).log_softmax(-1)  # (n, V)
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        nats = [-log.gather(1, target)[:, 0] for log in (log_p, log_q)]
        kl, _ = divergence(log_p, log_q, "forward_kl")  # overwrites log_q, so it comes last
        values = torch.stack([is_target.float(), *nats, kl, agree.float()])  # (5, n)
        sums += torch.where(is_target, values, 0).sum(-1, dtype=torch.float64)
    return sums
