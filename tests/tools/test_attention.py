"""tools.attention: a model whose heads attend as planted, the weights of real models, blocks by hand."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from configurator import UserError
from formats.tokenizer import Tokenizer
from model import GPT
from tests.conftest import busy_model, tiny_config
from tests.test_model import ids_for
from tools import attention
from tools.attention import block_means, distance_and_sink_mass, look, main


def planted():
    """Head 0 attends to the token before (the first one to itself), head 1 to the first token."""
    model = GPT(tiny_config(n_layer=1, n_embd=64, n_head=2, n_kv_head=2, head_dim=64, position="learned"))
    attention, eye = model.model["layers"][0].self_attn, torch.eye(64)
    with torch.no_grad():
        model.model["embed_tokens"].weight.zero_()
        model.model["embed_positions"].weight.copy_(eye)  # position t is the t-th unit vector
        before = eye.roll(-1, 0)  # maps unit vector t to t - 1
        before[:, 0], before[0, 0] = 0, 1
        first = torch.zeros(64, 64)
        first[0] = 1
        attention.q_proj.weight.copy_(torch.cat((before, first)))
        attention.k_proj.weight.copy_(torch.cat((eye, eye)))
    return model


def test_a_planted_pattern(tmp_path, monkeypatch, data):
    seen = {}
    look(planted(), [0] * 64, lambda layer, head, weights: seen.update({(layer, head): weights}))
    assert seen.keys() == {(0, 0), (0, 1)}
    before, first = seen[0, 0], seen[0, 1]
    assert before[torch.arange(1, 64), torch.arange(63)].min() > 0.97
    assert first[:, 0].min() > 0.97
    distance, mass = distance_and_sink_mass(before)
    assert distance == pytest.approx(63 / 64, abs=0.6) and mass < 0.08  # query 4 attends to 3
    distance, mass = distance_and_sink_mass(first)
    assert distance == pytest.approx(31.5, abs=0.5) and mass > 0.97
    # The picture: the cells of both heads, and the head in detail, are where they belong.
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs:
                        figures.append(self) or save(self, *args, **kwargs))
    monkeypatch.setattr(attention.GPT, "from_pretrained", lambda folder: planted())
    monkeypatch.setattr(attention.hf, "find_folder", lambda path: data)
    out = tmp_path / "a.png"
    main([f"--out={out}", "--prompt=" + "import os " * 20, "--head=1"])
    wall, one, *curves = figures[0].axes
    image = np.asarray(wall.images[0].get_array().filled(np.nan))
    T = min(64, len(Tokenizer.load(data).encode("import os " * 20)))
    n = image.shape[0] - 1
    assert image.shape == (n + 1, 2 * (n + 1)) and n == min(T, 32)
    assert np.nanmin(image[:n, n + 1]) > 0.97 and np.isnan(image[:, n]).all()
    assert one.get_title() == "Layer 0, head 1" and one.images[0].get_array()[:, 0].min() > 0.97
    assert {axes.get_ylabel() for axes in curves} >= {"mean distance (tokens)", "share on the first 4 tokens"}
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("changes", [{}, dict(sink_logits=True, qk_norm=True)])
def test_weights_of_a_model_give_its_output(changes):
    """Weights times values, through o_proj, is what the layer computes: also for GQA and a sink logit."""
    model = busy_model(tiny_config(n_head=6, n_kv_head=2, n_embd=96, **changes))
    ids, found, outputs, values = ids_for(model.config, B=1, T=20)[0].tolist(), [], [], []
    layer = model.model["layers"][1].self_attn
    layer.v_proj.register_forward_hook(lambda module, args, y: values.append(y[0]))
    layer.register_forward_hook(lambda module, args, y: outputs.append(y[0]))
    look(model, ids, lambda number, head, weights: found.append(weights) if number == 1 else None)
    v = values[0].view(20, 2, 16)
    heads = torch.cat([weights @ v[:, head // 3] for head, weights in enumerate(found)], dim=1)
    with torch.no_grad():
        assert (layer.o_proj(heads) - outputs[0]).abs().max() <= 1e-5
    sums = torch.stack(found).sum(-1)
    assert bool((sums < 0.99).any()) == bool(changes)  # with a sink logit the rest goes to nothing


def test_blocks_by_hand():
    weights = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0, 0.4, 0.4, 0.2]])
    assert np.allclose(block_means(weights, 2), [[1, 0], [0.45, 0.55]])
    assert np.allclose(block_means(weights, 9), weights)
    assert np.allclose(block_means(np.tri(100) / np.arange(1, 101)[:, None], 32).sum(1), 1)


def test_refusals(trained):
    for argv, message in ((["--layer=2"], "layer=2: must be from 0 to 1"), (["--head=9"], "head=9: must be"),
                          (["--out=docs"], "must be the name of a picture"),
                          (["--prompt=a"], "needs at least 5")):
        with pytest.raises(UserError, match=message):
            main([f"--model={trained}", *argv])
