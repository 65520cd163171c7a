"""Data for distillation without data: what a teacher writes by itself, or noise in its own tokens.

    python -m tools.synthesize --teacher=out/base --kind=sampled --tokens=1_000_000 --out=data/free
    python -m tools.synthesize --teacher=out/base --seeds=prompts.txt --out=data/seeded
    python distill.py --dataset=free --alpha=1

sampled: the teacher's own text, each document from the end-of-text token, or from the first tokens of a line
of --seeds. Its first tokens are drawn at a higher temperature, so that not all documents open alike, and the
rest as the teacher is. (LLM-QAT, arXiv 2305.17888, begins with every token in turn, takes the likeliest two
to four times, and then samples; --first_tokens=1 --first_temperature=1e9 begins as widely.)
uniform: ids that know nothing of each other, all equally likely.
unlike: out of distribution: the teacher's text at a temperature well above 1, which is unlikely to the
teacher and still leans on its context. Drawing by 1 / probability instead would give the same few dozen
tokens that the teacher holds impossible, again and again.

Writes a data folder of text as prepare.py does: split by the documents' hashes, duplicates left out and
counted. The same command gives the same bytes on the same machine, torch version and number of threads. A
document that reaches --length is cut: the end-of-text token behind it is not the teacher's, and noise teaches
nothing by its own targets, so distil with --alpha=1. What the student learned, a data set of real text says.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, require_not_negative, require_positive, run_script
from dataset.encoding import text_hash
from dataset.shards import FORMAT_VERSION, ShardWriter
from dataset.sources import Row, Skip, document, file_kind, read_rows
from formats import hf
from formats.files import atomic_folder, file_sha256, write_json
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from modeling.devices import pick_device
from prepare import unchanged

IN_VAIN = 1000  # so many documents in a row that are empty or known: the teacher has nothing else to say
OF_SAMPLED = ("seeds", "seed_tokens", "first_tokens", "first_temperature")


@dataclass(frozen=True, kw_only=True)
class FreeDataConfig:
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    kind: Literal["sampled", "uniform", "unlike"] = "sampled"  # what is written: see above
    tokens: int = 1_000_000  # stop at the document that reaches so many
    out: str = "data/free"  # the data folder itself
    length: int | None = None  # most tokens written of a document; None: what the teacher's context holds
    seeds: str | None = None  # sampled: a .jsonl ({"text": ..}) or text file, whose lines documents open with
    seed_tokens: int = 8  # sampled: that many tokens of a line
    first_tokens: int = 3  # sampled: tokens behind them (or at the beginning) at first_temperature
    first_temperature: float = 1.5  # sampled: 0 takes the likeliest
    temperature: float | None = None  # of the rest; None: 1 for sampled, 2 for unlike
    seed: int = 1337  # each document draws from this and its own number
    val_fraction: float = 0.03  # share of the documents for validation, chosen by their hash
    batch_size: int = 64  # documents written together
    device: str | None = None  # cpu, cuda, mps; None: the best there is
    overwrite: bool = False  # replace a folder made from other inputs

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "length", "seed_tokens", "batch_size")
        require_not_negative(self, "first_tokens", "seed", "first_temperature", "temperature")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if self.kind == "unlike" and self.temperature is not None and self.temperature <= 1:
            raise UserError(f"temperature={self.temperature}: kind=unlike needs one above 1")


# ---- Documents, without end ------------------------------------------------------------------------------

def random_documents(cfg: FreeDataConfig, words: np.ndarray, length: int) -> Iterator[list[int]]:
    """`length` ids each, drawn from `words`, (ids,)."""
    for number in count():
        yield np.random.default_rng((cfg.seed, number)).choice(words, length).tolist()


def written_documents(cfg: FreeDataConfig, model: GPT, tokenizer: Tokenizer, words: set[int],
                      seeds: list[list[int]], length: int) -> Iterator[list[int]]:
    """What the model writes behind each of the seeds in turn, up to an id that is not in `words`.

    The two parts of a document draw from different seeds, else the same numbers would choose in both.
    """
    start = tokenizer.prefix_ids or [tokenizer.eot_id]
    first = min(cfg.first_tokens, length) if cfg.kind == "sampled" else 0
    rest = cfg.temperature if cfg.temperature is not None else {"sampled": 1.0, "unlike": 2.0}[cfg.kind]
    parts = [(first, cfg.first_temperature, 2 * cfg.seed), (length - first, rest, 2 * cfg.seed + 1)]
    for begin in count(step=cfg.batch_size):
        numbers = range(begin, begin + cfg.batch_size)
        rows = {number: list(seeds[number % len(seeds)]) for number in numbers}
        live = list(numbers)
        for steps, temperature, seed in parts:
            prompts = [start + rows[number] for number in live]
            written = generate(model, prompts, steps, Sampling(temperature=temperature, seed=seed),
                               lambda row, new: new[-1] not in words, tokenizer.vocab_size, live)
            for tokens in written if live else ():
                for number, token in zip(live, tokens, strict=True):
                    rows[number] += [] if token is None else [token]
            live = [number for number in live if not rows[number] or rows[number][-1] in words]
        for row in rows.values():
            yield row if row[-1] in words else row[:-1]


def read_seeds(path: str, tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    """The first ids of each line that is not blank. UserError, with its place, for one that is not text."""
    if file_kind(Path(path)) == ".jsonl":
        rows: Iterable[Row] = read_rows([Path(path)], "text", 2**20)
    else:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        rows = (Row(f"{path}:{number}", "text", line) for number, line in enumerate(lines, 1))
    seeds = []
    for row in rows:
        try:
            seeds += [tokenizer.encode(document(row, "text"))[:tokens]] if row.content.strip() else []
        except Skip as reason:
            raise UserError(f"{row.place}: {reason}") from None
    if not seeds:
        raise UserError(f"seeds={path}: no text in it")
    return seeds


# ---- The folder -------------------------------------------------------------------------------------------

def write_documents(cfg: FreeDataConfig, documents: Iterable[list[int]], tokenizer: Tokenizer,
                    writers: dict[str, ShardWriter]) -> dict[str, Any]:
    """Write until there are cfg.tokens, ends of text among them; returns meta.json's "rows".

    UserError where nothing new comes any more, or a split stays empty.
    """
    table, seen, skipped, tokens, last = tokenizer.token_bytes(), set(), Counter(), 0, 0
    with tqdm(total=cfg.tokens, unit="token", leave=False, disable=not sys.stderr.isatty()) as bar:
        for number, ids in enumerate(documents, 1):
            data = b"".join(table[i] for i in ids)
            name = text_hash(data)
            if not ids or name in seen:
                skipped["duplicate document" if ids else "empty text"] += 1
                if number - last == IN_VAIN:
                    raise UserError(f"tokens={cfg.tokens}: after {tokens:,}, {IN_VAIN:,} documents brought "
                                    "nothing new; a higher temperature, more seeds or length would")
                continue
            seen.add(name)
            writer = writers["val" if name < cfg.val_fraction * 2**64 else "train"]
            writer.write(np.array([*ids, tokenizer.eot_id]), 1, len(data))
            bar.update(len(ids) + 1)
            tokens, last = tokens + len(ids) + 1, number
            if tokens >= cfg.tokens:
                break
    for split, writer in writers.items():
        writer.close()
        if not writer.tokens and (split == "train" or cfg.val_fraction):
            raise UserError(f"tokens={cfg.tokens}: none of {len(seen)} documents fell to {split} with "
                            f"val_fraction={cfg.val_fraction}: ask for more, or another share")
    return {"in": number, "kept": len(seen), "skipped": dict(skipped)}


def build(cfg: FreeDataConfig, teacher: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write the shards and the tokenizer into an empty folder; returns what meta.json says of them."""
    words = set(tokenizer.hf.get_vocab().values()) - tokenizer.special_ids - {tokenizer.eot_id}
    seeds = read_seeds(cfg.seeds, tokenizer, cfg.seed_tokens) if cfg.seeds else [[]]
    length = cfg.length or hf.read_config(teacher)["block_size"] - max(map(len, seeds))
    if length < 1:
        raise UserError(f"seed_tokens={cfg.seed_tokens}: fill the teacher's context; give --length=")
    if cfg.kind == "uniform":
        documents = random_documents(cfg, np.array(sorted(words)), length)
    else:
        model = GPT.from_pretrained(teacher, pick_device(cfg.device)).eval()
        documents = written_documents(cfg, model, tokenizer, words, seeds, length)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    writers = {split: ShardWriter(folder, split, dtype) for split in ("train", "val")}
    rows = write_documents(cfg, documents, tokenizer, writers)
    counts = {key: {split: getattr(writer, key) for split, writer in writers.items()}
              for key in ("documents", "tokens", "bytes")}
    tokenizer.save(folder)
    return {"format_version": FORMAT_VERSION, "kind": "text", "tokenizer": cfg.teacher,
            "tokenizer_sha256": file_sha256(folder / "tokenizer.json"), "vocab_size": tokenizer.vocab_size,
            "dtype": np.dtype(dtype).name, **counts,
            "shards": [shard for writer in writers.values() for shard in writer.shards],
            "source": f"{cfg.kind} by {cfg.teacher}", "rows": rows, "files_ignored": 0}


def main(argv: list[str]) -> int:
    cfg, given = configure(FreeDataConfig, argv, usage=__doc__)
    useless = {"sampled": (), "unlike": OF_SAMPLED, "uniform": (*OF_SAMPLED, "temperature")}[cfg.kind]
    if both := sorted(given.keys() & useless):
        raise UserError(f"{given[both[0]]}: {both[0]} has no meaning for kind={cfg.kind}")
    teacher, out = hf.find_folder(cfg.teacher), Path(cfg.out)
    inputs = dataclasses.asdict(cfg) | {"teacher": weights_sha256(teacher)}
    inputs["seeds"] = file_sha256(Path(cfg.seeds)) if cfg.seeds else None
    for key in ("out", "batch_size", "device", "overwrite"):
        del inputs[key]
    if (out / "meta.json").exists() and not cfg.overwrite:
        unchanged(out, inputs)
        return 0
    with atomic_folder(out) as folder:
        meta = build(cfg, teacher, Tokenizer.load(teacher), folder)
        write_json(folder / "meta.json", meta | {"inputs": inputs})
    print(f"data    {out}: {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} validation "
          f"tokens in {meta['rows']['kept']:,} documents of {meta['rows']['in']:,}")
    return 0


if __name__ == "__main__":
    run_script(main)
