"""Steps of generation/step_graph.py, here without a CUDA graph: tests/test_gpu.py captures them."""

import pytest
import torch

from generation.generate import (
    Options,
    Sampling,
    forward_last,
    generate,
    graph_steps,
    next_ids,
    uniform_numbers,
)
from modeling.kv_cache import KVCache
from tests.generation.test_generate import busy_model, tiny_config

PROMPTS = [[1, 2, 3], [4], list(range(20))]


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=1, qk_norm=True, bias="qkv"),
                                     dict(position="learned", norm="layernorm", mlp="gelu", bias="all")])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, top_k=20, seed=3)])
@torch.inference_mode()
def test_the_tokens_of_generate(changes, sampling):
    model = busy_model(tiny_config(**changes))
    uniform = uniform_numbers(sampling.seed, range(3), 30)
    expected = [list(tokens) for tokens in generate(model, PROMPTS, 30, sampling)]
    cache = KVCache(model.config, 3, 20 + 30 + 8)
    first = next_ids(forward_last(model, PROMPTS, cache), uniform[:, 0], sampling)
    cache.set_lengths([len(row) for row in PROMPTS])
    steps = graph_steps(model, cache, first[:, None].tolist(), uniform[:, 1:], sampling, Options())
    assert [first.tolist(), *steps] == expected


@torch.inference_mode()
def test_the_steps_end_with_the_cache():
    model = busy_model(tiny_config())
    cache = KVCache(model.config, 1, 10 + 8)
    forward_last(model, [[1, 2, 3]], cache)
    cache.set_lengths([3])
    steps = graph_steps(model, cache, [[5]], torch.zeros(1, 100), Sampling(temperature=0), Options())
    assert len(list(steps)) == 7


@torch.inference_mode()
def test_broken_logits_are_no_token():
    model = busy_model(tiny_config())
    cache = KVCache(model.config, 1, 10 + 8)
    forward_last(model, [[1, 2, 3]], cache)
    cache.set_lengths([3])
    model.model["norm"].weight.fill_(torch.nan)
    steps = graph_steps(model, cache, [[5]], torch.zeros(1, 2), Sampling(temperature=0), Options())
    assert list(steps) == [[-1], [-1]]
