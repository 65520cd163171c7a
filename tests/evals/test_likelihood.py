"""Log-probabilities equal transformers' with any shared prefixes and cuts; ids equal HFLM's."""

import random
import types

import numpy as np
import pytest
import torch

import model as model_file
from configurator import UserError
from evals import likelihood
from evals.likelihood import (
    Request,
    Text,
    Tree,
    encode_plain,
    encode_turn,
    fit_context,
    score_texts,
    token_losses,
)
from evals.lm import LM
from formats.chat_format import encode_prompt, end_of_turn, with_chat_tokens
from formats.tokenizer import Tokenizer
from tests.conftest import CODE, busy_model, tiny_config

GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([CODE], 400)


def tree_of_texts(seed=0):
    """Texts as in benchmarks: shared worked examples, four choices per question, some of them one token long.

    Two texts are equal, one continues another, and some share nothing.
    """
    draw = random.Random(seed)
    examples = [draw.randrange(500) for _ in range(30)]
    texts = []
    for _ in range(25):
        question = [draw.randrange(500) for _ in range(draw.randint(1, 12))]
        context = examples[:draw.choice([0, 15, 30, 30])] + question
        for _ in range(4):
            choice = [draw.randrange(500) for _ in range(draw.choice([1, 1, 3, 7]))]
            texts.append(Text(np.array(context + choice, np.int32), len(choice)))
    texts += [texts[0], Text(np.concatenate([texts[0].ids, [7, 8]]).astype(np.int32), 1)]
    texts.append(Text(texts[0].ids, len(texts[0].ids) - 1))
    draw.shuffle(texts)
    return texts


def alone(peer, texts):
    """(sum of the targets' log-probabilities, whether all are the likeliest) of each text, each in a pass."""
    scores = []
    for ids, asked in texts:
        ids = torch.from_numpy(ids).long()
        with torch.inference_mode():
            rows = peer(ids[None, :-1]).logits[0, -asked:].double().log_softmax(-1)  # (asked, V)
        scores.append((rows[torch.arange(asked), ids[-asked:]].sum().item(),
                       torch.equal(rows.argmax(-1), ids[-asked:])))
    return scores


@pytest.mark.parametrize("changes", [{}, GPT2, dict(qk_norm=True)], ids=["llama", "gpt2", "qwen3"])
def test_a_tree_of_texts_equals_transformers_on_each_text(changes, tmp_path):
    import transformers
    model = busy_model(tiny_config(**changes))
    model.save_pretrained(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = tree_of_texts()
    expected = alone(peer, texts)
    for max_tokens in (1, 40, 256, 10_000):
        scores = score_texts(model, texts, max_tokens)
        assert [each.log_prob for each in scores] == pytest.approx([each for each, _ in expected], abs=1e-5)
        assert [score.greedy for score in scores] == [greedy for _, greedy in expected]


def test_the_picture_of_the_module_docstring():
    """Three texts as a tree: paths, positions and mask by hand; then the prefix that the next text needs."""
    model = busy_model(tiny_config())
    tree = Tree(model, 16)
    a, b, c, d, e, f, g = range(7)
    with torch.inference_mode():
        paths = tree.read(model, [np.array(ids, np.int32) for ids in ([a, b, c, d], [a, b, c, e], [a, f, g])])
    assert [path.tolist() for path in paths] == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 6]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 3, 1, 2]]
    assert ["".join(".x"[seen] for seen in row) for row in tree.mask[0, 0].int().tolist()] == [
        "x......", "xx.....", "xxx....", "xxxx...", "xxx.x..", "x....x.", "x....xx"]
    keys, states = tree.k[0][0, :, [0, 5]].clone(), tree.states[[0, 5]].clone()
    tree.keep(2)
    assert tree.used == 2 and tree.path.tolist() == [0, 1] and tree.text.tolist() == [a, f]
    assert torch.equal(tree.k[0][0, :, :2], keys) and torch.equal(tree.states[:2], states)


def test_no_token_of_the_tree_is_computed_twice(monkeypatch):
    model, texts, computed = busy_model(tiny_config()), tree_of_texts(1), []
    forward = model_file.GPT.forward
    monkeypatch.setattr(model_file.GPT, "forward", lambda self, ids, **more: (
        computed.append(ids.shape[1]), forward(self, ids, **more))[1])
    score_texts(model, texts, max_tokens=64)
    nodes = {tuple(text.ids[:end]) for text in texts for end in range(1, len(text.ids))}
    assert sum(computed) == len(nodes) < sum(len(text.ids) - 1 for text in texts) / 2
    assert len(computed) > 5 and max(computed) <= 64


def test_losses_of_running_text_equal_transformers(tmp_path):
    import transformers
    model = busy_model(tiny_config())
    model.save_pretrained(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    draw = np.random.default_rng(0)
    rows = [draw.integers(500, size=length).astype(np.int32) for length in (65, 65, 65, 20, 2)]
    asked = [64, 64, 10, 10, 1]
    found = token_losses(model, rows, asked)
    assert [len(each) for each in found] == asked
    texts = [Text(row, count) for row, count in zip(rows, asked, strict=True)]
    assert [-sum(each) for each in found] == pytest.approx([each for each, _ in alone(peer, texts)], abs=1e-4)


# ---- Text -> ids ------------------------------------------------------------------------------------------

def test_a_context_and_its_continuations(tokenizer):
    def encoded(context, continuation):
        return encode_plain(tokenizer, context, continuation)

    ids = tokenizer.encode
    for continuation in ("(x):", "()"):
        expected = Request(ids("def f"), ids("def f" + continuation)[len(ids("def f")):])
        assert encoded("def f", continuation) == expected
    assert encoded("x =  ", "1").context == ids("x ="), "trailing spaces move to the continuation"
    assert encoded("x =  ", "1").continuation == ids("x =  1")[len(ids("x =")):]
    for nothing in ("", " \n"):
        assert encoded(nothing, "import") == Request([tokenizer.eot_id], ids(nothing + "import"))
    with pytest.raises(UserError, match="'' after 'x' has no token of its own"):
        encoded("x", "")


def test_ids_are_those_of_lm_evaluation_harness(tokenizer, tmp_path):
    harness = pytest.importorskip("lm_eval.models.huggingface")
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path, eos_token_id=tokenizer.eot_id)
    tokenizer.save(tmp_path)
    peer = harness.HFLM(pretrained=str(tmp_path), device="cpu")
    asked = {}
    peer._loglikelihood_tokens = lambda requests, **more: asked.update({text: ids for text, *ids in requests})
    pieces = ["", " ", "\n\n", "Question: a b", "a  ", "tokenizer", "é", "日本", "12 34", "\t", " x", "end. "]
    pairs = [(one + two, three) for one in pieces for two in pieces for three in pieces if three]
    for pair in pairs:
        try:
            request = encode_plain(tokenizer, *pair)
        except UserError:
            continue  # HFLM fails here as well, or scores nothing
        if not pair[0].strip() and pair[0]:
            continue  # HFLM refuses a context of spaces
        peer.loglikelihood([types.SimpleNamespace(args=pair, task_name="")], disable_tqdm=True)
        assert [request.context, request.continuation] == asked[pair], pair
    assert len(asked) > 1000
    assert peer.prefix_token_id == likelihood.opening_id(tokenizer) == tokenizer.eot_id


def test_a_turn_is_that_of_the_chat_format(tokenizer):
    chat = with_chat_tokens(tokenizer)
    question = " What is 2 + 2? "
    request = encode_turn(chat, question, " 4")
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    assert request.prefix + request.context + request.suffix == encode_prompt(chat, asked)
    assert request.continuation == chat.encode("4")
    assert encode_turn(chat, question, " <|im_end|>").continuation == chat.encode("<|im_end|>")
    assert encode_turn(chat, "Why?", " ").continuation == [end_of_turn(chat)], "empty: end of the turn"
    texts, lost = fit_context(request, 20)
    frame = len(request.prefix), len(request.suffix)
    ids = texts[0].ids.tolist()
    assert lost == len(request.context) - (21 - sum(frame) - 1) > 0 and len(texts) == 1 and len(ids) == 21
    assert ids[:frame[0]] == request.prefix, "the context is cut, not the frame of the chat"
    assert ids[frame[0]:-1 - frame[1]] == request.context[lost:]


def test_a_long_context_loses_its_beginning():
    request = Request(list(range(10)), [10, 11, 12])
    for block_size, begin in ((12, 0), (11, 1), (5, 7), (3, 9)):
        texts, lost = fit_context(request, block_size)
        assert [(text.ids.tolist(), text.num_targets) for text in texts] == [(list(range(begin, 13)), 3)]
        assert lost == begin
    pieces, lost = fit_context(Request([1, 2], [3, 4, 5, 6, 7, 8, 9]), 3)
    assert [(text.ids.tolist(), text.num_targets) for text in pieces] == [
        ([2, 3, 4, 5], 3), ([5, 6, 7, 8], 3), ([6, 7, 8, 9], 1)] and lost == 1


# ---- LM ---------------------------------------------------------------------------------------------------

def test_likelihoods_of_a_model(trained):
    lm = LM(str(trained), device="cpu")
    long = "import os\n" * 60
    found = lm.loglikelihood([("import", " os"), ("import", " é"), (long, " x" * 100), (long, "y"),
                              ("", "import")])
    assert len(found) == 5
    assert found[0].log_prob > found[1].log_prob
    assert found[0].truncated == 0
    whole = lm.tokenizer.encode(long.rstrip())
    suffix = lm.tokenizer.encode(long + "y")[len(whole):]
    assert found[3].truncated == len(whole) + len(suffix) - 65 > 0
    # All tokens of a continuation count, even if it is longer than the model's context.
    ids = lm.tokenizer.encode(long + " x" * 100)[len(whole):]
    assert len(ids) > 64 and found[2].truncated == len(whole) - 1
    pieces = [Text(np.array(([whole[-1]] + ids)[at:at + 65], np.int32), len(ids[at:at + 64]))
              for at in range(0, len(ids) - len(ids) % 64, 64)]
    rest = len(ids) % 64
    pieces += [Text(np.array(ids[-65:], np.int32), rest)] if rest else []
    expected = sum(score.log_prob for score in score_texts(lm.model, pieces))
    assert found[2].log_prob == pytest.approx(expected, abs=1e-4)


def test_a_broken_model_is_reported(trained):
    lm = LM(str(trained), device="cpu")
    with torch.no_grad():
        lm.model.head_weight.fill_(float("nan"))
    with pytest.raises(UserError, match="a log-probability is not finite, so its weights are broken"):
        lm.loglikelihood([("import", " os")])
