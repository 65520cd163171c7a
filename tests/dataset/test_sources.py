"""dataset/sources.py: every kind of file, every kind of fault, and no row is lost without a reason."""

import gzip
import json
import lzma
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from configurator import UserError
from dataset import sources
from dataset.sources import (
    Row,
    Skip,
    document,
    find_files,
    hub_rows,
    parse_json,
    read_rows,
    standard_library,
)
from prepare import main as prepare_main


def texts_and_reasons(rows, key="text"):
    texts, reasons = [], []
    for row in rows:
        try:
            texts.append(document(row, key))
        except Skip as reason:
            reasons.append((row.place.rsplit("/")[-1], str(reason)))
    return texts, reasons


def read(path, key="text", piece=2**10):
    return texts_and_reasons(read_rows([path], key, piece), key)


def test_lines_end_at_newline_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["one\u2028two\u2029\x85three", "with \\r\r inside", "last"]
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps({"text": t}, ensure_ascii=False).encode() for t in rows)
    )
    assert read(path) == (rows, [])


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a"', "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'{"other": "a"}', "no key 'text'"),
        (b'{"text": 3}', "'text' is not a string"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": " \\n"}', "empty text"),
        (b'{"text": "a", "text": "b"}', "JSON object with a name twice"),
        (b'{"text": "a", "x": {"y": 1, "y": 2}}', "JSON object with a name twice"),
        (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deeply"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "JSON number too long"),
        (b"", "blank line"),
        (b"\xef\xbb\xbf{}", "not JSON"),
    ],
)
def test_each_fault_has_its_reason_and_place(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}'
    path.write_bytes(b"\n".join([good, line, good]) + b"\n")
    assert read(path) == (["good", "good"], [("a.jsonl:2", reason)])


def test_ten_thousand_malformed_rows(tmp_path):
    """Valid rows, cut and changed at random, raise no exception but Skip; in = kept + skipped."""
    generator = random.Random(0)
    lines = []
    for number in range(10_000):
        line = bytearray(
            json.dumps({"text": f"row {number} \u00e9\U0001f600", "n": [number, {"a": None}]}).encode()
        )
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(line))
            change = generator.choice(["flip", "cut", "insert", "repeat"])
            if change == "flip":
                line[at] ^= 1 << generator.randrange(8)
            elif change == "cut":
                del line[at : at + generator.randrange(1, 9)]
            elif change == "insert":
                line[at:at] = generator.choice(
                    [b"NaN", b"\\ud800", b"\xff", b'"', b"{", b"1e999", b"\x00", b"\xe2\x80\xa8"]
                )
            else:
                line += line[at:]
            line = line or bytearray(b"x")
        lines.append(bytes(line).replace(b"\n", b" "))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    texts, reasons = read(path)
    assert len(texts) + len(reasons) == 10_000
    assert len(reasons) > 5_000 and len({reason for _, reason in reasons}) >= 5


def test_a_line_of_a_gigabyte_is_counted_in_little_memory(tmp_path, monkeypatch):
    """Scaled down to a limit of 1 MiB and a line of 64 MiB: the reader holds little more than the limit."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 2**20)
    path = tmp_path / "long.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "last"}\n')
    tracemalloc.start()
    result = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result == (["first", "last"], [("long.jsonl:2", "line over 1 MiB")])
    assert peak < 5 * 2**20


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_every_packing(tmp_path, suffix):
    import pyarrow

    def zstd(data):
        return pyarrow.compress(data, codec="zstd", asbytes=True)

    pack_rows = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    line = b'{"text": "packed"}\n'
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack_rows(line * 1000) + pack_rows(line))  # two frames, as parallel packers write
    assert read(path)[0] == ["packed"] * 1001
    if suffix:
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+: damaged"):
            read(path)
        for content in (b"not packed at all", b""):
            path.write_bytes(content)
            with pytest.raises(UserError, match="damaged"):
                read(path)


@pytest.mark.parametrize(
    "content, texts, reasons",
    [
        ('[{"text": "a"}, {"text": "b"} ]', ["a", "b"], []),
        ("[]", [], []),
        ('{"text": "a"}', ["a"], []),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"], []),
        ('\ufeff[{"text": "a"}]', ["a"], []),
        ('\ufeff{"text": "a"}', ["a"], []),
        (
            '[{"text": "a"}, {"text": "b", "text": "c"}, 3]',
            ["a"],
            [("x.json[1]", "JSON object with a name twice"), ("x.json[2]", "not a JSON object")],
        ),
        (
            '[{"text": "a"}, {"text": NaN}, 3, {"text": "\\ud800"}]',
            ["a"],
            [("x.json[1]", "NaN is not JSON"), ("x.json[2]", "not a JSON object"),
             ("x.json[3]", "lone surrogate")],
        ),
        ("", [], [("x.json:1", "blank line")]),
        ("{", [], [("x.json:1", "not JSON")]),
    ],
)
def test_json_arrays_objects_and_lines(tmp_path, content, texts, reasons):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8")
    assert read(path) == (texts, reasons)


@pytest.mark.parametrize("content", [
    '[{"text": "a"}, {"text": "b"', '[{"text": "a"}, ', '[{"text": "a"} {"text": "b"}]', "[" * 100_000,
    '[{"text": "a"}]\n[{"text": "b"}]', "[] x"])
def test_a_broken_json_array_is_a_damaged_file(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json: damaged: "):
        list(read_rows([path], None, 2**10))


def test_what_follows_the_first_stream_of_an_xz(tmp_path):
    """Another stream may follow, also after zeros. Anything else is damage, not the end."""
    lines = [json.dumps({"text": f"{i}"}).encode() + b"\n" for i in range(100)]
    one, two = lzma.compress(b"".join(lines[:50])), lzma.compress(b"".join(lines[50:]))
    path = tmp_path / "x.jsonl.xz"
    for content in (one + two, one + b"\0" * 8 + two + b"\0" * 4):
        path.write_bytes(content)
        assert read(path) == ([f"{i}" for i in range(100)], [])
    for content in (one + two[:8] + b"?" + two[9:], one + b"junk", one + two[:-4], one[:-4]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.jsonl.xz: damaged"):
            read(path)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert read(path, "body") == (["one", "two"], [("a.parquet:2", "'body' is null")])
    with pytest.raises(UserError, match="no column 'text'; --text_key= one of body, n"):
        read(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged"):
        read(path, "body")


def test_a_value_that_python_cannot_hold_is_one_line(tmp_path):
    """Python has no date after the year 9999. In a column that nobody reads it changes nothing."""
    import pyarrow
    import pyarrow.parquet

    far, day = pyarrow.array([10**15, 0], pyarrow.int64()), pyarrow.array([4 * 10**6, 0], pyarrow.int32())
    path = tmp_path / "a.parquet"
    for bad in (far.cast(pyarrow.timestamp("ms")), day.cast(pyarrow.date32()),
                far.cast(pyarrow.timestamp("us", "Moon/Tycho")),
                pyarrow.array([b"caf\xe9", b"a"]).view(pyarrow.string())):  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "bad": bad}), path)
        with pytest.raises(UserError, match=r"a\.parquet: damaged: "):
            list(read_rows([path], None, 2**10))
        assert read(path) == (["one", "two"], [])


def test_a_parquet_file_whose_name_is_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.parquet")
    os.rename(tmp_path / "a.parquet", name)
    assert read(Path(os.fsdecode(name))) == (["one"], [])


def test_a_large_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} é\n" + "\n" * (i % 7 == 0) for i in range(5000))
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    texts, reasons = read(path)
    assert reasons == [] and "".join(texts) == text
    assert 60 < len(texts) < 200 and all(piece.endswith("\n") for piece in texts)
    path.write_text("é" * 100_000, encoding="utf-8")  # nowhere to cut but between characters
    texts, reasons = read(path)
    assert reasons == [] and "".join(texts) == "é" * 100_000 and len(texts) > 50
    path.write_text("a line\n" * 200)  # 1,400 bytes
    assert [row.place for row in read_rows([path], None, 2**10)] == [f"{path} (piece {n})" for n in (1, 2)]
    path.write_text("short")
    assert [row.place for row in read_rows([path], None, 2**10)] == [str(path)]
    assert read(path) == (["short"], [])
    path.write_bytes(b"")
    assert read(path) == ([], [("a.txt", "empty text")])
    path.write_bytes(b"caf\xe9")
    assert read(path) == ([], [("a.txt", "not UTF-8")])
    for codec in ("utf-16-le", "utf-16-be"):  # as Notepad and PowerShell write it, larger than a piece
        path.write_bytes(("\ufeff" + "a line\r\n" * 5000).encode(codec))
        assert read(path) == ([], [("a.txt", "not UTF-8")])


def test_files_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl.gz", ".git/x.txt", "sub/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, ignored = find_files(str(tmp_path))
    assert [str(f.relative_to(tmp_path)) for f in files] == [
        "a.md",
        "b.txt",
        "sub/c.jsonl.gz",
    ] and ignored == 2  # .git and picture.png
    assert [f.name for f in find_files(f"{tmp_path}/b.txt,{tmp_path}/*.md")[0]] == ["b.txt", "a.md"]
    for source, message in (
        (f"{tmp_path}/nothing", "no such file"),
        (f"{tmp_path}/*.parquet", "no such file"),
        (f"{tmp_path}/sub/picture.png", "unknown kind of file"),
        (f"{tmp_path}/.git/y", "no such file"),
        ("wikitext", "--source=hf:wikitext"),
        ("allenai/c4", "for a data set of the Hugging Face hub write --source=hf:allenai/c4"),
        ("nothing/notes.txt", "nothing to read in it$"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(source)


def test_links_are_followed_once_and_what_is_left_out_is_counted(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "b" / "one.txt", outside / "two.txt", outside / "c" / "three.txt", root / ".hidden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (root / "link").symlink_to(outside)  # read
    for name, target in (("again", outside), ("a", root / "b"), ("loop", root), ("b/up", root),
                         ("nowhere", "missing"), ("gone.txt", "missing.txt")):  # fmt: skip
        (root / name).symlink_to(target)
    (outside / "back").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    files, ignored = find_files(str(root))
    assert sorted(path.name for path in files) == ["one.txt", "three.txt", "two.txt"]
    # again or link, a, loop, b/up, back, nowhere, gone.txt, pipe.txt, .hidden
    assert ignored == 9
    assert [str(path.relative_to(root)) for path in files if path.name == "one.txt"] == ["b/one.txt"]
    (root / "b.txt").write_text("x")
    assert find_files(f"{root}/b*") == ([root / "b.txt"], 1)  # the glob matches a folder, too


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["a,b.txt", "a[1].txt", "a *.txt", "\u00e9 \u4e2d.txt"])
def test_an_existing_file_is_read_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert find_files(str(tmp_path / name)) == ([tmp_path / name], 0)


def test_standard_library_has_no_tests_in_it():
    files = standard_library()
    assert len(files) > 500 and not any("test" in f.parts or "site-packages" in f.parts for f in files)


def test_a_data_set_through_datasets(tmp_path):
    """A local folder is read by the same code as a hub id."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts_and_reasons(hub_rows(str(tmp_path), "text"))[0] == ["one", "two"]
    assert texts_and_reasons(hub_rows(str(tmp_path), "body"), "body")[1][0][1] == "no key 'body'"
    with pytest.raises(UserError, match="source=hf:"):
        list(hub_rows(str(tmp_path / "nothing"), "text"))


def test_a_hub_source_is_read_twice_and_copied_never(tmp_path, monkeypatch):
    """Once for the tokenizer and once to encode. The only file with the text is the source itself."""
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = tmp_path / "hub" / "train.jsonl"
    source.parent.mkdir()
    texts = [f"a text that is easy to find, {i}" for i in range(99)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args = [f"--source=hf:{source.parent}", f"--out={tmp_path / 'd'}", "--vocab_size=300", "--num_proc=1"]
    prepare_main(args)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if texts[42].encode() in path.read_bytes()] == [source]


def test_strictness_of_parse_json():
    assert parse_json(b'{"a": [1, 2.5, "x", null, true]}') == {"a": [1, 2.5, "x", None, True]}
    assert document(Row("p", "value", "v"), "text") == "v"
