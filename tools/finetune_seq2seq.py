"""Fine-tune an encoder-decoder such as T5 on summaries, with ROUGE before and after in one table.

    python -m tools.finetune_seq2seq --model=google-t5/t5-small --source=hf:knkarthick/samsum:default:train
    python -m tools.finetune_seq2seq --model=t5/ --source=rows.jsonl --lora_rank=0 --learning_rate=3e-4

The rest of this project is about decoders. This file takes the model from transformers and the adapter from
PEFT, so that both kinds of model can be compared on one task. Rows have document, article or dialogue, and
summary or highlights (dataset/tasks.py). A hash of the document decides which rows are for validation. The
batch of a step depends on seed and step only. Writes the model or its adapter, and results.json with the
summaries.

ROUGE is that of eval.py's task summarize, of greedy summaries. Left out: resuming, beam search, several GPUs.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configurator import UserError, configure, require_not_negative, require_positive, run_script
from dataset.sources import find_files, hub_rows, read_rows, row_value, usable_rows
from dataset.tasks import ASK_SUMMARY, example
from evals.results import means
from evals.tasks.summarize import ROUGE, rouge
from formats.files import write_json
from formats.markdown import table
from modeling.devices import pick_device

PREFIX = "summarize: "  # T5 was trained with this one
VAL_FRACTION = 0.05  # share of the rows for validation, chosen by a hash of the document


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    model: str = "google-t5/t5-small"  # folder or hub id of an encoder-decoder of transformers
    source: str = "hf:knkarthick/samsum:default:train"  # rows: files, folders, globs or hf:NAME:CONFIG:SPLIT
    out_dir: str = "out/seq2seq"  # the results, and the adapter or the model
    lora_rank: int = 16  # rank of the adapter; 0 trains all weights
    learning_rate: float = 1e-3  # at the first step; it falls to 0 at the last
    max_steps: int = 500  # optimizer steps
    batch_size: int = 8  # rows per step
    document_tokens: int = 512  # longer documents lose their end
    summary_tokens: int = 64  # longest summary
    limit: int = 100  # most validation rows that are summarized
    seed: int = 1337  # of the batches, the adapter and dropout
    device: str | None = None  # cpu, cuda or mps; None is the best one available

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "max_steps", "batch_size", "document_tokens",
                         "summary_tokens", "limit")
        require_not_negative(self, "lora_rank", "seed")


def read_pairs(cfg: Seq2SeqConfig) -> dict[bool, list[tuple[str, str]]]:
    """{False: (document, summary) of each training row, True: those for validation}. UserError for none."""
    rows = (hub_rows(cfg.source.removeprefix("hf:"), None) if cfg.source.startswith("hf:") else
            read_rows(find_files(cfg.source)[0], None, piece=2**20))
    pairs: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for _, (prompt, summary) in usable_rows(rows, lambda row: example("summarize", row_value(row))):
        document = prompt.removesuffix(ASK_SUMMARY)
        pairs[zlib.crc32(document.encode()) < VAL_FRACTION * 2**32].append((document, summary))
    if not pairs[False] or not pairs[True]:
        raise UserError(f"source={cfg.source}: needs rows for training and for validation; there are "
                        f"{len(pairs[False])} and {len(pairs[True])}")
    return pairs


def tokens_of(cfg: Seq2SeqConfig, tokenizer: Any, documents: Sequence[str]) -> Any:
    return tokenizer([PREFIX + document for document in documents], truncation=True, padding=True,
                     max_length=cfg.document_tokens, return_tensors="pt").to(pick_device(cfg.device))


def train(cfg: Seq2SeqConfig, model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    """AdamW on the mean cross-entropy per token of the summaries, with a learning rate that falls to 0."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, cfg.learning_rate)
    model.train()
    for step in range(cfg.max_steps):
        batch = random.Random(f"{cfg.seed}/{step}").choices(pairs, k=cfg.batch_size)
        inputs = tokens_of(cfg, tokenizer, [document for document, _ in batch])
        labels = tokenizer(text_target=[summary for _, summary in batch], truncation=True, padding=True,
                           max_length=cfg.summary_tokens, return_tensors="pt").to(inputs.input_ids.device)
        targets = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)  # no loss on padding
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * (1 - step / cfg.max_steps)
        loss = model(**inputs, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == cfg.max_steps - 1:
            print(f"step {step:>6,}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def summarize(cfg: Seq2SeqConfig, model: Any, tokenizer: Any, documents: Sequence[str]) -> list[str]:
    """Greedy summaries."""
    model.eval()
    texts = []
    for first in range(0, len(documents), cfg.batch_size):
        inputs = tokens_of(cfg, tokenizer, documents[first:first + cfg.batch_size])
        ids = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=cfg.summary_tokens)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def main(argv: list[str]) -> int:
    cfg, _ = configure(Seq2SeqConfig, argv, usage=__doc__)
    try:
        import peft
        import transformers
    except ImportError:
        raise UserError("this tool needs transformers and peft (pip install transformers peft)") from None
    pairs = read_pairs(cfg)
    torch.manual_seed(cfg.seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(cfg.model).to(pick_device(cfg.device))
    except (OSError, ValueError) as error:
        raise UserError(f"model={cfg.model}: {str(error).splitlines()[0]}") from None
    documents, summaries = zip(*pairs[True][:cfg.limit], strict=True)
    texts = {"zero-shot": summarize(cfg, model, tokenizer, documents)}
    if cfg.lora_rank:
        spec = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, task_type="SEQ_2_SEQ_LM")
        model = peft.get_peft_model(model, spec)
    train(cfg, model, tokenizer, pairs[False])
    texts["tuned"] = summarize(cfg, model, tokenizer, documents)
    model.save_pretrained(cfg.out_dir)
    tokenizer.save_pretrained(cfg.out_dir)
    figures = {name: means([*map(rouge, each, summaries)], ROUGE) for name, each in texts.items()}
    rows = [dict(zip(("document", "summary", *texts), row, strict=True))
            for row in zip(documents, summaries, *texts.values(), strict=True)]
    write_json(Path(cfg.out_dir) / "results.json", {"settings": asdict(cfg), "figures": {
        name: {key: figure._asdict() for key, figure in each.items()} for name, each in figures.items()},
        "summaries": rows})
    print(table(["figure", "n", *figures], [[key, len(rows), *(
        f"{each[key].value:.4f} ± {each[key].stderr:.4f}" for each in figures.values())] for key in ROUGE]))
    return 0


if __name__ == "__main__":
    run_script(main)
