"""Where documents come from: files of any kind, read row by row with bounded memory, every row accounted for.

    files, ignored = find_files("notes.md,corpus/*.jsonl.zst")   # files, folders, globs; or "pystdlib"
    for row in read_rows(files, "text", piece=2**20): ...        # raw rows: cheap, for the process that reads
    text = document(row, text_key="text")                        # the row's text, or Skip: for the workers
    fields = value_of(row)                                       # all its keys, for chats and preferences

A row is a line of .jsonl, an element of a .json array, a value of a .parquet column, or a text file (.txt .md
.py; a large one is cut at line ends); of evaluation sets, also a line of .tsv or a record of .csv. .gz .xz
.zst are unpacked on the way. Lines end at \\n and nowhere else.
"""

import csv
import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from configurator import UserError

TEXT_KINDS = {".txt", ".md", ".py"}
KINDS = TEXT_KINDS | {".jsonl", ".json", ".parquet"}
TABLE_KINDS = {".tsv", ".csv"}
PACKED = {".gz", ".xz", ".zst"}
LONGEST_LINE = 32 * 2**20  # bytes; a longer line of JSON is skipped and counted, and never held in memory
LARGEST_JSON = 512 * 2**20  # bytes; a .json array is read whole, a .jsonl of any size is not


class Row(NamedTuple):
    """A row before it is looked into. content: bytes of text or JSON, or a value that is already Python's."""

    place: str  # "file:line", for messages
    kind: str  # "text", "json", "value", or "bad" with the reason as content
    content: Any


class Skip(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


class Blank(Skip):
    """A row with nothing in it."""


def find_files(source: str, key: str = "source", kinds: set[str] = KINDS) -> tuple[list[Path], int]:
    """The files that a comma-separated list of files, folders and globs names, and how many it ignores.

    "pystdlib" is the source text of the running Python's standard library, without its tests and installed
    packages. Order: as listed, sorted within a folder or glob. Raises UserError, which names the key that the
    list came from, for a name without files or an unknown kind.
    """
    if source == "pystdlib":
        return standard_library(), 0
    files, ignored = [], 0
    for name in [source] if os.path.exists(source) else source.split(","):  # a comma may be part of a name
        if os.path.isdir(name):
            inside = files_under(Path(name), lambda part: part.startswith("."))
            known = [path for path in inside if file_kind(path) in kinds]
            ignored += len(inside) - len(known)
        else:
            names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))  # so may a [
            known = [path for path in map(Path, names) if path.is_file()]
            if unknown := [path for path in known if file_kind(path) not in kinds]:
                known_kinds = f"{' '.join(sorted(kinds))}, each also {' '.join(sorted(PACKED))}"
                raise UserError(f"{key}={unknown[0]}: unknown kind of file (known: {known_kinds})")
        if not known:
            raise UserError(f"{key}={name}: no such file, or nothing to read in it")
        files += known
    return files, ignored


def standard_library() -> list[Path]:
    """The .py files of the running Python's standard library, without tests: about 12 MB on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in files_under(root, left_out.__contains__) if path.suffix == ".py"]
    if not files:
        raise UserError(f"source=pystdlib: {root} holds no .py files; give --source=FILES")
    return files


def files_under(root: Path, leave_out: Callable[[str], bool]) -> list[Path]:
    """All files below a folder, sorted; names that `leave_out` says True to are not looked into."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not leave_out(name)]
        files += [os.path.join(folder, name) for name in names if not leave_out(name)]
    return [path for path in map(Path, sorted(files)) if path.is_file()]


def file_kind(path: Path) -> str:
    """".jsonl" for both a.jsonl and a.jsonl.zst."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else suffixes[-1]


def open_packed(path: Path, raw: BinaryIO) -> BinaryIO:
    """A stream of unpacked bytes over the open file `raw`."""
    packing = path.suffix.lower()
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".xz":
        return io.BufferedReader(XZReader(raw), 2**20)
    if packing == ".zst":
        import pyarrow  # which, unlike some, notices that a stream has been cut short
        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(unpacked, 2**20)
    return raw


class XZReader(io.RawIOBase):
    """The streams of an .xz one behind the other; lzma.LZMAFile silently drops damaged ones behind the first.
    """

    def __init__(self, raw: BinaryIO):
        self.raw, self.unpacker, self.begun = raw, lzma.LZMADecompressor(lzma.FORMAT_XZ), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill some of the buffer; 0 at the end. Raises LZMAError or EOFError for damage."""
        while True:
            packed = b""
            if self.unpacker.eof:
                packed = self.unpacker.unused_data.lstrip(b"\0") or self.raw.read(2**16).lstrip(b"\0")
                if not packed and not self.raw.peek(1):
                    return 0
                self.unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self.unpacker.needs_input:
                packed = self.raw.read(2**16)
                if not packed:
                    raise EOFError("the stream has been cut short")
            data = self.unpacker.decompress(packed, max_length=len(buffer))
            if data:
                buffer[:len(data)] = data
                return len(data)


def read_rows(files: list[Path], text_key: str | None, piece: int, progress: Any = None) -> Iterator[Row]:
    """Every row of every file, in order; text is cut near every `piece` bytes. progress(n): n bytes read.

    text_key: the column of a .parquet; None takes all of them, as a dict.

    Raises UserError for a damaged archive, a Parquet file without the column, a .json too large to be read
    whole.
    """
    for path in files:
        kind = file_kind(path)
        try:
            with open(path, "rb") as raw:
                if kind == ".parquet":
                    rows = parquet_rows(path, text_key)
                else:
                    stream = open_packed(path, raw)
                    rows = (text_pieces(stream, path, piece) if kind in TEXT_KINDS else
                            table_rows(stream, path, kind) if kind in TABLE_KINDS else
                            json_lines(stream, path) if kind == ".jsonl" else json_elements(stream, path))
                before = 0
                for row in rows:
                    yield row
                    if progress and raw.tell() > before:
                        progress(raw.tell() - before)
                        before = raw.tell()
        except UserError:
            raise
        except (EOFError, OSError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's fault, and it names the file
            raise UserError(f"{path}: damaged: {error}") from None


def text_pieces(stream: BinaryIO, path: Path, piece: int) -> Iterator[Row]:
    """A text file as one row, or cut near every `piece` bytes: at a blank line, a line end or a space."""
    rest, number, first = b"", 0, True
    while True:
        new = stream.read(2 * piece - len(rest))
        buffer = rest + new
        if first:
            buffer, first = buffer.removeprefix(b"\xef\xbb\xbf"), False  # a byte order mark is not text
        last = len(new) < 2 * piece - len(rest)
        cut = len(buffer)
        if not last or cut > piece:
            for mark in (b"\n\n", b"\n", b" "):
                if (at := buffer.rfind(mark, piece // 2, piece)) >= 0:
                    cut = at + len(mark)
                    break
            else:
                cut = min(piece, len(buffer))
                while cut > 1 and buffer[cut:cut + 1] and buffer[cut] & 0xC0 == 0x80:
                    cut -= 1  # not inside a UTF-8 character
        number += 1
        place = str(path) if last and number == 1 else f"{path} (piece {number})"
        if buffer or number == 1:
            yield Row(place, "text", buffer[:cut])
        rest = buffer[cut:]
        if last and not rest:
            return


def json_lines(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """One row a line. A line over LONGEST_LINE is read past in small pieces."""
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(2**20)
            yield Row(f"{path}:{number}", "bad", f"line over {LONGEST_LINE >> 20} MiB")
        else:
            yield Row(f"{path}:{number}", "json", line)


def json_elements(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """One row an element of the array, each as JSON text. One object is one row; lines of JSON are lines."""
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise UserError(f"{path}: a .json over {LARGEST_JSON >> 20} MiB is not read; make it a .jsonl")
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        if is_json_lines(data):
            yield from json_lines(io.BytesIO(data), path)
        else:
            yield Row(f"{path}:1", "json", data)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Row(f"{path}:1", "bad", "not UTF-8")
        return
    decoder, number, at = json.JSONDecoder(), 0, text.index("[") + 1
    while True:
        at = skip_blank(text, at)
        if text[at:at + 1] == "]" and number == 0:
            if text[at + 1:].strip():
                yield Row(f"{path}[0]", "bad", "text behind the array")
            return
        number += 1
        try:
            end = decoder.raw_decode(text, at)[1]
            follow = skip_blank(text, end)
            if text[follow:follow + 1] not in (",", "]"):
                raise ValueError
        except (ValueError, RecursionError):  # who knows where this element ends: the rest is one bad row
            yield Row(f"{path}[{number - 1}]", "bad", "not JSON")
            return
        yield Row(f"{path}[{number - 1}]", "json", text[at:end].encode("utf-8", "surrogatepass"))
        if text[follow] == "]":
            if text[follow + 1:].strip():
                yield Row(f"{path}[{number}]", "bad", "text behind the array")
            return
        at = follow + 1


def is_json_lines(data: bytes) -> bool:
    """Whether the first line is a whole JSON value and more follows."""
    first, _, rest = data.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def skip_blank(text: str, at: int) -> int:
    while text[at:at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def table_rows(stream: BinaryIO, path: Path, kind: str) -> Iterator[Row]:
    """One row a line of .tsv, where a quote is a quote, or a record of .csv: {number of the column: cell}."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="\n" if kind == ".tsv" else "")
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(text, strict=True)
    records = (line.rstrip("\r\n").split("\t") for line in text) if kind == ".tsv" else reader
    number = 1
    for record in records:
        yield Row(f"{path}:{number}", "value", dict(enumerate(record, 1)))
        number = number + 1 if kind == ".tsv" else reader.line_num + 1
    text.detach()


def parquet_rows(path: Path, text_key: str | None) -> Iterator[Row]:
    """One row a value of the column, or a dict of all columns, a batch of rows in memory at a time."""
    import pyarrow.parquet
    with pyarrow.parquet.ParquetFile(path) as file:
        if text_key is not None and text_key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {text_key!r}; --text_key= one of {names}")
        number = 0
        columns = None if text_key is None else [text_key]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for value in (batch if text_key is None else batch.column(0)).to_pylist():
                number += 1
                yield Row(f"{path}:{number}", "value", value)


def hub_rows(name: str, text_key: str | None, key: str = "source") -> Iterator[Row]:
    """Stream NAME[:CONFIG[:SPLIT]] of the Hugging Face hub, or a local folder, through `datasets`.

    Each row is the value of a column, or for None a dict of all of them. key: what a UserError names.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{key}=hf:...: needs the package `datasets` (pip install datasets)") from None
    name, _, rest = name.partition(":")
    if not name:
        raise UserError(f"{key}=hf:: give the name of a data set, as hf:NAME")
    config, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(stream, 1):
            yield Row(f"hf:{name}:{number}", "value", row if text_key is None else row.get(text_key))
    except (OSError, ValueError) as error:  # what `datasets` raises for a name, a network or a file
        raise UserError(f"{key}=hf:{name}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def row_value(row: Row) -> Any:
    """The row's content as Python's: text, or what the JSON says. Raises Skip with the reason if it is bad.
    """
    if row.kind == "bad":
        raise Skip(row.content)
    if row.kind == "text":
        try:
            return row.content.decode("utf-8")
        except UnicodeDecodeError:
            raise Skip("not UTF-8") from None
    return parse_json(row.content) if row.kind == "json" else row.content


def document(row: Row, text_key: str) -> str:
    """The row's text. Raises Skip with the reason if there is none that can be used."""
    value = row_value(row)
    if row.kind == "json":
        if not isinstance(value, dict):
            raise Skip("not a JSON object")
        if text_key not in value:
            raise Skip(f"no key {text_key!r}")
        value = value[text_key]
    if not isinstance(value, str):
        raise Skip(f"{text_key!r} is not a string")
    if not value.strip():
        raise Blank("empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Skip("lone surrogate") from None
    return value


def usable_rows(rows: Iterable[Row], read: Callable[[Row], Any], prefix: str = "") -> Iterator[tuple[Row, Any]]:
    """(row, read(row)) of each row, without blank rows. Raises UserError "<prefix>file:line: reason" for the
    first row that cannot be used: evaluation sets are read in whole or not at all."""
    for row in rows:
        try:
            value = read(row)
        except Blank:
            continue
        except Skip as reason:
            raise UserError(f"{prefix}{row.place}: {reason}") from None
        yield row, value


def parse_json(line: bytes) -> Any:
    """Strict JSON (RFC 8259, with unique names). Raises Skip for everything else, however deep or long."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise Skip("not UTF-8") from None
    if not text.strip():
        raise Blank("blank line")
    try:
        return json.loads(text, object_pairs_hook=unique_names, parse_constant=no_constant)
    except RecursionError:
        raise Skip("JSON nested too deeply") from None
    except json.JSONDecodeError:
        raise Skip("not JSON") from None
    except ValueError:  # Python refuses to read integers of more than 4300 digits
        raise Skip("JSON number too long") from None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise Skip("JSON object with a name twice")
    return result


def no_constant(name: str) -> None:
    raise Skip(f"{name} is not JSON")
