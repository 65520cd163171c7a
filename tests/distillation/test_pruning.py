"""Pruning: without a smaller width the student is a copy, otherwise it keeps the active parts."""

import pytest
import torch

from configurator import UserError
from distillation.pruning import kept_layers, measure_activity, prune, pruned_config, rotated
from tests.conftest import busy_model, tiny_config

IDS = torch.randint(500, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "choice, layers",
    [
        ("every:2", [0, 2, 4]),
        ("every:3", [0, 3]),
        ("first:2", [0, 1]),
        ("last:2", [3, 4]),
        ("0,2,3", [0, 2, 3]),
    ],
)
def test_kept_layers(choice, layers):
    assert kept_layers(choice, 5) == layers


@pytest.mark.parametrize("choice", ["", "5", "2,1", "1,1", "last:6", "last:0", "every:0", "every:x", "a"])
def test_layers_that_do_not_exist_are_refused(choice):
    with pytest.raises(UserError, match="write every:2, first:3, last:3 or increasing numbers"):
        kept_layers(choice, 5)


GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)


@pytest.mark.parametrize("kind", [{}, GPT2, {"qk_norm": True}, {"tie_embeddings": False, "bias": "qkv"}])
def test_keeping_everything_is_a_copy_of_the_teacher(kind):
    teacher = busy_model(tiny_config(**kind))
    student = prune(teacher, teacher.config, [0, 1], IDS)
    torch.testing.assert_close(student(IDS), teacher(IDS), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [{}, GPT2])
def test_a_kept_layer_is_the_layer_of_the_teacher(kind):
    """A teacher without its middle block computes the same as the student."""
    teacher = busy_model(tiny_config(n_layer=3, **kind))
    config = pruned_config(teacher.config, [0, 2], {})
    student = prune(teacher, config, [0, 2], IDS)
    del teacher.model["layers"][1]
    torch.testing.assert_close(student(IDS), teacher(IDS))


def test_parts_that_do_nothing_are_pruned_first():
    """Half of the heads and neurons of this teacher are dead: without them it computes the same."""
    teacher = busy_model(tiny_config(n_head=4, n_kv_head=2, n_layer=2))
    with torch.no_grad():
        for block in teacher.model["layers"]:
            block.self_attn.v_proj.weight[:16] = 0  # the first key/value head, and so two query heads
            block.mlp.up_proj.weight[64:] = 0
    config = pruned_config(teacher.config, [0, 1], {"n_head": 2, "n_kv_head": 1, "intermediate_size": 64})
    student = prune(teacher, config, [0, 1], IDS)
    assert student.num_parameters() < teacher.num_parameters()
    torch.testing.assert_close(student(IDS), teacher(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_stream_computes_the_same(tied):
    """The norms' weights move into the matrices. With a tied table, the last norm's must be equal."""
    teacher = busy_model(tiny_config(tie_embeddings=tied, qk_norm=True))
    with torch.no_grad():
        if tied:
            teacher.model["norm"].weight.fill_(1.3)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    other = busy_model(teacher.config, seed=5)
    other.load_state_dict(rotated(teacher.state_dict(), basis, 64))
    torch.testing.assert_close(other(IDS), teacher(IDS), rtol=1e-4, atol=1e-4)


def test_a_stream_of_few_dimensions_is_pruned_without_loss():
    """A model of width 32, embedded in width 64 in a random direction, is recovered."""
    small = busy_model(tiny_config(n_embd=32, head_dim=16, norm_eps=1e-9))
    U = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(1))).Q  # (64, 32)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
    large = busy_model(tiny_config(norm_eps=1e-9))
    state = rotated(small.state_dict(), torch.eye(32), 32)
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = U @ tensor
        elif tensor.ndim == 2:
            state[name] = tensor @ U.T
        elif "norm" in name:
            state[name] = torch.full((64,), 0.5**0.5)  # a length of 1 is shared by twice the channels
    large.load_state_dict(state)
    torch.testing.assert_close(large(IDS), small(IDS), rtol=1e-3, atol=2e-3)
    config = pruned_config(large.config, [0, 1], {"n_embd": 32})
    torch.testing.assert_close(prune(large, config, [0, 1], IDS)(IDS), large(IDS), rtol=1e-3, atol=2e-3)


def test_silent_channels_are_pruned_first():
    teacher = busy_model(tiny_config(**GPT2))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith(("embed_tokens.weight", "norm.weight", "norm.bias")):
                parameter[..., ::2] = 0
    config = pruned_config(teacher.config, [0, 1], {"n_embd": 32})
    student = prune(teacher, config, [0, 1], IDS)
    kept = teacher.model["embed_tokens"].weight[:, 1::2]
    assert torch.equal(student.model["embed_tokens"].weight, kept)
    assert student(IDS).isfinite().all() and config.head_dim == teacher.config.head_dim


def test_activity_is_the_mean_size_of_the_inputs():
    teacher = busy_model(tiny_config())
    seen = []
    hook = teacher.model["layers"][1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    teacher(IDS)
    hook.remove()
    activity = measure_activity(teacher, IDS)
    torch.testing.assert_close(activity["neurons.1"], seen[0].abs().mean((0, 1)))
    assert activity["heads.0"].shape == (4,) and activity["channels"].shape == (64,)


@pytest.mark.parametrize(
    "widths, message",
    [
        ({"n_embd": 128}, "n_embd=128: wider than the teacher, which has 64"),
        ({"n_head": 3}, "n_head=3"),
        ({"n_head": 2, "n_kv_head": 2}, "must keep its 2 query heads"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, message):
    with pytest.raises(UserError, match=message):
        pruned_config(tiny_config(), [0], widths)
