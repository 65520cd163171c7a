"""Checkpoints are complete or absent: written under a temporary name, hashed, forced to disk, then renamed.

    out_dir/step_000500/     config.json, model.safetensors, tokenizer.json, ...   a Hugging Face folder
                             trainer/state.pt                                      what only training needs
                             manifest.json                                         sha256 of each file; last
    out_dir/checkpoints.json {"last": "step_000500", "best": "step_000400", "stage_1": "step_000200", ...}

safetensors and torch.load read a file with a flipped bit without an error. So a folder that does not match
its manifest counts as absent: a run resumes from the newest folder that matches, and no model is loaded from
a folder that does not.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from configurator import UserError
from formats.files import atomic_folder, file_sha256, path_in_errors, read_json, sync_folder, write_json

NAME = re.compile(r"step_(\d{6,})")  # the name of a checkpoint folder


# ---- Manifests --------------------------------------------------------------------------------------------

def write_manifest(folder: Path, **entries: Any) -> None:
    """Force a folder's files to disk, then write manifest.json: the hash of each file, and `entries`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file, path_in_errors(path):
            os.fsync(file.fileno())
    digests = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    write_json(folder / "manifest.json", {"files": digests} | entries)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)


def find_corruption(folder: Path, model_only: bool = False) -> str | None:
    """The first difference between a folder and its manifest, or None if every file has its sha256.

    model_only: skip trainer/, which is twice the size of the rest, and README.md, which people edit.
    """
    skipped = ("trainer/", "README.md") if model_only else ()
    try:
        digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, digest in digests.items():
            if not name.startswith(skipped) and file_sha256(folder / name) != digest:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# ---- The checkpoints of a run -----------------------------------------------------------------------------

def folder_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(out_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [path for path in out_dir.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=folder_step)


def newest_verified(out_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all intact. Calls `warn` for each damaged one that it skips."""
    for folder in reversed(step_folders(out_dir)):
        problem = find_corruption(folder)
        if problem is None:
            return folder
        warn(f"{folder}: skipped: {problem}")
    return None


def require_space(out_dir: Path, size: int) -> None:
    """Raise UserError unless two checkpoints of `size` bytes fit: the newest and its successor."""
    needed = size if step_folders(out_dir) else 2 * size
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise UserError(f"out_dir={out_dir}: a checkpoint takes up to {size / 1e9:,.2f} GB, so "
                        f"{needed / 1e9:,.2f} GB must be free; {free / 1e9:,.2f} GB are")


def write_checkpoint(out_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a folder, make it out_dir/step_<step>, and return that path.

    Raises UserError, and leaves no partial folder, if it cannot be written completely.
    """
    folder = out_dir / f"step_{step:06d}"
    try:
        with atomic_folder(folder, marker=None) as new:  # replaces one of the same step
            write(new)
            write_manifest(new)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a full disk
        raise UserError(f"{folder}: could not be written ({error}); earlier ones are untouched") from error
    return folder


def clean_tmp(out_dir: Path) -> None:
    """Delete the temporary files and folders of a process that was killed."""
    # Also .step_000500.tmp and .merged.tmp, which are folders, and the replaced .step_000500.old.
    for path in (*out_dir.glob("*.tmp"), *out_dir.glob(".step_*.old"), *out_dir.glob(".merged.old")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- run.json and pointers --------------------------------------------------------------------------------

def read_run(out_dir: Path) -> dict[str, Any]:
    """run.json of a run. Raises UserError, with the remedy, if it is damaged or missing."""
    path = out_dir / "run.json"
    try:
        run = read_json(path)
        identity: Any = run.get("identity")
        parts = [run.get("config"), identity, run.get("wandb", {})]
        if not all(isinstance(part, dict) for part in parts) or type(identity.get("data", {})) is not dict:
            raise UserError(f"{path}: damaged (no config or no identity)")
    except UserError as error:
        raise UserError(f"{error}; delete it to continue with the configuration of this command") from None
    return run


def read_pointers(out_dir: Path) -> dict[str, Any]:
    """The content of checkpoints.json, or {} if it is missing. Raises UserError if it is damaged.

    Every value is the name of a checkpoint, except best_val_loss, which is a finite number.
    """
    path = out_dir / "checkpoints.json"
    try:
        pointers = read_json(path)
        for key, value in pointers.items():
            is_number = type(value) in (int, float) and abs(value) < math.inf
            if not (is_number if key == "best_val_loss" else NAME.fullmatch(str(value))):
                raise UserError(f"{path}: damaged ({key} is {str(value)[:40]!r})")
    except UserError as error:
        raise UserError(f"{error}; delete it, and the next save writes a new one") from None
    return pointers


def update_pointers(out_dir: Path, keep: int, **pointers: Any) -> None:
    """Update checkpoints.json, then delete all checkpoints except the newest `keep` and the ones it names."""
    pointers = read_pointers(out_dir) | pointers
    write_json(out_dir / "checkpoints.json", pointers)
    for folder in step_folders(out_dir)[:-keep]:
        if folder.name not in pointers.values():
            shutil.rmtree(folder)


def remove_checkpoints(out_dir: Path) -> None:
    """Delete every checkpoint of a run. The pointers go first, so that they never name a missing folder."""
    (out_dir / "checkpoints.json").unlink(missing_ok=True)
    for folder in step_folders(out_dir):
        shutil.rmtree(folder)
