"""The key/value cache: cached logits equal uncached ones; the slots are those of the drawing."""

import pytest
import torch

from modeling.kv_cache import KVCache
from tests.conftest import busy_model, tiny_config
from tests.test_model import GPT2, YARN, ids_for


def test_slots_worked_by_hand():
    """The drawing in the module's docstring: after 5 and 3 tokens, the next ones go to slots 5 and 3."""
    cache = KVCache(tiny_config(), batch_size=2, max_length=8)
    assert cache.prepare(5) == (None, slice(0, 5))
    cache.set_lengths([5, 3])
    assert (cache.used, cache.even) == (5, False)
    mask, positions = cache.prepare(1)
    assert positions.tolist() == [[5], [3]]
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("lengths", [[20, 7, 13], [20, 20, 20]])
@pytest.mark.parametrize("changes", [{}, GPT2, dict(rope_scaling=YARN), dict(position="none", n_expert=4),
                                     dict(sink_logits=True)])
def test_cached_logits_equal_uncached(changes, lengths):
    """Rows of different and of equal length, fed in three parts."""
    config = tiny_config(**changes)
    model, ids = busy_model(config), ids_for(config, B=3, T=40)
    lengths = torch.tensor(lengths)
    cache = KVCache(config, 3, 40)
    with torch.no_grad():
        whole = model(ids)
        prefill = model(ids[:, :20], cache=cache)
        cache.set_lengths(lengths.tolist())
        rows = torch.arange(3)[:, None]
        several = model(ids[rows, lengths[:, None] + torch.arange(5)], cache=cache)
        cache.set_lengths((lengths + 5).tolist())
        single = model(ids[rows, lengths[:, None] + 5], cache=cache)
    for row, length in enumerate(lengths):
        assert (prefill[row, :length] - whole[row, :length]).abs().max() <= 1e-5
        assert (several[row] - whole[row, length : length + 5]).abs().max() <= 1e-5
        assert (single[row, 0] - whole[row, length + 5]).abs().max() <= 1e-5
