"""A verifier: a language model with a scalar head that says how likely an answer is right.

    verifier = Verifier("out/verifier", tokenizer)
    scores = verifier.score(prompt_ids, [answer_ids, ...])     # (n,) float32, each the probability of "right"
    best = answers[int(scores.argmax())]

verifier.py trains it. Its folder is an adapter in PEFT's format (formats/peft.py) whose table `score` is the
head. The head reads the hidden state after the answer's last token, and how likely the answer is to the
adapted model:

    log-odds = score[:C] . hidden + score[C] * (sum of log p(token) over the answer) + score[C + 1]

Verifiers for word problems (arXiv 2110.14168) have the hidden state alone. In a model of three layers that is
not enough (docs/log.md): a slip is a token that the model did not expect, and only its output knows
what it expects. The adapter is trained through both terms. Left out: a value at every token, as in the paper.
"""

from collections.abc import Callable, Iterator, Sequence
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
from modeling.devices import to_device

BATCH_TOKENS = 2**13  # tokens of the answers that are read together
CHUNK = 1024  # positions whose logits are computed at once


class ScoredGPT(GPT):
    """A GPT with the head `score`, loaded from a verifier's folder, with its adapter merged."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd + 2, 1, bias=False)

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        hf.require_intact(folder)
        empty = ("score.weight", torch.zeros(self.score.weight.shape))  # the adapter's table replaces it
        base = hf.read_tensors(hf.base_folder(folder, verify=True))
        return peft.merge_adapter(folder, chain(base, [empty]))


def answer_rows(rows: Sequence[Sequence[int]], sampled: Sequence[Sequence[bool]],
                block_size: int) -> dict[str, Any]:
    """Prompts with their answers as a batch of n rows, padded at the end, which causal attention hides.

    rows: the ids of a prompt and its answer. sampled: True for the ids that the model has generated. Only the
    last block_size tokens of a longer row are read. Returns {"input_ids": (n, T), "last": (n,) position of
    the last token, "positions": (targets,) where in the flattened (n T) the next token is a generated one,
    "targets": (targets,) those tokens, "owners": (targets,) their rows}, all int64.
    """
    kept = [torch.tensor(row[-block_size:]) for row in rows]
    ids = nn.utils.rnn.pad_sequence(kept, batch_first=True)  # (n, T)
    marks = [torch.tensor(row[-block_size:]) for row in sampled]
    owners, places = nn.utils.rnn.pad_sequence(marks, batch_first=True)[:, 1:].nonzero(as_tuple=True)
    return {"input_ids": ids, "last": torch.tensor([len(row) - 1 for row in kept]), "owners": owners,
            "positions": owners * ids.shape[1] + places, "targets": ids[owners, places + 1]}


def chunked_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """log p(target) for hidden (N, C) and the output matrix (P, C): (N,) float32, a chunk at a time."""
    chunks = [F.cross_entropy((h @ weight[:vocab_size].T.to(h.dtype)).float(), t, reduction="none")
              for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)]
    return -torch.cat(chunks)  # (N,)


def answer_logits(forward: nn.Module, model: Any, batch: dict[str, Any],
                  log_probs: Callable[..., Tensor] = chunked_log_probs) -> Tensor:
    """The log-odds of "right" for each row of an `answer_rows` batch: (n,) float32.

    model: a GPT with the head `score`. forward: the model, or DDP's wrapper around it. log_probs: training
    has a version that saves memory.
    """
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        last = hidden[torch.arange(len(hidden), device=hidden.device), batch["last"]]  # (n, T, C) -> (n, C)
        found = log_probs(hidden.flatten(0, 1)[batch["positions"]], weight, batch["targets"],
                          model.config.vocab_size)  # (targets,)
        sums = torch.zeros(len(hidden), device=hidden.device).index_add(0, batch["owners"], found.float())
        ones = torch.ones_like(sums)
        features = torch.cat((last.float(), sums[:, None], ones[:, None]), dim=1)  # (n, C + 2)
        return F.linear(features, model.score.weight.float())[:, 0]  # (n,)

    return forward(batch["input_ids"], head=head)


def find_verifier(path: str | Path) -> Path:
    """The folder of a verifier. Raises UserError if there is none."""
    folder = hf.find_folder(path)
    if read_json(folder / peft.CONFIG).get("modules_to_save") != ["score"]:
        raise UserError(f"{path}: is no verifier (verifier.py trains one)")
    return folder


class Verifier:
    """A trained verifier, from its folder or the best checkpoint of an out_dir of verifier.py."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, device: Any = "cpu"):
        """tokenizer: that of the model whose answers are scored. Raises UserError if the folder is no
        verifier, or if its token ids have another meaning."""
        folder = find_verifier(path)
        # Only ids are read here, so they must have the same meaning. The files may differ: a .gguf file lists
        # the special tokens in another place than the tokenizer.json that it was made from.
        if Tokenizer.load(folder).hf.get_vocab() != tokenizer.hf.get_vocab():
            raise UserError(f"{path}: this verifier was trained with another tokenizer than the model's")
        self.model = ScoredGPT.from_pretrained(folder, device).eval()

    def score(self, prompt_ids: Sequence[int], answers_ids: Sequence[Sequence[int]]) -> Tensor:
        """The probability that each answer to a prompt is right: (n,) float32 on the CPU.

        An answer's ids are those that the model has generated, with the end of its turn.
        """
        rows = [[*prompt_ids, *answer] for answer in answers_ids]
        before = [False] * len(prompt_ids)
        return self.score_rows(rows, [before + [True] * len(answer) for answer in answers_ids])

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[Sequence[int]], sampled: Sequence[Sequence[bool]]) -> Tensor:
        """`score` for rows with prompts of their own, and results of tools; see `answer_rows`."""
        scores, device = torch.zeros(len(rows)), self.model.head_weight.device
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # similar lengths: little padding
        while order:
            size = max(1, BATCH_TOKENS // len(rows[order[0]]))
            now, order = order[:size], order[size:]
            batch = answer_rows([rows[row] for row in now], [sampled[row] for row in now],
                                self.model.config.block_size)
            logits = answer_logits(self.model, self.model, to_device(batch, device))
            scores[now] = logits.sigmoid().cpu()
        return scores
