"""Writing files so that a reader never sees half of one, and hashing them.

    write_json(path, content)                     # a temporary file, fsync, rename
    with folder_to_be(Path("data/books")) as new: # build a folder next to its final name, then rename it
        ...
    file_sha256(path)

Every error names the path. fcntl is needed, so this runs on Linux and macOS (on Windows: WSL2).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file, as that of a write to a full disk, is given this one's name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class HashedFile:
    """A new file, and the SHA-256 of what was written to it."""

    def __init__(self, path: Path):
        self.path, self.digest, self.file = path, hashlib.sha256(), open(path, "wb")

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        with path_in_errors(self.path):
            self.file.write(data)
        self.digest.update(data)

    def close(self) -> str:
        """Force it to disk; returns the hash."""
        with path_in_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        return self.digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step: it is old or new, never half."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with path_in_errors(path):
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sibling_path(target: Path, word: str) -> Path:
    """Where, beside `target`, what is to take its place ("tmp") or had it ("old") is kept for the moment."""
    target = target.resolve()
    return target.with_name(f".{target.name}.{word}")


@contextlib.contextmanager
def atomic_folder(target: Path, mark: str = "meta.json", kind: str = "data set") -> Iterator[Path]:
    """An empty folder beside `target` to build in, which then takes its place. UserError if it may not: what
    stands there already must have the file `mark`, as folders of this kind do."""
    if target.exists() and not target.is_dir():
        raise UserError(f"out={target}: is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).exists():
        raise UserError(f"out={target}: holds files, but no {kind}; give a folder that is new or empty")
    target = target.resolve()
    beside, before = sibling_path(target, "tmp"), sibling_path(target, "old")
    beside.mkdir(parents=True, exist_ok=True)
    lock = lock_path(beside)
    if lock is None:
        raise UserError(f"out={target}: another process is writing it")
    try:
        for old in beside.iterdir():  # of one that was killed
            old.unlink()
        yield beside
        if (target / mark).exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(target, before)
        os.replace(beside, target)
        sync_folder(target.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        os.close(lock)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one per line. Skips a line that a kill or a power cut left incomplete, and
    returns [] for a file that is missing."""
    events = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            events += [event] if isinstance(event, dict) else []
    return events


def lock_path(path: Path) -> int | None:
    """Lock a file (created if missing) or a folder for this process, without waiting.

    Returns an open descriptor, or None if another process holds the lock. Closing the descriptor releases it;
    the kernel also releases it when the process ends, in whatever way.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
