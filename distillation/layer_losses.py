"""Losses between a layer of the student and a layer of the teacher: hidden states, attention, relations.

    loss = hidden_mse(projection(student_hidden), teacher_hidden, weights)       # one pair of layers
    loss = relation_loss(student_v, teacher_v, heads=12, weights=weights)        # widths and heads may differ

Every loss is a sum over positions, never a mean; the training loop divides by the global count, which is the
sum of `weights`. Everything is computed in float32, also under autocast and for bfloat16 inputs. The result
is a float32 scalar, 0 if no position counts. The teacher's tensors should have no gradient. Left out: the
projection of a narrow student to the teacher's width. It has parameters, so it belongs to the caller
(distillation/student.py).

Shapes: B batch, T time, C width of a vector, H query heads, K key heads, R relation heads, D width of a head.
`weights` (B, T) is float: 1 if a position counts, 0 if not. Positions of weight 0 must hold finite numbers.
`document_ids` (B, T) are those of model.py: attention stays within a document.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = -1e30  # the logarithm of 0, but finite, because inf - inf is NaN
MIN_NORM = 1e-6  # a vector shorter than this has no direction: its cosine with any other is about 0


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of every a with every b: (..., n, C), (..., m, C) -> (..., n, m) float32."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().mT


def hidden_mse(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The squared difference of hidden states, averaged over the C entries and summed over positions.

    student, teacher: (B, T, C), any float dtype. weights: (B, T). Unit: the square of a hidden state.
    Source: L_hidn of TinyBERT, arXiv 1909.10351.
    """
    return (weights * (student.float() - teacher.float()).square().mean(dim=-1)).sum()


def hidden_cosine(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """1 - cosine of the angle between hidden states, summed over positions; 0 to 2 per position.

    student, teacher: (B, T, C), any float dtype. weights: (B, T). A zero vector has cosine 0 with any other.
    Source: L_cos of DistilBERT, arXiv 1910.01108.
    """
    student, teacher = (F.normalize(x.float(), dim=-1, eps=MIN_NORM) for x in (student, teacher))
    return (weights * (1 - (student * teacher).sum(dim=-1))).sum()


def visible(x: Tensor, document_ids: Tensor | None) -> Tensor:
    """True where a query may see a key: the key is not later and is in the same document. x: (B, H, T, D).

    Returns bool: (1, 1, T, T), or (B, 1, T, T) with document_ids.
    """
    T = x.shape[2]
    causal = torch.ones(1, 1, T, T, dtype=torch.bool, device=x.device).tril()
    if document_ids is None:
        return causal
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])  # (B, 1, T, T)


def log_attention(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """log softmax(q k^T / sqrt(D)) over the keys that are seen; about NEG_INF for the others.

    q: (B, H, T, D). k: (B, K, T, D); each key head serves H / K neighbouring query heads. Returns
    (B, H, T, T) float32.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, H, T, D)
    scores = inner_products(q, k) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    return scores.masked_fill(~seen, NEG_INF).log_softmax(dim=-1)


def attention_mse(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor,
                  weights: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Squared difference of attention probabilities: mean over heads and visible keys, sum over queries.

    q: (B, H, T, D), k: (B, K, T, D), after the rotary embedding. Each model has its own H, K and D. If the H
    differ, the probabilities of each model are averaged over its heads first. weights: (B, T) of the queries.
    Unit: a squared probability. Needs several (B, H, T, T) float32 tensors.
    Source: L_attn of TinyBERT, arXiv 1909.10351, here after the softmax.
    """
    seen = visible(student_q, document_ids)  # (B or 1, 1, T, T)
    student = log_attention(student_q, student_k, seen).exp()  # (B, H, T, T)
    teacher = log_attention(teacher_q, teacher_k, seen).exp()  # (B, H of the teacher, T, T)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (x.mean(dim=1, keepdim=True) for x in (student, teacher))  # (B, 1, T, T)
    rows = (student - teacher).square().sum(dim=-1) / seen.sum(dim=-1)  # (B, H or 1, T); unseen keys add 0
    return (weights * rows.mean(dim=1)).sum()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, weights: Tensor,
                  document_ids: Tensor | None = None, squared: bool = False) -> Tensor:
    """KL(teacher || student) of self-relations, in nats, averaged over relation heads, summed over positions.

    student: (B, T, Cs), teacher: (B, T, Ct): the queries, keys or values of all heads, concatenated. Both are
    cut into R = `heads` relation heads again, so head counts and widths may differ. A relation is the causal
    softmax(x x^T / sqrt(D)) of a head x with itself; D is the model's own. weights: (B, T). Needs several
    (B, R, T, T) float32 tensors. squared: in place of KL, the squared difference of the relations'
    probabilities, averaged over the visible keys.
    Source: MiniLMv2, arXiv 2012.15828, without its look at later positions.
    """
    # (B, T, C) -> (B, R, T, D) each
    student, teacher = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher))
    seen = visible(student, document_ids)  # (B or 1, 1, T, T)
    student, teacher = log_attention(student, student, seen), log_attention(teacher, teacher, seen)
    if squared:
        divergence = (student.exp() - teacher.exp()).square().sum(dim=-1) / seen.sum(dim=-1)  # (B, R, T)
    else:
        divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)  # (B, R, T)
    return (weights * divergence.mean(dim=1)).sum()


def squared_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of every student and teacher vector, averaged over C: (B, T, C) -> (B, T, T).
    """
    mean = teacher.mean(dim=1, keepdim=True)  # (B, 1, C); a large common offset would cost precision below
    student, teacher = student - mean, teacher - mean
    squares = student.square().sum(dim=-1)[:, :, None] + teacher.square().sum(dim=-1)[:, None, :]  # (B, T, T)
    return (squares - 2 * inner_products(student, teacher)) / student.shape[-1]


def transport_plan(cost: Tensor, weights: Tensor, regularization: float, iterations: int) -> Tensor:
    """How much mass each student position (rows) sends to each teacher position (columns): (B, T, T) float32.

    cost: (B, T, T). The rows sum to `weights` (B, T); so do the columns, up to the error that is left after
    the iterations.
    """
    mass = torch.where(weights > 0, weights.log(), NEG_INF)  # (B, T)
    both = weights[:, :, None] * weights[:, None, :]  # (B, T, T), the pairs that count
    # The unit of the costs is their geometric mean. A first token often has a huge vector; it would raise the
    # arithmetic mean so much that the plan of all other tokens is blurred.
    logs = (both * cost.clamp_min(1e-12).log()).sum(dim=(1, 2)) / both.sum(dim=(1, 2)).clamp_min(1)  # (B,)
    kernel = -cost / (regularization * logs.exp())[:, None, None]  # (B, T, T)
    row = mass  # (B, T), logarithms of the factors that scale the rows, and below the columns
    for _ in range(iterations):
        column = mass - (kernel + row[:, :, None]).logsumexp(dim=1)  # (B, T)
        row = mass - (kernel + column[:, None, :]).logsumexp(dim=2)
    return (kernel + row[:, :, None] + column[:, None, :]).exp()


def sinkhorn_loss(student: Tensor, teacher: Tensor, weights: Tensor, regularization: float = 0.05,
                  iterations: int = 20) -> Tensor:
    """The cost of moving a sequence's student vectors onto its teacher vectors in the cheapest way.

    student, teacher: (B, T, C), any float dtype. weights: (B, T). The cost of a pair is the squared
    difference averaged over C, and each position has mass 1, so the loss is comparable with hidden_mse, which
    pairs each position with itself. regularization: weight of the plan's entropy, as a share of the geometric
    mean of all pairs' costs. It blurs the plan, so equal inputs still have a small cost. The backward pass
    treats the plan as constant; at convergence that is the gradient of the cost minus the weighted entropy.
    Source: arXiv 1306.0895, computed on logarithms.
    """
    cost = squared_distances(student.float(), teacher.float())  # (B, T, T)
    with torch.no_grad():
        plan = transport_plan(cost, weights, regularization, iterations)  # (B, T, T)
    return (plan * cost).sum()


def info_nce(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 0.07) -> Tensor:
    """-log probability of picking the teacher vector of the same position, summed over positions, in nats.

    The probability is a softmax over the cosines between a student vector and all teacher vectors of its
    sequence. student, teacher: (B, T, C), any float dtype. weights: (B, T). temperature: of the softmax; 0.07
    is from MoCo, arXiv 1911.05722. If n positions count in a sequence, log(n) - loss / n is a lower bound of
    the mutual information between student and teacher vectors. The negatives come from the same sequence, not
    from the batch, so the batch size does not change the loss. Needs (B, T, T) float32.
    Source: arXiv 1807.03748.
    """
    student, teacher = (F.normalize(x.float(), dim=-1, eps=MIN_NORM) for x in (student, teacher))
    scores = inner_products(student, teacher) / temperature  # (B, T, T)
    log_p = scores.masked_fill(weights[:, None] == 0, NEG_INF).log_softmax(dim=-1)
    return -(weights * log_p.diagonal(dim1=1, dim2=2)).sum()
