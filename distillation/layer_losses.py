"""Losses between the inside of a student and of a teacher: hidden states, attention, relations.

    loss = hidden_mse(projection(student_hidden), teacher_hidden, weights)       # one pair of layers
    loss = relation_loss(student_v, teacher_v, heads=12, weights=weights)        # widths and heads may differ

Every loss is a sum over positions, never a mean: the loop divides by the global count, the sum of `weights`.
Everything is computed in float32, also under autocast and for bfloat16 inputs; what comes back is a float32
scalar, 0 where no position counts. The teacher's tensors are meant to come without a gradient.
Left out: the projection of a narrow student to the teacher's width, which has parameters: the caller's.

Shapes: B batch, T time, C width of a vector, H query heads, K key heads, R relation heads, D width of a head.
`weights` (B, T) is float, 1 where a position counts and 0 where not; the positions of no
weight must hold finite numbers. `document_ids` (B, T) are those of model.py: attention stays within each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = -1e30  # the logarithm of 0, but finite: the difference of two is a number, where inf - inf is NaN
SHORTEST = 1e-6  # a vector below this norm has no direction: its cosine with any other is about 0


def same_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32. Raises ValueError where their shapes differ."""
    if student.shape != teacher.shape:
        raise ValueError(f"student vectors of shape {tuple(student.shape)} against the teacher's "
                         f"{tuple(teacher.shape)}: project the student to the teacher's width first")
    return student.float(), teacher.float()


def products(a: Tensor, b: Tensor) -> Tensor:
    """Every a with every b: (..., n, C), (..., m, C) -> (..., n, m), in float32 under autocast, too."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().mT


def hidden_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The squared difference of hidden states, averaged over the C entries, summed over positions.

    student, teacher: (B, T, C), any float dtype. weights: (B, T). Unit: the square of a hidden state's.
    Raises ValueError where the shapes differ. Source: TinyBERT's L_hidn, arXiv 1909.10351.
    """
    student, teacher = same_width(student, teacher)
    return (weights * (student - teacher).square().mean(dim=-1)).sum()


def hidden_cosine(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """1 - cosine of the angle between hidden states, summed over positions: 0 to 2 each.

    student, teacher: (B, T, C), any float dtype. weights: (B, T). A vector of zeros has cosine 0 with all.
    Raises ValueError where the shapes differ. Source: DistilBERT's L_cos, arXiv 1910.01108.
    """
    student, teacher = (F.normalize(x, dim=-1, eps=SHORTEST) for x in same_width(student, teacher))
    return (weights * (1 - (student * teacher).sum(dim=-1))).sum()


def visible(x: Tensor, document_ids: Tensor | None) -> Tensor:
    """Which keys each query sees: itself and those before it, in its document. x: (B, H, T, D).

    Returns bool, (1, 1, T, T), or (B, 1, T, T) with document_ids.
    """
    T = x.shape[2]
    causal = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
    if document_ids is None:
        return causal
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])  # (B, 1, T, T)


def log_attention(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """log softmax(q k^T / sqrt(D)) over the keys that are seen, and about NOTHING at the others.

    q: (B, H, T, D). k: (B, K, T, D), each head for H / K neighbouring queries'. Returns (B, H, T, T) float32.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, D)
    scores = products(q, k) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    return scores.masked_fill(~seen, NEG_INF).log_softmax(dim=-1)


def attention_mse(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor,
                  weights: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The squared difference of causal attention probabilities, averaged over heads and visible keys, summed.

    q: (B, H, T, D), k: (B, K, T, D), as they meet in attention: after the rotary turn. Each model has its own
    H, K and D; where the H differ, each model's probabilities are averaged over its heads first. weights:
    (B, T) of the query rows. Unit: a probability squared. Needs several (B, H, T, T) float32 tensors.
    Source: TinyBERT's L_attn, arXiv 1909.10351, here after the softmax.
    """
    seen = visible(student_q, document_ids)  # (B or 1, 1, T, T)
    student = log_attention(student_q, student_k, seen).exp()  # (B, H, T, T)
    teacher = log_attention(teacher_q, teacher_k, seen).exp()  # (B, H of the teacher, T, T)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (x.mean(dim=1, keepdim=True) for x in (student, teacher))  # (B, 1, T, T)
    rows = (student - teacher).square().sum(dim=-1) / seen.sum(dim=-1)  # (B, H or 1, T); unseen keys add 0
    return (weights * rows.mean(dim=1)).sum()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut vectors into relation heads: (B, T, C) -> (B, R, T, C / R). ValueError where C is not divisible."""
    B, T, C = x.shape
    if C % heads:
        raise ValueError(f"vectors of width {C} cannot be cut into {heads} relation heads: choose a divisor "
                         "of the student's and the teacher's width")
    return x.reshape(B, T, heads, C // heads).transpose(1, 2)  # (B, R, T, D)


def relation_loss(student: Tensor, teacher: Tensor, heads: int, weights: Tensor,
                  document_ids: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of how positions relate, averaged over relation heads, summed over rows; nats.

    student: (B, T, Cs), teacher: (B, T, Ct): the queries, keys or values of all heads side by side. Both are
    cut anew into `heads` relation heads, so head counts and widths may differ. A relation is the causal
    softmax(x x^T / sqrt(D)) of a head with itself, D the model's own. weights: (B, T) of the rows. Needs
    several (B, R, T, T) float32 tensors. Raises ValueError where a width is not divisible by heads.
    Source: MiniLMv2, arXiv 2012.15828, whose rows see all others; ours see those before them.
    """
    student, teacher = split_heads(student, heads), split_heads(teacher, heads)  # (B, R, T, D) each
    seen = visible(student, document_ids)  # (B or 1, 1, T, T)
    student, teacher = log_attention(student, student, seen), log_attention(teacher, teacher, seen)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)  # (B, R, T)
    return (weights * divergence.mean(dim=1)).sum()


def squared_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of every pair, averaged over C: (B, T, C) float32 twice -> (B, T, T)."""
    middle = teacher.mean(dim=1, keepdim=True)  # (B, 1, C); what all share would cost precision below
    student, teacher = student - middle, teacher - middle
    squares = student.square().sum(dim=-1)[:, :, None] + teacher.square().sum(dim=-1)[:, None, :]  # (B, T, T)
    return (squares - 2 * products(student, teacher)) / student.shape[-1]


def transport_plan(cost: Tensor, weights: Tensor, regularization: float, iterations: int) -> Tensor:
    """How much of each student position (rows) goes to each teacher position: (B, T, T) float32.

    cost: (B, T, T). Rows sum to `weights` (B, T); columns do so up to what the iterations leave.
    """
    mass = torch.where(weights > 0, weights.log(), NEG_INF)  # (B, T)
    both = weights[:, :, None] * weights[:, None, :]  # (B, T, T), the pairs that count
    # The geometric mean: a first token's outsized vectors would raise the mean until it blurs all the others.
    logs = (both * cost.clamp_min(1e-12).log()).sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp_min(1)  # (B,)
    kernel = -cost / (regularization * logs.exp())[:, None, None]  # (B, T, T)
    row = mass  # (B, T), the logarithms of the scales that give rows, and columns, their sums
    for _ in range(iterations):
        column = mass - (kernel + row[:, :, None]).logsumexp(dim=1)  # (B, T)
        row = mass - (kernel + column[:, None, :]).logsumexp(dim=2)
    return (kernel + row[:, :, None] + column[:, None, :]).exp()


def sinkhorn_loss(student: Tensor, teacher: Tensor, weights: Tensor, regularization: float = 0.05,
                  iterations: int = 20) -> Tensor:
    """What it costs to move a sequence's student vectors onto its teacher vectors, whichever goes to which.

    student, teacher: (B, T, C), any float dtype. weights: (B, T); a counted position has the mass 1, so the
    cost, the squared difference averaged over C, is summed over positions, as hidden_mse is, which pairs each
    with its own. regularization: the weight of the plan's entropy, as a share of the geometric mean of all
    pairs' costs; it blurs the plan, so that equal inputs keep a small cost. The backward pass holds the plan
    fixed, which at convergence gives the gradient of the cost minus the weighted entropy. Raises ValueError
    where the shapes differ. Source: arXiv 1306.0895, iterated on logarithms.
    """
    cost = squared_distances(*same_width(student, teacher))  # (B, T, T)
    with torch.no_grad():
        plan = transport_plan(cost, weights, regularization, iterations)  # (B, T, T)
    return (plan * cost).sum()


def info_nce(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 0.07) -> Tensor:
    """How hard a student vector's own teacher vector is to find in its sequence, summed, in nats.

    student, teacher: (B, T, C), any float dtype, scaled to length 1 here. weights: (B, T). temperature: of
    the softmax over the cosines; 0.07 is MoCo's, arXiv 1911.05722. With n positions that count in a sequence,
    log(n) - loss / n is a lower bound of the mutual information of the two, and at most log(n). The others
    are those of the same sequence, not of the batch, whose size would else change the loss. Needs (B, T, T)
    float32. Raises ValueError where the shapes differ. Source: arXiv 1807.03748.
    """
    student, teacher = (F.normalize(x, dim=-1, eps=SHORTEST) for x in same_width(student, teacher))
    scores = products(student, teacher) / temperature  # (B, T, T)
    log_p = scores.masked_fill(weights[:, None] == 0, NEG_INF).log_softmax(dim=-1)
    return -(weights * log_p.diagonal(dim1=1, dim2=2)).sum()
