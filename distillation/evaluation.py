"""Validation of a student: its loss, and how close it is to its teacher.

    evaluation = StudentEvaluation(cfg, mix, Rows, teacher, run, packing=True, document_mask=False)
    results = evaluation(student, last=True)              # {"val_loss", "val_kl", "val_agreement", ...}
"""

import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from dataset.chat_rows import batch_of
from dataset.dataloader import Mix
from distillation.divergences import DenseTeacher, comparison_sums, select_targets
from training.config import RunConfig
from training.run import Run
from training.staged_data import MixEvaluation


class StudentEvaluation(MixEvaluation[RunConfig]):
    """Evaluates a student on the validation rows of a mix of data folders.

    If the teacher is in memory (it is not when distillation reads a cache), the results include the teacher's
    own loss, KL(teacher || student), and how often both models have the same most likely token.
    """

    def __init__(self, cfg: RunConfig, mix: Mix, kind: Any, teacher: nn.Module | None, run: Run,
                 packing: bool, document_mask: bool):
        """kind: the class of the rows. packing, document_mask: keys of distill.py."""
        super().__init__(cfg, mix, kind, run)
        self.teacher, self.packing, self.document_mask = teacher, packing, document_mask

    def __call__(self, model: nn.Module, last: bool) -> dict[str, float]:
        """Read the first cfg.eval_tokens tokens of each folder, shared by the ranks. Losses are in nats per
        token."""
        means = self.means(lambda rows: self.values(model, rows))
        return means | {"val_perplexity": math.exp(min(means["val_loss"], 700))}

    def values(self, model: nn.Module, rows: Any) -> dict[str, float]:
        """The results of one folder."""
        def measure(batch: dict[str, Any]) -> list[Tensor]:
            targets = batch["targets"]
            return [*self.batch_sums(model, batch), self.byte_counts[targets[targets >= 0]].sum()]

        def make_batch(numbers: np.ndarray) -> dict[str, Any]:
            return batch_of(rows.read(numbers), self.mix.tokenizer.eot_id, self.packing, self.document_mask)

        count, nats, teacher_nats, kl, agree, text_bytes = self.sums(rows, make_batch, measure)
        values = {"val_loss": nats / count}
        if rows.kind == "text":  # the bytes of a chat are not all targets
            values["val_bits_per_byte"] = nats / math.log(2) / max(text_bytes, 1)
        if self.teacher is not None:
            values |= {"val_teacher_loss": teacher_nats / count, "val_kl": kl / count,
                       "val_agreement": agree / count}
        return values

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
