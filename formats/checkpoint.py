"""Checkpoints that are whole or absent: written beside their name, hashed, forced to disk, then renamed.

    out_dir/step_000500/     config.json, model.safetensors, tokenizer.json, ...   a Hugging Face folder
                             trainer/state.pt                                      what only training needs
                             manifest.json                                         sha256 of all files, last
    out_dir/checkpoints.json {"last": "step_000500", "best": "step_000400", "stage_1": "step_000200", ...}

A folder whose manifest does not match is as good as absent: safetensors and torch.load read a flipped bit
without a word. So a run resumes from the newest folder that matches, and no model is read from one that does
not.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from configurator import UserError
from formats.files import file_sha256, path_in_errors, sync_folder, write_json

NAME = re.compile(r"step_(\d{6,})")


def write_checkpoint(out_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Make out_dir/step_<step> of what `write(folder)` puts in a folder, and return that path.

    Raises UserError, and leaves nothing behind, where it cannot be written whole.
    """
    folder = out_dir / f"step_{step:06d}"
    beside = out_dir / f".{folder.name}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        write_manifest(beside)
        shutil.rmtree(folder, ignore_errors=True)  # an unverified one of the same step
        os.replace(beside, folder)
        sync_folder(out_dir)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError when a disk is full
        raise UserError(f"{folder}: could not be written ({error}); earlier ones are untouched") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def write_manifest(folder: Path, **more: Any) -> None:
    """Force a folder's files to disk, and write manifest.json: their hashes, and what else is to be known."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file, path_in_errors(path):
            os.fsync(file.fileno())
    digests = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    write_json(folder / "manifest.json", {"files": digests} | more)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)


def require_space(out_dir: Path, size: int) -> None:
    """UserError unless two checkpoints of `size` bytes fit: the newest, and the one that replaces it."""
    missing = size if step_folders(out_dir) else 2 * size
    free = shutil.disk_usage(out_dir).free
    if free < missing:
        raise UserError(f"out_dir={out_dir}: {missing / 1e9:,.2f} GB must be free, as a checkpoint may take "
                        f"{size / 1e9:,.2f}; {free / 1e9:,.2f} GB are")


def clean_tmp(out_dir: Path) -> None:
    """Remove what a killed process left half written."""
    for path in out_dir.glob(".step_*.tmp"):
        shutil.rmtree(path)
    for path in out_dir.glob("*.tmp"):
        path.unlink()


def find_corruption(folder: Path, model_only: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is there and has its sha256.

    model_only: leave out trainer/, which is twice the size of the rest, and README.md, which people edit.
    """
    left_out = ("trainer/", "README.md") if model_only else ()
    try:
        listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, digest in listed.items():
            if not name.startswith(left_out) and file_sha256(folder / name) != digest:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def step_folders(out_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [path for path in out_dir.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=folder_step)


def folder_step(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def newest_verified(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The latest checkpoint whose files are all intact; says which ones it passed over."""
    for folder in reversed(step_folders(out_dir)):
        problem = find_corruption(folder)
        if problem is None:
            return folder
        warn(f"{folder}: passed over: {problem}")
    return None


def read_pointers(out_dir: Path) -> dict[str, Any]:
    """checkpoints.json, or {} where there is none. UserError for one that is damaged."""
    path = out_dir / "checkpoints.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); without it the next save makes a new one") from None


def update_pointers(out_dir: Path, keep: int, **pointers: Any) -> None:
    """Update checkpoints.json, then delete all checkpoints but the newest `keep` and those it points to."""
    pointers = read_pointers(out_dir) | pointers
    write_json(out_dir / "checkpoints.json", pointers)
    folders = step_folders(out_dir)
    for folder in folders[:-keep]:
        if folder.name not in pointers.values():
            shutil.rmtree(folder)


def remove_checkpoints(out_dir: Path) -> None:
    """Delete every checkpoint of a run; the pointers first, so that none of them is ever dangling."""
    (out_dir / "checkpoints.json").unlink(missing_ok=True)
    for folder in step_folders(out_dir):
        shutil.rmtree(folder)
