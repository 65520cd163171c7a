"""Running text: transformers' sliding window, bits per byte, and which text is read."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from configurator import UserError
from dataset.shards import DataFolder
from evals.lm import LM
from evals.results import Figure, ratio
from evals.tasks import perplexity
from evals.tasks.perplexity import Texts, read_texts
from formats import hf
from formats.tokenizer import Tokenizer
from tests.conftest import CODE

# Unusual text in the middle: the guide weighs the first and the last window a little differently.
TEXT = CODE[:9_000] + "Caf\u00e9, \u4e2d\u6587, \U0001f600 and \u00e9t\u00e9.\n" + CODE[9_000:]


@pytest.fixture(scope="module")
def lm(trained):
    return LM(str(trained), device="cpu")


def sliding_window(folder, text, stride):
    """The recipe of transformers' guide, as (perplexity, guide, tokens).

    In `perplexity` each window's mean loss is weighted by the number of its scored tokens. In `guide` it is
    weighted as the guide does, by the number of labels minus one.
    """
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    context, length = model.config.max_position_embeddings, ids.shape[1]
    total, count, before, guide = 0.0, 0, 0, [0.0, 0]
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        labels = ids[:, begin:end].clone()
        labels[:, :before - begin] = -100  # tokens of an earlier window
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        valid, marked = (int((part != -100).sum()) for part in (labels[:, 1:], labels))
        total, count, before = total + loss * valid, count + valid, end
        guide = [guide[0] + loss * (marked - 1), guide[1] + marked - 1]
        if end == length:
            break
    return math.exp(total / count), math.exp(guide[0] / guide[1]), count


@pytest.mark.parametrize("stride", [None, 64, 17])
def test_transformers_sliding_window(lm, trained, stride):
    figures = perplexity.score(lm, Texts([TEXT], ""), "", stride).figures
    expected, guide, count = sliding_window(hf.find_folder(trained), TEXT, stride or 32)
    assert figures["perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity"].value == pytest.approx(guide, rel=1e-4) and figures["perplexity"].n == count
    nats = math.log(figures["perplexity"].value) * count
    scored = figures["bits_per_byte"].n
    assert figures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / scored)
    if stride != 64:  # without overlap the first token of each window is not scored
        first = len(lm.tokenizer.decode(lm.tokenizer.encode(TEXT)[:1]).encode())
        assert scored == len(TEXT.encode()) - first


def test_windows():
    assert perplexity.windows(10, 4, 2) == [(0, 4, 3), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert perplexity.windows(9, 4, 3) == [(0, 4, 3), (3, 7, 3), (6, 9, 2)]
    assert perplexity.windows(8, 4, 4) == [(0, 4, 3), (4, 8, 3)]
    assert perplexity.windows(9, 4, 4) == [(0, 4, 3), (4, 8, 3)], "a last token alone has no context"
    assert perplexity.windows(3, 4, 2) == [(0, 3, 2)]


def test_a_ratio_and_its_standard_error():
    assert ratio([2.0, 4.0], [1, 2]) == (2, 0, 3)
    draws, generator = [], np.random.default_rng(0)
    for _ in range(400):
        counts = generator.integers(5, 15, size=60)
        draws.append(ratio((counts * generator.normal(3, 1, size=60)).tolist(), counts.tolist()))
    spread = np.std([each.value for each in draws])
    assert np.mean([each.stderr for each in draws]) == pytest.approx(spread, rel=0.1)


def test_an_end_of_text_token_separates_documents(lm):
    ids = perplexity.join_documents(lm, Texts(["import os", "x"], ""))
    assert ids.tolist() == [*lm.tokenizer.encode("import os"), lm.tokenizer.eot_id, *lm.tokenizer.encode("x")]
    with pytest.raises(UserError, match="somewhere: the text is too short"):
        perplexity.join_documents(lm, Texts([""], "somewhere"))
    with pytest.raises(UserError, match="stride=65: must be positive, and at most the context of 64"):
        perplexity.score(lm, Texts([TEXT], ""), "", 65)


# ---- Whose text -------------------------------------------------------------------------------------------

def test_the_text_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffno mark", encoding="utf-8")
    (tmp_path / "b.md").write_bytes("naïve".encode())
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert read_texts(str(tmp_path / "a.txt"), "", 100) == Texts(["no mark"], str(tmp_path / "a.txt"))
    assert read_texts(str(tmp_path / "rows.jsonl"), "", 5).documents == ["one", "tw"]
    assert read_texts(str(tmp_path / "b.md"), "", 3).documents == ["na"], "no half characters"
    (tmp_path / "perplexity_b.md").write_bytes("naïve".encode())
    (tmp_path / "perplexity.jsonl").write_text('{"text": "one"}\n')
    assert read_texts(str(tmp_path), "", 100).documents == ["naïve"], "text files named perplexity*"
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    assert read_texts(str(tmp_path / "rows.jsonl"), "", 9).documents == ["one", "two"]
    with pytest.raises(UserError, match="bad.txt: not UTF-8"):
        read_texts(str(tmp_path / "bad.txt"), "", 100)
    (tmp_path / "bad.txt").write_text("")
    with pytest.raises(UserError, match="bad.txt: no text in it"):
        read_texts(str(tmp_path / "bad.txt"), "", 100)
    with pytest.raises(UserError, match="no such file"):
        read_texts(str(tmp_path / "none.txt"), "", 100)


def test_the_text_of_a_prepared_folder_is_its_validation_split(data, trained, tmp_path):
    folder = DataFolder(data)
    whole = read_texts(str(data), "", 10**9).documents
    tokenizer, eot_id = Tokenizer.load(data), Tokenizer.load(data).eot_id
    ids = [index for document in whole for index in [*tokenizer.encode(document), eot_id]]
    assert ids == [int(index) for shard in folder.shards["val"] for index in shard]
    assert sum(len(document.encode()) for document in whole) == folder.meta["bytes"]["val"]
    assert read_texts(None, str(trained), 1000) == read_texts(str(data), "", 1000)
    # A model trained on chats is measured on the text of its base.
    chats = tmp_path / "chats"
    chats.mkdir()
    meta = json.loads((data / "meta.json").read_text())
    (chats / "meta.json").write_text(json.dumps(meta | {"kind": "chat", "shards": []}))
    out = tmp_path / "sft"
    shutil.copytree(hf.find_folder(trained), out / "step_000001")
    run = {"config": {"dataset": str(chats), "init_from": str(trained)}, "identity": {}}
    (out / "run.json").write_text(json.dumps(run))
    assert read_texts(None, str(out / "step_000001"), 1000).place == str(data)
    (out / "run.json").write_text(json.dumps({"config": {"dataset": str(chats)}, "identity": {}}))
    with pytest.raises(UserError, match="is not here: give --data=perplexity=FILE"):
        read_texts(None, str(out / "step_000001"), 1000)
    with pytest.raises(UserError, match="holds chat rows, not text"):
        read_texts(str(chats), "", 1000)


def test_wikitext_is_the_same_text_from_rows_and_from_a_file(tmp_path):
    lines = ["", " = Title = \n", " naïve .\n", ""]
    rows, whole = tmp_path / "wikitext_test.jsonl", tmp_path / "wikitext.txt"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    whole.write_text("\n\n".join(lines), encoding="utf-8")
    texts = [perplexity.load(str(path), 1, None, "", wikitext=True) for path in (rows, whole)]
    assert texts[0].documents == texts[1].documents == ["\n\n = Title = \n\n\n naïve .\n\n\n"]
    rows.write_text(json.dumps({"text": "é" * 600}) + "\n")
    assert perplexity.load(str(rows), 1, None, "", wikitext=True).documents == ["é" * 512], "limit in bytes"


def test_a_broken_model_has_no_perplexity(trained):
    broken = LM(str(trained), device="cpu")
    with torch.no_grad():
        broken.model.head_weight[5] = math.nan
    with pytest.raises(UserError, match="step_000060: a loss is not finite, so its weights are broken"):
        perplexity.score(broken, Texts([TEXT], ""), "")


def test_a_huge_loss_has_a_perplexity():
    """e^710 is no float64."""
    assert perplexity.perplexity_of(Figure(1e4, 0.0, 5)).value == math.exp(700)
