"""Ternary layers: worked examples, transformers' BitNet, gradients, folders, and a whole run."""

import json
import shutil

import numpy as np
import pytest
import torch

import sft
import train
from configurator import UserError
from formats import hf
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from modeling.ternary import (
    TernaryLinear,
    pack_codes,
    quantize_activations,
    quantize_weights,
    straight_through,
    unpack_codes,
)
from tests.conftest import TINY_RUN, busy_model, tiny_config
from tests.runs import losses, run

IDS = torch.arange(40).view(2, 20)
EPS = 1e-5


def layer(n_in=48, n_out=32, bias=False, seed=0):
    torch.manual_seed(seed)
    return TernaryLinear(n_in, n_out, bias=bias, eps=EPS)


def tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_float64(linear, x):
    """The layer in numpy's float64: (..., in) -> output, rounded inputs, rounded matrix, norm's divisor."""
    x, w = x.double().numpy(), linear.weight.detach().double().numpy()
    divisor = np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    step = np.abs(x / divisor).max(-1, keepdims=True) / 127
    inputs = np.round(x / divisor / step) * step
    scale = np.abs(w).mean()
    matrix = np.clip(np.round(w / scale), -1, 1) * scale
    bias = 0 if linear.bias is None else linear.bias.detach().double().numpy()
    return inputs @ matrix.T + bias, inputs, matrix, divisor


def test_a_matrix_by_hand():
    """Mean magnitude (0.3 + 1.2 + 0 + 0.6 + 0.2 + 0.1) / 6 = 0.4, so weights below 0.2 become 0."""
    codes, scale = quantize_weights(torch.tensor([[0.3, -1.2, 0.0], [-0.6, 0.1999, -0.1001]]))
    assert codes.tolist() == [[1, -1, 0], [-1, 0, 0]]
    assert scale.item() == pytest.approx(0.4)


def test_tokens_by_hand():
    """The largest entry becomes level 127; each token has its own step."""
    levels, step = quantize_activations(torch.tensor([[1.27, -0.5, 0.0149], [0.0, -254.0, 3.2]]))
    assert levels.tolist() == [[127, -50, 1], [0, -127, 2]]
    assert step.flatten().tolist() == pytest.approx([0.01, 2.0])


def test_packing_by_hand():
    """The example in the docstring of pack_codes."""
    codes = torch.tensor([[1.0, -1.0, 0.0, 0.0, 1.0]])
    assert pack_codes(codes).tolist() == [[0b01010010, 0b11111110]]
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)


def test_a_layer_by_hand():
    """Divided by its root mean square 2.5, x is (1.2, 1.6, 0, 0): levels 95 and 127, step 1.6 / 127."""
    linear = TernaryLinear(4, 2, bias=True, eps=0.0)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, -0.5]]))
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
        y = linear(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    expected = 0.5 * (95 - 127) * 1.6 / 127  # 0.5 is the weights' scale
    assert y.tolist() == pytest.approx([expected, 1 - expected])


@pytest.mark.parametrize("bias", [False, True])
def test_values_equal_float64(bias):
    linear, x = layer(bias=bias), tokens(2, 5, 48)
    expected = torch.from_numpy(in_float64(linear, x)[0])
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_transformers_bitnet_layer_gives_the_same():
    from transformers.integrations.bitnet import AutoBitLinear

    ours, x = layer(), tokens(2, 5, 48).requires_grad_()
    theirs = AutoBitLinear(48, 32, bias=False, online_quant=True, use_rms_norm=True, rms_norm_eps=EPS)
    theirs.load_state_dict({"weight": ours.weight.detach(), "rms_norm.weight": torch.ones(48)})
    results = []
    with torch.compiler.set_stance("force_eager"):
        for linear in (ours, theirs):
            y = linear(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, linear.weight))))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_gradients_are_straight_through():
    """The gradients of a product of the rounded factors, then through the norm; checked in float64."""
    linear, x = layer(), tokens(6, 48).requires_grad_()
    upstream = tokens(6, 32, seed=2)
    linear(x).backward(upstream)
    _, inputs, matrix, divisor = in_float64(linear, x.detach())
    g = upstream.double().numpy()
    normed, back = x.detach().double().numpy() / divisor, g @ matrix
    expected = (back - normed * (back * normed).mean(-1, keepdims=True)) / divisor
    for found, reference in ((linear.weight.grad, g.T @ inputs), (x.grad, expected)):
        torch.testing.assert_close(found.double(), torch.from_numpy(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_three_values_exactly(dtype):
    w = layer().weight.detach().to(dtype).requires_grad_()
    codes, scale = quantize_weights(w)
    used = straight_through(w, codes * scale)
    assert used.dtype == dtype and torch.equal(used, (codes * scale).to(dtype)) and used.unique().numel() == 3
    used.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


@torch.no_grad()
def test_the_scale_of_the_input_does_not_matter():
    linear, x = layer(), 100 * tokens(6, 48)  # far above eps
    torch.testing.assert_close(linear(1024 * x), linear(x))
    torch.testing.assert_close(linear(1024 * x[:3]), linear(x)[:3])  # nor do the other tokens


def test_zeros_are_finite():
    linear = layer(bias=True)
    x = tokens(3, 48)
    x[1] = 0
    x.requires_grad_()
    y = linear(x)
    assert torch.equal(y[1], linear.bias)
    y.sum().backward()
    assert x.grad.isfinite().all() and linear.weight.grad.isfinite().all()
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(linear(x), linear.bias.expand(3, -1))


@torch.no_grad()
def test_in_bfloat16():
    """Under autocast, and with bfloat16 weights: the dtypes of nn.Linear, nearly the values of float32."""
    linear, x = layer(), tokens(6, 48)
    expected = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            y = linear(given)
            assert y.dtype == torch.bfloat16 and (y - expected).norm() < 0.01 * expected.norm()
    assert linear.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes", [{}, dict(mlp="gelu", bias="all"), dict(bias="qkv", tie_embeddings=False)]
)
def test_only_the_blocks_are_ternary(changes):
    plain, model = GPT(tiny_config(**changes)), GPT(tiny_config(ternary=True, **changes))
    found = {name for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == linears - {"lm_head"} and len(found) == (12 if "mlp" in changes else 14)
    assert all(module.eps == 1e-5 for module in model.modules() if isinstance(module, TernaryLinear))
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.num_parameters() == plain.num_parameters()
    assert model.flops_per_token(64) == plain.flops_per_token(64)


@torch.no_grad()
def test_a_folder_loads_with_equal_logits(tmp_path):
    model = busy_model(tiny_config(ternary=True))
    model.save_pretrained(tmp_path, eos_token_id=7)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["model_type"] == "nanollama" and "only nanollama loads it" in described["note"]
    back = GPT.from_pretrained(tmp_path).eval()
    assert back.config == model.config and torch.equal(back(IDS), model(IDS))
    plain = GPT(tiny_config()).eval()
    plain.load(tmp_path)
    assert (plain(IDS) - model(IDS)).abs().max() > 0.01, "a plain model has other logits"


@torch.no_grad()
def test_a_folder_without_the_key_is_not_ternary(tmp_path):
    model = busy_model(tiny_config(bias="qkv", qk_norm=True))  # saved with all of GPTConfig's keys
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    assert described["gpt_config"].pop("ternary") is False
    path.write_text(json.dumps(described))
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(IDS), model(IDS))
    assert hf.architecture(GPTConfig()) == "llama"


def test_a_run_without_the_key_continues(trained, data, tmp_path):
    """A run from before the key existed counts as not ternary, and that cannot be changed."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    path = out / "run.json"
    content = json.loads(path.read_text())
    del content["config"]["ternary"]
    path.write_text(json.dumps(content))
    words = [*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", "--max_steps=60"]
    with pytest.raises(UserError, match="ternary was False, is True"):
        train.main([*words, "--ternary=True"])
    train.main(words)


@pytest.fixture(scope="module")
def learnt(data, tmp_path_factory):
    """An out_dir after a short ternary run, and its events."""
    out = tmp_path_factory.mktemp("out") / "ternary"
    return out, run(data, out, "--ternary=True", "--max_steps=40")


def test_a_run_lowers_its_loss(learnt):
    out, events = learnt
    found = losses(events)
    assert found[0] == pytest.approx(np.log(500), abs=0.2)
    assert sum(found[-5:]) / 5 < found[0] - 1.0
    assert GPT.from_pretrained(out).config.ternary


def test_fine_tuning_keeps_it_ternary(learnt, chats, tmp_path):
    words = ["--device=cpu", "--block_size=64", "--global_batch_size=8", "--micro_batch_size=8",
             "--max_steps=2", "--eval_tokens=512", "--sample_answers=0", f"--dataset={chats}",
             f"--init_from={learnt[0]}", f"--out_dir={tmp_path / 'o'}"]
    sft.main(words)
    assert GPT.from_pretrained(tmp_path / "o").config.ternary


def test_it_has_no_adapters(chats, tmp_path):
    GPT(tiny_config(ternary=True, vocab_size=506)).save_pretrained(tmp_path / "t")
    Tokenizer.load(chats).save(tmp_path / "t")
    words = ["--device=cpu", "--block_size=64", "--lora_rank=2", f"--dataset={chats}",
             f"--init_from={tmp_path / 't'}", f"--out_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="lora_rank=2: PEFT cannot represent .* with ternary=True;") as info:
        sft.main(words)
    assert "\n" not in str(info.value)
