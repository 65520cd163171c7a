"""Attention sinks: the cache equals a slow model that keeps all keys; the sink logit equals its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from generation.generate import Options, PrefixCache, Sampling, generate
from model import rotate
from modeling.attention import attend, mask_and_positions
from modeling.sinks import SinkCache, attend_with_sink, cache_limits
from tests.conftest import busy_model, tiny_config
from tests.test_model import GPT2, LLAMA3, YARN, ids_for

GREEDY = Sampling(temperature=0)


def slow_logits(model, ids, sinks, window):
    """StreamingLLM as in the paper: keep all keys unrotated, and rotate the visible ones at each step."""
    layers, H, D = model.model["layers"], model.config.n_head, model.config.head_dim
    kept, logits = [([], []) for _ in layers], []
    for t in range(len(ids)):
        places = [*range(t + 1)] if t < sinks + window else [*range(sinks), *range(t + 1 - window, t + 1)]
        x = model.model["embed_tokens"](ids[t])[None]  # (1, C)
        for block, (keys, values) in zip(layers, kept, strict=True):
            h, attention = block.input_layernorm(x), block.self_attn
            q, k, v = (f(h).view(-1, D) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = attention.q_norm(q), attention.k_norm(k)
            keys.append(k)
            values.append(v)
            k = torch.stack([rotate(keys[place][None, :, None], model.rope(slice(i, i + 1)))[0, :, 0]
                             for i, place in enumerate(places)], 1)  # (K, S, D)
            v = torch.stack([values[place] for place in places], 1)
            q = rotate(q[None, :, None], model.rope(slice(len(places) - 1, len(places))))[0]  # (H, 1, D)
            k, v = (each.repeat_interleave(H // len(each), 0) for each in (k, v))
            weights = (q @ k.mT / math.sqrt(D)).softmax(-1)
            x = x + attention.o_proj((weights @ v).view(1, -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(F.linear(model.model["norm"](x), model.head_weight)[0, :model.config.vocab_size])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("sinks, window, changes", [
    (2, 6, {}), (0, 5, {}), (2, 6, dict(rope_scaling=YARN, qk_norm=True)), (1, 7, dict(rope_scaling=LLAMA3)),
    (3, 61, dict(rope_scaling=YARN))])
def test_cache_equals_a_slow_model(sinks, window, changes):
    """Rows of different lengths, far beyond the context, over several turns of the window back (rebase)."""
    model = busy_model(tiny_config(block_size=64, **changes))
    length = 40 if window < 60 else 150
    ids = ids_for(model.config, B=2, T=length)
    cache = SinkCache(model.config, 2, (sinks, window), model.rope)
    first, seen = 4, [[], []]
    model(ids[:, :first], cache=cache)
    lengths = [first, first - 2]
    cache.set_lengths(lengths)
    for _ in range(length - first):
        step = torch.stack([ids[row, n:n + 1] for row, n in enumerate(lengths)])
        for row, values in enumerate(model(step, cache=cache)[:, 0]):
            seen[row].append(values)
        lengths = [n + 1 for n in lengths]
        cache.set_lengths(lengths)
    for row in range(2):
        expected = slow_logits(model, ids[row, :lengths[row]], sinks, window)[-len(seen[row]):]
        assert (torch.stack(seen[row]) - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_slots_worked_by_hand():
    """The drawing in the module's docstring."""
    model = busy_model(tiny_config(block_size=16))
    cache = SinkCache(model.config, 1, (2, 3), model.rope)
    for count in range(7):
        cache.prepare(1)
        for layer in range(model.config.n_layer):
            shape = 1, model.config.n_kv_head, 1, model.config.head_dim
            cache.update(layer, torch.zeros(shape), torch.full(shape, float(count)))
        cache.set_lengths([count + 1])
    assert cache.v[0][0, 0, :, 0].tolist() == [0, 1, 5, 6, 4]  # a b f g e
    with pytest.raises(ValueError, match="one token at a time"):
        cache.prepare(2)


def test_until_the_window_is_full_nothing_changes():
    model = busy_model(tiny_config(block_size=32))
    plain, sinks = (list(generate(model, [[5, 6, 7], [9]], 20, sampling)) for sampling in
                    (GREEDY, Sampling(temperature=0, sinks=4)))
    assert plain == sinks


def test_rows_and_prompts_of_any_length():
    """A row has the tokens that it has alone; a prompt that is too long keeps its sinks and its end."""
    model = busy_model(tiny_config(block_size=32))
    sampling = Sampling(sinks=2, window=10, seed=3)
    prompts = [[5, 6, 7], list(range(40)), [9]]
    together = list(generate(model, prompts, 50, sampling, lambda row, new: row == 2 and len(new) == 20))
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 50 if row < 2 else 20, sampling, None, Options(row_numbers=[row]))
        assert [step[row] for step in together if step[row] is not None] == [token for token, in alone]
    cut = [0, 1, *range(30, 40)]
    assert list(generate(model, [cut], 9, sampling)) == list(generate(model, [prompts[1]], 9, sampling))
    assert prompts == [[5, 6, 7], list(range(40)), [9]]  # the caller's lists are as they were


def test_a_conversation_goes_on_past_the_window():
    """The second turn, whose cache has dropped tokens, writes what it writes without a prefix cache."""
    model, prefix = busy_model(tiny_config(block_size=32)), PrefixCache()
    sampling, ids = Sampling(temperature=0, sinks=2, window=14), [1, 2, 3]
    for turn in range(4):
        prompt = ids + [turn]
        new = [token for token, in generate(model, [prompt], 6, sampling, None, Options(prefix=prefix))]
        assert new == [token for token, in generate(model, [prompt], 6, sampling)]
        ids = prompt + new


def test_what_cannot_have_sinks_is_refused():
    with pytest.raises(UserError, match="position=learned"):
        cache_limits(tiny_config(**GPT2), 4, None)
    for sinks, window in ((4, 61), (64, None)):
        with pytest.raises(UserError, match="at most the context of 64"):
            cache_limits(tiny_config(block_size=64), sinks, window)
    with pytest.raises(UserError, match="window=0"):
        Sampling(window=0)
    with pytest.raises(UserError, match="sinks=-1"):
        Sampling(sinks=-1)
    for changes, sinks in (({}, 4), (dict(n_expert=2), 0)):
        model = busy_model(tiny_config(**changes))
        model.compiled_steps = True
        with pytest.raises(UserError, match="compile=True does not work with experts, sinks or window"):
            next(generate(model, [[1]], 1, Sampling(sinks=sinks)))


def test_nothing_is_read_again(monkeypatch):
    """Every step past the context reads one token; without sinks, half a context is read now and then."""
    model, widths = busy_model(tiny_config(block_size=32)), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *args, **kwargs:
                        widths.append(ids.shape[1]) or forward(self, ids, *args, **kwargs))
    for sinks, widest in ((4, 1), (0, 16)):
        widths.clear()
        list(generate(model, [[1]], 100, Sampling(temperature=0, sinks=sinks)))
        assert len(widths) == 100 and max(widths) == widest


# ---- The learned sink logit -------------------------------------------------------------------------------

def formula(q, k, v, visible, sink):
    """softmax over the keys and one more logit, whose value is dropped (openai/gpt-oss, torch/model.py)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)  # (B, H, T, S)
    column = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("case", ["causal", "one query", "documents", "paths"])
def test_sink_logit_equals_its_formula(case):
    generator = torch.Generator().manual_seed(0)
    B, H, K, T, D = 2, 6, 2, 5, 8
    queries = 1 if case == "one query" else T
    q, k, v = (torch.randn(B, heads, n, D, generator=generator) for heads, n in
               ((H, queries), (K, T), (K, T)))
    sink = torch.randn(H, generator=generator).requires_grad_()
    mask, visible = None, torch.ones(queries, T, dtype=torch.bool).tril(T - queries)
    if case == "documents":
        documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
        mask, _ = mask_and_positions(documents, 9, document_ids=documents)
        visible = mask
    if case == "paths":  # the same causal rows, as paths
        mask, _ = mask_and_positions(torch.zeros(B, T).long(), 9, paths=torch.arange(B * T).view(B, T))
    found, expected = attend_with_sink(q, k, v, mask, 0.0, sink), formula(q, k, v, visible, sink)
    assert (found - expected).abs().max() <= 1e-6
    (grad,), (wanted,) = (torch.autograd.grad(y.square().sum(), sink) for y in (found, expected))
    assert (grad - wanted).abs().max() <= 1e-5
    low = attend_with_sink(q, k, v, mask, 0.0, sink - 1e3)  # a sink of minus infinity is no sink
    assert (low - attend(q, k, v, mask)).abs().max() <= 1e-6
