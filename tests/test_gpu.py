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
from generation.generate import Sampling, generate
from modeling.attention import document_mask, mask_and_positions
from tests.conftest import TINY_RUN, busy_model, tiny_config
from tests.runs import events, losses

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


def test_a_compiled_step_has_the_same_tokens_on_the_gpu():
    """A CUDA graph, in float32. The context becomes full, so that a second cache is made."""
    torch.set_float32_matmul_precision("highest")
    model, prompts = busy_model(tiny_config()).cuda(), [[1, 2, 3], [4], list(range(60))]
    texts = []
    for model.compiled_steps in (False, True, True):
        steps = generate(model, prompts, 40, Sampling(temperature=0))
        texts.append([list(tokens) for tokens in steps])
    assert texts[0] == texts[1] == texts[2]


def test_sampling_on_the_gpu(trained, capsys):
    assert sample.main([f"--model={trained}", "--device=cuda", "--prompt=import", "--max_new_tokens=50"]) == 0
    assert len(capsys.readouterr().out) > 20
