"""On-policy distillation: rows that the student goes on with itself (GKD, arXiv 2306.13649).

    prompts, lengths = beginnings(rows)                       # which a batch brings, and its rows' numbers
    batch = continued(student, batch, seed, vocab_size, end_ids)

Of text the first quarter of a row is the prompt, and the student writes the rest. Of chats, a conversation a
row, all before the last answer is, and the student answers, in no more tokens than the data does. What it
writes follows from its weights and from the row's number in the run, not from how a step is split. An answer
may end sooner than the data's; a batch counts the words of those, because all ranks agree on the count first.
"""

from typing import Any

import numpy as np
import torch

from dataset.dataloader import IGNORE
from generation.generate import Sampling, generate_steps
from model import GPT


def beginnings(rows: np.ndarray) -> tuple[list[int], list[int]]:
    """(tokens of each row's prompt, most tokens behind it) of text (n, T + 1), or of chats (n, 3, T)."""
    if rows.ndim == 2:
        n, tokens = rows.shape
        prompt = max(1, (tokens - 1) // 4)
        return [prompt] * n, [tokens - prompt] * n
    at, trained = np.arange(rows.shape[2]), rows[:, 1] != IGNORE  # (T,), (n, T)
    last = np.where(trained, at, -1).max(axis=1)  # (n,), the last target's position
    before = np.where(~trained & (at < last[:, None]), at, -1).max(axis=1)  # (n,), the last before its run
    return (before + 2).tolist(), (last - before).tolist()  # a target stands one token behind its position


def continued(student: GPT, batch: dict[str, Any], seed: int, vocab_size: int,
              end_ids: set[int]) -> dict[str, Any]:
    """The batch with the student's words behind each prompt, sampled at temperature 1.

    batch: "input_ids" (B, T); "prompts" and "lengths", `beginnings` of its rows; "numbers" of its rows in the
    run. A row that writes one of end_ids has ended. Returns other "input_ids" (B, T'), and, as chat_batch,
    "positions" and "targets" (targets,), which are the student's words, and those alone.
    """
    rows = [row[:prompt] for row, prompt in zip(batch["input_ids"].tolist(), batch["prompts"], strict=True)]
    lengths, device = batch["lengths"], batch["input_ids"].device

    def is_done(row: int, new: list[int]) -> bool:
        return len(new) == lengths[row] or new[-1] in end_ids

    student.eval()
    with torch.no_grad():
        steps = list(generate_steps(student, rows, max(lengths), Sampling(temperature=1.0, seed=seed), is_done,
                             vocab_size, batch["numbers"]))
    student.train()
    own = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    T = max(len(row) + len(new) for row, new in zip(rows, own, strict=True)) - 1
    whole = [(row + new)[:-1] for row, new in zip(rows, own, strict=True)]
    ids = [row + [0] * (T - len(row)) for row in whole]  # padded behind: causal attention needs no mask
    first = [number * T + len(row) - 1 for number, row in enumerate(rows)]
    positions = [place + k for place, new in zip(first, own, strict=True) for k in range(len(new))]
    made = {"input_ids": ids, "positions": positions, "targets": sum(own, [])}
    return batch | {name: torch.tensor(values, device=device) for name, values in made.items()}
