"""What only a GPU shows; skipped, with the reason, where there is none.

python -m pytest tests/test_gpu.py
"""

import json

import pytest
import torch

import sample
import train
from model import GPT, document_mask
from tests.conftest import TINY_RUN, busy_model, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_flex_attention_equals_the_dense_mask_forward_and_backward():
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
        model.mask_and_positions = masks_of(model, dense)
        logits = model(ids, document_ids=documents)
        logits.square().mean().backward()
        results.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (one, grads), (two, expected) = results
    assert (one - two).abs().max() < 1e-4
    assert all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(grads, expected, strict=True))


def masks_of(model, dense):
    def masks(input_ids, document_ids, cache):
        _, positions = GPT.mask_and_positions(model, input_ids, document_ids, cache)
        return document_mask(document_ids, dense), positions

    return masks


@pytest.mark.parametrize("words", [[], ["--compile=True"], ["--compile=True", "--document_mask=True"]])
def test_bfloat16_training_follows_float32_on_the_cpu(data, tmp_path, words):
    losses = []
    for place in (["--device=cpu"], ["--device=cuda", *words]):
        out = tmp_path / place[0][-4:]
        mask = [word for word in words if "mask" in word]
        train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", "--max_steps=30", *place, *mask])
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([event["loss"] for event in events if "loss" in event])
    assert max(abs(a / b - 1) for a, b in zip(*losses, strict=True)) < 0.02


def test_sampling_on_the_gpu(trained, capsys):
    assert sample.main([f"--model={trained}", "--device=cuda", "--prompt=import", "--max_new_tokens=50"]) == 0
    assert len(capsys.readouterr().out) > 20
