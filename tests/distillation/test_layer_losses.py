"""Layer losses against float64 numpy, torch's own attention, brute force and worked examples."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillation.layer_losses import (
    attention_mse,
    hidden_cosine,
    hidden_mse,
    info_nce,
    relation_loss,
    sinkhorn_loss,
    squared_distances,
    transport_plan,
)


def attention_of_vectors(student, teacher, weights):
    """attention_mse of vectors (B, T, C), cut into four heads; the same vectors are queries and keys."""
    student, teacher = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (student, teacher))
    return attention_mse(student, student, teacher, teacher, weights)


# Each loss as f(student, teacher, weights) of vectors, for what must hold of all of them.
VECTOR_LOSSES = {
    "mse": hidden_mse,
    "cosine": hidden_cosine,
    "relation": lambda student, teacher, weights: relation_loss(student, teacher, 4, weights),
    "relation, squared": lambda student, teacher, weights: relation_loss(student, teacher, 4, weights,
                                                                         squared=True),
    "sinkhorn": sinkhorn_loss,
    "info_nce": lambda student, teacher, weights: info_nce(student, teacher, weights, 0.1),
    "attention": attention_of_vectors,
}


def each_loss(*but):
    names = [name for name in VECTOR_LOSSES if name not in but]
    return pytest.mark.parametrize("loss", [VECTOR_LOSSES[name] for name in names], ids=names)


def problem(B=2, T=7, C=24, seed=0):
    """Student and teacher vectors, and weights that leave out about a third."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, B, T, C, generator=generator)
    weights = (torch.rand(B, T, generator=generator) > 0.3).float()
    return student, teacher, weights


def queries_and_keys(H=4, K=4, D=6, B=2, T=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, T, D, generator=generator), torch.randn(B, K, T, D, generator=generator)


def double(*tensors):
    return [x.double().numpy() for x in tensors]


def numpy_softmax(scores):
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def numpy_attention(q, k, documents=None):
    """(B, H, T, T) float64: row t is a softmax over the keys up to t of its document, row by row."""
    q, k = double(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    B, H, T, D = q.shape
    result = np.zeros((B, H, T, T))
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        keys = [s for s in range(t + 1) if documents is None or documents[b, s] == documents[b, t]]
        result[b, h, t, keys] = numpy_softmax(k[b, h, keys] @ q[b, h, t] / math.sqrt(D))
    return result


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 3]])
with_documents = pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])


# Against float64 numpy

def test_mse_and_cosine_equal_numpy():
    student, teacher, weights = problem()
    s, t, w = double(student, teacher, weights)
    squares = ((s - t) ** 2).mean(-1)
    cosines = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    mse, cosine = hidden_mse(student, teacher, weights), hidden_cosine(student, teacher, weights)
    assert mse.item() == pytest.approx((w * squares).sum(), rel=1e-6)
    assert cosine.item() == pytest.approx((w * (1 - cosines)).sum(), rel=1e-6)


@with_documents
@pytest.mark.parametrize("teacher_heads", [4, 2])
def test_attention_equals_numpy(teacher_heads, documents):
    """The student has grouped keys. The teacher has another width, and the same number of heads or fewer."""
    student = queries_and_keys(H=4, K=2)
    teacher = queries_and_keys(H=teacher_heads, K=teacher_heads, D=10, seed=1)
    s, t = (numpy_attention(*each, documents) for each in (student, teacher))
    if teacher_heads == 2:
        s, t = s.mean(1, keepdims=True), t.mean(1, keepdims=True)
    visible = numpy_attention(torch.zeros(2, 1, 7, 1), torch.zeros(2, 1, 7, 1), documents) > 0
    rows = (((s - t) ** 2).sum(-1) / visible.sum(-1)).mean(1)
    weights = problem()[2]
    total = attention_mse(*student, *teacher, weights, documents)
    assert total.item() == pytest.approx((weights.numpy() * rows).sum(), rel=1e-6)


@with_documents
@pytest.mark.parametrize("widths, heads", [((24, 24), 1), ((24, 24), 4), ((12, 36), 6), ((20, 16), 4)])
def test_relation_equals_numpy(widths, heads, documents):
    student, teacher, weights = problem(C=widths[0])[0], problem(C=widths[1], seed=1)[1], problem()[2]
    s, t = (x.view(2, 7, heads, -1).transpose(1, 2) for x in (student, teacher))
    s, t = numpy_attention(s, s, documents), numpy_attention(t, t, documents)
    rows = np.where(t > 0, t * np.log(np.where(t > 0, t / np.where(s > 0, s, 1), 1)), 0).sum(-1).mean(1)
    total = relation_loss(student, teacher, heads, weights, documents)
    assert total.item() == pytest.approx((weights.numpy() * rows).sum(), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_equals_numpy(temperature):
    student, teacher, weights = problem()
    expected = 0.0
    for s, t, counts in zip(*double(student, teacher), weights.numpy() > 0, strict=True):  # a sequence each
        s, t = (x[counts] / np.linalg.norm(x[counts], axis=-1, keepdims=True) for x in (s, t))
        expected -= np.log(np.diag(numpy_softmax(s @ t.T / temperature))).sum()
    assert info_nce(student, teacher, weights, temperature).item() == pytest.approx(expected, rel=1e-6)


def test_sinkhorn_equals_numpy():
    """Sequence by sequence, on the counted positions alone, and without logarithms."""
    student, teacher, weights = problem()
    expected = 0.0
    for s, t, counted in zip(*double(student, teacher), weights.numpy() > 0, strict=True):
        cost = ((s[counted][:, None] - t[counted][None]) ** 2).mean(-1)
        kernel, row = np.exp(-cost / (0.05 * np.exp(np.log(cost).mean()))), np.ones(counted.sum())
        for _ in range(20):
            column = 1 / (kernel.T @ row)
            row = 1 / (kernel @ column)
        expected += (row[:, None] * kernel * column * cost).sum()
    assert sinkhorn_loss(student, teacher, weights).item() == pytest.approx(expected, rel=1e-6)


# Against outside references

def test_attention_probabilities_are_those_of_torch():
    """Values that are the identity matrix make scaled_dot_product_attention return its probabilities."""
    student, teacher = queries_and_keys(H=4, K=2), queries_and_keys(H=4, K=4, seed=1)
    s, t = (F.scaled_dot_product_attention(q, k, torch.eye(7).expand(2, k.shape[1], 7, 7), is_causal=True,
                                           enable_gqa=True) for q, k in (student, teacher))
    expected = ((s - t).square().sum(-1) / torch.arange(1, 8)).mean(1).sum()
    total = attention_mse(*student, *teacher, torch.ones(2, 7))
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sinkhorn_without_entropy_is_the_best_assignment():
    student, teacher, _ = problem(B=1, T=5)
    cost = (student[0][:, None] - teacher[0][None]).square().mean(-1)
    best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    total = sinkhorn_loss(student, teacher, torch.ones(1, 5), regularization=0.002, iterations=1000)
    assert total.item() == pytest.approx(best.item(), rel=1e-4)


# Worked examples

def test_two_vectors_by_hand():
    """(1, 0) against (0, 2): mean square (1 + 4) / 2, cosine 0. (3, 4) against (-3, -4): 50 and cosine -1."""
    student, teacher = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [-3.0, -4.0]]])
    assert hidden_mse(student, teacher, torch.ones(1, 2)).item() == 52.5
    assert hidden_mse(student, teacher, torch.tensor([[1.0, 0.0]])).item() == 2.5
    assert hidden_cosine(student, teacher, torch.ones(1, 2)).item() == pytest.approx(1 + 2)


def test_attention_and_relation_by_hand():
    """D = 1. The second row scores 0 and ln 3: probabilities 1/4 and 3/4, against the teacher's halves."""
    x, halves = torch.tensor([[[0.0], [math.sqrt(math.log(3))]]]), torch.zeros(1, 2, 1)
    relation = relation_loss(x, halves, 1, torch.ones(1, 2))
    assert relation.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    squared = relation_loss(x, halves, 1, torch.ones(1, 2), squared=True)
    assert squared.item() == pytest.approx((1 / 16 + 1 / 16) / 2)
    attention = attention_mse(x[None], x[None], halves[None], halves[None], torch.ones(1, 2))
    assert attention.item() == pytest.approx((1 / 16 + 1 / 16) / 2)


def test_info_nce_by_hand():
    """Two orthogonal pairs at temperature 1 / ln 3: the right one has probability 3 / (3 + 1)."""
    x = 5 * torch.eye(2)[None]
    total = info_nce(x, x, torch.ones(1, 2), temperature=1 / math.log(3))
    assert total.item() == pytest.approx(2 * math.log(4 / 3))


# What must hold

@pytest.mark.parametrize("name", ["mse", "cosine", "relation", "attention"])
def test_equal_inputs_cost_nothing(name):
    student, _, weights = problem()
    assert VECTOR_LOSSES[name](student, student, weights).item() == pytest.approx(0, abs=1e-5)


def test_reordered_positions_cost_sinkhorn_next_to_nothing():
    student, teacher, _ = problem()
    loss = sinkhorn_loss(student, student.flip(1), torch.ones(2, 7))
    assert loss < 0.01 * sinkhorn_loss(student, teacher, torch.ones(2, 7))
    assert loss < 0.01 * hidden_mse(student, student.flip(1), torch.ones(2, 7))


def test_what_all_vectors_share_costs_sinkhorn_no_precision():
    student, teacher, weights = problem()
    shifted = sinkhorn_loss(student + 1000, teacher + 1000, weights)
    assert shifted.item() == pytest.approx(sinkhorn_loss(student, teacher, weights).item(), rel=1e-4)


def test_one_outsized_vector_does_not_blur_the_plan_of_the_others():
    """Real models have such a vector at the first token. All others still go to their own position, so the
    cost is that of hidden_mse."""
    student, weights = problem(T=40, C=64)[0], torch.ones(2, 40)
    student[:, 0] *= 100
    teacher = student + 0.1
    expected = hidden_mse(student, teacher, weights).item()
    assert sinkhorn_loss(student, teacher, weights).item() == pytest.approx(expected, rel=0.1)


def test_info_nce_bounds_the_information_by_log_n():
    """log(n) - loss / n is at most log(n), nearly log(n) if student and teacher agree, and 0 for zeros."""
    student, teacher, weights = problem(B=1, T=40)
    n = weights.sum().item()
    found, lost, blank = (math.log(n) - info_nce(s, teacher, weights, 0.05).item() / n
                          for s in (teacher, student, torch.zeros_like(student)))
    assert 0.98 * math.log(n) < found <= math.log(n)
    assert lost < found
    assert blank == pytest.approx(0, abs=1e-5)


@each_loss()
def test_it_is_a_sum_over_the_rows_of_a_batch(loss):
    student, teacher, weights = problem()
    parts = [loss(student[b:b + 1], teacher[b:b + 1], weights[b:b + 1]).item() for b in range(2)]
    assert loss(student, teacher, weights).item() == pytest.approx(sum(parts), rel=1e-6)


@each_loss()
def test_positions_without_weight_at_the_end_change_nothing(loss):
    """Padding: neither their vectors nor their number matter, and no gradient reaches them."""
    student, teacher, _ = problem()
    weights = torch.ones(2, 7)
    weights[:, 4:] = 0
    short = loss(student[:, :4], teacher[:, :4], weights[:, :4])
    student[:, 4:] *= 100
    student.requires_grad_()
    total = loss(student, teacher, weights)
    assert total.item() == pytest.approx(short.item(), rel=1e-5)
    total.backward()
    assert student.grad[:, 4:].abs().max() == 0 and student.grad[:, :4].abs().max() > 0


@pytest.mark.parametrize("name", ["relation", "attention"])
def test_a_later_position_does_not_change_earlier_rows(name):
    student, teacher, _ = problem()
    early = torch.tensor([1.0, 1, 1, 1, 0, 0, 0]).expand(2, 7)
    before = VECTOR_LOSSES[name](student, teacher, early)
    student[:, 4:], teacher[:, 4:] = 7.0, -3.0
    assert torch.equal(VECTOR_LOSSES[name](student, teacher, early), before)
    assert VECTOR_LOSSES[name](student, teacher, 1 - early) > 0  # which the later rows do see


def test_documents_do_not_see_each_other():
    """Two documents in a row cost what they cost alone."""
    student, teacher, weights = problem(B=1)
    documents = torch.tensor([[3, 3, 3, 4, 4, 4, 4]])
    for loss in (lambda s, t, w, ids: relation_loss(s, t, 4, w, ids),
                 lambda s, t, w, ids: attention_mse(s[:, None], s[:, None], t[:, None], t[:, None], w, ids)):
        alone = [loss(student[:, part], teacher[:, part], weights[:, part], None).item()
                 for part in (slice(0, 3), slice(3, 7))]
        assert loss(student, teacher, weights, documents).item() == pytest.approx(sum(alone), rel=1e-6)


@each_loss()
def test_no_weight_gives_zero_and_zero_gradients(loss):
    student, teacher, weights = problem()
    student.requires_grad_()
    total = loss(student, teacher, torch.zeros_like(weights))
    total.backward()
    assert total.item() == 0 and student.grad.abs().max() == 0
    weights[0] = 0  # one empty sequence and one full one
    assert loss(student, teacher, weights).isfinite()


def hard_inputs():
    student, teacher, _ = problem()
    one_hot = torch.zeros_like(student)
    one_hot[..., 3] = 300.0
    zeros = torch.zeros_like(student)
    return {"normal": (student, teacher), "equal": (student, student.clone()),
            "one hot": (one_hot, teacher), "against one hot": (student, one_hot),
            "one hot twice": (one_hot, one_hot.clone()),
            "zeros": (zeros, teacher), "against zeros": (student, zeros),
            "zeros twice": (zeros, zeros.clone()),
            "large": (1000 * student, 1000 * teacher), "small": (1e-4 * student, 1e-4 * teacher)}


@each_loss()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", hard_inputs())
def test_hard_inputs_stay_finite(loss, dtype, kind):
    student, teacher = (x.to(dtype) for x in hard_inputs()[kind])
    student.requires_grad_()
    total = loss(student, teacher, problem()[2])
    total.backward()
    assert total.dtype == torch.float32 and student.grad.dtype == dtype
    assert total.isfinite() and total > -1e-3 and student.grad.isfinite().all()


@each_loss()
def test_bfloat16_inputs_and_autocast_are_computed_in_float32(loss):
    student, teacher, weights = problem()
    rounded = student.bfloat16(), teacher.bfloat16()
    exact = loss(rounded[0].float(), rounded[1].float(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*rounded, weights), exact)


@each_loss("sinkhorn")  # its plan is held fixed: see below
def test_gradients_equal_finite_differences(loss):
    """Along one random direction."""
    student, teacher, weights = problem()
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(2))
    student.requires_grad_()
    loss(student, teacher, weights).backward()
    step = 1e-2
    with torch.no_grad():
        ends = [loss(student + sign * step * direction, teacher, weights).item() for sign in (1, -1)]
    slope = (student.grad * direction).sum().item()
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=5e-3)


def test_sinkhorn_gradient_pulls_towards_the_planned_place():
    """With the plan P held fixed: d/dx of sum P |x - y|^2 / C = 2 / C (x - P y), as rows of P sum to 1."""
    student, teacher, _ = problem()
    weights = torch.ones(2, 7)
    plan = transport_plan(squared_distances(student, teacher), weights, 0.05, 20)
    assert torch.allclose(plan.sum(dim=2), weights) and torch.allclose(plan.sum(dim=1), weights, atol=1e-2)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(sinkhorn_loss(student, teacher, weights), student)
    assert torch.allclose(gradient, 2 / 24 * (student - plan @ teacher), atol=1e-6)


def test_sinkhorn_descent_moves_the_student_onto_the_teacher():
    student, teacher, _ = problem(T=5)
    weights = torch.ones(2, 5)
    before = sinkhorn_loss(student, teacher, weights).item()
    for _ in range(60):
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(sinkhorn_loss(student, teacher, weights), student)
        student = (student - 24 / 4 * gradient).detach()  # each step goes half of the way
    assert sinkhorn_loss(student, teacher, weights).item() < 0.02 * before
