"""Files of any kind -> rows -> text, in bounded memory, with a reason for every row that cannot be used.

    files, ignored = find_files("notes.md,corpus/*.jsonl.zst")   # files, folders, globs, or "pystdlib"
    for row in read_rows(files, "text"): ...                     # unparsed rows: cheap, for the parent
    text = document(row, text_key="text")                        # the row's text, or Skip: for the workers
    value = row_value(row)                                       # all its keys, for chats and preferences

What is read, and what a row of it is:

    source         row                                                     its place in messages
    .txt .md .py   the whole file; a large file is cut at line ends        notes.txt, notes.txt (piece 2)
    .jsonl         a line                                                  a.jsonl:7
    .json          an element of the array                                 a.json[6]
                   the whole file, if it holds one object                  a.json:1
                   a line, if it holds JSON lines                          a.json:7
    .parquet       a value of the text column, or all columns as a dict    a.parquet:7
    .tsv           a line {1: cell, 2: cell, ..}; benchmarks only          a.tsv:7
    hf:NAME        a row that the package `datasets` streams               hf:NAME:7

Every file may be packed as .gz, .xz or .zst. Lines end at \\n only; U+2028 and the like are text. Left out:
HTML, PDF, archives of several files, and encodings other than UTF-8.
"""

import glob
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from configurator import UserError, optional_import

TEXT_KINDS = {".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js",
              ".ts", ".go", ".rs", ".rb", ".sh", ".sql"}
KINDS = TEXT_KINDS | {".jsonl", ".json", ".parquet"}
PACKED = {".gz", ".xz", ".zst"}
LONGEST_LINE = 32 * 2**20  # bytes; a longer line of JSON is skipped and counted, and never held in memory
LARGEST_JSON = 512 * 2**20  # bytes; a .json is read whole, a .jsonl line by line
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it at the start of a file; it is no text
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # the first two bytes of a text in UTF-16


def printable(text: str) -> str:
    r"""The text with escapes for what UTF-8 or a terminal cannot show: half a character becomes "\ud800"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Row(NamedTuple):
    """A row that is not parsed yet. Its content: bytes of text, bytes of JSON, or a Python value."""

    place: str  # "file:line", for messages
    kind: str  # "text", "json", "value", or "bad" (content is then the reason)
    content: Any


class Skip(Exception):
    """A row that cannot be used. The message is the reason under which the row is counted."""

    def __init__(self, reason: str, **details: Any):
        """reason: may quote the row; what cannot be printed is escaped. details: if a quality rule drops a
        well-formed row, what the rule saw."""
        super().__init__(printable(reason))
        self.details = details


class Blank(Skip):
    """A row with nothing in it."""


# ---- Names -> files ---------------------------------------------------------------------------------------

def file_kind(path: Path) -> str:
    """".jsonl" for both a.jsonl and a.jsonl.zst."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else suffixes[-1]


def files_under(root: Path, leave_out: Callable[[str], bool],
                seen: set[str] | None = None) -> tuple[list[Path], int]:
    """(all files below a folder, sorted; number of ignored files and folders).

    It ignores files and folders if leave_out(name) is True, links that lead nowhere or to a folder that is
    read anyway (such as the folder of the link), and anything that is not a regular file, such as a pipe.
    seen: the real paths of the folders that were entered so far.
    """
    files, folders, ignored = [], [], 0
    seen = {os.path.realpath(root)} if seen is None else seen
    # Links come after folders: a link to one of them is ignored.
    for path in sorted(root.iterdir(), key=lambda path: (path.is_symlink(), path.name)):
        if leave_out(path.name) or os.path.realpath(path) in seen or not (path.is_dir() or path.is_file()):
            ignored += 1
        elif path.is_dir():
            seen.add(os.path.realpath(path))
            folders.append(path)
        else:
            files.append(path)
    for folder in folders:
        inside, left_out = files_under(folder, leave_out, seen)
        files, ignored = files + inside, ignored + left_out
    return sorted(files, key=str), ignored


def standard_library() -> list[Path]:
    """The .py files of the running Python's standard library, about 12 MB on every machine.

    Leaves out its tests and installed packages. Raises UserError if the source is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in files_under(root, left_out.__contains__)[0] if path.suffix == ".py"]
    if not files:
        raise UserError(f"source=pystdlib: {root} holds no .py files; give --source=FILES")
    return files


def hub_hint(name: str, key: str) -> str:
    """A remedy, as the end of an error message, for a name such as wikitext or allenai/c4."""
    # eval.py's --data= reads no hf:NAME.
    is_hub_id = key != "data" and re.fullmatch(r"[\w-]+(/[\w.-]+)?", name) and not os.path.exists(name)
    return f"; for a data set of the Hugging Face hub write --{key}=hf:{name}" if is_hub_id else ""


def find_files(source: str, key: str = "source", kinds: set[str] = KINDS) -> tuple[list[Path], int]:
    """(files, number of ignored files and folders) of a comma-separated list of files, folders and globs.

    Files come in the order of the list, sorted within a folder or glob. Folders are searched to any depth.
    What is left out is counted: files of other kinds, hidden files and folders, and what `files_under`
    ignores. "pystdlib" is the Python standard library. Raises UserError, which names the config key `key`, if
    a name matches no file or names a file of another kind.
    """
    if source == "pystdlib":
        return standard_library(), 0
    files, ignored = [], 0
    for name in [source] if os.path.exists(source) else source.split(","):  # a file name may hold a comma
        if os.path.isdir(name):
            inside, left_out = files_under(Path(name), lambda part: part.startswith("."))
            matches = [path for path in inside if file_kind(path) in kinds]
            ignored += left_out + len(inside) - len(matches)
        else:
            # An existing file wins over a glob, because its name may hold a [.
            names = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
            matches = [path for path in map(Path, names) if path.is_file()]
            ignored += len(names) - len(matches)  # folders that a glob matches
            if unknown := [path for path in matches if file_kind(path) not in kinds]:
                known = f"{' '.join(sorted(kinds))}, each also {' '.join(sorted(PACKED))}"
                raise UserError(f"{key}={unknown[0]}: unknown kind of file (known: {known})")
        if not matches:
            hint = hub_hint(name, key) if file_kind(Path(name)) not in kinds else ""
            raise UserError(f"{key}={name}: no such file, or nothing to read in it{hint}")
        files += matches
    return files, ignored


# ---- Packed files -> bytes --------------------------------------------------------------------------------

class XZReader(io.RawIOBase):
    """The unpacked bytes of an .xz of one or more streams. Raises LZMAError or EOFError if it is damaged.

    lzma.LZMAFile cannot be used: it silently drops a damaged stream that follows a good one.
    """

    def __init__(self, raw: BinaryIO):
        self.raw, self.unpacker = raw, lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of the buffer; returns the number of bytes, 0 at the end."""
        while True:
            packed = b""
            if self.unpacker.eof:
                # The next stream follows at once, or after zeros that pad the file to 4 bytes.
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


def open_packed(path: Path, raw: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    """A stream of unpacked bytes over the open file `raw`."""
    packing = path.suffix.lower()
    if packing in PACKED and not raw.peek(1):
        raise EOFError("an archive has at least a header")
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".xz":
        return io.BufferedReader(XZReader(raw), 2**20)
    if packing == ".zst":
        import pyarrow  # its reader raises an error at a stream that was cut short; some others do not
        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(unpacked, 2**20)
    return raw


def without_mark(stream: Any) -> Any:
    """The stream of bytes; a byte order mark at its beginning is passed over."""
    if stream.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
        stream.read(len(BYTE_ORDER_MARK))
    return stream


# ---- Bytes -> rows ----------------------------------------------------------------------------------------

def cut_near(buffer: bytes, piece: int) -> int:
    """Where to cut text after at most `piece` bytes: after a blank line, else a line end, else a space."""
    for mark in (b"\n\n", b"\n", b" "):
        if (at := buffer.rfind(mark, piece // 2, piece)) >= 0:
            return at + len(mark)
    cut = piece
    while cut > 1 and buffer[cut] & 0xC0 == 0x80:  # a continuation byte: do not cut inside a character
        cut -= 1
    return cut


def text_pieces(stream: BinaryIO, path: Path, piece: int) -> Iterator[Row]:
    """A text file as one row or, if it is longer than `piece` bytes, as several rows of about that size."""
    rest, number, at_end = b"", 0, False
    while rest or not at_end:
        wanted = 2 * piece - len(rest)
        new = stream.read(wanted)
        if not number and new.startswith(UTF16_MARKS):
            # Only the mark is bad UTF-8. The pieces after it would be read as letters with NULs between.
            yield Row(str(path), "bad", "not UTF-8")
            return
        at_end = len(new) < wanted
        buffer = rest + new
        cut = cut_near(buffer, piece) if len(buffer) > piece else len(buffer)
        number += 1
        if buffer or number == 1:  # an empty file is one row, so that it is counted
            place = str(path) if number == 1 and cut == len(buffer) else f"{path} (piece {number})"
            yield Row(place, "text", buffer[:cut])
        rest = buffer[cut:]


def json_lines(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """One row per line."""
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):  # read on to the line's end, a MiB at a time
                line = stream.readline(2**20)
            yield Row(f"{path}:{number}", "bad", f"line over {LONGEST_LINE >> 20} MiB")
        else:
            yield Row(f"{path}:{number}", "json", line)


def object_or_reason(pairs: list[tuple[str, Any]]) -> Any:
    """The object; or the Skip, which `raise_reason` raises for the element that holds the object."""
    try:
        return unique_names(pairs)
    except Skip as reason:
        return reason


def raise_reason(reason: Skip) -> NoReturn:
    raise reason


def json_elements(data: bytes, path: Path) -> Iterator[Row]:
    """One row per element of a JSON array, as JSON text. Raises ValueError if the file is not JSON."""
    for number, value in enumerate(json.loads(data.decode(), object_pairs_hook=object_or_reason)):
        try:
            row = Row(f"{path}[{number}]", "json", json.dumps(value, default=raise_reason).encode())
        except Skip as reason:
            row = Row(f"{path}[{number}]", "bad", str(reason))
        yield row


def is_json_lines(data: bytes) -> bool:
    """True if the first line is a whole JSON value and more lines follow."""
    first, _, rest = data.lstrip(b" \t\r\n").partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def json_file(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """The rows of a .json: the elements of an array, one object, or JSON lines under another name.

    Raises UserError for a file over LARGEST_JSON bytes.
    """
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise UserError(f"{path}: a .json over {LARGEST_JSON >> 20} MiB is not read; make it a .jsonl")
    if data.lstrip().startswith(b"["):
        yield from json_elements(data, path)
    elif is_json_lines(data):
        yield from json_lines(io.BytesIO(data), path)
    else:
        yield Row(f"{path}:1", "json", data)


def table_rows(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """One row per line of a .tsv: {number of the column, from 1: cell}. A quotation mark is an ordinary
    character."""
    text = io.TextIOWrapper(stream, "utf-8", newline="\n")
    for number, line in enumerate(text, 1):
        yield Row(f"{path}:{number}", "value", dict(enumerate(line.rstrip("\r\n").split("\t"), 1)))
    text.detach()  # else the wrapper closes the stream, which is not its own


def parquet_rows(path: Path, text_key: str | None) -> Iterator[Row]:
    """One row per value of a column, or (for None) per row as a dict; 256 rows are in memory at a time.

    Raises UserError if there is no such column.
    """
    import pyarrow.parquet
    # Arrow cannot open a path that is not UTF-8, but Python can.
    with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        if text_key is not None and text_key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {text_key!r}; --text_key= one of {names}")
        batches = file.iter_batches(batch_size=256, columns=None if text_key is None else [text_key])
        values = (value for batch in batches
                  for value in (batch if text_key is None else batch.column(0)).to_pylist())
        for number, value in enumerate(values, 1):
            yield Row(f"{path}:{number}", "value", value)


def file_rows(raw: io.BufferedReader, path: Path, text_key: str | None, piece: int) -> Iterator[Row]:
    """The rows of one open file; arguments as in `read_rows`."""
    kind = file_kind(path)
    if kind == ".parquet":
        return parquet_rows(path, text_key)
    stream = without_mark(open_packed(path, raw))
    if kind in TEXT_KINDS:
        return text_pieces(stream, path, piece)
    if kind == ".tsv":
        return table_rows(stream, path)
    return json_lines(stream, path) if kind == ".jsonl" else json_file(stream, path)


def read_rows(files: list[Path], text_key: str | None = None, piece: int = 2**20) -> Iterator[Row]:
    """Every row of every file, in order.

    text_key: the column of a .parquet; None reads all columns, as a dict. piece: text files are cut near
    every `piece` bytes. Raises UserError for a damaged file, a Parquet file without the column, or a .json
    that is too large.
    """
    for path in files:
        try:
            with open(path, "rb") as raw:
                yield from file_rows(raw, path, text_key, piece)
        except UserError:
            raise
        # Arithmetic and lookup: a value of Parquet that Python cannot hold, such as a date in the year 10000.
        except (ArithmeticError, EOFError, LookupError, OSError, RecursionError, ValueError, lzma.LZMAError,
                zlib.error) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's fault, not the file's, and the error names the path
            raise UserError(f"{path}: damaged: {error}") from None


def hub_rows(name: str, text_key: str | None = None, key: str = "source") -> Iterator[Row]:
    """Stream NAME[:CONFIG[:SPLIT]] of the Hugging Face hub, or a local folder, with the package `datasets`.

    Each row is the value of a column, or (for text_key=None) a dict of all columns. The split is "train" if
    none is given. Raises UserError, which names the config key `key`, for a wrong name or no network.
    """
    datasets = optional_import("datasets", f"{key}=hf:{name}")
    name, config, split = (name.split(":", 2) + ["", ""])[:3]
    if not name:
        raise UserError(f"{key}=hf:: give the name of a data set, as hf:NAME")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(stream, 1):
            place = f"hf:{name}:{number}"
            if text_key is None or text_key in row:
                yield Row(place, "value", row if text_key is None else row[text_key])
            else:
                yield Row(place, "bad", f"no key {text_key!r}")
    except Exception as error:  # `datasets` raises many types, for a name, a network, a file or a value in it
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{key}=hf:{name}: {type(error).__name__}: {reason}") from None


# ---- Rows -> values ---------------------------------------------------------------------------------------

def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object. Raises Skip if a name occurs twice; json.loads would keep the last one."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise Skip("JSON object with a name twice")
    return result


def no_constant(name: str) -> None:
    """Raises Skip for NaN and Infinity, which Python's parser accepts."""
    raise Skip(f"{name} is not JSON")


def decode_utf8(data: bytes) -> str:
    """The bytes as text. Raises Skip if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Skip("not UTF-8") from None


def require_utf8(text: str) -> str:
    r"""The same text. Raises Skip if UTF-8 cannot hold it: JSON may spell half a character as "\ud800"."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Skip("lone surrogate") from None
    return text


def parse_json(line: bytes) -> Any:
    """Strict JSON (RFC 8259, names unique within an object). Raises Skip for anything else."""
    text = decode_utf8(line)
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


def row_value(row: Row) -> Any:
    """The row's content as a Python value: text, or what its JSON holds. Raises Skip if the row is bad."""
    if row.kind == "bad":
        raise Skip(row.content)
    if row.kind == "text":
        return decode_utf8(row.content)
    return parse_json(row.content) if row.kind == "json" else row.content


def require_object(value: Any) -> dict[str, Any]:
    """The same value. Raises Skip unless it is a JSON object."""
    if not isinstance(value, dict):
        raise Skip("not a JSON object")
    return value


def document(row: Row, text_key: str) -> str:
    """The row's text: a JSON row's value under `text_key`, else its content. Raises Skip if it has none."""
    value = row_value(row)
    if row.kind == "json":
        if text_key not in require_object(value):
            raise Skip(f"no key {text_key!r}")
        value = value[text_key]
    if value is None:
        raise Skip(f"{text_key!r} is null")
    if not isinstance(value, str):
        raise Skip(f"{text_key!r} is not a string")
    if not value.strip():
        raise Blank("empty text")
    return require_utf8(value)


def usable_rows(rows: Iterable[Row], read: Callable[[Row], Any],
                prefix: str = "") -> Iterator[tuple[Row, Any]]:
    """(row, read(row)) of each row that is not blank, for sources that are read whole or not at all.

    Raises UserError "<prefix>file:line: reason" for the first row that cannot be used.
    """
    for row in rows:
        try:
            value = read(row)
        except Blank:
            continue
        except Skip as reason:
            raise UserError(f"{prefix}{row.place}: {reason}") from None
        yield row, value
