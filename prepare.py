"""Stage 0, the data: text, chats or preferences -> packed shards of token ids, which every stage reads.

    python prepare.py                                    # the standard library -> data/pystdlib
    python prepare.py --source=books/,notes.jsonl.zst --tokenizer=gpt2 --out=data/books
    python prepare.py --source=https://example.com/notes.txt
    python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 --max_tokens=1e9
    python prepare.py --out=data/books --verify=True     # do the shards still have their hashes?
    python prepare.py --kind=chat --source=alpaca.json,chats.jsonl --tokenizer=out/base --out=data/chats
    python prepare.py --kind=preference --source=problems --tokenizer=out/sft --out=data/pairs
    python prepare.py --source=crawl/ --out=data/clean --decontaminate=eval/,hf:cais/mmlu:all:test

Reads the kinds of files that dataset/sources.py lists; chats and preferences in the row forms that
dataset/conversations.py lists. Writes data/<name>/: train_00000.bin ..., val_00000.bin ... (raw little-endian
ids, as nanoGPT's), tokenizer.json, for chats and preferences a .mask per .bin, and meta.json last.

A hash of each document decides whether it is for training or validation, so no text is in both. Exact
duplicates are dropped. Rows in = rows kept + rows skipped, with a reason for each. With --decontaminate, rows
that overlap an evaluation item (dataset/decontaminate.py) are left out, and contaminated.json lists them. A
run that fails or is killed leaves an existing folder as it was."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, require, require_positive, run_script
from dataset import decontaminate, problems
from dataset.download import download, is_url, url_name
from dataset.encoding import Batch, Recipe, encoded_texts, identity_bytes, parse_rows, text_hash, tokenize_all
from dataset.eval_items import Benchmark, find_benchmarks
from dataset.shards import DataFolder, ShardWriter, describe, open_writers
from dataset.sources import Row, Skip, find_files, hub_rows, parse_json, printable, read_rows
from formats import hf
from formats.chat_format import with_chat_tokens
from formats.files import atomic_folder, file_sha256, write_json
from formats.tokenizer import Tokenizer

EMBEDDED = ("problems", "mistakes")  # sources that dataset/problems.py generates
PIECE_BYTES = 2**20  # a text file is cut into documents of about this size
# A batch travels to a worker process and back. At 1 MiB the transport costs little next to the encoding.
BATCH_BYTES = 2**20
# The merges of a BPE hardly change after this much text, and its training needs memory for all of it.
BPE_SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    source: str = "pystdlib"  # files, folders, globs, a URL, hf:NAME[:CONFIG[:SPLIT]], problems or mistakes
    out: str | None = None  # data folder to write; None is data/<name of the source>
    kind: Literal["text", "chat", "preference"] = "text"  # what a row is
    text_key: str = "text"  # key or column that holds the text of a .jsonl, .json, .parquet or hub row
    keys: str = ""  # names of the rows' keys in chats and preferences, as question=original_text,answer=ans
    tokenizer: str = "bpe"  # bpe (trained here), gpt2, a folder with tokenizer.json, an out_dir or a hub id
    vocab_size: int = 4096  # number of ids of a bpe that is trained here
    val_fraction: float = 0.03  # share of the documents for validation, chosen by their hash
    max_tokens: int | None = None  # stop after the document that reaches this many; None reads everything
    decontaminate: str | None = None  # evaluation sets that no row may overlap: files, folders, hf:NAME
    num_proc: int | None = None  # processes that tokenize; None is one per core
    strict: bool = False  # stop at the first row that cannot be used
    overwrite: bool = False  # replace a folder that was made from other inputs
    verify: bool = False  # only check the hashes of an existing folder

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "max_tokens", "num_proc")
        # Every vocabulary contains the 256 bytes and the end-of-text token.
        require(self, "vocab_size", 257 <= self.vocab_size <= 10**6, "at least 257 and at most 1,000,000")
        require(self, "val_fraction", 0 <= self.val_fraction < 1, "at least 0 and below 1")
        if self.source == "mistakes" and self.kind != "preference":
            raise UserError("source=mistakes only works with --kind=preference")
        if self.keys and self.kind == "text":
            raise UserError(f"keys={self.keys} is only for chats and preferences; for text use --text_key=")
        if self.text_key != "text" and self.kind != "text":
            raise UserError(f"text_key={self.text_key} is only for text; for kind={self.kind} use --keys=")
        require(self, "keys", all(ours and theirs for ours, theirs in self.key_names.items()),
                "written as ours=theirs, with commas between")
        # A folder or glob such as "." or *.md has no name that a data folder could take.
        if not self.out and (self.folder == Path("data") or set("*?[") & set(self.folder.name)):
            raise UserError(f"source={self.source}: gives the data folder no name; add --out=data/NAME")

    @property
    def key_names(self) -> dict[str, str]:
        """{our name of a key: its name in the rows}."""
        pairs = (entry.partition("=") for entry in self.keys.split(",") if entry)
        return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}

    @property
    def folder(self) -> Path:
        """The data folder to write."""
        # books/,notes.jsonl -> books; hf:some/set:config -> set; a/notes.txt.gz -> notes
        name = url_name(self.source) if is_url(self.source) else (
            self.source.removeprefix("hf:").split(",")[0].split(":")[0].rstrip("/*"))
        return Path(self.out) if self.out else Path("data") / Path(name).name.split(".")[0]


# ---- Rows in ----------------------------------------------------------------------------------------------

def source_rows(cfg: PrepareConfig, files: list[Path],
                progress: Callable[[int], Any] | None = None) -> Iterator[Row]:
    """All rows of the source, in the same order at each call.

    progress: as for `read_rows`; if there are no files, it is called with 1 after each row.
    """
    if not files and progress:
        for row in source_rows(cfg, files):
            yield row
            progress(1)
        return
    if cfg.source in EMBEDDED:
        kind = "mistakes" if cfg.source == "mistakes" else cfg.kind
        # The seed is fixed: everybody's embedded data is the same, and evaluation draws from another split.
        for number, value in enumerate(problems.problem_rows(kind, problems.ROWS, seed=1), 1):
            yield Row(f"{cfg.source}:{number}", "value", value["text"] if cfg.kind == "text" else value)
        return
    text_key = cfg.text_key if cfg.kind == "text" else None  # chats and preferences need the whole row
    if not files:
        yield from hub_rows(cfg.source.removeprefix("hf:"), text_key)
        return
    # The split is by document. A few large text files would leave validation empty, so they are cut into
    # smaller pieces, of which about ten are for validation. At least two are needed, one for each split.
    piece = PIECE_BYTES
    if len(files) * cfg.val_fraction < 10:
        size = sum(path.stat().st_size for path in files)
        smallest = 2**10 if size > 2**10 else max(size // 2, 8)
        piece = min(piece, max(int(size * cfg.val_fraction / 10), smallest))
    yield from read_rows(files, text_key, piece, progress)


def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Consecutive rows, about BATCH_BYTES at a time."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        # Rows of Parquet and the hub are Python values; their length as text is close enough.
        size += len(row.content if isinstance(row.content, bytes | str) else str(row.content))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_limit(rows: Iterable[Row], recipe: Recipe, val_fraction: float) -> int:
    """The hash below which documents are for validation, so that both splits get a document if there are two.

    Usually that is val_fraction of all hashes. If no document falls to a split, it gets the document whose
    hash is nearest to this limit.
    """
    limit, lowest, highest = int(val_fraction * 2**64), 2**64, -1
    if not limit:
        return 0  # no validation split is wanted
    rows = iter(rows)
    while batch := list(itertools.islice(rows, 64)):
        contents, _, _ = parse_rows(batch, recipe)
        hashes = [text_hash(identity_bytes(content)) for content in contents if content is not None]
        lowest, highest = min([lowest, *hashes]), max([highest, *hashes])
        if lowest < limit <= highest:  # nearly always after the first batch
            return limit
    if lowest >= highest:
        return limit  # no two documents; `require_documents` says so
    split = "validation" if lowest >= limit else "training"
    print(f"split     few documents for val_fraction={val_fraction}: {split} gets one, chosen by its hash")
    return min(max(limit, lowest + 1), highest)


def training_texts(rows: Iterable[Row], recipe: Recipe, val_limit: int) -> Iterator[str]:
    """The first BPE_SAMPLE_BYTES of text, to train a tokenizer on."""
    total = 0
    for batch in in_batches(rows):
        contents, _, _ = parse_rows(batch, recipe)
        for content in contents:
            if content is None:  # a skipped row; write_shards counts it
                continue
            data = identity_bytes(content)
            # Validation text must not shape the vocabulary, or its loss would look better than it is.
            if text_hash(data) >= val_limit:
                yield from encoded_texts(content)
                total += len(data)
            if total > BPE_SAMPLE_BYTES:
                return


# ---- Counting ---------------------------------------------------------------------------------------------

class SeenHashes:
    """A set of uint64 hashes in 8 bytes each (a Python set takes about 60): a few sorted arrays."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []  # each at least twice as long as the next

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add (n,) uint64 hashes; returns (n,) bool, True for the first of each hash that is new."""
        unique, first = np.unique(hashes, return_index=True)  # (u,) sorted; (u,) first position of each
        new = np.ones(len(unique), dtype=bool)
        for known in self.arrays:
            # A hash is known if it stands where it would be inserted (past the end: at the last place).
            at = np.searchsorted(known, unique)
            new &= known[np.minimum(at, len(known) - 1)] != unique
        if new.any():
            self.arrays.append(unique[new])
        # Merging arrays of similar length keeps their number logarithmic, so each hash is moved rarely.
        while len(self.arrays) > 1 and len(self.arrays[-2]) < 2 * len(self.arrays[-1]):
            self.arrays[-2:] = [np.sort(np.concatenate(self.arrays[-2:]))]
        result = np.zeros(len(hashes), dtype=bool)
        result[first[new]] = True
        return result


class Tally:
    """Rows in, rows kept, and rows skipped by reason, with the first three places of each reason."""

    def __init__(self, strict: bool):
        """strict: raise UserError at the first bad row."""
        self.strict, self.rows_in, self.kept = strict, 0, 0
        self.first: Row | None = None  # shows which keys the rows have, if none can be used
        self.skipped: Counter[str] = Counter()
        self.places: defaultdict[str, list[str]] = defaultdict(list)
        self.removed: list[dict[str, Any]] = []  # the rows that overlap evaluation items

    def count(self, row: Row, kept: bool, reason: str | None, overlaps: list[dict[str, Any]]) -> None:
        """Count a row. reason: why it is unusable, or None; not kept without a reason means duplicate."""
        if overlaps:
            self.removed.append({"row": row.place, "overlaps": overlaps})
        elif reason and self.strict:  # an overlap is what --decontaminate looks for, not a fault of the row
            raise UserError(f"{row.place}: {reason}")
        # Every row takes exactly one of the two ways below, so in = kept + skipped.
        self.rows_in += 1
        self.first = self.first or row
        if kept:
            self.kept += 1
            return
        reason = reason or "duplicate document"
        self.skipped[reason] += 1
        if len(self.places[reason]) < 3:  # enough to look at, and little memory for millions of bad rows
            self.places[reason].append(printable(row.place))

    def report(self) -> str:
        lines = [f"rows      {self.rows_in:,} in = {self.kept:,} kept + {self.skipped.total():,} skipped"]
        for reason, count in self.skipped.most_common():  # the most frequent reason first
            more = ", ..." if count > 3 else ""
            lines.append(f"          {count:,} skipped: {reason} ({', '.join(self.places[reason])}{more})")
        return "\n".join(lines)


# ---- Shards out -------------------------------------------------------------------------------------------

def write_batch(batch: Batch, keep: np.ndarray, writers: dict[str, ShardWriter], val_limit: int) -> None:
    """Append the documents to keep, (rows,) bool, to the shards of their split."""
    is_val = batch.hashes < np.uint64(val_limit)  # (rows,) hashes are uniform
    for split, chosen in (("train", keep & ~is_val), ("val", keep & is_val)):
        tokens = np.repeat(chosen, batch.lengths)  # (tokens,) from documents to their tokens
        mask = batch.mask[tokens] if len(batch.mask) else None
        writers[split].write(batch.ids[tokens], int(chosen.sum()), int(batch.byte_counts[chosen].sum()), mask)


def write_shards(batches: Iterable[list[Row]], recipe: Recipe, cfg: PrepareConfig, val_limit: int,
                 writers: dict[str, ShardWriter], tally: Tally) -> None:
    """Tokenize all rows, count them, and write them to the train and val shards. val_limit: `split_limit`."""
    seen, tokens = SeenHashes(), 0
    for rows, batch in tokenize_all(batches, recipe, cfg.num_proc or os.cpu_count() or 1):
        keep = batch.lengths > 0  # (rows,) bool
        # Duplicates are dropped here and not in the workers, because only the parent sees every row.
        keep[keep] = seen.add(batch.hashes[keep])
        total = tokens + np.cumsum(batch.lengths * keep)  # (rows,) tokens up to the end of each row
        used = len(rows)
        if cfg.max_tokens is not None:
            # The document that reaches the limit is the last; rows after it are not even counted.
            used = min(used, int(np.searchsorted(total, cfg.max_tokens)) + 1)
            keep[used:] = False
        # Counting in the order of the source makes the listed places the first ones.
        for i, row in enumerate(rows[:used]):
            tally.count(row, bool(keep[i]), batch.reasons[i], batch.overlaps[i])
        write_batch(batch, keep, writers, val_limit)
        tokens = total[used - 1]
        if cfg.max_tokens is not None and tokens >= cfg.max_tokens:
            return  # this ends the generators too: no more rows are read


# ---- The folder -------------------------------------------------------------------------------------------

def make_tokenizer(texts: Iterable[str], cfg: PrepareConfig) -> Tokenizer:
    """The tokenizer that cfg names, or one trained on the texts. For chats, it has the chat tokens."""
    if cfg.tokenizer == "bpe":
        begin = time.perf_counter()
        tokenizer = Tokenizer.train(texts, cfg.vocab_size)
        print(f"tokens    BPE of {tokenizer.vocab_size:,} trained in {time.perf_counter() - begin:.1f} s")
    else:
        path = Path(cfg.tokenizer)
        # Qwen/Qwen3-0.6B is a hub id unless there is a folder Qwen/ here; out/base is an out_dir.
        is_hub_id = cfg.tokenizer.count("/") == 1 and not path.parent.exists()
        is_model = (path / "checkpoints.json").is_file() or is_hub_id
        tokenizer = Tokenizer.load(hf.find_folder(path) if is_model else cfg.tokenizer)
    return tokenizer if cfg.kind == "text" else with_chat_tokens(tokenizer)


def make_index(benchmarks: list[Benchmark]) -> decontaminate.Index:
    """An index of the items of all benchmarks."""
    begin = time.perf_counter()
    index = decontaminate.Index([(benchmark.name, list(benchmark.items())) for benchmark in benchmarks])
    print(f"items     {len(index.places):,} of {len(benchmarks)} evaluation sets indexed in "
          f"{time.perf_counter() - begin:.1f} s ({index.megabytes():,.0f} MB)")
    return index


def row_keys(row: Row | None, kind: str) -> str:
    """A hint such as "; --text_key= one of a, b", if the row is a JSON object; else nothing."""
    # A hint must never hide the error it belongs to: a first row that is no JSON object gives none.
    option = {"text": "--text_key=", "chat": "--keys=question=..,answer=..",
              "preference": "--keys=prompt=..,chosen=..,rejected=.."}[kind]
    with contextlib.suppress(Skip, TypeError):
        if row and row.kind == "json":
            return printable(f"; {option} one of {', '.join(parse_json(row.content))}")
    return ""


def require_documents(cfg: PrepareConfig, tally: Tally, tokens: dict[str, int]) -> None:
    """UserError if no row could be used, or if a split got no document."""
    if not tally.kept:
        # The most frequent reason is most likely the user's mistake, such as another name of the text's key.
        reason = max(tally.skipped, key=tally.skipped.__getitem__, default="there is none")
        raise UserError(f"source={cfg.source}: no row can be used: {reason}{row_keys(tally.first, cfg.kind)}")
    for split, count in tokens.items():
        if not count and (split == "train" or cfg.val_fraction):  # val_fraction=0 wants no validation
            raise UserError(f"source={cfg.source}: none of {tally.kept} documents fell to {split} with "
                            f"val_fraction={cfg.val_fraction}: give more text, or another share")


def build(cfg: PrepareConfig, folder: Path, files: list[Path], benchmarks: list[Benchmark]) -> dict[str, Any]:
    """Write shards and tokenizer into an empty folder; returns meta.json's content but for its inputs."""
    size = sum(path.stat().st_size for path in files)
    rows = problems.ROWS if cfg.source in EMBEDDED else None  # about: nobody knows how many the hub has
    amount = f": {size / 1e6:,.1f} MB in {len(files):,} files" if files else ""
    print(f"reading   {cfg.source}{amount}")
    index = make_index(benchmarks) if benchmarks else None
    recipe = Recipe(cfg.kind, cfg.text_key, cfg.key_names, index)
    val_limit = split_limit(source_rows(cfg, files), recipe, cfg.val_fraction)
    # The source is read again if a tokenizer is trained, for its sample, and once more to encode.
    tokenizer = make_tokenizer(training_texts(source_rows(cfg, files), recipe, val_limit), cfg)
    recipe = recipe._replace(tokenizer=tokenizer)  # until here, rows were parsed but not encoded
    writers = open_writers(folder, tokenizer.vocab_size, masked=cfg.kind != "text")
    begin, tally = time.perf_counter(), Tally(cfg.strict)
    # The bar, on a terminal only, counts bytes of packed files: how many they unpack to is not known.
    with tqdm(total=size or rows, unit="B" if files else "row", unit_scale=True, leave=False,
              disable=None) as bar:
        batches = in_batches(source_rows(cfg, files, bar.update))
        write_shards(batches, recipe, cfg, val_limit, writers, tally)
    meta = describe(writers, cfg.kind, tokenizer, cfg.tokenizer)
    seconds, megabytes = time.perf_counter() - begin, sum(meta["bytes"].values()) / 1e6
    print(tally.report())
    print(f"speed     {megabytes:,.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)")
    require_documents(cfg, tally, meta["tokens"])  # after the report, which shows why
    if index:
        overlaps = decontaminate.contamination(index, tally.removed)
        print(decontaminate.report(overlaps["benchmarks"]))
        write_json(folder / "contaminated.json", overlaps)
    return meta | {"source": cfg.source,
                   "rows": {"in": tally.rows_in, "kept": tally.kept, "skipped": tally.skipped}}


# ---- The command ------------------------------------------------------------------------------------------

def describe_inputs(cfg: PrepareConfig, files: list[Path], benchmarks: list[Benchmark]) -> dict[str, Any]:
    """What the folder's content follows from: the settings, and hashes of every file that is read."""
    # num_proc and strict are missing on purpose: they do not change a byte of what is written.
    keys = ["kind", "text_key" if cfg.kind == "text" else "keys", "tokenizer", "val_fraction", "max_tokens"]
    settings = {key: getattr(cfg, key) for key in keys}
    if cfg.tokenizer == "bpe":
        settings["vocab_size"] = cfg.vocab_size
    elif cfg.tokenizer != "gpt2":  # a tokenizer is known by its content, so its folder may move
        definition = json.dumps(make_tokenizer([], cfg).definition, sort_keys=True)
        settings["tokenizer"] = hashlib.sha256(definition.encode()).hexdigest()
    sets = {benchmark.name: benchmark.digest() for benchmark in benchmarks}
    settings["decontaminate"] = {"sets": sets, **decontaminate.SETTINGS} if sets else None
    if cfg.source in EMBEDDED:
        settings["problems"] = problems.ROWS_VERSION
    if not files:
        return settings | {"source": cfg.source}
    # One hash over all files, in order: names and places do not matter, and meta.json stays small.
    digests = "".join(file_sha256(path) for path in files)
    return settings | {"files": len(files), "content": hashlib.sha256(digests.encode()).hexdigest()}


def changed_inputs(data: DataFolder, inputs: dict[str, Any]) -> list[str]:
    """The names of the inputs that differ from those that the folder was made from."""
    return [key for key, value in inputs.items() if data.meta["inputs"].get(key) != value]


def unchanged(folder: Path, inputs: dict[str, Any]) -> DataFolder:
    """The existing folder, opened. Raises UserError if it was made from other inputs."""
    data = DataFolder(folder)
    if different := changed_inputs(data, inputs):
        raise UserError(f"{folder}: made from other inputs ({', '.join(different)} differ); "
                        "--overwrite=True replaces it, --out= makes another")
    print(f"data      {folder} is up to date")
    return data


def prepare(cfg: PrepareConfig) -> DataFolder:
    """Make the data folder that cfg describes, unless it exists and has the same inputs; returns it opened.

    Raises UserError for every fault of the input (a bad row only if cfg.strict).
    """
    # Rows that are generated or streamed have no files: their inputs are known by the source's name alone.
    has_files = cfg.source not in EMBEDDED and not cfg.source.startswith("hf:")
    source = str(download(cfg.source)) if is_url(cfg.source) else cfg.source
    files, ignored = find_files(source) if has_files else ([], 0)
    benchmarks, others = find_benchmarks(cfg.decontaminate) if cfg.decontaminate else ([], 0)
    inputs = describe_inputs(cfg, files, benchmarks)
    # meta.json is written last, so a folder that has one is complete.
    if (cfg.folder / "meta.json").exists() and not cfg.overwrite:
        return unchanged(cfg.folder, inputs)
    # Everything is written next to the final place and renamed at the end: a failure changes nothing.
    with atomic_folder(cfg.folder) as folder:
        meta = build(cfg, folder, files, benchmarks)
        write_json(folder / "meta.json", meta | {"files_ignored": ignored, "inputs": inputs})
    tokens = meta["tokens"]
    note = f"; {ignored + others:,} other files and folders ignored" if ignored + others else ""
    counts = f"{tokens['train']:,} training and {tokens['val']:,} validation tokens"
    print(f"data      {cfg.folder}: {counts}{note}")
    return DataFolder(cfg.folder)


def prepare_problems(kind: Literal["chat", "preference"], model: str) -> DataFolder:
    """The embedded problems for a model's tokenizer, in data/problems_<kind>; made again if outdated.

    Raises UserError if a user made the folder with other settings.
    """
    # find_folder turns an out_dir into its checkpoint and a hub id into its download, which have a tokenizer.
    cfg = PrepareConfig(kind=kind, source="problems", out=f"data/problems_{kind}",
                        tokenizer=str(hf.find_folder(model)))
    exists = (cfg.folder / "meta.json").exists()
    different = changed_inputs(DataFolder(cfg.folder), describe_inputs(cfg, [], [])) if exists else []
    # Another tokenizer or version of the problems is no choice of the user's, so that folder is replaced.
    if others := [key for key in different if key not in ("tokenizer", "problems")]:
        raise UserError(f"{cfg.folder}: was made with other settings ({', '.join(others)} differ); "
                        "to train on it, rename it and pass its new name as --dataset=")
    return prepare(dataclasses.replace(cfg, overwrite=bool(different)))


def main(argv: list[str]) -> int:
    cfg, provenance = configure(PrepareConfig, argv, usage=__doc__)
    # An existing tokenizer has a fixed size, so a vocab_size that the user gave must not be ignored silently.
    if "vocab_size" in provenance and cfg.tokenizer != "bpe":
        raise UserError(f"{provenance['vocab_size']}: vocab_size only works with --tokenizer=bpe, "
                        f"not {cfg.tokenizer}")
    if cfg.verify:
        DataFolder(cfg.folder).verify()  # reads every byte; opening a folder checks only names and sizes
        print(f"{cfg.folder}: every shard matches its sha256")
    else:
        prepare(cfg)
    return 0


if __name__ == "__main__":
    run_script(main)
