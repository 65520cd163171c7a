"""A student's validation, beside its teacher's.

    evaluation = Evaluation(cfg, mix, Rows, teacher, run)
    figures = evaluation(student, last=True)              # {"val_loss", "val_kl", "val_agreement", ...}
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dataset.chat_rows import batch_of
from dataset.dataloader import Mix, validation_batches, validation_rows
from distillation.divergences import DenseTeacher, compared, select_targets
from modeling.devices import to_device
from training.run import Run


class StudentEvaluation:
    """The student on validation rows, by the weights of the last stage's mix; beside the teacher, where that
    is in memory: its own loss, KL(teacher || student), and how often both hold the same token likeliest."""

    def __init__(self, cfg: Any, mix: Mix, kind: Any, teacher: nn.Module | None, run: Run):
        """cfg: has block_size, eval_tokens, micro_batch_size, packing and document_mask. kind: of rows."""
        self.cfg, self.mix, self.run, self.teacher = cfg, mix, run, teacher
        self.rows = [kind(folder, "val", cfg.block_size) for folder in mix.folders]
        self.byte_counts = torch.tensor([len(token) for token in mix.tokenizer.token_bytes()])  # (V,)

    def __call__(self, model: nn.Module, last: bool) -> dict[str, float]:
        results: dict[str, float] = {}
        for rows, weight in zip(self.rows, self.mix.weights, strict=True):
            count, nats, teacher_nats, kl, agree, text_bytes = self.sums(model, rows)
            found = {"val_loss": nats / count}
            if rows.kind == "text":
                found["val_bits_per_byte"] = nats / math.log(2) / max(text_bytes, 1)
            if self.teacher is not None:
                found |= {"val_teacher_loss": teacher_nats / count, "val_kl": kl / count,
                          "val_agreement": agree / count}
            for name, value in found.items():
                results[name] = results.get(name, 0.0) + weight * value
        return results | {"val_perplexity": math.exp(min(results["val_loss"], 700))}

    def sums(self, model: nn.Module, rows: Any) -> list[float]:
        """`compared` over one folder's first cfg.eval_tokens and all ranks, and the bytes of their text."""
        run, tokenizer = self.run, self.mix.tokenizer
        sums, text_bytes = torch.zeros(5, dtype=torch.float64, device=run.device), 0
        for batch in validation_batches(lambda numbers: batch_of(rows.read(numbers), self.cfg, tokenizer.eot_id),
                                        validation_rows(rows, self.cfg.eval_tokens),
                                        self.cfg.micro_batch_size, run.rank, run.world_size):
            found = self.of(model, to_device(batch, run.device), tokenizer.vocab_size)
            if batch["count"]:
                sums += found
                text_bytes += int(self.byte_counts[batch["targets"][batch["targets"] >= 0]].sum())
        return run.sum([*sums.tolist(), text_bytes])

    def of(self, model: nn.Module, batch: dict[str, Any], vocab_size: int) -> Tensor:
        """`compared`, (5,), of a batch; without a teacher the student stands for it."""
        inputs = dict(input_ids=batch["input_ids"], document_ids=batch.get("document_ids"))
        targets = batch["targets"].flatten()

        def beside(teacher: DenseTeacher | None) -> Tensor:
            def head(hidden: Tensor, weight: Tensor) -> Tensor:
                hidden = select_targets(hidden, batch)
                other = teacher or DenseTeacher(hidden, weight)
                return compared(hidden, weight, targets, other, vocab_size)
            return model(**inputs, head=head)

        if self.teacher is None:
            return beside(None)
        return self.teacher(**inputs, head=lambda hidden, weight: beside(
            DenseTeacher(select_targets(hidden, batch), weight)))
