"""training/losses.py against float64 numpy, torch's own cross-entropy and a worked example."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.dataloader import IGNORE
from training.losses import linear_cross_entropy


def problem(N=1100, C=24, V=50, P=64, seed=0, scale=1.0):
    """Hidden states, a padded table and targets with gaps; more than two chunks of 512 rows."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator) * scale
    weight = torch.randn(P, C, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < 0.3] = IGNORE
    return hidden, weight, targets, V


def numpy_loss(hidden, weight, targets, V, z_loss):
    """(nll, total) in float64, by the definition."""
    logits = hidden.double().numpy() @ weight[:V].double().numpy().T
    log_z = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    wanted = targets.numpy() != IGNORE
    rows = np.arange(len(targets))[wanted]
    nll = (log_z[wanted] - logits[rows, targets.numpy()[wanted]]).sum()
    return nll, nll + z_loss * (log_z[wanted] ** 2).sum()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sum_equals_numpy(z_loss, scale):
    hidden, weight, targets, V = problem(scale=scale)
    total, nll = linear_cross_entropy(hidden, weight, targets, V, z_loss)
    expected_nll, expected_total = numpy_loss(hidden, weight, targets, V, z_loss)
    assert nll.item() == pytest.approx(expected_nll, rel=1e-6)
    assert total.item() == pytest.approx(expected_total, rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_gradients_equal_autograd_in_float64(z_loss):
    hidden, weight, targets, V = problem()
    reference = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logits = reference[0] @ reference[1][:V].T
    log_z = logits.logsumexp(-1)[targets != IGNORE]
    (3 * (F.cross_entropy(logits, targets, reduction="sum") + z_loss * log_z.square().sum())).backward()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    (3 * linear_cross_entropy(*ours, targets, V, z_loss)[0]).backward()
    for one, two in zip(ours, reference, strict=True):
        assert (one.grad.double() - two.grad).norm() <= 1e-6 * two.grad.norm()
    assert ours[1].grad[V:].abs().max() == 0  # padding is out of the softmax, so nothing pulls on it


def test_two_tokens_by_hand():
    """Logits (ln 3, 0): probabilities 3/4 and 1/4. Cross-entropy of the second: ln 4; logsumexp: ln 4 too."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(3)], [0.0], [99.0]])
    total, nll = linear_cross_entropy(hidden, weight, torch.tensor([1]), vocab_size=2, z_loss=0.5)
    assert nll.item() == pytest.approx(math.log(4))
    assert total.item() == pytest.approx(math.log(4) + 0.5 * math.log(4) ** 2)


def test_no_target_gives_zero_and_zero_gradients():
    hidden, weight, targets, V = problem(N=8)
    hidden.requires_grad_(), weight.requires_grad_()
    total, nll = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), V, z_loss=0.1)
    total.backward()
    assert total.item() == nll.item() == 0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_bfloat16_matrices_reduce_in_float32():
    hidden, weight, targets, V = problem(C=256, scale=0.1)
    exact = numpy_loss(hidden, weight, targets, V, 0.0)[0]
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = linear_cross_entropy(hidden, weight, targets, V)
    total.backward()
    assert nll.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert nll.item() == pytest.approx(exact, rel=2e-3)


def test_without_gradients_it_is_the_same_number():
    hidden, weight, targets, V = problem()
    hidden.requires_grad_()
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, targets, V)[1]
    assert torch.equal(plain, linear_cross_entropy(hidden, weight, targets, V)[1].detach())


def test_backward_twice_is_not_scaled_twice():
    hidden, weight, targets, V = problem(N=8)
    hidden.requires_grad_()
    total, _ = linear_cross_entropy(hidden, weight, targets, V)
    (first,) = torch.autograd.grad(2 * total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * total, hidden)
    assert torch.equal(first, second)
