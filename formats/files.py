"""Write files so that a reader never sees half of one; read JSON; lock; hash.

    write_json(path, content)                       # a temporary file, fsync, rename
    with atomic_folder(Path("data/books")) as new:  # build a folder next to its final name, then rename it
        ...
    config = read_json(path)                        # {} if the file is missing
    digest = file_sha256(path)

Every error names the path. This module needs fcntl, so it runs on Linux and macOS (on Windows, use WSL2).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from configurator import UserError

if TYPE_CHECKING:  # prepare.py handles no tensors, so it starts without torch, in a fifth of the time
    from torch import Tensor


@contextlib.contextmanager
def path_in_errors(path: object) -> Iterator[None]:
    """Add `path` to an OSError that is raised inside and names no file, such as the one of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def content_errors(path: object, what: str = "damaged") -> Iterator[None]:
    """Turn every error that the content of a file causes inside into a UserError of one line: "path: what".

    The `tokenizers` library raises a bare Exception or, where its Rust code panics, a BaseException.
    """
    try:
        yield
    except (UserError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        is_missing = isinstance(error, KeyError)
        reason = f"needs the key {error}" if is_missing else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {what} ({' '.join(reason.split())[:200]})") from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append(file: BinaryIO, values: np.ndarray) -> None:
    """Append the bytes of an array to an open file."""
    with path_in_errors(file.name):
        file.write(values.tobytes())


def close_new(file: BinaryIO) -> str:
    """Force a new file to disk and close it. Returns its hash."""
    with file, path_in_errors(Path(file.name)):
        file.flush()
        os.fsync(file.fileno())
    return file_sha256(Path(file.name))


# ---- Files ------------------------------------------------------------------------------------------------

def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new content, never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes do not share one
    try:
        with path_in_errors(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename: otherwise a power cut may leave an empty file
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` of a value as JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate, as in a file name that is not UTF-8, becomes the escape that JSON has for it: \udcff.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_tensors(path: Path, tensors: "dict[str, Tensor]") -> None:
    """Write a safetensors file with the umask's mode; the library alone gives it to its owner only."""
    path.touch()
    mode = path.stat().st_mode
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def require_utf8_name(name: str, remedy: str) -> None:
    """Raise UserError with the remedy for the name of a file or folder that no JSON file can hold."""
    if name.encode("utf-8", "ignore").decode() != name:
        raise UserError(f"{name}: this name is not UTF-8; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} if the file is missing. Raises UserError for anything else."""
    with content_errors(path):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (not a JSON object)")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line, or [] if the file is missing.

    Skips a line that is not a JSON object, or whose "step" is not an integer: a kill or a power cut may leave
    half a line in a log.
    """
    events = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            events += [event] if isinstance(event, dict) and type(event.get("step", 0)) is int else []
    return events


# ---- Folders ----------------------------------------------------------------------------------------------

def lock_path(path: Path) -> int | None:
    """Lock a file (created if missing) or a folder for this process, without waiting.

    Returns an open descriptor, or None if another process holds the lock. Closing the descriptor releases the
    lock. The kernel also releases it when the process ends, even if it is killed.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def sibling_path(target: Path, suffix: str) -> Path:
    """A hidden path next to `target`: the new folder is built at "tmp", the replaced one is kept at "old"."""
    target = target.resolve()
    return target.with_name(f".{target.name}.{suffix}")


@contextlib.contextmanager
def atomic_folder(target: Path, marker: str | None = "meta.json", kind: str = "data set") -> Iterator[Path]:
    """Yield an empty folder to build in, next to `target`. When the block ends, it replaces `target`.

    An existing folder is replaced only if it contains the file `marker`, as all folders of this kind do: a
    mistyped path must not delete somebody's files. None replaces any folder. Raises UserError otherwise, and
    if another process is writing the same folder. After an exception inside the block `target` is unchanged.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"out={target}: is a file; give a folder")
    if marker and target.is_dir() and any(target.iterdir()) and not (target / marker).exists():
        raise UserError(f"out={target}: holds files, but no {kind}; give a new or empty folder")
    target = target.resolve()
    new, old = sibling_path(target, "tmp"), sibling_path(target, "old")
    target.parent.mkdir(parents=True, exist_ok=True)  # its error names a path that the user knows
    new.mkdir(exist_ok=True)
    lock = lock_path(new)
    if lock is None:
        raise UserError(f"out={target}: another process is writing it")
    try:
        for leftover in new.iterdir():  # from a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield new
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)  # a folder that is not empty cannot be replaced in one step
        os.replace(new, target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)
