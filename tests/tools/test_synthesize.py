"""tools/synthesize.py: the folder is a valid data set, and a student learns from it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from dataset.encoding import text_hash
from dataset.shards import DataFolder
from formats import hf
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from tests.conftest import busy_model, tiny_config
from tests.test_distill import run
from tools import synthesize

FEW = ["--tokens=3000", "--val_fraction=0.2", "--device=cpu", "--batch_size=16"]


def make(teacher, out, *more):
    synthesize.main([f"--teacher={teacher}", f"--out={out}", *FEW, *more])
    return DataFolder(out)


def documents(data, split):
    """The ids of each document, without the end-of-text token."""
    ids = np.concatenate([np.empty(0, np.uint16), *data.shards[split]]).tolist()
    end, found = Tokenizer.load(data.folder).eot_id, [[]]
    for i in ids:
        found[-1:] = [found[-1], []] if i == end else [[*found[-1], i]]
    assert found.pop() == [], "every document has its end"
    return found


def all_documents(data):
    return documents(data, "train") + documents(data, "val")


def nats(teacher, rows):
    """The mean loss of the documents that have full length."""
    folder = hf.find_folder(teacher)
    model, start = GPT.from_pretrained(folder).eval(), Tokenizer.load(folder).eot_id
    rows = torch.tensor([[start, *row] for row in rows if len(row) == 40])
    with torch.no_grad():
        return F.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten()).item()


# ---- A valid data set ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "uniform", "unlike"])
def test_it_teaches(trained, tmp_path, kind):
    data = make(trained, tmp_path / "free", f"--kind={kind}", "--tokens=12_000")
    found = run(trained, data.folder, tmp_path / "a", "--alpha=1")
    divergences = [event["divergence"] for event in found if "divergence" in event]
    assert divergences[-1] < 0.5 * divergences[0]
    assert 0 < found[-1]["val_kl"] < divergences[0]


@pytest.mark.parametrize("kind", ["sampled", "uniform", "unlike"])
def test_counts_are_right(trained, tmp_path, kind):
    data = make(trained, tmp_path / "free", f"--kind={kind}")
    data.verify()
    tokenizer, meta = Tokenizer.load(data.folder), data.meta
    assert tokenizer.definition == Tokenizer.load(hf.find_folder(trained)).definition
    table = tokenizer.token_bytes()
    for split in ("train", "val"):
        texts = [b"".join(table[i] for i in ids) for ids in documents(data, split)]
        assert meta["documents"][split] == len(texts) == len(set(texts)) > 0
        assert meta["bytes"][split] == sum(map(len, texts))
        assert meta["tokens"][split] == sum(map(len, documents(data, split))) + len(texts)
        assert all((text_hash(text) < 0.2 * 2**64) == (split == "val") for text in texts)
    assert 3000 <= sum(meta["tokens"].values()) < 3000 + 65
    rows = meta["rows"]
    assert rows["in"] == rows["kept"] + sum(rows["skipped"].values())
    assert rows["kept"] == sum(meta["documents"].values())
    assert meta["vocab_size"] == 500 and meta["dtype"] == "uint16"
    assert not tokenizer.special_ids & {i for ids in all_documents(data) for i in ids}


def test_seeds(trained, tmp_path, capsys):
    """The same seed writes the same bytes, another seed other bytes; repeating a command does nothing."""
    for kind in ("sampled", "uniform"):
        first, same, other = (
            make(trained, tmp_path / f"{kind}{name}", f"--kind={kind}", f"--seed={seed}").meta["shards"]
            for name, seed in (("a", 5), ("b", 5), ("c", 6))
        )
        assert first == same
        assert not {shard["sha256"] for shard in first} & {shard["sha256"] for shard in other}
    capsys.readouterr()
    make(trained, tmp_path / "uniforma", "--kind=uniform", "--seed=5")
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"made from other inputs \(seed differ\)"):
        make(trained, tmp_path / "uniforma", "--kind=uniform", "--seed=6")
    replaced = make(trained, tmp_path / "uniforma", "--kind=uniform", "--seed=6", "--overwrite=True")
    assert replaced.meta["shards"] == json.loads((tmp_path / "uniformc" / "meta.json").read_text())["shards"]


def test_a_large_vocabulary_needs_four_bytes_per_id(trained, tmp_path, monkeypatch):
    load = Tokenizer.load

    def larger(source):
        tokenizer = load(source)
        tokenizer.vocab_size = 2**16 + 1
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", larger)
    assert make(trained, tmp_path / "free", "--kind=uniform").meta["dtype"] == "uint32"


# ---- What the documents are -------------------------------------------------------------------------------


def test_documents_are_text_of_the_teacher(trained, tmp_path, monkeypatch):
    """With one temperature, the documents are those of `generate`, in the same order."""
    monkeypatch.setattr(synthesize, "FIRST_TOKENS", 0)
    data = make(trained, tmp_path / "free", "--length=20", "--seed=4")
    model, tokenizer = GPT.from_pretrained(trained).eval(), Tokenizer.load(data.folder)
    rows = [[] for _ in range(16)]
    for tokens in generate(model, [[tokenizer.eot_id]] * 16, 20, Sampling(temperature=1.0, seed=9)):
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
    expected = [row[: row.index(tokenizer.eot_id)] if tokenizer.eot_id in row else row for row in rows]
    found = all_documents(data)
    assert all(row in found for row in expected if row) and max(map(len, found)) == 20


def test_the_first_tokens_have_their_own_temperature(trained, tmp_path, monkeypatch):
    """At a very high temperature, documents start with any token."""
    def documents_at(temperature, *more):
        monkeypatch.setattr(synthesize, "FIRST_TEMPERATURE", temperature)
        return all_documents(make(trained, tmp_path / f"{temperature}", *more))

    monkeypatch.setattr(synthesize, "FIRST_TOKENS", 1)
    firsts = [row[0] for row in documents_at(1e9, "--length=8")]
    assert len(set(firsts)) > 0.6 * len(firsts), "about 330 draws from 499 tokens make 242 different ones"
    assert len({row[0] for row in documents_at(1, "--length=8")}) < len(set(firsts))


def test_noise_is_unlikely_to_the_teacher(trained, tmp_path):
    """Uniform ids are about equally frequent. Each kind is less likely to the teacher than the one before."""
    more = ["--length=40", "--tokens=8000"]
    found = {
        kind: all_documents(make(trained, tmp_path / kind, f"--kind={kind}", *more))
        for kind in ("sampled", "unlike", "uniform")
    }
    sampled, unlike, uniform = (nats(trained, rows) for rows in found.values())
    assert sampled + 0.3 < unlike < uniform - 0.3
    counts = np.bincount(np.concatenate(found["uniform"]), minlength=500)
    assert counts[499] == 0 and counts[:499].min() > 0 and counts.max() < 45  # about 16 each


def test_special_tokens_end_a_document(trained, tmp_path, monkeypatch):
    """The chat tokens too, which an untrained teacher writes sometimes."""
    tokenizer = with_chat_tokens(Tokenizer.load(hf.find_folder(trained)))
    busy_model(tiny_config(vocab_size=512)).save_pretrained(tmp_path / "chatty")
    tokenizer.save(tmp_path / "chatty")
    monkeypatch.setitem(synthesize.TEMPERATURES, "unlike", 3.0)
    data = make(tmp_path / "chatty", tmp_path / "free", "--kind=unlike")
    lengths = [len(row) for row in all_documents(data)]
    assert len(tokenizer.special_ids) == 7 and min(lengths) < 40 and max(lengths) == 64
    assert not tokenizer.special_ids & {i for row in all_documents(data) for i in row}
    uniform = make(tmp_path / "chatty", tmp_path / "noise", "--kind=uniform")
    assert not tokenizer.special_ids & {i for row in all_documents(uniform) for i in row}


# ---- Mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tokens=0"], "tokens=0: must be positive"),
        (["--val_fraction=1"], "val_fraction=1.0: must be at least 0 and below 1"),
        (["--kind=uniform", "--length=1"], "1,000 documents brought nothing new"),
        (["--tokens=60", "--val_fraction=0.001"], "none of . documents fell to val"),
        (["--teacher={tmp}/nowhere"], "no model here"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        make(trained, tmp_path / "free", *(word.replace("{tmp}", str(tmp_path)) for word in more))
    assert "\n" not in str(error.value) and not (tmp_path / "free").exists()
