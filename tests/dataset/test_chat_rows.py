"""dataset/chat_rows.py: how chats and preferences are packed, cut, left out and masked."""

import shutil

import numpy as np
import pytest
import torch

from configurator import UserError
from dataset.chat_rows import ChatRows, PairRows, UnpackedChatRows, chat_batch, pack_rows, pair_batch
from dataset.conversations import conversation, preference
from dataset.dataloader import IGNORE
from dataset.shards import SEPARATOR, DataFolder
from formats.chat_format import encode_answer, encode_chat, encode_prompt
from formats.tokenizer import Tokenizer
from prepare import main as prepare_main
from tests.conftest import busy_model, tiny_config
from tests.mistakes import mistake_rows

CHATS = [
    {"question": "2 + 2?", "answer": "4"},
    {"question": "1234567890" * 4, "answer": "yes"},
    {"question": "a", "answer": "b c d " * 30},
    {"messages": [{"role": role, "content": text} for role, text in
                  (("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4"))]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"chat": (folder, its rows), "preference": ...}"""
    import json

    root = tmp_path_factory.mktemp("chats")
    rows = {"chat": CHATS, "preference": list(mistake_rows(60, seed=2))}
    for kind, content in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        prepare_main([f"--source={root / kind}.jsonl", f"--kind={kind}", f"--out={root / kind}",
                      "--val_fraction=0", "--vocab_size=400", "--num_proc=1"])  # fmt: skip
    return {kind: (DataFolder(root / kind), content) for kind, content in rows.items()}


def tokenizer_of(data):
    return Tokenizer.load(data.folder)


def test_an_unpacked_row_is_a_conversation_and_its_mask(folders):
    data, chats = folders["chat"]
    tokenizer, rows = tokenizer_of(data), UnpackedChatRows(data, "train", 200)
    assert len(rows) == 4 and rows.left_out == 0
    for row, chat in zip(rows.read(np.arange(4)), chats, strict=True):
        ids, mask = encode_chat(tokenizer, conversation(chat))
        last = max(i for i, wanted in enumerate(mask) if wanted)  # the end of the last answer
        assert row[0, :last].tolist() == ids[:last]
        shifted = zip(ids[1 : last + 1], mask[1 : last + 1], strict=True)
        expected = [i if wanted else IGNORE for i, wanted in shifted]
        assert row[1, :last].tolist() == expected and (row[1, last:] == IGNORE).all()
        first = row[1].tolist().index(next(i for i in expected if i != IGNORE))
        opening = tokenizer.decode(ids[: first + 1])
        assert opening.endswith("<|im_start|>assistant\n"), "the token that begins an answer is a target"


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(folders):
    data, _ = folders["chat"]
    rows = UnpackedChatRows(data, "train", 24)
    assert len(rows) == 3 and rows.left_out == 1  # the question of the second is too long
    assert rows.cut == 1  # the third loses its end
    cut = rows.read(np.array([1]))[0]
    assert (cut[1, -4:] != IGNORE).all(), "a cut answer is trained on up to the cut, without an end"
    with pytest.raises(UserError, match="none of 4 train conversations has an answer in its first"):
        ChatRows(data, "train", 4)


@pytest.mark.parametrize("kind", [ChatRows, UnpackedChatRows])
def test_a_last_conversation_without_any_target_is_left_out(folders, kind, tmp_path):
    """A template may leave none: a greeting of the assistant, then only a user's message."""
    (mask,) = shutil.copytree(folders["chat"][0].folder, tmp_path / "chat").glob("train_*.mask")
    values = bytearray(mask.read_bytes())
    ends = [place for place, value in enumerate(values) if value == SEPARATOR]
    values[ends[-2] + 1:ends[-1]] = bytes(ends[-1] - ends[-2] - 1)
    mask.write_bytes(values)
    rows = kind(DataFolder(tmp_path / "chat"), "train", 200)
    assert len(rows.usable) == 3 and rows.left_out == 1
    assert (rows.read(np.arange(len(rows)))[:, 1] != IGNORE).any(1).all()


@pytest.mark.parametrize("kind", [ChatRows, UnpackedChatRows])
def test_conversations_that_are_cut_are_counted_or_dropped(folders, kind):
    """At every row length, against the lengths of the encoded conversations up to their last target."""
    data, chats = folders["chat"]
    encoded = [encode_chat(tokenizer_of(data), conversation(chat)) for chat in chats]
    lengths = [max(at for at, wanted in enumerate(mask) if wanted) for _, mask in encoded]  # inputs
    for size in range(min(lengths), 200):
        cut, whole = kind(data, "train", size), kind(data, "train", size, overlong="drop")
        used = {int(document) for row in cut.rows for document in row}
        kept = {int(document) for row in whole.rows for document in row}
        assert cut.cut == sum(lengths[document] > size for document in used)
        assert kept == {number for number, length in enumerate(lengths) if length <= size}
        assert whole.cut == 0 and whole.left_out == len(chats) - len(kept)
    with pytest.raises(UserError, match="none of 4 train conversations is whole in block_size=12 tokens"):
        kind(data, "train", 12, overlong="drop")


def test_packing_loses_nothing(folders):
    data, _ = folders["chat"]
    alone, packed = UnpackedChatRows(data, "train", 200), ChatRows(data, "train", 200)
    assert len(packed) < len(alone)
    wanted = lambda rows: sorted(rows.read(np.arange(len(rows)))[:, 1].flatten().tolist())  # noqa: E731
    some = [target for target in wanted(packed) if target != IGNORE]
    assert some == [target for target in wanted(alone) if target != IGNORE]


def test_best_fit_by_hand():
    assert pack_rows(np.array([3, 9, 6, 4, 1]), 10) == [[1, 4], [2, 3], [0]]
    assert pack_rows(np.array([3, 9]), 10**15) == [[1, 0]]
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 61, 3000)
    rows = pack_rows(lengths, 100)
    assert sorted(number for row in rows for number in row) == list(range(3000))
    assert all(lengths[row].sum() <= 100 for row in rows)
    assert len(rows) <= 1.02 * lengths.sum() / 100


def test_packed_conversations_have_the_same_logits_as_alone(folders):
    data, _ = folders["chat"]
    model = busy_model(tiny_config(vocab_size=512, block_size=256))
    alone, packed = UnpackedChatRows(data, "train", 200), ChatRows(data, "train", 200)

    def logits(rows):
        """At every target, in the order of the conversations."""
        results = {}
        for index in range(len(rows)):
            batch = chat_batch(rows.read(np.array([index])))
            out = model(batch["input_ids"], document_ids=batch["document_ids"]).flatten(0, 1)
            places = batch["document_ids"].flatten()[batch["positions"]]
            for number, document in enumerate(rows.rows[index]):
                results[int(document)] = out[batch["positions"][places == number]]
        return torch.cat([results[number] for number in sorted(results)])

    with torch.no_grad():
        torch.testing.assert_close(logits(packed), logits(alone), rtol=1e-5, atol=1e-5)


def test_a_batch_ends_after_its_last_target(folders):
    data, _ = folders["chat"]
    batch = chat_batch(UnpackedChatRows(data, "train", 200).read(np.array([0, 3])))
    assert batch["count"] == len(batch["targets"]) == len(batch["positions"])
    assert batch["input_ids"].shape == batch["document_ids"].shape
    length = batch["input_ids"].shape[1]
    assert int((batch["positions"] % length).max()) == length - 1


def test_pairs(folders):
    data, rows = folders["preference"]
    tokenizer, pairs = tokenizer_of(data), PairRows(data, "train", 256)
    assert len(pairs) + pairs.left_out == data.meta["rows"]["kept"]
    batch = pair_batch([pairs.pair(number) for number in range(8)])
    ids, lengths, tokens = batch["input_ids"][0], batch["lengths"].flatten().tolist(), 0
    positions, targets = batch["positions"].split(lengths), batch["targets"].split(lengths)
    assert batch["count"] == 8
    for number in range(8):
        prompt, *answers = preference(rows[number])
        opening = encode_prompt(tokenizer, prompt)
        tokens += len(opening)
        for side, answer in enumerate(answers, 2 * number):
            reply, path = encode_answer(tokenizer, answer), batch["paths"][side].tolist()
            length = len(opening) + len(reply) - 1
            assert ids[path[:length]].tolist() == (opening + reply)[:-1]
            assert set(path[length:]) <= {path[length - 1]}, "a shorter one repeats its last token"
            assert positions[side].tolist() == path[len(opening) - 1 : length]
            assert targets[side].tolist() == reply
            tokens += len(reply) - 1
    assert len(ids) == tokens, "each prompt is there once, and nothing else is"


def test_a_pair_by_hand():
    """The example in the docstring of pair_batch: prompt 10 11, chosen 20 21, rejected 30 31 32."""
    batch = pair_batch([(np.array([10, 11, 20, 21, 30, 31, 32]), 2, 2)])
    assert batch["input_ids"].tolist() == [[10, 11, 20, 30, 31]]
    assert batch["paths"].tolist() == [[0, 1, 2, 2], [0, 1, 3, 4]]
    assert batch["positions"].tolist() == [1, 2, 1, 3, 4]
    assert batch["targets"].tolist() == [20, 21, 30, 31, 32]
    assert batch["lengths"].tolist() == [[2, 3]] and batch["count"] == 1


def test_pairs_that_do_not_fit_are_left_out(folders):
    data, _ = folders["preference"]
    some = PairRows(data, "train", 100)
    assert 0 < some.left_out < 60
    with pytest.raises(UserError, match="none of .* train preferences fits block_size=8"):
        PairRows(data, "train", 8)


def test_an_id_outside_the_vocabulary_is_named(folders, tmp_path):
    import shutil

    data, _ = folders["chat"]
    copy = tmp_path / "copy"
    shutil.copytree(data.folder, copy)
    ids = np.fromfile(copy / "train_00000.bin", dtype="<u2")
    ids[3] = 60_000
    ids.tofile(copy / "train_00000.bin")
    with pytest.raises(UserError, match="train_00000.bin: token 3 is 60000, the vocabulary has"):
        UnpackedChatRows(DataFolder(copy), "train", 200).read(np.arange(4))


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_tokenizer_is_trained_on_messages_and_not_on_json(kind, tmp_path):
    """As JSON, these rows would have the names of keys, and backslashes next to every word."""
    import json

    words = ('"left"\n"right"', '"right"\n"left"')
    row = {"chat": lambda n: {"question": f"{n}", "answer": words[0]},
           "preference": lambda n: {"prompt": f"{n}", "chosen": words[0], "rejected": words[1]}}[kind]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(99)))
    prepare_main([f"--kind={kind}", f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'd'}",
                  "--vocab_size=290", "--num_proc=1"])  # fmt: skip
    tokens = Tokenizer.load(tmp_path / "d").hf.get_vocab().keys()
    assert {"user", "assistant", '"left', '"right'} <= tokens
    assert not [token for token in tokens if "role" in token or "content" in token]


def test_rows_with_other_names_and_every_row_counted(tmp_path, capsys):
    import json

    rows = [{"text": f"{n} + 1?", "ans": n + 1.0} for n in range(30)]
    rows += [{"text": "a"}, {"text": "b", "ans": ""}, rows[0]]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n")
    args = [f"--source={tmp_path / 'r.jsonl'}", "--kind=chat", f"--out={tmp_path / 'd'}", "--num_proc=1",
             "--val_fraction=0", "--vocab_size=300"]  # fmt: skip
    for kind, keys in (("chat", "question=..,answer=.."), ("preference", "prompt=..,chosen=..,rejected=..")):
        with pytest.raises(UserError, match=f"--keys={keys} one of text, ans$"):
            prepare_main([*args, f"--kind={kind}"])
    prepare_main([*args, "--keys=question=text,answer=ans"])
    assert DataFolder(tmp_path / "d").meta["rows"] == {
        "in": 34, "kept": 30,
        "skipped": {"no key 'ans'": 1, "empty answer": 1, "duplicate document": 1, "not JSON": 1},
    }  # fmt: skip
    assert "34 in = 30 kept + 4 skipped" in capsys.readouterr().out
    prepare_main([*args, "--keys=question=text,answer=ans"])
    assert "is up to date" in capsys.readouterr().out
    DataFolder(tmp_path / "d").verify()
    mask = tmp_path / "d" / "train_00000.mask"
    mask.write_bytes(b"\1" + mask.read_bytes()[1:])
    with pytest.raises(UserError, match="train_00000.mask: content does not match"):
        DataFolder(tmp_path / "d").verify()
    mask.unlink()
    with pytest.raises(UserError, match="train_00000.mask: shard is missing"):
        DataFolder(tmp_path / "d")
    for args, message in (
        (["--keys=a=b"], "keys=a=b is only for chats and preferences; for text use --text_key="),
        (["--kind=chat", "--keys=question"], "keys=question: must be written as ours=theirs"),
        (["--kind=chat", "--text_key=ans"], "text_key=ans is only for text; for kind=chat use --keys="),
    ):
        with pytest.raises(UserError, match=message):
            prepare_main(args)
