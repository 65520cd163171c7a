"""On-policy distillation: the student writes the text that the teacher then corrects (GKD, arXiv 2306.13649).

    prompts, lengths = prompt_lengths(rows)                   # stored in the batch, with the rows' numbers
    batch = rollout_batch(student, batch, seed, vocab_size, end_ids)

In text, the first quarter of a row is the prompt, and the student writes the rest. In chats (one conversation
per row), the prompt is everything before the last answer, and the student's answer may not be longer than the
reference answer. A row's rollout depends on the weights and on the number of the row in the run, not on the
micro-batch size or the number of ranks.

A rollout may end before the reference does. The batch's "count" is still that of the reference, because all
ranks agree on the counts before anything is generated.
"""

from typing import Any

import numpy as np
import torch

from dataset.dataloader import IGNORE
from generation.generate import Options, Sampling, generate_steps
from model import GPT


def prompt_lengths(rows: np.ndarray) -> tuple[list[int], list[int]]:
    """(tokens of each row's prompt, most tokens of its rollout). rows: text (n, T + 1) or chats (n, 3, T).

    Example of a chat with T = 8 and the targets of two answers at the positions 2, 3 and 5, 6, 7:

        position  0 1 2 3 4 5 6 7
        target    - - x x - x x x      The target at position 5 is token 6,
                                       so the prompt is tokens 0 to 5 (6 tokens), and the answer has 3.
    """
    if rows.ndim == 2:
        n, tokens = rows.shape
        prompt = max(1, (tokens - 1) // 4)
        return [prompt] * n, [tokens - prompt] * n
    position, is_target = np.arange(rows.shape[2]), rows[:, 1] != IGNORE  # (T,), (n, T)
    last = np.where(is_target, position, -1).max(axis=1)  # (n,), position of the last target
    # (n,), the last position before the last answer's targets
    before = np.where(~is_target & (position < last[:, None]), position, -1).max(axis=1)
    return (before + 2).tolist(), (last - before).tolist()


def rollout_batch(student: GPT, batch: dict[str, Any], seed: int, vocab_size: int,
                  end_ids: set[int | None]) -> dict[str, Any]:
    """The batch with a rollout of the student, sampled at temperature 1, after each prompt.

    batch: "input_ids" (B, T); "prompts" and "lengths", the `prompt_lengths` of its rows; "numbers", the rows'
    numbers in the run. A rollout ends with a token of end_ids or at its length. Returns the batch with new
    "input_ids" (B, T'), and "positions" and "targets" (targets,) of the student's tokens, as chat_batch does.
    """
    prompts = [row[:n] for row, n in zip(batch["input_ids"].tolist(), batch["prompts"], strict=True)]
    lengths, device = batch["lengths"], batch["input_ids"].device

    def is_done(row: int, new: list[int]) -> bool:
        return len(new) == lengths[row] or new[-1] in end_ids

    student.eval()
    with torch.no_grad():
        steps = list(generate_steps(student, prompts, max(lengths), Sampling(temperature=1.0, seed=seed),
                                    is_done, Options(vocab_size=vocab_size, row_numbers=batch["numbers"])))
    student.train()
    rollouts = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    rows = [prompt + rollout for prompt, rollout in zip(prompts, rollouts, strict=True)]
    T = max(map(len, rows)) - 1  # the last token of a row is a target, but no input
    # Padded at the end: causal attention needs no mask.
    ids = [row[:-1] + [0] * (T - len(row) + 1) for row in rows]  # (B, T)
    first = [number * T + len(prompt) - 1 for number, prompt in enumerate(prompts)]  # in the flattened (B T)
    positions = [start + k for start, new in zip(first, rollouts, strict=True) for k in range(len(new))]
    lists = {"input_ids": ids, "positions": positions, "targets": sum(rollouts, [])}
    return batch | {name: torch.tensor(values, device=device) for name, values in lists.items()}
