"""Mixture of experts: equal to a dense model, balanced over the global batch, the same on several ranks.

The logits are compared with those of transformers' Mixtral and Qwen3-MoE in tests/test_model.py.
"""

import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from distillation.pruning import pruned_config
from formats import gguf, hf
from model import GPT, GPTConfig
from modeling import moe
from tests.conftest import busy_model, tiny_config
from tests.runs import assert_same_run, events, losses, run
from tests.test_model import ids_for

EXPERTS = ["--n_expert=4", "--expert_size=64", "--schedule=constant"]


@torch.no_grad()
def test_one_expert_is_the_dense_model():
    dense = busy_model(tiny_config())
    sparse = GPT(tiny_config(n_expert=1, n_expert_per_token=1)).eval()
    sparse.load_state_dict({name.replace(".mlp.", ".mlp.experts.0."): tensor
                            for name, tensor in dense.state_dict().items()}, strict=False)
    ids = ids_for(dense.config)
    assert (sparse(ids) - dense(ids)).abs().max() <= 1e-6
    assert sparse.flops_per_token(64) - dense.flops_per_token(64) == 6 * 2 * 64  # two routers, (1, 64)


@torch.no_grad()
@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_permuted_tokens_have_permuted_outputs(balance):
    layer = busy_model(tiny_config(n_expert=6, balance=balance)).model["layers"][0].mlp
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    moved = layer(x.view(1, 18, 64)[:, order])
    assert (moved - layer(x).view(1, 18, 64)[:, order]).abs().max() <= 1e-6


@torch.no_grad()
def test_ties_go_to_the_lower_index_and_the_bias_only_selects():
    layer = GPT(tiny_config(n_expert=4, balance="bias")).model["layers"][0].mlp
    layer.gate.weight.zero_()
    x = torch.randn(3, 64)
    assert layer.route(x)[1].tolist() == [[0, 1]] * 3
    layer.expert_bias.copy_(torch.tensor([-1.0, 0, 2, 1]))
    _, chosen, weights = layer.route(x)
    assert chosen.tolist() == [[2, 3]] * 3 and weights.tolist() == [[0.5, 0.5]] * 3


def test_gradient_of_both_router_losses():
    """With the load of the step before, against autograd of the formulas; the output itself is unchanged."""
    model = GPT(tiny_config(n_expert=4, balance_weight=0.3, router_z_loss=0.2))
    layer, x = model.model["layers"][0].mlp, torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    load = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    plain = layer(x[None])
    moe.begin_step(model, 0.5, load)
    y = layer(x[None])
    assert torch.equal(y, plain)
    found, = torch.autograd.grad(y.sum() - plain.sum(), layer.gate.weight)  # of the added losses alone
    logits = F.linear(x, layer.gate.weight)
    loss = 0.3 * 4 * (logits.softmax(-1) @ load[0]).sum() + 0.2 * logits.logsumexp(-1).square().sum()
    expected, = torch.autograd.grad(0.5 * loss, layer.gate.weight)
    assert (found - expected).abs().max() <= 1e-6
    counts = layer.route(x)[1].flatten().bincount(minlength=4)
    assert layer.counts.tolist() == [*counts.tolist(), 0]  # of the one pass after begin_step; none is dropped
    model.model["layers"][1].mlp.counts += 1
    load, metrics = moe.end_step(model)
    assert load[0].tolist() == (counts / 10).tolist() and metrics == {"expert_load": load.max() * 4}


def test_grouped_products_equal_the_loop():
    """What a GPU computes, here in torch's slow version for CPUs; one expert has no rows."""
    experts = GPT(tiny_config(n_expert=3)).model["layers"][0].mlp.experts.bfloat16()
    rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    counts = torch.tensor([5, 0, 11])
    parts = rows.split(counts.tolist())
    loop = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    grouped = moe.grouped_swiglu(rows, experts, counts)
    assert torch.allclose(grouped, loop, rtol=0.02, atol=1e-5)
    weights = [rows, experts[2].gate_proj.weight, experts[0].down_proj.weight, experts[1].up_proj.weight]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (grouped, loop)), strict=True)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_capacity_by_hand():
    """Four experts with room for ceil(1.0 * 10 / 4) = 3 choices; 5 tokens have the same two experts."""
    model = GPT(tiny_config(n_expert=4, capacity_factor=1.0))
    layer, x = model.model["layers"][0].mlp, torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # every token likes expert 1 best, then 3
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = torch.tensor([0.0, 3, 1, 2])
        x[..., 0] = 1
    assert layer.route(x[0])[1].tolist() == [[1, 3]] * 5
    dropless = layer(x)  # before begin_step, as in evaluation and generation
    moe.begin_step(model, 1.0, None)
    y = layer(x)
    assert torch.allclose(y[:, :3], dropless[:, :3], atol=1e-6) and y[:, 3:].count_nonzero() == 0
    assert layer.counts.tolist() == [0, 5, 0, 5, 4] and torch.equal(layer.eval()(x), dropless)
    model.model["layers"][1].mlp.counts += 1
    assert moe.end_step(model)[1]["expert_dropped"].item() == pytest.approx((4 + 1) / (10 + 4))
    with pytest.raises(UserError, match="capacity_factor=0.0: must be positive"):
        tiny_config(n_expert=4, capacity_factor=0.0)


def test_a_large_capacity_drops_nothing(data, tmp_path):
    """The same run as without a limit. With a small one, drops are counted and the run goes on."""
    argv = [*EXPERTS, "--max_steps=4", "--eval_tokens=256"]
    logs = [run(data, tmp_path / str(factor), *argv, f"--capacity_factor={factor}")
            for factor in (None, 4.0, 0.5)]
    assert losses(logs[0]) == losses(logs[1]) != losses(logs[2])
    shares = [[event.get("expert_dropped") for event in log if "loss" in event] for log in logs]
    assert shares[0] == [None] * 4 and shares[1] == [0.0] * 4
    assert all(0.5 <= share < 0.75 for share in shares[2])  # experts take half of the choices at most


@pytest.mark.parametrize("balance", ["aux", "bias"])
def test_experts_are_balanced_after_200_steps(data, tmp_path, balance):
    """The mean of steps 181 to 200. One file is Mixtral's, the other is this project's own."""
    run(data, tmp_path, *EXPERTS, f"--balance={balance}", "--max_steps=200", "--log_interval=20",
        "--block_size=32", "--n_layer=1", "--intermediate_size=64", "--eval_tokens=256")
    assert next(event["expert_load"] for event in reversed(events(tmp_path)) if "loss" in event) <= 1.5
    config = GPTConfig.read(hf.find_folder(tmp_path))
    assert hf.architecture(config) == {"aux": "mixtral", "bias": "nanollama"}[balance]


@pytest.mark.parametrize("balance, parallel", [("aux", "ddp"), ("bias", "fsdp")])
def test_two_ranks_are_one_process(data, tmp_path, two_ranks, balance, parallel):
    """Balance and losses do not depend on ranks, shards or micro-batches."""
    argv = [*EXPERTS, f"--balance={balance}", "--balance_weight=0.1", "--max_steps=5", "--eval_tokens=256"]
    alone = run(data, tmp_path / "one", *argv, "--micro_batch_size=2")
    two_ranks(run, data, tmp_path / "two", *argv, f"--parallel={parallel}")
    together = events(tmp_path / "two")
    assert losses(together) == pytest.approx(losses(alone), abs=2e-5)
    loads = [[event["expert_load"] for event in each if "loss" in event] for each in (together, alone)]
    assert loads[0] == pytest.approx(loads[1], abs=0.02)


def test_a_resumed_run_is_the_same_run(data, tmp_path):
    argv = [*EXPERTS, "--balance_weight=0.1", "--save_interval=2", "--activation_checkpointing=True",
            "--eval_tokens=256"]
    run(data, tmp_path / "whole", *argv, "--max_steps=4")
    run(data, tmp_path / "parts", *argv, "--max_steps=2")
    run(data, tmp_path / "parts", *argv, "--max_steps=4")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_active_parameters_by_hand():
    """C 64, 4 experts of width 48 of which 2 are used, in one of two layers."""
    model = GPT(tiny_config(n_expert=4, expert_size=48, dense_layers=[0]))
    assert model.num_parameters() - model.num_parameters(active=True) == 2 * 3 * 64 * 48


def test_what_cannot_have_experts_refuses_them():
    config = tiny_config(n_expert=4)
    with pytest.raises(UserError, match="format=gguf: models with experts"):
        gguf.require_supported(config)
    with pytest.raises(UserError, match="cannot be pruned"):
        pruned_config(config, [0], {})
    for changes, message in ((dict(ternary=True), "not ternary"), (dict(mlp="gelu"), "SwiGLU"),
                             (dict(n_expert_per_token=5), "n_expert_per_token=5: must be from 1"),
                             (dict(n_expert_per_token=1), "norm_topk=True: must be False"),
                             (dict(dense_layers=[0, 1]), "not all"),
                             (dict(dense_layers=[7]), "dense_layers")):
        with pytest.raises(UserError, match=message):
            tiny_config(n_expert=4, **changes)
