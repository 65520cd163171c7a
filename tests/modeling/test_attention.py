"""Masks and the attention kernel: worked examples, packed documents, paths, FlexAttention."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from modeling.attention import attend, document_mask, document_positions, mask_and_positions
from tests.conftest import busy_model, tiny_config
from tests.test_model import GPT2, ids_for


def test_documents_worked_by_hand():
    """Two documents of three and two tokens: positions start again, and no token sees the other document."""
    documents = torch.tensor([[5, 5, 5, 6, 6]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 1]]
    assert document_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_paths_worked_by_hand():
    """The example in the docstring of Paths: the prompt p q, and its two answers a b and c."""
    paths = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 4]])
    mask, positions = mask_and_positions(torch.zeros(1, 5, dtype=torch.int64), block_size=4, paths=paths)
    assert mask.tokens is paths and mask.slots.tolist() == [[0, 1, 2, 3, 6]]
    assert positions.tolist() == [[0, 1, 2, 3, 2]]


@pytest.mark.parametrize("changes", [{}, GPT2, dict(qk_norm=True, n_kv_head=1)])
def test_packed_documents_have_the_logits_that_they_have_alone(changes):
    config = tiny_config(**changes)
    model = busy_model(config)
    ids = ids_for(config, B=1)
    lengths = [5, 1, 30, 28]
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = model(ids, document_ids=document_ids)
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    assert (packed - alone).abs().max() <= 1e-5


def test_a_document_does_not_depend_on_its_neighbour():
    config = tiny_config()
    model = busy_model(config)
    one, two = ids_for(config, B=1), ids_for(config, B=1, seed=1)
    document_ids = (torch.arange(64) >= 24).long()[None]
    mixed = torch.cat((two[:, :24], one[:, 24:]), dim=1)
    with torch.no_grad():
        first, second = model(one, document_ids=document_ids), model(mixed, document_ids=document_ids)
    assert torch.equal(first[:, 24:], second[:, 24:])
    assert not torch.equal(first[:, :24], second[:, :24])


@pytest.mark.parametrize("changes", [dict(n_head=6, n_kv_head=2, n_embd=96), GPT2, dict(qk_norm=True)])
def test_paths_have_the_logits_that_they_have_alone(changes):
    """A tree (a root with two branches, one of which branches again) and a separate sequence, their tokens
    in random order over two rows."""
    config = tiny_config(**changes)
    model, ids = busy_model(config), ids_for(config, B=2, T=45)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    root, left, right, leaf, other, alone = order.split([12, 9, 20, 15, 20, 14])
    paths = [torch.cat(path) for path in ((root, left, leaf), (root, left, other), (root, right), (alone,))]
    longest = max(map(len, paths))
    padded = torch.stack([torch.cat((path, path[-1:].expand(longest - len(path)))) for path in paths])
    with torch.no_grad():
        together = model(ids, paths=padded).flatten(0, 1)
        for path in paths:
            assert (together[path] - model(ids.flatten()[path][None])[0]).abs().max() <= 1e-5
        ids.view(-1)[leaf] = ids_for(config, B=1, T=15, seed=1)[0]
        changed = (model(ids, paths=padded).flatten(0, 1) != together).any(dim=-1)
    assert set(changed.nonzero()[:, 0].tolist()) == set(leaf.tolist()), "no other token changes"
    with pytest.raises(ValueError, match="65 tokens do not fit block_size=64"):
        model(ids, paths=torch.zeros(1, 65, dtype=torch.int64))


def test_flex_attention_sees_what_the_dense_mask_sees():
    """FlexAttention, which GPUs use; without gradients, because it has no backward pass on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 128, 16, generator=generator) for heads in (4, 2, 2))
    documents = torch.randint(2, (2, 128), generator=generator).cumsum(dim=1)

    def visible(b, h, i, j):
        return (j <= i) & (documents[b, i] == documents[b, j])

    mask = create_block_mask(visible, 2, None, 128, 128, device="cpu")
    assert isinstance(mask, BlockMask)
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v, mask), attend(q, k, v, document_mask(documents)), atol=1e-6)


def test_bfloat16_attention_on_a_cpu_computes_in_float32():
    """The output and the gradients are those of float32 on the rounded inputs, rounded once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 16, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    exact = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, k, v, None)
    expected = attend(*exact, None)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())
    y.sum().backward()
    expected.sum().backward()
    for tensor, reference in zip((q, k, v), exact, strict=True):
        assert torch.equal(tensor.grad, reference.grad.bfloat16())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_single_query_by_the_definition(monkeypatch, masked, groups):
    """In float64; also if the kernel returns a non-contiguous result, as one of the GPU's kernels does."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 1, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, groups, 5, 16, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()[:, None, None]
    scores = q @ k.repeat_interleave(8 // groups, dim=1).mT / 4
    scores = scores.masked_fill(~mask, -torch.inf) if masked else scores
    expected = scores.softmax(-1) @ v.repeat_interleave(8 // groups, dim=1)
    kernel = F.scaled_dot_product_attention
    assert (attend(q, k, v, mask if masked else None) - expected).abs().max() < 1e-12
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *arguments, **options: kernel(
        *arguments, **options).transpose(1, 2).contiguous().transpose(1, 2))
    assert (attend(q, k, v, mask if masked else None) - expected).abs().max() < 1e-12
