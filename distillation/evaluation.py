"""Validation of a student: its loss, and how close it is to its teacher.

    evaluation = StudentEvaluation(cfg, mix, Rows, teacher, run)
    results = evaluation(student, last=True)              # {"val_loss", "val_kl", "val_agreement", ...}
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dataset.chat_rows import batch_of
from dataset.dataloader import Mix, validation_rows
from distillation.divergences import DenseTeacher, comparison_sums, select_targets
from training.run import Run
from training.staged_data import validation_sums


class StudentEvaluation:
    """Evaluates a student on the validation rows of a mix of data folders.

    The results are averages over the folders, with the weights that the folders have in training. If the
    teacher is in memory (it is not when distillation reads a cache), they include the teacher's own loss,
    KL(teacher || student), and how often both models have the same most likely token.
    """

    def __init__(self, cfg: Any, mix: Mix, kind: Any, teacher: nn.Module | None, run: Run):
        """kind: the class of the rows. cfg has block_size, eval_tokens, micro_batch_size, packing and
        document_mask."""
        self.cfg, self.mix, self.run, self.teacher = cfg, mix, run, teacher
        self.rows = [kind(folder, "val", cfg.block_size) for folder in mix.folders]
        lengths = [len(token) for token in mix.tokenizer.token_bytes()]
        self.byte_counts = torch.tensor(lengths, device=run.device)  # (V,)

    def __call__(self, model: nn.Module, last: bool) -> dict[str, float]:
        """Read the first cfg.eval_tokens tokens of each folder, shared by the ranks. Losses are in nats per
        token."""
        results: dict[str, float] = {}
        for rows, weight in zip(self.rows, self.mix.weights, strict=True):
            count, nats, teacher_nats, kl, agree, text_bytes = self.folder_sums(model, rows)
            values = {"val_loss": nats / count}
            if rows.kind == "text":  # the bytes of a chat are not all targets
                values["val_bits_per_byte"] = nats / math.log(2) / max(text_bytes, 1)
            if self.teacher is not None:
                values |= {"val_teacher_loss": teacher_nats / count, "val_kl": kl / count,
                           "val_agreement": agree / count}
            for name, value in values.items():
                results[name] = results.get(name, 0.0) + weight * value
        return results | {"val_perplexity": math.exp(min(results["val_loss"], 700))}

    def folder_sums(self, model: nn.Module, rows: Any) -> list[float]:
        """`comparison_sums` of one folder, summed over all ranks, and the bytes of the targets' text."""
        cfg, eot_id = self.cfg, self.mix.tokenizer.eot_id

        def measure(batch: dict[str, Any]) -> list[Tensor]:
            targets = batch["targets"]
            return [*self.batch_sums(model, batch), self.byte_counts[targets[targets >= 0]].sum()]

        return validation_sums(self.run, validation_rows(rows, cfg.eval_tokens), cfg.micro_batch_size,
                               lambda numbers: batch_of(rows.read(numbers), cfg, eot_id), measure)

    def batch_sums(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """`comparison_sums` of a batch, (5,). Without a teacher, the student is compared with itself.

        As in distill.py, the student's forward pass runs inside the teacher's, where both output matrices are
        gathered.
        """
        inputs = {"input_ids": batch["input_ids"], "document_ids": batch.get("document_ids")}
        targets, vocab_size = batch["targets"].flatten(), self.mix.tokenizer.vocab_size

        def dense(hidden: Tensor, weight: Tensor) -> DenseTeacher:
            return DenseTeacher(select_targets(hidden, batch), weight)  # (N, C)

        def student_sums(teacher: DenseTeacher | None) -> Tensor:
            return model(**inputs, head=lambda hidden, weight: comparison_sums(
                select_targets(hidden, batch), weight, targets, teacher or dense(hidden, weight), vocab_size))

        if self.teacher is None:
            return student_sums(None)
        return self.teacher(**inputs, head=lambda hidden, weight: student_sums(dense(hidden, weight)))
