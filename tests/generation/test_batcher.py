"""batcher.py: rows that join and leave a batch have the tokens of `generate`, whatever their neighbours do."""

import threading
import time

import pytest
import torch

from configurator import UserError
from generation.batcher import PIECE_TOKENS, Batcher, Row
from generation.generate import Options, Sampling, append_tokens, generate
from tests.conftest import busy_model, tiny_config
from tests.generation.test_generate import GREEDY, prompts_of

SAMPLINGS = [GREEDY, Sampling(seed=3), Sampling(seed=4, top_k=5), Sampling(seed=5, top_p=0.7, temperature=1.3),
             Sampling(seed=6, min_p=0.1, repetition_penalty=1.3)]


def alone(model, prompt, count, sampling, number=0):
    rows = [[]]
    for tokens in generate(model, [prompt], count, sampling, lambda row, new: new[-1] == 7,
                           Options(vocab_size=500, row_numbers=[number])):
        append_tokens(rows, tokens)
    return rows[0]


class Run:
    """A batcher, and the rows that it was given."""

    def __init__(self, model, slots, context_length=None):
        self.batcher = Batcher(model, 500, slots, context_length or model.config.block_size)
        self.steps = threading.Semaphore(0)

    def row(self, prompt, count, sampling=GREEDY, **more):
        options = dict(is_done=lambda new: new[-1] == 7, wake=lambda row: self.steps.release()) | more
        return Row(prompt=prompt, max_new_tokens=count, sampling=sampling, **options)

    def start(self, *rows):
        self.batcher.submit(list(rows))
        return rows

    def wait(self, rows):
        until = time.monotonic() + 20
        while not all(row.ended for row in rows):
            assert self.steps.acquire(timeout=until - time.monotonic()), "the batcher hangs"
        return [row.new for row in rows]


@pytest.fixture
def run(request):
    made = []

    def make(*arguments, **more):
        made.append(Run(*arguments, **more))
        return made[-1]

    yield make
    for each in made:
        each.batcher.close()


def test_rows_have_the_tokens_of_generate(run):
    """30 rows of five samplings, in 4 slots, past the end of the context (64), arriving one by one."""
    model = busy_model(tiny_config(vocab_size=512))
    batch, rows = run(model, 4), []
    for number, prompt in enumerate(prompts_of(30, longest=64, seed=2)):
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        rows += batch.start(batch.row(prompt, 10 + number, sampling, number=number))
        if number % 3 == 0:
            batch.steps.acquire(timeout=5)
    for number, (row, new) in enumerate(zip(rows, batch.wait(rows), strict=True)):
        assert row.error is None
        assert new == alone(model, row.prompt, 10 + number, SAMPLINGS[number % len(SAMPLINGS)], number)
