"""Write a data set with a teacher, for distillation without the data that the teacher was trained on.

    python -m tools.synthesize --teacher=out/base --kind=sampled --tokens=1_000_000 --out=data/free
    python distill.py --dataset=free --alpha=1

sampled   Text of the teacher. Its first three tokens are drawn at a higher temperature, so that the documents
          differ from the start. (LLM-QAT, arXiv 2305.17888, starts with each token in turn.)
uniform   Noise: independent, equally likely token ids.
unlike    Out of distribution: text of the teacher at the temperature 2. The teacher finds it unlikely, but
          each token still depends on the context. Not done: drawing tokens by 1 / probability, which repeats
          the few dozen tokens that the teacher thinks least likely.

Writes a data folder of text as prepare.py does: split by the documents' hashes, without duplicates, which are
counted. The same command writes the same bytes on the same machine, torch version and number of threads.

Distil with --alpha=1. The targets of noise teach nothing, and the end-of-text token after a document that was
cut at --length is not the teacher's choice. Evaluate the student on real text.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configurator import (
    ProgressBar,
    UserError,
    configure,
    require,
    require_not_negative,
    require_positive,
    run_script,
)
from dataset.encoding import text_hash
from dataset.shards import ShardWriter, describe, open_writers
from formats import hf
from formats.files import atomic_folder, write_json
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from generation.generate import Options, Sampling, append_tokens, generate
from model import GPT
from modeling.devices import pick_device
from prepare import unchanged

MAX_IN_VAIN = 1000  # after this many empty or duplicate documents in a row, more will not help
TEMPERATURES = {"sampled": 1.0, "unlike": 2.0}
FIRST_TOKENS, FIRST_TEMPERATURE = 3, 1.5  # the beginning of a sampled document


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    kind: Literal["sampled", "uniform", "unlike"] = "sampled"  # the content, see above
    tokens: int = 1_000_000  # stop after the document that reaches this number
    out: str = "data/free"  # the data folder
    length: int | None = None  # most tokens of a document; None fills the teacher's context
    seed: int = 1337  # each document is drawn from this seed and its number
    val_fraction: float = 0.03  # share of the documents for validation, chosen by their hash
    batch_size: int = 64  # documents that are generated together
    device: str | None = None  # cpu, cuda, mps; None is the best one available
    overwrite: bool = False  # replace a folder that was made from other inputs

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "length", "batch_size")
        require_not_negative(self, "seed")
        require(self, "val_fraction", 0 <= self.val_fraction < 1, "at least 0 and below 1")


# ---- Documents, without end -------------------------------------------------------------------------------

def uniform_documents(cfg: SynthesizeConfig, text_ids: set[int], length: int) -> Iterator[list[int]]:
    """Documents of `length` ids, drawn uniformly from text_ids."""
    choices = np.array(sorted(text_ids))
    for number in count():
        yield np.random.default_rng((cfg.seed, number)).choice(choices, length).tolist()


def extend_documents(model: GPT, tokenizer: Tokenizer, text_ids: set[int], documents: dict[int, list[int]],
                     steps: int, sampling: Sampling) -> None:
    """Append up to `steps` tokens to each of the documents {number: ids} that has not ended.

    A document has ended if its last id is not in text_ids. Its number seeds its random numbers.
    """
    live = [number for number, ids in documents.items() if not ids or ids[-1] in text_ids]
    if not live:
        return
    start = tokenizer.prefix_ids or [tokenizer.eot_id]
    options = Options(vocab_size=tokenizer.vocab_size, row_numbers=live)
    for tokens in generate(model, [start + documents[number] for number in live], steps, sampling,
                           lambda row, new: new[-1] not in text_ids, options):
        append_tokens([documents[number] for number in live], tokens)


def teacher_documents(cfg: SynthesizeConfig, model: GPT, tokenizer: Tokenizer, text_ids: set[int],
                      length: int) -> Iterator[list[int]]:
    """Documents of up to `length` ids that the model writes.

    A document is written in two phases: the first tokens, then the rest at another temperature. The phases
    use different random seeds; otherwise both would draw the same random numbers.
    """
    first = min(FIRST_TOKENS, length) if cfg.kind == "sampled" else 0
    for begin in count(step=cfg.batch_size):
        documents: dict[int, list[int]] = {n: [] for n in range(begin, begin + cfg.batch_size)}
        extend_documents(model, tokenizer, text_ids, documents, first,
                         Sampling(temperature=FIRST_TEMPERATURE, seed=2 * cfg.seed))
        extend_documents(model, tokenizer, text_ids, documents, length - first,
                         Sampling(temperature=TEMPERATURES[cfg.kind], seed=2 * cfg.seed + 1))
        for ids in documents.values():
            yield ids if ids[-1] in text_ids else ids[:-1]  # without the token that ended it


# ---- The data folder --------------------------------------------------------------------------------------

def write_documents(cfg: SynthesizeConfig, documents: Iterable[list[int]], tokenizer: Tokenizer,
                    writers: dict[str, ShardWriter]) -> dict[str, Any]:
    """Write documents until they have cfg.tokens tokens, with an end-of-text token after each one.

    Returns "rows" of meta.json. Raises UserError if no new documents come, or if a split stays empty.
    """
    table, seen, skipped = tokenizer.token_bytes(), set(), Counter()
    tokens, last_new = 0, 0
    with ProgressBar(total=cfg.tokens, unit="token") as bar:
        for number, ids in enumerate(documents, 1):
            data = b"".join(table[i] for i in ids)
            digest = text_hash(data)
            if not ids or digest in seen:
                skipped["duplicate document" if ids else "empty text"] += 1
                if number - last_new == MAX_IN_VAIN:
                    raise UserError(f"tokens={cfg.tokens}: at {tokens:,}, {MAX_IN_VAIN:,} documents brought "
                                    "nothing new; raise length")
                continue
            seen.add(digest)
            writer = writers["val" if digest < cfg.val_fraction * 2**64 else "train"]
            writer.write(np.array([*ids, tokenizer.eot_id]), len(data))
            bar.update(len(ids) + 1)
            tokens, last_new = tokens + len(ids) + 1, number
            if tokens >= cfg.tokens:
                break
    for split, writer in writers.items():
        if not writer.tokens and (split == "train" or cfg.val_fraction):
            raise UserError(f"tokens={cfg.tokens}: none of {len(seen)} documents fell to {split} with "
                            f"val_fraction={cfg.val_fraction}; raise tokens or change val_fraction")
    return {"in": number, "kept": len(seen), "skipped": dict(skipped)}


def build(cfg: SynthesizeConfig, teacher: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write shards and tokenizer into an empty folder. Returns the content of meta.json except its inputs."""
    text_ids = set(tokenizer.hf.get_vocab().values()) - tokenizer.special_ids - {tokenizer.eot_id}
    length = cfg.length or hf.read_config(teacher)["block_size"]
    if cfg.kind == "uniform":
        documents = uniform_documents(cfg, text_ids, length)
    else:
        model = GPT.from_pretrained(teacher, pick_device(cfg.device)).eval()
        documents = teacher_documents(cfg, model, tokenizer, text_ids, length)
    writers = open_writers(folder, tokenizer.vocab_size)
    rows = write_documents(cfg, documents, tokenizer, writers)
    return describe(writers, "text", tokenizer, cfg.teacher) | {
        "source": f"{cfg.kind} by {cfg.teacher}", "rows": rows, "files_ignored": 0}


def main(argv: list[str]) -> None:
    cfg, _ = configure(SynthesizeConfig, argv, usage=__doc__)
    teacher, out = hf.find_folder(cfg.teacher), Path(cfg.out)
    inputs = dataclasses.asdict(cfg) | {"teacher": weights_sha256(teacher)}
    for key in ("out", "batch_size", "device", "overwrite"):  # these do not change the content
        del inputs[key]
    if (out / "meta.json").exists() and not cfg.overwrite:
        unchanged(out, inputs)
        return
    with atomic_folder(out) as folder:
        meta = build(cfg, teacher, Tokenizer.load(teacher), folder)
        write_json(folder / "meta.json", meta | {"inputs": inputs})
    print(f"data      {out}: {meta['tokens']['train']:,} training and {meta['tokens']['val']:,} validation "
          f"tokens in {meta['rows']['kept']:,} documents; {meta['rows']['in']:,} were generated")


if __name__ == "__main__":
    run_script(main)
