"""Stage 0, the data: text, chats or preferences -> packed shards of token ids that every stage reads.

    python prepare.py                                    # the standard library -> data/pystdlib
    python prepare.py --source=books/,notes.jsonl.zst --tokenizer=gpt2 --out=data/books
    python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 --max_tokens=1e9
    python prepare.py --out=data/books --verify=True     # do the shards still have their hashes?
    python prepare.py --kind=chat --source=alpaca.json,chats.jsonl --tokenizer=out/base --out=data/chats
    python prepare.py --kind=preference --source=problems --tokenizer=out/sft --out=data/pairs
    python prepare.py --source=crawl/ --out=data/clean --decontaminate=eval/,hf:cais/mmlu:all:test

Writes data/<name>/: train_00000.bin ..., val_00000.bin ... (raw little-endian uint16, readable by np.memmap
as nanoGPT's), tokenizer.json, and meta.json last of all: a folder without it does not exist. An end-of-text
token stands behind every document. Which side of the split a document falls on is decided by its hash, so
the same text is never on both; exact duplicates are dropped. Rows in = rows kept + rows skipped, by reason,
always. Chats and preferences come in the forms that dataset/conversations.py knows, are written as
formats/chat_format.py says, and have a mask beside their ids. With --decontaminate, a row that overlaps an
evaluation item (dataset/decontaminate.py says when) is left out of both sides and of the text that a
tokenizer is trained on, and contaminated.json lists it, with what it overlaps. The folder is built beside
its name and then renamed: a failure, a kill or a mistake leaves what was there as it was."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, require_positive, run_script
from dataset import problems
from dataset.decontaminate import SETTINGS, Index, Removed
from dataset.encoding import Recipe, parse_rows, pieces, text_hash, text_in, tokenize_all
from dataset.eval_items import Benchmark, find_benchmarks
from dataset.shards import FORMAT_VERSION, DataFolder, ShardWriter
from dataset.sources import Row, Skip, find_files, hub_rows, parse_json, read_rows
from formats import hf
from formats.chat_format import with_chat_tokens
from formats.files import atomic_folder, file_sha256, write_json
from formats.tokenizer import Tokenizer

BATCH_BYTES = 2**20  # rows travel to the workers in batches of about this size
BPE_SAMPLE_BYTES = 64 * 2**20  # a tokenizer is trained on so much of the training text at the most


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    source: str = "pystdlib"  # or problems, mistakes; files, folders, globs; hf:NAME[:CONFIG[:SPLIT]]
    out: str | None = None  # the data folder itself; None: data/<name of the source>
    kind: Literal["text", "chat", "preference"] = "text"  # what a row is
    text_key: str = "text"  # the key or column that holds the text of a .jsonl, .json, .parquet or hub row
    keys: str = ""  # of chats and preferences, where they have other names: question=original_text,answer=ans
    tokenizer: str = "bpe"  # bpe (trained here), gpt2, a folder with tokenizer.json, an out_dir or a hub id
    vocab_size: int = 4096  # ids of a bpe trained here
    val_fraction: float = 0.03  # share of the documents for validation, chosen by their hash
    max_tokens: int | None = None  # stop at the document that reaches so many; None: read everything
    decontaminate: str | None = None  # files, folders, data folders, hf:NAMEs that no row may overlap
    num_proc: int | None = None  # processes that tokenize; None: one a core
    strict: bool = False  # stop at the first row that cannot be used
    overwrite: bool = False  # replace a folder made from other inputs
    verify: bool = False  # only check an existing folder's hashes

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "max_tokens", "num_proc")
        if not 257 <= self.vocab_size <= 10**6:
            raise UserError(f"vocab_size={self.vocab_size}: must be at least 257 (256 bytes and the end of "
                            "text) and at most 1,000,000")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if self.source == "mistakes" and self.kind != "preference":
            raise UserError("source=mistakes: are preferences (--kind=preference)")
        if self.keys and self.kind == "text":
            raise UserError(f"keys={self.keys}: is for chats and preferences; of text give --text_key=")
        if self.text_key != "text" and self.kind != "text":
            raise UserError(f"text_key={self.text_key}: is for text; of a {self.kind} give --keys=")
        if not all(ours and theirs for ours, theirs in self.key_names.items()):
            raise UserError(f"keys={self.keys}: write ours=theirs, with commas between")
        if not self.out and (self.folder == Path("data") or set("*?[") & set(self.folder.name)):
            raise UserError(f"source={self.source}: gives the data folder no name; add --out=data/NAME")

    @property
    def key_names(self) -> dict[str, str]:
        """{our name of a key: the rows'}."""
        pairs = (entry.partition("=") for entry in self.keys.split(",") if entry)
        return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}

    @property
    def folder(self) -> Path:
        name = self.source.removeprefix("hf:").split(",")[0].split(":")[0].rstrip("/*")
        return Path(self.out) if self.out else Path("data") / Path(name).name.split(".")[0]


# ---- What the parent does: batches, duplicates, split, shards, counts -------------------------------------

def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.content if isinstance(row.content, bytes | str) else str(row.content))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class SeenHashes:
    """Which hashes have come by, at 8 bytes each: a few sorted arrays, each at least twice the next."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Remember some uint64 hashes; returns bool, True for the first of each that was not known."""
        unique, first = np.unique(hashes, return_index=True)
        new = np.ones(len(unique), dtype=bool)
        for known in self.arrays:
            at = np.searchsorted(known, unique)
            new &= known[np.minimum(at, len(known) - 1)] != unique
        if new.any():
            self.arrays.append(unique[new])
        while len(self.arrays) > 1 and len(self.arrays[-2]) < 2 * len(self.arrays[-1]):
            self.arrays[-2:] = [np.sort(np.concatenate(self.arrays[-2:]))]
        result = np.zeros(len(hashes), dtype=bool)
        result[first[new]] = True
        return result


class Tally:
    """Rows in, kept, and skipped by reason with the first three places of each."""

    def __init__(self) -> None:
        self.rows_in, self.kept = 0, 0
        self.first: Row | None = None
        self.skipped: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}

    def count(self, row: Row, reason: str | None) -> None:
        self.rows_in += 1
        self.first = self.first or row
        if reason is None:
            self.kept += 1
            return
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if self.skipped[reason] <= 3:
            self.places.setdefault(reason, []).append(row.place)

    def report(self) -> str:
        lines = [f"rows    {self.rows_in:,} in = {self.kept:,} kept + {sum(self.skipped.values()):,} skipped"]
        for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1]):
            places = ", ".join(self.places[reason]) + ", ..." * (count > 3)
            lines.append(f"        {count:,} skipped: {reason} ({places})")
        return "\n".join(lines)


def write_shards(batches: Iterable[list[Row]], recipe: Recipe, cfg: PrepareConfig,
                 writers: dict[str, ShardWriter], removed: Removed | None) -> Tally:
    """Tokenize all rows into the writers for "train" and "val". If cfg.strict, UserError at a bad row."""
    tally, seen, tokens = Tally(), SeenHashes(), 0
    for rows, batch in tokenize_all(batches, recipe, cfg.num_proc or os.cpu_count() or 1):
        keep = batch.lengths > 0
        keep[keep] = seen.add(batch.hashes[keep])
        total = tokens + np.cumsum(batch.lengths * keep)  # (rows,) tokens up to and with each row
        used = len(rows)
        if cfg.max_tokens is not None:
            used = min(used, int(np.searchsorted(total, cfg.max_tokens)) + 1)
            keep[used:] = False
        for i, row in enumerate(rows[:used]):
            if batch.overlaps[i]:
                removed.count(row.place, batch.overlaps[i])
            elif batch.reasons[i] and cfg.strict:
                raise UserError(f"{row.place}: {batch.reasons[i]}")
            tally.count(row, None if keep[i] else batch.reasons[i] or "duplicate document")
        is_val = batch.hashes < np.uint64(cfg.val_fraction * 2**64)
        for split, chosen in (("train", keep & ~is_val), ("val", keep & is_val)):
            tokens_chosen = np.repeat(chosen, batch.lengths)  # (tokens,)
            writers[split].write(batch.ids[tokens_chosen], int(chosen.sum()),
                                 int(batch.byte_counts[chosen].sum()),
                                 batch.mask[tokens_chosen] if len(batch.mask) else None)
        tokens = total[used - 1]
        if cfg.max_tokens is not None and tokens >= cfg.max_tokens:
            break
    for writer in writers.values():
        writer.close()
    return tally


def training_texts(rows: Iterable[Row], recipe: Recipe, val_fraction: float) -> Iterator[str]:
    """The first BPE_SAMPLE_BYTES of usable text that will not be validation text."""
    total = 0
    for batch in in_batches(rows):
        contents, _, _ = parse_rows(batch, recipe)  # what is left out is counted when the rows are tokenized
        for content in filter(None, contents):
            data = text_in(content).encode("utf-8")
            if text_hash(data) >= val_fraction * 2**64:
                yield from pieces(content)
                total += len(data)
            if total > BPE_SAMPLE_BYTES:
                return


# ---- The command ------------------------------------------------------------------------------------------

def prepare(cfg: PrepareConfig) -> DataFolder:
    """Make the data folder that cfg describes, or find it made from the same inputs; returns it opened."""
    made = cfg.source in ("problems", "mistakes") or cfg.source.startswith("hf:")  # rows that no file holds
    files, ignored = ([], 0) if made else find_files(cfg.source)
    benchmarks, others = find_benchmarks(cfg.decontaminate) if cfg.decontaminate else ([], 0)
    inputs = describe_inputs(cfg, files, benchmarks)
    if (cfg.folder / "meta.json").exists() and not cfg.overwrite:
        return unchanged(cfg.folder, inputs)
    with atomic_folder(cfg.folder) as folder:
        meta = build(cfg, folder, files, benchmarks)
        write_json(folder / "meta.json", meta | {"files_ignored": ignored, "inputs": inputs})
    tokens = meta["tokens"]
    print(f"data    {cfg.folder}: {tokens['train']:,} training and {tokens['val']:,} validation tokens"
          + (f"; {ignored + others:,} files of other kinds ignored" if ignored + others else ""))
    return DataFolder(cfg.folder)


def prepare_problems(kind: Literal["chat", "preference"], model: str) -> DataFolder:
    """The embedded problems for a model's tokenizer, in data/problems_<kind>: made anew where another made
    them, or an earlier version of the problems. UserError where the folder differs in anything else."""
    cfg = PrepareConfig(kind=kind, source="problems", out=f"data/problems_{kind}",
                        tokenizer=str(hf.find_folder(model)))
    there = (cfg.folder / "meta.json").exists()
    different = differing(DataFolder(cfg.folder), describe_inputs(cfg, [], [])) if there else []
    if others := [key for key in different if key not in ("tokenizer", "problems")]:
        raise UserError(f"{cfg.folder}: was made otherwise ({', '.join(others)} differ); to train on it, "
                        "give it another name, and that as --dataset=")
    return prepare(dataclasses.replace(cfg, overwrite=bool(different)))


def build(cfg: PrepareConfig, folder: Path, files: list[Path], benchmarks: list[Benchmark]) -> dict[str, Any]:
    """Write the shards and the tokenizer into an empty folder; returns what meta.json says of them."""
    size = sum(path.stat().st_size for path in files)
    # The split is by document, so a few text files are cut until they give some ten for validation.
    piece = 2**20 if len(files) * cfg.val_fraction >= 10 else int(max(size * cfg.val_fraction / 10, 2**10))

    def rows(progress: Any = None) -> Iterator[Row]:
        if cfg.source in ("problems", "mistakes"):
            kind = "mistakes" if cfg.source == "mistakes" else cfg.kind
            return (Row(f"{cfg.source}:{number}", "value", row if cfg.kind != "text" else row["text"])
                    for number, row in enumerate(problems.problem_rows(kind, problems.ROWS, seed=1), 1))
        text_key = cfg.text_key if cfg.kind == "text" else None
        if not files:
            return hub_rows(cfg.source.removeprefix("hf:"), text_key)
        return read_rows(files, text_key, min(piece, 2**20), progress)

    index = make_index(benchmarks) if benchmarks else None
    recipe = Recipe(cfg.kind, cfg.text_key, cfg.key_names, index)
    tokenizer = make_tokenizer(training_texts(rows(), recipe, cfg.val_fraction), cfg)
    recipe, removed = recipe._replace(tokenizer=tokenizer), Removed(index) if index else None
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    writers = {split: ShardWriter(folder, split, dtype, cfg.kind != "text") for split in ("train", "val")}
    begin, quiet = time.perf_counter(), not sys.stderr.isatty()
    with tqdm(total=size or None, unit="B", unit_scale=True, leave=False, disable=quiet) as bar:
        tally = write_shards(in_batches(rows(bar.update)), recipe, cfg, writers, removed)
    seconds = time.perf_counter() - begin
    counts = {key: {split: getattr(writer, key) for split, writer in writers.items()}
              for key in ("documents", "tokens", "bytes")}
    megabytes = sum(counts["bytes"].values()) / 1e6
    print(tally.report())
    print(f"speed   {megabytes:,.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)")
    require_documents(cfg, tally, counts["tokens"])
    tokenizer.save(folder)
    if removed:
        print(removed.report())
        write_json(folder / "contaminated.json", removed.content())
    return {"format_version": FORMAT_VERSION, "kind": cfg.kind, "tokenizer": cfg.tokenizer,
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
            "vocab_size": tokenizer.vocab_size, "dtype": np.dtype(dtype).name, **counts,
            "shards": [shard for writer in writers.values() for shard in writer.shards], "source": cfg.source,
            "rows": {"in": tally.rows_in, "kept": tally.kept, "skipped": tally.skipped}}


def require_documents(cfg: PrepareConfig, tally: Tally, tokens: dict[str, int]) -> None:
    """UserError where no row could be used, with what may be the key of the text, or a split has none."""
    if not tally.kept:
        reason = max(tally.skipped, key=tally.skipped.get, default="there is none")
        raise UserError(f"source={cfg.source}: no row can be used: {reason}{keys_of(tally.first, cfg.kind)}")
    for split, count in tokens.items():
        if not count and (split == "train" or cfg.val_fraction):
            raise UserError(f"source={cfg.source}: none of {tally.kept} documents fell to {split} with "
                            f"val_fraction={cfg.val_fraction}: give more text, or another share")


def keys_of(row: Row | None, kind: str) -> str:
    """"; --text_key= one of a, b" for a row of JSON with those keys, else nothing."""
    option = {"text": "--text_key=", "chat": "--keys=question=..,answer=..",
              "preference": "--keys=prompt=..,chosen=..,rejected=.."}[kind]
    with contextlib.suppress(Skip, TypeError):
        if row and row.kind == "json":
            return f"; {option} one of {', '.join(parse_json(row.content))}"
    return ""


def make_index(benchmarks: list[Benchmark]) -> Index:
    """The items of all benchmarks, to be found in the rows."""
    begin = time.perf_counter()
    index = Index([(benchmark.name, list(benchmark.items())) for benchmark in benchmarks])
    print(f"items   {len(index.places):,} of {len(benchmarks)} evaluation sets indexed in "
          f"{time.perf_counter() - begin:.1f} s ({index.megabytes():,.0f} MB)")
    return index


def describe_inputs(cfg: PrepareConfig, files: list[Path], benchmarks: list[Benchmark]) -> dict[str, Any]:
    """What the folder's content follows from: settings, and the content of every file."""
    keys = ["kind", "text_key" if cfg.kind == "text" else "keys", "tokenizer", "val_fraction", "max_tokens"]
    settings = {key: getattr(cfg, key) for key in keys + ["vocab_size"] * (cfg.tokenizer == "bpe")}
    if cfg.tokenizer not in ("bpe", "gpt2"):  # what it is counts, not where it lies
        definition = json.dumps(make_tokenizer([], cfg).definition, sort_keys=True)
        settings["tokenizer"] = hashlib.sha256(definition.encode()).hexdigest()
    sets = {benchmark.name: benchmark.digest() for benchmark in benchmarks}
    settings["decontaminate"] = {"sets": sets, **SETTINGS} if sets else None
    if cfg.source in ("problems", "mistakes"):
        settings["problems"] = file_sha256(Path(problems.__file__))
    if not files:
        return settings | {"source": cfg.source}
    digests = "".join(file_sha256(path) for path in files)
    return settings | {"files": len(files), "content": hashlib.sha256(digests.encode()).hexdigest()}


def differing(data: DataFolder, inputs: dict[str, Any]) -> list[str]:
    """Which of the inputs the folder was not made from."""
    return [key for key, value in inputs.items() if data.meta["inputs"].get(key) != value]


def unchanged(folder: Path, inputs: dict[str, Any]) -> DataFolder:
    """The folder as it is. Raises UserError if it was made from other inputs."""
    data = DataFolder(folder)
    if different := differing(data, inputs):
        raise UserError(f"{folder}: made from other inputs ({', '.join(different)} differ); "
                        "--overwrite=True replaces it, --out= makes another")
    print(f"data    {folder} is up to date")
    return data


def make_tokenizer(texts: Iterable[str], cfg: PrepareConfig) -> Tokenizer:
    """The tokenizer that cfg names, or one trained on the texts; for chats, with their tokens."""
    if cfg.tokenizer == "bpe":
        begin = time.perf_counter()
        tokenizer = Tokenizer.train(texts, cfg.vocab_size)
        print(f"tokens  BPE of {tokenizer.vocab_size:,} trained in {time.perf_counter() - begin:.1f} s")
    else:
        path = Path(cfg.tokenizer)
        is_hub_id = cfg.tokenizer.count("/") == 1 and not path.parent.exists()
        is_model = (path / "checkpoints.json").is_file() or is_hub_id
        tokenizer = Tokenizer.load(hf.find_folder(path) if is_model else cfg.tokenizer)
    return tokenizer if cfg.kind == "text" else with_chat_tokens(tokenizer)


def main(argv: list[str]) -> int:
    cfg, provenance = configure(PrepareConfig, argv, usage=__doc__)
    if "vocab_size" in provenance and cfg.tokenizer != "bpe":
        raise UserError(f"{provenance['vocab_size']}: vocab_size is for --tokenizer=bpe, not {cfg.tokenizer}")
    if cfg.verify:
        DataFolder(cfg.folder).verify()
        print(f"{cfg.folder}: every shard matches its sha256")
    else:
        prepare(cfg)
    return 0


if __name__ == "__main__":
    run_script(main)
