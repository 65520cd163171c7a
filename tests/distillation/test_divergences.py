"""Distillation losses: against float64 numpy and autograd, at their limits, and with cached teachers."""

import math

import numpy as np
import pytest
import torch

from dataset.dataloader import IGNORE
from distillation.divergences import (
    AlignedTeacher,
    DenseTeacher,
    Groups,
    Objective,
    SparseTeacher,
    comparison_sums,
    divergence,
    group_loss,
    linear_distillation,
    soft_loss,
)

KINDS = ["forward_kl", "reverse_kl", "jsd", "tv"]
V, P, C = 100, 128, 16


def in_numpy(z, y, kind, beta, T):
    """The divergence of each row by its definition, in float64."""

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def kl(a, b):
        return np.where(a > 0, a * (np.log(np.maximum(a, 1e-300)) - np.log(np.maximum(b, 1e-300))), 0).sum(-1)

    p, q = softmax(z / T), softmax(y / T)
    m = beta * q + (1 - beta) * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
        "tv": lambda: 0.5 * np.abs(p - q).sum(-1),
    }[kind]()


def in_autograd(z, y, kind, beta, T):
    """The same in torch operations, for its gradient."""
    p, q = (z / T).softmax(-1), (y / T).softmax(-1)
    m = beta * q + (1 - beta) * p
    if kind == "forward_kl":
        return (q * (q.log() - p.log())).sum(-1)
    if kind == "reverse_kl":
        return (p * (p.log() - q.log())).sum(-1)
    if kind == "jsd":
        return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)
    return 0.5 * (p - q).abs().sum(-1)


def logits(seed, n=40, scale=2.0):
    return scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, T):
    z, y = logits(1), logits(2)
    loss, grad = soft_loss(z, DenseTeacher(y, None), slice(None), Objective(1.0, T, kind, 0.3))
    expected = T**2 * in_numpy(z.double().numpy(), y.double().numpy(), kind, 0.3, T)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=5e-6, atol=1e-6 * T**2)
    z64 = z.double().requires_grad_()
    (wanted,) = torch.autograd.grad(T**2 * in_autograd(z64, y.double(), kind, 0.3, T).sum(), z64)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=2e-6 * max(T, 1 / T))


def test_mse_is_of_the_logits():
    z, y = logits(1), logits(2)
    z.requires_grad_()
    loss, grad = soft_loss(z.detach(), DenseTeacher(y, None), slice(None), Objective(1.0, 3.0, "mse"))
    expected = (z - y).square().mean(-1)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), z)[0])


@pytest.mark.parametrize("T", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("kind", [*KINDS, "mse"])
def test_hard_teachers_are_finite(kind, T):
    """Teachers: impossible tokens, one-hot, uniform. Students: uniform, and one-hot at another token."""
    y = torch.zeros(4, V)
    y[0, 1:] = -1e30 if kind == "mse" else -math.inf
    y[1, ::2] = 0.0 if kind == "mse" else -math.inf
    y[2, 3] = 80.0
    z = torch.zeros(4, V)
    z[1, 5], z[3, 7] = 60.0, 60.0
    if kind == "mse":
        y.clamp_(min=-1e10)
    loss, grad = soft_loss(z, DenseTeacher(y, None), slice(None), Objective(1.0, T, kind))
    assert loss.isfinite().all() and grad.isfinite().all()
    assert (loss >= -1e-4 * T**2).all()


def test_a_divergence_is_zero_for_the_teacher_itself():
    y = logits(3)
    for kind in KINDS:
        loss, grad = soft_loss(y, DenseTeacher(y, None), slice(None), Objective(1.0, 2.0, kind))
        assert loss.abs().max() < 2e-5 and grad.abs().max() < 1e-5


def test_jsd_stays_within_ln_2():
    """Two different one-hot distributions have the largest value."""
    apart = torch.full((1, V), -80.0)
    one, other = apart.clone(), apart.clone()
    one[0, 0], other[0, 1] = 80.0, 80.0
    loss, _ = divergence(one.log_softmax(-1), other.log_softmax(-1), "jsd", 0.5)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    loss, _ = divergence(logits(1).log_softmax(-1), logits(2).log_softmax(-1), "jsd", 0.5)
    assert (loss >= 0).all() and (loss <= math.log(2)).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_temperature_keeps_the_size_of_the_gradient(kind):
    teacher = DenseTeacher(logits(2), None)
    sizes = [soft_loss(logits(1), teacher, slice(None), Objective(1.0, T, kind))[1].norm()
             for T in (50.0, 100.0)]  # fmt: skip
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.05)


# ---- The head ---------------------------------------------------------------------------------------------


def head_inputs(n=1100):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, C, generator=generator).requires_grad_()
    weight = (0.5 * torch.randn(P, C, generator=generator)).requires_grad_()
    targets = torch.randint(V, (n,), generator=generator)
    targets[::3] = IGNORE
    matrix = torch.randn(P + 64, 24, generator=generator)
    teacher = DenseTeacher(torch.randn(n, 24, generator=generator), matrix)
    return hidden, weight, targets, teacher


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_head_is_the_plain_loss(alpha):
    """Over several chunks. The padding of both models is dropped, and ignored positions count nothing."""
    hidden, weight, targets, teacher = head_inputs()
    loss, ce, kd = linear_distillation(hidden, weight, targets, teacher, V, Objective(alpha, 2.0))
    grads = torch.autograd.grad(loss, (hidden, weight))
    wanted = targets != IGNORE
    z = (hidden.double() @ weight.double()[:V].T)[wanted]
    y = (teacher.hidden.double() @ teacher.weight.double()[:V].T)[wanted]
    plain_ce = torch.nn.functional.cross_entropy(z, targets[wanted], reduction="sum")
    plain_kd = 4 * in_autograd(z, y, "forward_kl", 0.5, 2.0).sum()
    expected = (1 - alpha) * plain_ce + alpha * plain_kd
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ce.item() == pytest.approx(plain_ce.item(), rel=1e-6)
    assert kd.item() == pytest.approx(plain_kd.item() if alpha else 0.0, rel=1e-6)
    for one, two in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()
    assert (grads[0][~wanted] == 0).all() and (grads[1][V:] == 0).all()


def test_no_target_is_zero():
    hidden, weight, targets, teacher = head_inputs(9)
    loss, ce, kd = linear_distillation(hidden, weight, targets.fill_(IGNORE), teacher, V, Objective())
    loss.backward()
    assert loss.item() == ce.item() == kd.item() == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_frozen_tables_get_no_gradient():
    hidden, weight, targets, teacher = head_inputs(50)
    loss, *_ = linear_distillation(hidden, weight.detach(), targets, teacher, V, Objective())
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


def test_comparison_sums_by_hand():
    """Two positions. Teacher: 1/2, 1/4, 1/4 at both. Student: 1/3 each, then the same as the teacher."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]] * 2).log()
    student = torch.stack((torch.zeros(3), teacher[1]))
    sums = comparison_sums(student, torch.eye(3), torch.tensor([0, 1]), DenseTeacher(teacher, None), 3)
    kl = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    expected = [2, math.log(3) + math.log(4), math.log(2) + math.log(4), kl, 2]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)


# ---- A cached teacher -------------------------------------------------------------------------------------


def sparse(log_q, k):
    top, ids = log_q.topk(k, dim=-1)
    return SparseTeacher(ids, top.exp(), log_q.exp().scatter(1, ids, 0.0).sum(-1))


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_all_tokens_kept_is_the_whole_teacher(T):
    hidden, weight, targets, teacher = head_inputs(200)
    log_q = (teacher.logits(slice(None), V) / T).log_softmax(-1)
    values = {}
    for name, source in (("whole", teacher), ("cached", sparse(log_q, V))):
        loss, *_ = linear_distillation(hidden, weight, targets, source, V, Objective(0.7, T))
        values[name] = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for one, two in zip(*values.values(), strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()


def test_all_other_tokens_are_one_outcome():
    """By hand: q = 1/2, 1/4, 1/8, 1/8 with two tokens kept, p uniform: KL over the outcomes 1/2, 1/4, 1/4."""
    log_q = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    z = torch.zeros(1, 4, requires_grad=True)
    loss, grad = soft_loss(z.detach(), sparse(log_q, 2), slice(None), Objective(1.0))
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0 + 0.25 * math.log(0.25 / 0.5), rel=1e-6)
    assert grad[0].tolist() == pytest.approx([-0.25, 0.0, 0.125, 0.125], abs=1e-7)


def test_samples_are_unbiased_and_renormalised_tokens_are_not():
    z, log_q = logits(1, n=1)[0], logits(2, n=1, scale=1.0)[0].log_softmax(-1)
    whole = soft_loss(z[None], DenseTeacher(log_q[None], None), slice(None), Objective(1.0))[1][0]
    generator = torch.Generator().manual_seed(0)
    many = 20_000
    ids = torch.multinomial(log_q.exp(), 8 * many, replacement=True, generator=generator).view(many, 8)
    drawn = SparseTeacher(ids, torch.full((many, 8), 1 / 8))
    mean = soft_loss(z.expand(many, V), drawn, slice(None), Objective(1.0))[1].mean(0)
    top, kept = log_q.topk(8)
    sharp = SparseTeacher(kept[None], top.softmax(-1)[None])  # scaled to sum 1, the other tokens dropped
    biased = soft_loss(z[None], sharp, slice(None), Objective(1.0))[1][0]
    assert (mean - whole).norm() < 0.02 * whole.norm()
    assert (biased - whole).norm() > 0.3 * whole.norm()


# ---- Another vocabulary -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha,T", [(0.7, 2.0), (1.0, 1.0)])
def test_groups_of_tokens(kind, alpha, T):
    """The tokens from 60 on are in the groups of 0 to 9, and every second target's group is split, into
    single tokens and one part: the divergence of these sets, and the cross-entropy within the target's set,
    with their gradient."""
    z, y = logits(1)[:12].requires_grad_(), logits(2)[:12]
    groups, parts = torch.arange(V), torch.arange(V)
    groups[60:] %= 10
    parts[65:80] = groups[65:80]
    several = (groups.bincount()[groups] > 1).nonzero()[:, 0]
    targets, is_split = torch.arange(len(z)) % 10 + 60, torch.arange(len(z)) % 2 > 0
    group_of, expected = groups.tolist(), []
    members = {group: [k for k in range(V) if group_of[k] == group] for group in range(60)}
    for row, target in enumerate(targets.tolist()):
        apart = members[group_of[target]] if is_split[row] else []
        sets = [[j for j in apart if parts[j] == k] for k in apart if parts[k] == k]
        sets += [each for each in members.values() if each != apart]
        heads = [each[0] for each in sets]
        y[row, [k for k in range(V) if k not in heads]] = -torch.inf
        log_p, log_q = (z[row] / T).log_softmax(-1), (y[row] / T).log_softmax(-1)[heads]
        p = torch.stack([log_p[each].logsumexp(-1) for each in sets])
        loss = T**2 * in_autograd(p[None], log_q[None], kind, 0.3, 1.0)[0]
        own = next(each for each in sets if target in each)
        inside = z[row, own].logsumexp(-1) - z[row, target]
        expected.append(loss + inside * (alpha < 1))
    expected = torch.stack(expected)
    teacher = AlignedTeacher(DenseTeacher(y, None), Groups(groups, parts, several), is_split)
    loss, gradient = group_loss(z.detach(), targets, teacher, slice(None), Objective(alpha, T, kind, 0.3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-4, atol=1e-5)
