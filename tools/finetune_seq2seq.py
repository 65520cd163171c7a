"""Fine-tune an encoder-decoder such as T5 on summaries, with ROUGE before and after in one table.

    python -m tools.finetune_seq2seq --model=google-t5/t5-small --source=hf:knkarthick/samsum:default:train
    python -m tools.finetune_seq2seq --model=t5/ --source=rows.jsonl --lora_rank=0 --learning_rate=3e-4

The rest of this project is about decoders. This file takes the model and the training loop from transformers
and the adapter from PEFT, so that both kinds of model can be compared on one task. The optimizer is AdamW.
Rows have document, article or dialogue, and summary or highlights (dataset/tasks.py). A hash of the document
decides which rows are for validation. Writes the model or its adapter, and results.json with the summaries.
transformers takes the best device; CUDA_VISIBLE_DEVICES= chooses the CPU.

ROUGE is that of eval.py's task summarize, of greedy summaries. Left out: resuming, beam search, several GPUs.
"""

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configurator import UserError, configure, optional_import, require, require_positive, run_script
from dataset.sources import find_files, hub_rows, read_rows, row_value, usable_rows
from dataset.tasks import ASK_SUMMARY, example
from evals.results import means
from evals.tasks.summarize import ROUGE, rouge, scorer
from formats.files import write_json
from formats.markdown import table

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

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "max_steps", "batch_size", "document_tokens",
                         "summary_tokens", "limit")
        for key in ("lora_rank", "seed"):
            require(self, key, getattr(self, key) >= 0, "at least 0")


def read_pairs(cfg: Seq2SeqConfig) -> dict[bool, list[dict[str, str]]]:
    """{False: training rows, True: validation rows}, each {"document", "summary"}. UserError for none."""
    rows = (hub_rows(cfg.source.removeprefix("hf:")) if cfg.source.startswith("hf:") else
            read_rows(find_files(cfg.source)[0]))
    pairs: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for _, (prompt, summary) in usable_rows(rows, lambda row: example("summarize", row_value(row))):
        document = prompt.removesuffix(ASK_SUMMARY)
        pairs[zlib.crc32(document.encode()) < VAL_FRACTION * 2**32].append(
            {"document": document, "summary": summary})
    if not pairs[False] or not pairs[True]:
        raise UserError(f"source={cfg.source}: needs rows for training and for validation; there are "
                        f"{len(pairs[False])} and {len(pairs[True])}")
    return pairs


def encode(cfg: Seq2SeqConfig, tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """{"input_ids", "attention_mask", "labels"} of a row."""
    inputs = tokenizer(PREFIX + row["document"], truncation=True, max_length=cfg.document_tokens)
    labels = tokenizer(text_target=row["summary"], truncation=True, max_length=cfg.summary_tokens)
    return {**inputs, "labels": labels["input_ids"]}


def make_trainer(cfg: Seq2SeqConfig, rows: list[dict[str, str]]) -> Any:
    """A Seq2SeqTrainer with the model, and an adapter if there is one. Raises UserError for no such model."""
    transformers, peft = (optional_import(name, "finetune_seq2seq") for name in ("transformers", "peft"))
    transformers.set_seed(cfg.seed)  # of the adapter's first weights
    try:
        # Without trust_remote_code, transformers asks on the terminal whether to run the folder's code.
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(cfg.model, trust_remote_code=False,
                                                                   use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model={cfg.model}: {str(error).splitlines()[0]}") from None
    if cfg.lora_rank:
        spec = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, task_type="SEQ_2_SEQ_LM")
        model = peft.get_peft_model(model, spec)
    arguments = transformers.Seq2SeqTrainingArguments(
        cfg.out_dir, learning_rate=cfg.learning_rate, max_steps=cfg.max_steps, seed=cfg.seed,
        per_device_train_batch_size=cfg.batch_size, per_device_eval_batch_size=cfg.batch_size,
        predict_with_generate=True, save_strategy="no", logging_steps=10, report_to="none")
    return transformers.Seq2SeqTrainer(
        model, arguments, transformers.DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=[encode(cfg, tokenizer, row) for row in rows], processing_class=tokenizer)


def summarize(cfg: Seq2SeqConfig, trainer: Any, rows: list[dict[str, str]]) -> list[str]:
    """Greedy summaries."""
    tokenizer = trainer.processing_class
    found = trainer.predict([encode(cfg, tokenizer, row) for row in rows], num_beams=1,
                            max_new_tokens=cfg.summary_tokens)
    return tokenizer.batch_decode(found.predictions.clip(0), skip_special_tokens=True)  # padding is -100


def main(argv: list[str]) -> None:
    cfg, _ = configure(Seq2SeqConfig, argv, usage=__doc__)
    pairs = read_pairs(cfg)
    scorer()  # a missing package and a wrong place end the run now, not after training
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    rows, trainer = pairs[True][:cfg.limit], make_trainer(cfg, pairs[False])
    texts = {"zero-shot": summarize(cfg, trainer, rows)}  # a new adapter changes nothing
    trainer.train()
    trainer.save_model()
    texts["tuned"] = summarize(cfg, trainer, rows)
    figures = {name: means([rouge(text, row["summary"]) for text, row in zip(each, rows, strict=True)], ROUGE)
               for name, each in texts.items()}
    write_json(Path(cfg.out_dir) / "results.json", {"settings": asdict(cfg), "figures": {
        name: {key: figure._asdict() for key, figure in each.items()} for name, each in figures.items()},
        "summaries": [row | {name: each[place] for name, each in texts.items()}
                      for place, row in enumerate(rows)]})
    print(table(["figure", "n", *figures], [[key, len(rows), *(
        f"{each[key].value:.4f} ± {each[key].stderr:.4f}" for each in figures.values())] for key in ROUGE]))


if __name__ == "__main__":
    run_script(main)
