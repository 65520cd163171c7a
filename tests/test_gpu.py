"""Tests that need a GPU; they are skipped if there is none.

python -m pytest tests/test_gpu.py
"""

import pytest
import torch

import distill
import dpo
import sample
import sft
import train
from dataset.dataloader import IGNORE
from generation.generate import Sampling, generate
from modeling.attention import document_mask, mask_and_positions
from tests.conftest import TINY_RUN, busy_model, tiny_config
from tests.runs import events, losses
from training.losses import linear_cross_entropy, linear_log_probs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_flex_attention_equals_the_dense_mask_forward_and_backward(monkeypatch):
    torch.set_float32_matmul_precision("highest")  # a training run before may have allowed TF32
    model = busy_model(tiny_config(block_size=256)).cuda()
    ids = torch.randint(500, (2, 256), device="cuda")
    documents = (torch.rand(2, 256, device="cuda") < 0.05).long().cumsum(dim=1)
    assert not isinstance(document_mask(documents), torch.Tensor)
    for block in model.model["layers"]:
        block.compile()
    results = []
    for dense in (False, True):
        model.zero_grad()
        monkeypatch.setattr("model.mask_and_positions", forced(dense))
        logits = model(ids, document_ids=documents)
        logits.square().mean().backward()
        results.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (one, grads), (two, expected) = results
    assert (one - two).abs().max() < 1e-4
    assert all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(grads, expected, strict=True))


def forced(dense_or_not):
    """mask_and_positions with this choice of `dense`, whatever the model asks for."""
    def masks(input_ids, block_size, document_ids, paths, dense):
        return mask_and_positions(input_ids, block_size, document_ids, paths, dense_or_not)

    return masks


@pytest.mark.parametrize("words", [[], ["--compile=True"], ["--compile=True", "--document_mask=True"]])
def test_bfloat16_training_follows_float32_on_the_cpu(data, tmp_path, words):
    runs = []
    for place in (["--device=cpu"], ["--device=cuda", *words]):
        out = tmp_path / place[0][-4:]
        mask = [word for word in words if "mask" in word]
        train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", "--max_steps=30", *place, *mask])
        runs.append(losses(events(out)))
    assert max(abs(a / b - 1) for a, b in zip(*runs, strict=True)) < 0.02


SHORT = """--block_size=64 --global_batch_size=8 --micro_batch_size=4 --max_steps=10 --eval_tokens=2048
    --learning_rate=1e-3 --log_interval=1 --eval_interval=0 --save_interval=0""".split()


@pytest.mark.parametrize("kind", ["online", "inside", "on_policy", "lora", "preferences"])
def test_later_stages_follow_the_cpu(kind, trained, data, chats, pairs, tmp_path):
    """Packed chats, answers that share their prompt, a teacher and its layers, in float32 on both devices."""
    taught = [f"--teacher={trained}", f"--dataset={data}", "--student_layers=last:1"]
    script, words = {
        "online": (distill, taught),
        "inside": (distill, [*taught, "--hidden_weight=1", "--attention_weight=0.5"]),
        "on_policy": (distill, [*taught, "--on_policy=0.5"]),
        "lora": (sft, [f"--init_from={trained}", f"--dataset={chats}", "--lora_rank=4"]),
        "preferences": (dpo, [f"--init_from={tmp_path / 'chat'}", f"--dataset={pairs}"])}[kind]
    if kind == "preferences":
        sft.main([*SHORT, f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={tmp_path / 'chat'}",
                  "--device=cpu"])
    runs = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        script.main([*SHORT, *words, "--dtype=float32", f"--device={device}", f"--out_dir={out}"])
        runs.append(losses(events(out)))
    assert max(abs(a / b - 1) for a, b in zip(*runs, strict=True)) < 0.02


@pytest.mark.parametrize(("changes", "sampling"), [
    ({}, Sampling(temperature=0)), (dict(n_kv_head=1, qk_norm=True, bias="qkv"), Sampling(top_p=0.9)),
    (dict(position="learned", norm="layernorm", mlp="gelu", bias="all"), Sampling(temperature=0))])
def test_a_compiled_step_has_the_same_tokens_on_the_gpu(changes, sampling):
    """A CUDA graph, in float32. The context becomes full, so that a second cache is made."""
    torch.set_float32_matmul_precision("highest")
    model = busy_model(tiny_config(**changes)).cuda()
    for prompts in ([[1, 2, 3], [4], list(range(60))], [[5, 6, 7]]):
        texts = []
        for model.compiled_steps in (False, True, True):
            steps = generate(model, prompts, 70, sampling)
            texts.append([list(tokens) for tokens in steps])
        assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_the_softmax_kernel_equals_float64(z_loss):
    from modeling.kernels import softmax_gradient_
    n, P, V = 37, 10_048, 10_001
    logits = 3 * torch.randn(n, P, device="cuda")
    targets, weights = torch.randint(V, (n,), device="cuda"), torch.randn(n, device="cuda")
    exact = logits[:, :V].double().requires_grad_()
    log_z = exact.logsumexp(-1)
    nll = log_z - exact.gather(1, targets[:, None])[:, 0]
    (weights * (nll + z_loss * log_z.square())).sum().backward()
    assert (softmax_gradient_(logits, targets, weights, V, z_loss) - log_z).abs().max() < 1e-5
    assert (logits[:, :V] - exact.grad).abs().max() < 1e-5
    assert not logits[:, V:].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_heads_equal_those_on_the_cpu(frozen):
    """Cross-entropy and log-probabilities in float32, values and gradients, with positions without target."""
    torch.set_float32_matmul_precision("highest")
    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(50, 32, generator=generator).to(device)
        weight = torch.randn(576, 32, generator=generator).to(device)
        targets = torch.randint(550, (50,), generator=generator).to(device)
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        log_probs = linear_log_probs(hidden, weight, targets, 550)
        (log_probs * torch.arange(50, device=device)).sum().backward()
        targets[::3] = IGNORE
        loss, nll = linear_cross_entropy(hidden, weight, targets, 550, z_loss=1e-3)
        loss.backward()
        results.append([log_probs, loss, nll, hidden.grad, *([] if frozen else [weight.grad])])
    assert all(torch.allclose(one, two.cpu(), 1e-4, 1e-4) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("sizes", [(300,), (256, 64, 40), (128, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_products_with_one_row(sizes, with_bias):
    from modeling.kernels import row_products
    x = torch.randn(1, 1, 700, device="cuda")
    weights = [torch.randn(size, 700, device="cuda") for size in sizes]
    biases = [torch.randn(size, device="cuda") if with_bias else None for size in sizes]
    expected = [x.double() @ weight.double().T + (0 if bias is None else bias)
                for weight, bias in zip(weights, biases, strict=True)]
    outputs = row_products(x, weights, biases)
    assert all((one - two).abs().max() < 1e-4 for one, two in zip(outputs, expected, strict=True))


def test_sampling_on_the_gpu(trained, capsys):
    sample.main([f"--model={trained}", "--device=cuda", "--prompt=import", "--max_new_tokens=50"])
    assert len(capsys.readouterr().out) > 20
