"""A verifier: a language model with a scalar head that says how likely an answer is right.

    verifier = Verifier.load("out/verifier", tokenizer)
    scores = verifier.score(prompt_ids, [answer_ids, ...])     # (n,) float32, each the probability of "right"
    best = answers[int(scores.argmax())]

verifier.py trains it. A verifier's folder is an adapter in PEFT's format (formats/peft.py) whose table `score`
is the head, and verifier.json with the bias. The head reads the hidden state after the answer's last token, as
transformers' LlamaForSequenceClassification does:

    probability = sigmoid(score . hidden + bias)

The verifier of "Training Verifiers to Solve Math Word Problems" (arXiv 2110.14168) is of this kind; it also
learns a value at every token. That is left out.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from formats import hf, peft
from formats.files import read_json
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig

FILE = "verifier.json"  # {"bias": log-odds that are added to the head's output}
BATCH_TOKENS = 2**13  # tokens of the answers that are read together


class ScoredGPT(GPT):
    """A GPT with the head `score`, loaded from a verifier's folder, with its adapter merged."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__(config, seed)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        hf.require_intact(folder)
        empty = ("score.weight", torch.zeros(self.score.weight.shape))  # the adapter's table replaces it
        base = hf.read_tensors(hf.base_folder(folder, verify=True))
        return peft.merge_adapter(folder, chain(base, [empty]))


def answer_rows(rows: Sequence[Sequence[int]], block_size: int) -> dict[str, Any]:
    """Prompts with their answers as a batch: {"input_ids": (n, T), "last": (n,)}, int64.

    rows: the ids of a prompt and its answer. Of a row longer than block_size only the end is read. last: the
    position of each row's last token. Shorter rows are padded at their end, which causal attention hides.
    """
    kept = [torch.tensor(row[-block_size:]) for row in rows]
    return {"input_ids": nn.utils.rnn.pad_sequence(kept, batch_first=True),  # (n, T)
            "last": torch.tensor([len(row) - 1 for row in kept])}


def answer_logits(model: nn.Module, score: nn.Linear, batch: dict[str, Any]) -> Tensor:
    """The head's output for each row of an `answer_rows` batch: (n,) float32. Add the bias for log-odds."""
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        last = hidden[torch.arange(len(hidden), device=hidden.device), batch["last"]]  # (n, T, C) -> (n, C)
        return F.linear(last, score.weight.to(last.dtype))[:, 0].float()  # (n,)

    return model(batch["input_ids"], head=head)


class Verifier:
    """A trained verifier. Use `load`."""

    def __init__(self, model: ScoredGPT, bias: float):
        self.model, self.bias = model, bias

    @classmethod
    def load(cls, path: str | Path, tokenizer: Tokenizer, device: Any = "cpu") -> "Verifier":
        """Load a verifier's folder, or the best checkpoint of an out_dir of verifier.py.

        tokenizer: that of the model whose answers are scored. Raises UserError if the folder is no verifier, or
        if its tokenizer is another one.
        """
        folder = hf.find_folder(path)
        bias = read_json(folder / FILE).get("bias")
        if not isinstance(bias, float) or not peft.is_adapter(folder):
            raise UserError(f"{path}: is no verifier (verifier.py trains one)")
        if Tokenizer.load(folder).definition != tokenizer.definition:
            raise UserError(f"{path}: this verifier was trained with another tokenizer than the model's")
        model = ScoredGPT.from_pretrained(folder, device).eval()
        assert isinstance(model, ScoredGPT)
        return cls(model, bias)

    def score(self, prompt_ids: Sequence[int], answers_ids: Sequence[Sequence[int]]) -> Tensor:
        """The probability that each answer to a prompt is right: (n,) float32 on the CPU.

        An answer's ids are those that the model has generated, with the end of its turn.
        """
        return self.score_rows([[*prompt_ids, *answer] for answer in answers_ids])

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """`score` for rows that are a prompt and its answer each; every row may have its own prompt."""
        scores, device = torch.zeros(len(rows)), self.model.head_weight.device
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # similar lengths: little padding
        while order:
            size = max(1, BATCH_TOKENS // len(rows[order[0]]))
            now, order = order[:size], order[size:]
            batch = answer_rows([rows[row] for row in now], self.model.config.block_size)
            logits = answer_logits(self.model, self.model.score, {k: v.to(device) for k, v in batch.items()})
            scores[now] = (logits + self.bias).sigmoid().cpu()
        return scores
