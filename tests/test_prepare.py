"""prepare.py, dataset/shards.py and dataset/dataloader.py: what is on disk, what a step reads, and that every
fault is a one-line message."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare as prepare_module
from configurator import UserError
from dataset import problems
from dataset import shards as shards_module
from dataset.dataloader import Mix, Rows, parse_mix, rank_batches, text_batch, validation_rows
from dataset.shards import DataFolder
from dataset.sources import Row
from formats.files import atomic_folder
from formats.tokenizer import Tokenizer
from prepare import PrepareConfig, main, prepare, prepare_problems
from tests.conftest import ROOT, config_of


def documents(count, start=0):
    return [
        f"document {i}: " + " ".join(str(i * j) for j in range(i % 13 + 3)) + "\n"
        for i in range(start, start + count)
    ]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def decoded(folder, split):
    """The documents of a split, read with np.memmap and the tokenizer alone, not with DataFolder."""
    meta, tokenizer = json.loads((folder / "meta.json").read_text()), Tokenizer.load(folder)
    ids = np.concatenate(
        [
            np.memmap(folder / s["name"], dtype="<u2", mode="r")
            for s in meta["shards"]
            if s["name"].startswith(split)
        ]
    )
    assert ids[-1] == tokenizer.eot_id
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    return [
        tokenizer.decode(part[part != tokenizer.eot_id].tolist()) for part in np.split(ids, ends + 1)[:-1]
    ]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_every_document_once_on_one_side(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2**12)
    texts = documents(600)
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts[:50] + [" "])
    data = prepare(
        config_of(
            PrepareConfig,
            f"--source={source}",
            f"--out={tmp_path / 'd'}",
            "--vocab_size=300",
            "--val_fraction=0.2",
            f"--num_proc={num_proc}",
        )
    )
    train, val = decoded(tmp_path / "d", "train"), decoded(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert [t for t in texts if t in set(train)] == train  # in the order of the source
    assert 60 < len(val) < 180
    assert data.meta["rows"] == {
        "in": 651,
        "kept": 600,
        "skipped": {"duplicate document": 50, "empty text": 1},
    }
    assert data.meta["documents"] == {"train": len(train), "val": len(val)}
    assert data.meta["bytes"]["val"] == sum(len(text.encode()) for text in val)
    data.verify()
    # The same documents are on the same side when they are in another file, among other documents.
    other = write_jsonl(tmp_path / "b.jsonl", documents(50, start=600) + texts)
    prepare(
        config_of(
            PrepareConfig,
            f"--source={other}",
            f"--out={tmp_path / 'e'}",
            "--vocab_size=300",
            "--val_fraction=0.2",
            "--num_proc=1",
        )
    )
    assert set(val) <= set(decoded(tmp_path / "e", "val"))


@pytest.mark.parametrize("content", [b"x" * 2**19, "x" * 2**19, {"messages": [{"content": "x" * 2**19}]}])
def test_batches_are_of_equal_size_whatever_a_row_is(content):
    batches = list(prepare_module.in_batches([Row("a", "value", content)] * 5))
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_processes_do_not_change_a_byte(tmp_path, text_folder):
    names = []
    for num_proc in (1, 2):
        folder = tmp_path / str(num_proc)
        prepare(
            config_of(
                PrepareConfig,
                f"--source={text_folder}",
                f"--out={folder}",
                "--vocab_size=400",
                f"--num_proc={num_proc}",
            )
        )
        names.append(sorted((path.name, path.read_bytes()) for path in folder.iterdir()))
    assert names[0] == names[1]


def test_shards_roll_and_rows_do_not_span_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2**11)
    source = write_jsonl(tmp_path / "a.jsonl", documents(400))
    data = prepare(
        config_of(
            PrepareConfig, f"--source={source}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"
        )
    )
    train = data.shards["train"]
    assert len(train) > 3 and sum(map(len, train)) == data.meta["tokens"]["train"]
    rows = Rows(data, "train", 64)
    assert len(rows) == sum((len(shard) - 1) // 64 for shard in train)
    expected = [shard[i * 64 : i * 64 + 65] for shard in train for i in range((len(shard) - 1) // 64)]
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(rows.read(order), np.stack(expected)[order])


def test_same_inputs_do_nothing_others_are_refused(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    args = [
        f"--source={write_jsonl(source, documents(300))}",
        f"--out={tmp_path / 'd'}",
        "--vocab_size=300",
        "--num_proc=1",
    ]
    main(args)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    capsys.readouterr()
    main(args)
    main([*args, "--num_proc=2"])
    assert capsys.readouterr().out.count("is up to date") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    with pytest.raises(UserError, match="val_fraction differ"):
        main([*args, "--val_fraction=0.5"])
    write_jsonl(source, documents(301))
    with pytest.raises(UserError, match="content differ.*--overwrite=True"):
        main(args)
    main([*args, "--overwrite=True"])
    assert DataFolder(tmp_path / "d").meta["rows"]["in"] == 301
    main([*args, "--verify=True"])


def test_the_same_bytes_as_rows_of_another_kind_are_other_inputs(tmp_path):
    write_jsonl(tmp_path / "a.txt", documents(300))
    args = [f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"]
    main([*args, f"--source={tmp_path / 'a.txt'}"])
    for name in ("a.md", "a.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / "a.txt").read_bytes())
    main([*args, f"--source={tmp_path / 'a.md'}"])  # text, as before
    with pytest.raises(UserError, match=r"made from other inputs \(kinds differ\)"):
        main([*args, f"--source={tmp_path / 'a.jsonl'}"])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["inputs"].pop("kinds") == []
    (tmp_path / "d" / "meta.json").write_text(json.dumps(meta))
    main([*args, f"--source={tmp_path / 'a.jsonl'}"])  # a folder of an earlier version


def test_a_data_set_in_its_own_source_is_not_read(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", documents(300))
    args = [f"--source={tmp_path}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"]
    main(args)
    main(args)
    assert "is up to date" in capsys.readouterr().out


def test_max_tokens_stops_at_a_document(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300))
    args = [f"--source={source}", "--vocab_size=300", "--num_proc=1", "--val_fraction=0.1"]
    whole = prepare(config_of(PrepareConfig, *args, f"--out={tmp_path / 'all'}"))
    limit = sum(whole.meta["tokens"].values()) // 2
    part = prepare(config_of(PrepareConfig, *args, f"--out={tmp_path / 'part'}", f"--max_tokens={limit}"))
    assert limit <= sum(part.meta["tokens"].values()) < limit + 100
    assert part.meta["rows"]["in"] == part.meta["rows"]["kept"] == sum(part.meta["documents"].values()) < 300
    assert (
        decoded(tmp_path / "part", "train")
        == decoded(tmp_path / "all", "train")[: part.meta["documents"]["train"]]
    )


def test_strict_stops_at_the_first_bad_row(tmp_path):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, documents(5))
    source.write_text(source.read_text() + "{\n")
    args = [f"--source={source}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"]
    with pytest.raises(UserError, match=r"a\.jsonl:6: not JSON"):
        main([*args, "--strict=True"])
    with pytest.raises(UserError, match="no data set here"):
        DataFolder(tmp_path / "d")


def test_names_that_are_not_utf8(tmp_path, monkeypatch, capsys):
    """Linux allows them. Places in messages and in contaminated.json have escapes."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [*documents(100), " "])
    (folder / os.fsdecode(b"\xff.txt")).write_text("".join(documents(50, start=200)))
    write_jsonl(folder / "eval.jsonl", documents(20)[9:])
    monkeypatch.chdir(folder)
    args = ["--source=.", "--out=d", "--vocab_size=300", "--num_proc=1", "--decontaminate=eval.jsonl"]
    main(args)
    assert "1 skipped: empty text" in capsys.readouterr().out
    main(["--out=d", "--verify=True"])
    removed = json.loads((folder / "d" / "contaminated.json").read_text("utf-8"))["removed"]
    assert len(removed) > 9 and {each["row"].split(":")[0] for each in removed} == {"a.jsonl", "eval.jsonl"}
    assert Mix("d", 64, seed=0).samples(0, 4).shape == (4, 65)
    main(["--source=..", "--out=e", *args[2:]])
    removed = json.loads((folder / "e" / "contaminated.json").read_text("utf-8"))["removed"]
    assert any("caf\udce9/a.jsonl" in each["row"] for each in removed)


def test_names_beyond_ascii_in_the_c_locale(tmp_path):
    folder = tmp_path / "\u00fcn\u00ef \u4e2d"
    folder.mkdir()
    write_jsonl(folder / "\u00e4.jsonl", [*documents(100), " "])
    command = [sys.executable, str(ROOT / "prepare.py"), f"--source={folder}", f"--out={folder / 'd'}",
               "--vocab_size=300", "--num_proc=1"]  # fmt: skip
    process = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "\u4e2d/\u00e4.jsonl:101" in process.stdout.decode("utf-8")
    assert DataFolder(folder / "d").meta["source"] == str(folder)


@pytest.mark.parametrize("source", ["a.jsonl", "problems", "hf:hub"])
def test_what_is_printed_lines_up_and_begins_at_once(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "ROWS", 300)
    (tmp_path / "hub").mkdir()
    for name in ("a.jsonl", "hub/train.jsonl"):
        write_jsonl(tmp_path / name, [*documents(100), " "])
    write_jsonl(tmp_path / "eval.jsonl", documents(9)[6:])
    main([f"--source={source}", "--out=d", "--vocab_size=300", "--num_proc=1", "--decontaminate=eval.jsonl",
          "--val_fraction=0.3"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split()[0] for line in lines if line[0] != " "]
    assert labels == ["reading", "items", "tokens", "rows", "speed", "overlap", "data"]
    assert lines[0].split()[1].rstrip(":") == source
    assert all(line[:10].endswith("  ") and line[10] != " " for line in lines)


def hashes_of(texts):
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]


@pytest.mark.parametrize("name, count", [("a.txt", 600), ("a.txt", 20), ("a.jsonl", 8), ("a.jsonl", 2)])
def test_a_small_first_file_has_a_document_on_each_side(tmp_path, capsys, name, count):
    """If no document falls to validation, the one with the smallest hash is taken: a function of the hash."""
    for seed in range(20):  # with the default val_fraction=0.03
        texts = documents(count, start=1000 * seed)
        if name == "a.txt":
            (tmp_path / name).write_text("".join(texts))
        else:
            write_jsonl(tmp_path / name, texts)
        out = tmp_path / str(seed)
        main([f"--source={tmp_path / name}", f"--out={out}", "--vocab_size=300", "--num_proc=1"])
        train, val = decoded(out, "train"), decoded(out, "val")
        assert not set(train) & set(val) and sorted("".join(train + val)) == sorted("".join(texts))
        limit = 0.03 * 2**64
        if min(hashes_of(train + val)) < limit:
            assert set(val) == {text for text in train + val if hashes_of([text])[0] < limit}
            assert "split " not in capsys.readouterr().out
        else:
            assert val == [min(train + val, key=lambda text: hashes_of([text])[0])]
            assert "0.03: validation gets one, chosen by its hash" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["One line, and no more.", "a word " * 500, "\u00e9\u4e2d\U0001f600" * 300])
def test_a_text_of_one_line(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    main([f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'd'}", "--vocab_size=257", "--num_proc=1"])
    train, val = decoded(tmp_path / "d", "train"), decoded(tmp_path / "d", "val")
    assert train and val and set("".join(train + val)) == set(text)


def test_training_gets_a_document_too(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", texts := documents(2))
    args = [f"--source={source}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"]
    main([*args, "--val_fraction=0.999999"])
    assert decoded(tmp_path / "d", "train") == [max(texts, key=lambda text: hashes_of([text])[0])]
    assert "split     few documents for val_fraction=0.999999: training gets one" in capsys.readouterr().out


def test_too_little_text_says_so(tmp_path):
    for content in ('{"text": "alone"}\n', '{"text": "alone"}\n' * 9):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"none of 1 documents fell to (train|val) with"):
            main([f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'd'}", "--num_proc=1"])
    (tmp_path / "b.txt").write_text("".join(f"a single small file, line {i}\n" for i in range(900)))
    args = [f"--source={tmp_path / 'b.txt'}", f"--out={tmp_path / 'e'}", "--num_proc=1"]
    main([*args, "--val_fraction=0.2"])


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--vocab_size=200", "257"),
        ("--val_fraction=1.0", "below 1"),
        ("--max_tokens=0", "positive"),
        ("--source=nowhere.txt", "no such file"),
        ("--tokenizer=nowhere", "no tokenizer there"),
        ("--source=hf:no/such:data", "source=hf:no/such"),
        ("--source=hf:", "give the name of a data set"),
        ("--source=wikitext", "write --source=hf:wikitext"),
        ("--vocab_size=1e9", "at most 1,000,000"),
        ("--out=", "no value"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, monkeypatch, arg, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        main([f"--out={tmp_path / 'd'}", "--num_proc=1", arg])


@pytest.mark.parametrize("source, name", [
    ("books/,notes.jsonl", "books"), ("corpus/*", "corpus"), ("a/notes.txt.gz", "notes"),
    ("hf:some/set:config:split", "set"), ("corpus/*.md", None), ("a/b?.txt", None), ("[ab].txt", None),
    (".", None), ("./", None), ("..", None), (".notes.txt", None), ("/", None)])  # fmt: skip
def test_the_folders_name(source, name):
    if name:
        assert PrepareConfig(source=source).folder == Path("data") / name
    else:
        assert PrepareConfig(source=source, out="data/mine").folder == Path("data/mine")
        with pytest.raises(UserError, match="no name; add --out=data/NAME"):
            PrepareConfig(source=source)


def test_an_interrupt_leaves_no_data_set(tmp_path):
    """Ctrl-C during the work of two workers: exit code 130, no traceback, and no folder is left."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " + "some words in a row " * 40}) + "\n")
    (tmp_path / "small.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(200)))
    main(
        [
            f"--source={tmp_path / 'small.jsonl'}",
            f"--out={tmp_path / 't'}",
            "--vocab_size=300",
            "--num_proc=1",
        ]
    )
    command = [
        sys.executable,
        str(ROOT / "prepare.py"),
        f"--source={tmp_path / 'a.jsonl'}",
        f"--out={tmp_path / 'd'}",
        f"--tokenizer={tmp_path / 't'}",
        "--num_proc=2",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    deadline = time.time() + 60
    while not list((tmp_path / ".d.tmp").glob("train*.bin")) and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the workers too
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert not (tmp_path / "d").exists() and not (tmp_path / ".d.tmp").exists()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """SIGTERM and SIGKILL end the parent before it can stop its workers."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " + "some words in a row " * 40}) + "\n")
    args = [f"--source={tmp_path / 'a.jsonl'}", "--vocab_size=300", "--num_proc=2"]
    for received in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / received.name
        process = subprocess.Popen([sys.executable, str(ROOT / "prepare.py"), f"--out={out}", *args],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while not list((tmp_path / f".{out.name}.tmp").glob("train*.bin")) and time.time() < deadline:
            time.sleep(0.02)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 2
        process.send_signal(received)
        process.wait()
        while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.time() < deadline:
            time.sleep(0.02)
        assert time.time() < deadline


def test_what_is_in_the_folder_is_safe(tmp_path):
    """Other files are never replaced, and a failed run leaves the data set that was there."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(200)))
    args = [f"--source={source}", "--vocab_size=300", "--num_proc=1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pytorch_model.bin").write_text("precious")
    with pytest.raises(UserError, match="holds files, but no data set"):
        main([*args, f"--out={tmp_path / 'mine'}"])
    with pytest.raises(UserError, match="is a file"):
        main([*args, f"--out={source}"])
    (tmp_path / "empty").mkdir()
    main([*args, f"--out={tmp_path / 'empty'}"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()}
    for mistake, message in (("--text_key=txt", "no row can be used: no key 'txt'; --text_key= one of text"),
                             ("--tokenizer=gtp2", "no tokenizer there .give gpt2, a .gguf")):
        wrong = [arg for arg in args if "vocab" not in arg or "key" in mistake]
        with pytest.raises(UserError, match=message):
            main([*wrong, f"--out={tmp_path / 'empty'}", "--overwrite=True", mistake])
        assert {path.name: path.read_bytes() for path in (tmp_path / "empty").iterdir()} == before
    main([*args, f"--out={tmp_path / 'empty'}", "--overwrite=True", "--val_fraction=0.2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "empty", "mine"]


def test_the_embedded_problems_follow_the_model_and_nothing_else(chat_folder, tmp_path, monkeypatch, capsys):
    """Made again for another tokenizer; a folder that a user made with other settings is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "ROWS", 300)
    args = ["--kind=chat", "--source=problems", "--out=data/problems_chat", "--num_proc=1"]
    main([*args, "--vocab_size=300"])
    tokenizer = DataFolder("data/problems_chat").meta["tokenizer_sha256"]
    assert prepare_problems("chat", str(chat_folder)).meta["tokenizer_sha256"] != tokenizer
    assert "is up to date" not in capsys.readouterr().out
    prepare_problems("chat", str(chat_folder))
    assert "is up to date" in capsys.readouterr().out
    main([*args, "--vocab_size=300", "--val_fraction=0.2", "--overwrite=True"])
    with pytest.raises(UserError, match=r"problems_chat: was made with other settings \(val_fraction"):
        prepare_problems("chat", str(chat_folder))
    assert DataFolder("data/problems_chat").meta["inputs"]["val_fraction"] == 0.2


def test_two_prepares_of_one_folder(tmp_path):
    with atomic_folder(tmp_path / "d"):
        with pytest.raises(UserError, match="another process is writing it"):
            with atomic_folder(tmp_path / "d"):
                pass
        assert (tmp_path / ".d.tmp").exists()
    assert (tmp_path / "d").exists()


# ---- Opening ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "copy"))


def test_every_fault_of_a_folder_is_one_line(copy):
    shard = copy / "train_00000.bin"
    whole = shard.read_bytes()
    for content, message in (
        (whole[:-2], "bytes, meta.json says"),
        (whole[:-1], "bytes, meta.json says"),
        (b"", "0 bytes"),
    ):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"train_00000\.bin: .*{message}"):
            DataFolder(copy)
    shard.unlink()
    with pytest.raises(UserError, match="shard is missing"):
        DataFolder(copy)
    shard.write_bytes(whole)
    (copy / "train_00001.bin").write_bytes(b"xx")
    with pytest.raises(UserError, match="not in meta.json"):
        DataFolder(copy)
    (copy / "train_00001.bin").unlink()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match="does not match its sha256"):
        DataFolder(copy).verify()
    shard.write_bytes(whole)
    meta = json.loads((copy / "meta.json").read_text())
    for key, value in (("vocab_size", None), ("vocab_size", "x"), ("bytes", {"train": 5}), ("bytes", 3),
                       ("inputs", []), ("kind", 3), ("shards", [{"name": "train_00000.bin", "tokens": 5}]),
                       ("shards", [{"name": 3, "tokens": "x", "sha256": ""}]), ("dtype", "x"), ("shards", 3),
                       ("dtype", "float16"), ("dtype", "uint8"), ("dtype", "int64"), ("dtype", ">u2"),
                       ("dtype", "object"), ("kind", "texts"), ("vocab_size", True), ("vocab_size", -1),
                       ("vocab_size", 2**63), ("bytes", {"train": 5, "val": 10**400}),
                       ("bytes", {"train": 5, "val": -5}), ("bytes", {"train": 5, "val": float("nan")}),
                       ("shards", meta["shards"] * 2), ("shards", [meta["shards"][0] | {"tokens": 0}]),
                       ("shards", [meta["shards"][0] | {"tokens": True}]), ("shards", [None]),
                       ("shards", [meta["shards"][0] | {"name": "../copy/train_00000.bin"}]),
                       ("shards", [meta["shards"][0] | {"name": "test_00000.bin"}])):
        (copy / "meta.json").write_text(json.dumps(meta | {key: value}))
        with pytest.raises(UserError, match="meta.json: not a data set's"):
            DataFolder(copy)
    for text in ("[" * 100_000 + "]" * 100_000, '{"kind": ' * 5000, "[]", "null", "\ud800", "\xff"):
        (copy / "meta.json").write_bytes(text.encode("latin-1", "backslashreplace"))
        with pytest.raises(UserError, match="meta.json: not a data set's"):
            DataFolder(copy)
    (copy / "meta.json").write_text(json.dumps(meta | {"kind": "chat"}))
    with pytest.raises(UserError, match="not a data set's .ValueError: shards cannot be right"):
        Mix(str(copy), 64, seed=0)
    (copy / "meta.json").write_text(json.dumps(meta))
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(UserError, match="tokenizer.json is not the one it was made with"):
        Mix(str(copy), 64, seed=0)
    (copy / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="not a data set's"):
        DataFolder(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(UserError, match="no data set here"):
        DataFolder(copy)


@pytest.mark.parametrize("bad", [500, 65535])
def test_an_id_outside_the_vocabulary_is_named(copy, bad):
    ids = np.fromfile(copy / "train_00000.bin", dtype="<u2")
    ids[130] = bad
    ids.tofile(copy / "train_00000.bin")
    with pytest.raises(UserError, match=rf"train_00000\.bin: token 130 is {bad}, the vocabulary has 500 ids"):
        Rows(DataFolder(copy), "train", 64).read(np.arange(10))


@pytest.mark.parametrize("vocab_size, dtype", [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_large_vocabularies_are_wider_on_disk(tmp_path, monkeypatch, vocab_size, dtype):
    """The last two ids of the vocabulary come back unchanged."""
    tokenizer = Tokenizer.train(["some text to train on"], 260)
    monkeypatch.setattr(Tokenizer, "train", classmethod(lambda cls, texts, size: tokenizer))
    tokenizer.vocab_size = vocab_size
    tokenizer.encode = lambda text: [vocab_size - 1, vocab_size - 2, 1] * 30
    source = write_jsonl(tmp_path / "a.jsonl", documents(100))
    data = prepare(config_of(PrepareConfig, f"--source={source}", f"--out={tmp_path / 'd'}", "--num_proc=1"))
    assert data.meta["dtype"] == dtype
    assert DataFolder(tmp_path / "d").shards["train"][0][:2].tolist() == [vocab_size - 1, vocab_size - 2]


def test_ten_gigabytes_open_at_once(tmp_path, data):
    """40 sparse shards of 256 MiB each: opening checks sizes and does not read the contents."""
    meta = json.loads((data / "meta.json").read_text())
    meta["shards"] = [{"name": f"train_{i:05d}.bin", "tokens": 2**27, "sha256": ""} for i in range(40)]
    for shard in meta["shards"]:
        with open(tmp_path / shard["name"], "wb") as file:
            file.truncate(2**28)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    begin = time.process_time()
    folder = DataFolder(tmp_path)
    assert time.process_time() - begin < 0.1
    assert sum(map(len, folder.shards["train"])) == 40 * 2**27


# ---- Duplicates, mixes, batches ---------------------------------------------------------------------------


def test_parse_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert parse_mix("a:3,b:1") == [(Path("data/a"), 0.75), (Path("data/b"), 0.25)]
    assert parse_mix("elsewhere") == [(Path("elsewhere"), 1.0)]
    assert parse_mix("/abs/x:y") == [(Path("/abs/x:y"), 1.0)]
    for spec in ("a:0,b:1", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="must be positive"):
            parse_mix(spec)


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch, data):
    """A file is answered with the command that makes a data set of it; else, the data sets are listed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data/nosuch: no data set here .*; prepare.py makes one$"):
        Mix("nosuch", 64, seed=0)
    for name in ("books", "code"):
        shutil.copytree(data, tmp_path / "data" / name)
    with pytest.raises(UserError, match="no data set here .*; data/ has books, code$"):
        Mix("nosuch", 64, seed=0)
    (tmp_path / "my notes.txt").write_text("x")
    (tmp_path / "data" / "chats.jsonl").write_text("x")
    for spec, message in (
        ("my notes.txt", r"^dataset=my notes.txt: is a file; first run: python prepare.py "
                         r"--source='my notes.txt' --out='data/my notes'$"),
        (f"{tmp_path}/data/chats.jsonl:0.5,books:0.5", r"--out=data/chats \(chats and .*: add --kind= and"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Mix(spec, 64, seed=0)


def test_interleave_by_hand(data):
    """The example in the docstring of Mix.interleave: turn j of a folder is at time (j + 1/2) / weight."""
    mix = Mix(str(data), 64, seed=0)
    mix.weights = [0.7, 0.3]
    assert [round((j + 0.5) / 0.7, 2) for j in range(7)] == [0.71, 2.14, 3.57, 5.0, 6.43, 7.86, 9.29]
    assert [round((j + 0.5) / 0.3, 2) for j in range(3)] == [1.67, 5.0, 8.33]
    owners, numbers = mix.interleave(0, 10)
    assert "".join("ab"[owner] for owner in owners) == "abaaabaaba"
    assert numbers.tolist() == [0, 0, 1, 2, 3, 1, 4, 5, 2, 6]
    assert [part.tolist() for part in mix.interleave(4, 3)] == [[0, 1, 0], [3, 1, 4]]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [0.5, 0.49, 0.01], [1 / 3, 1 / 3, 1 / 3]])
def test_samples_are_one_sequence_however_it_is_cut(data, weights):
    """Each folder's samples come in order, without gaps and in proportion; ranges can be cut anywhere."""
    mix = Mix(str(data), 64, seed=0)
    mix.weights = weights
    owners, numbers = mix.interleave(0, 3000)
    for folder, weight in enumerate(weights):
        turns = numbers[owners == folder]
        assert np.array_equal(turns, np.arange(len(turns)))
        share = np.cumsum(owners == folder) - weight * np.arange(1, 3001)
        assert np.abs(share).max() <= 1.5
    for size in (1, 7, 64):
        cut = [mix.interleave(first, min(size, 3000 - first)) for first in range(0, 3000, size)]
        assert np.array_equal(np.concatenate([o for o, _ in cut]), owners)
        assert np.array_equal(np.concatenate([n for _, n in cut]), numbers)


def test_an_epoch_is_every_row_once_in_a_new_order(data):
    mix = Mix(str(data), 64, seed=5)
    count = len(mix.rows[0])
    first, second = mix.samples(0, count), mix.samples(count, count)
    rows = mix.rows[0].read(np.arange(count))
    assert not np.array_equal(first, rows) and not np.array_equal(first, second)
    assert np.array_equal(np.unique(first, axis=0), np.unique(rows, axis=0))
    assert np.array_equal(np.unique(second, axis=0), np.unique(rows, axis=0))
    assert mix.epoch_samples() == count
    assert not np.array_equal(Mix(str(data), 64, seed=6).samples(0, 8), first[:8])


def test_folders_of_different_tokenizers_do_not_mix(data, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300))
    prepare(
        config_of(
            PrepareConfig, f"--source={source}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"
        )
    )
    with pytest.raises(UserError, match="different tokenizers"):
        Mix(f"{data}:1,{tmp_path / 'd'}:1", 64, seed=0)


def test_rows_longer_than_the_text_are_refused(data):
    with pytest.raises(UserError, match=r"make no row of block_size=10000000 \+ 1"):
        Mix(str(data), 10_000_000, seed=0)


def test_text_batch_by_hand():
    batch = text_batch(np.array([[5, 9, 0, 7, 8, 0, 3]]), eot_id=0)
    assert batch["input_ids"].tolist() == [[5, 9, 0, 7, 8, 0]]
    assert batch["targets"].tolist() == [[9, 0, 7, 8, 0, 3]]
    assert batch["document_ids"].tolist() == [
        [0, 0, 1, 1, 1, 2]
    ]  # the end-of-text token opens the next document
    assert batch["count"] == 6 and batch["context"] == (4 + 9 + 1) / 6


def test_sink_tokens_before_a_row_by_hand(data):
    """They are read and predict nothing, so that every token of the text is a target once."""
    batch = text_batch(np.array([[5, 9, 7], [7, 8, 6]]), sinks=[0, 0])
    assert batch["input_ids"].tolist() == [[0, 0, 5, 9], [0, 0, 7, 8]]
    assert batch["targets"].tolist() == [[-100, -100, 9, 7], [-100, -100, 8, 6]]
    assert batch["count"] == 4 and batch["context"] == 4
    folder = DataFolder(data)
    short, rows = Rows(folder, "train", 60), Rows(folder, "train", 64, sink_tokens=4)
    assert len(rows) == len(short) and rows.T == 60
    assert np.array_equal(rows.read(np.arange(3)), short.read(np.arange(3)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 64 * 7, 1])
def test_validation_is_shared_without_loss(data, world_size, limit):
    rows = Rows(DataFolder(data), "val", 64)
    total = validation_rows(rows, limit)
    assert total == (len(rows) if limit is None else max(1, limit // 64))
    ranks = [list(rank_batches(total, 4, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # all ranks run the same number of forward passes
    assert sorted(number for batches in ranks for batch in batches for number in batch) == [*range(total)]
