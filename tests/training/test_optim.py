"""training/optim.py: Muon against torch's and the SVD, groups, multipliers, the schedule's corners."""

import math

import pytest
import torch

from configurator import UserError
from model import GPT
from tests.conftest import tiny_config
from training import optim
from training.config import RunConfig
from training.optim import Muon, clip_gradients, learning_rate_at, make_optimizers, multipliers, orthogonalize


def test_muon_equals_torch_in_its_precision(monkeypatch):
    """torch.optim.Muon orthogonalises in bfloat16; here ours does, too."""

    def in_bfloat16(matrices, steps=5):
        return torch.stack(
            [
                torch.optim._muon._zeropower_via_newtonschulz(m, (3.4445, -4.7750, 2.0315), steps, 1e-7)
                for m in matrices
            ]
        ).float()

    monkeypatch.setattr(optim, "orthogonalize", in_bfloat16)
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (8, 24), (24, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        one.step(), two.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 8)])
def test_orthogonalize_keeps_the_directions_and_evens_the_lengths(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    result = orthogonalize(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    lengths = torch.diagonal(
        u.mT @ result @ v.mT, dim1=-2, dim2=-1
    )  # singular values in the original directions
    assert lengths.min() > 0.5 and lengths.max() < 1.3
    off = u.mT @ result @ v.mT - torch.diag_embed(lengths)
    assert off.abs().max() < 1e-3
    assert orthogonalize(torch.zeros(1, *shape)).abs().max() == 0


def test_update_has_adamw_size():
    """0.2 RMS per entry for a square matrix, whatever the gradient's scale."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    parameter.grad = 1e-4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=1.0).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing(kind):
    model = GPT(tiny_config())
    optimizers = make_optimizers(model, RunConfig(optimizer=kind, weight_decay=0.5))

    def step(bad):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan if bad else 0.1)
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad))
            optimizer.step()

    def everything():
        tensors = [parameter.detach() for parameter in model.parameters()]
        tensors += [value for o in optimizers for state in o.state.values() for value in state.values()]
        return [tensor.clone() for tensor in tensors]

    step(bad=False)
    before = everything()
    step(bad=True)
    assert all(torch.equal(one, two) for one, two in zip(before, everything(), strict=True))
    step(bad=False)
    assert not torch.equal(before[0], everything()[0])


def test_the_table_of_multipliers_in_few_lines():
    table = {"embed": 5.0, "layers.0.mlp": 0.5, "layers.1.mlp": 0.5, "layers.1.norm": 1.0, "norm": 1.0,
             "head": 0.0}
    expected = ["lr x 5    embed", "lr x 0.5  layers.*.mlp  (2 layers)", "lr x 0    frozen: 1 parameter",
                "lr x 1    the other 2 parameters"]
    assert optim.multipliers_text(table).split("\n") == expected


def test_groups():
    """Muon has the blocks' matrices; only matrices decay; a factor of 0 freezes."""
    model = GPT(tiny_config(tie_embeddings=False, bias="qkv"))
    cfg = RunConfig(
        optimizer="muon",
        weight_decay=0.1,
        learning_rate=1.0,
        lr_multipliers={r"layers\.0\.mlp": 0.0, "embed": 0.5},
    )
    muon, adamw = make_optimizers(model, cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: (o, g) for o in (muon, adamw) for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        frozen = "layers.0.mlp" in name
        assert (name not in groups) == (not parameter.requires_grad) == frozen
        if not frozen:
            optimizer, group = groups[name]
            assert (optimizer is muon) == (".layers." in name and parameter.ndim == 2)
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0)
            assert group["lr_multiplier"] == (0.5 if "embed" in name else 1.0)
    optim.set_learning_rate([muon, adamw], 0.2)
    assert {group["lr"] for group in adamw.param_groups} == {0.1, 0.2}


@pytest.mark.parametrize(
    "patterns, message",
    [
        ({"nothing": 0.5}, "pattern 'nothing' matches no parameter"),
        ({"(": 1.0}, "is not a regular expression"),
        ({"mlp": -1.0}, "a factor of at least 0"),
        ({"mlp": "a"}, "a factor of at least 0"),
        ({1: 2.0}, "must be a regular expression"),
        ({"": 0.0}, "freezes every parameter"),
        ({"mlp": 0.0, ".": 0.0}, "freezes every parameter"),
        ({"mlp": 1.0, "mlp.up": 0.5}, "'mlp.up' matches no parameter .or an earlier pattern took them all"),
    ],
)
def test_multipliers_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        multipliers(GPT(tiny_config()), patterns)


@pytest.mark.parametrize(
    "schedule, steps, expected",
    [
        ("wsd", [0, 9, 10, 79, 80, 90, 99], [0.1, 1.0, 1.0, 1.0, 1.0, 0.55, 0.145]),
        ("constant", [0, 9, 10, 99], [0.1, 1.0, 1.0, 1.0]),
        ("linear", [0, 10, 55, 99], [0.1, 1.0, 0.55, 0.11]),
        ("cosine", [0, 10, 55, 99], [0.1, 1.0, 0.55, 0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2]),
    ],
)
def test_schedule_worked_by_hand(schedule, steps, expected):
    """100 steps, 10 of warmup, peak 1, end 0.1; wsd decays over 20."""
    cfg = RunConfig(schedule=schedule, learning_rate=1.0, min_lr=0.1, warmup_steps=10, decay_steps=20)
    assert [learning_rate_at(cfg, step, 100) for step in steps] == pytest.approx(expected)


def test_schedule_defaults_and_single_step():
    cfg = RunConfig(learning_rate=1.0, schedule="wsd")
    assert learning_rate_at(cfg, 0, 1000) == 1 / 20 and learning_rate_at(cfg, 699, 1000) == 1.0
    assert learning_rate_at(cfg, 850, 1000) == pytest.approx(0.5)
    assert learning_rate_at(cfg, 0, 1) == 1.0


def test_a_decay_that_is_longer_than_the_run_begins_after_the_warmup():
    """A short trial of a long run: 4 steps of warmup, then a decay of 8 steps instead of 1,000."""
    cfg = RunConfig(learning_rate=1.0, schedule="wsd", warmup_steps=4, decay_steps=1000)
    rates = [learning_rate_at(cfg, step, 12) for step in range(12)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


# ---- Clipping ---------------------------------------------------------------------------------------------


def large_gradients():
    """Parameters with two million gradient entries, most of them small."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((1001, 2048), (7,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) ** 5
    return parameters


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e9])
def test_the_norm_is_that_of_float64(limit):
    """Within 1e-7, where torch's own norm of this gradient is off by more than 1e-6."""
    parameters = large_gradients()
    exact = torch.cat([parameter.grad.flatten().double() for parameter in parameters]).norm().item()
    assert abs(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item() / exact - 1) > 1e-6
    norm = clip_gradients(parameters, limit)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-7)
    factor = 1 / exact if limit == 1 else 1.0
    for clipped, original in zip(parameters, large_gradients(), strict=True):
        torch.testing.assert_close(clipped.grad, original.grad * factor, rtol=1e-5, atol=0)


def sharded_norm(limit):
    """(the norm, the clipped gradients) of `large_gradients` in shards of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, parameters = init_device_mesh("cpu", (2,)), []
    for parameter in large_gradients():
        parameters.append(torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        parameters[-1].grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
    norm = clip_gradients(parameters, limit)
    return norm.item(), [parameter.grad.full_tensor() for parameter in parameters]


def test_shards_are_clipped_like_the_whole(two_ranks):
    parameters = large_gradients()
    norm = clip_gradients(parameters, 1.0).item()
    for found, gradients in two_ranks(sharded_norm, 1.0):
        assert found == norm
        assert all(torch.equal(ours, p.grad) for ours, p in zip(gradients, parameters, strict=True))


def test_a_norm_that_is_not_finite_is_reported():
    parameters = large_gradients()
    parameters[0].grad[3, 3] = math.nan
    assert clip_gradients(parameters, 1.0).isnan()
