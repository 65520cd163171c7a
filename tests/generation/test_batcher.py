"""batcher.py: rows that join and leave a batch have the tokens of `generate`, whatever the others do."""

import threading
import time

import pytest
import torch

from configurator import UserError
from generation.batcher import PIECE_TOKENS, Batcher, Row
from generation.generate import Options, Sampling, append_tokens, generate
from tests.conftest import busy_model, tiny_config
from tests.generation.test_generate import GREEDY, prompts_of

SAMPLINGS = [GREEDY, Sampling(seed=3), Sampling(seed=4, top_k=5),
             Sampling(seed=5, top_p=0.7, temperature=1.3),
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
    """20 rows of five samplings, in 4 slots, past the end of the context (64), arriving one by one."""
    model = busy_model(tiny_config(vocab_size=512))
    batch, rows = run(model, 4), []
    for number, prompt in enumerate(prompts_of(20, longest=64, seed=2)):
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        rows += batch.start(batch.row(prompt, 10 + number, sampling, number=number))
        if number % 3 == 0:
            batch.steps.acquire(timeout=5)
    for number, (row, new) in enumerate(zip(rows, batch.wait(rows), strict=True)):
        assert row.error is None
        assert new == alone(model, row.prompt, 10 + number, SAMPLINGS[number % len(SAMPLINGS)], number)


def test_a_running_row_goes_on_while_a_long_prompt_is_read(run):
    """A prompt of 600 tokens is read in five pieces; the other row gets a token after each."""
    model = busy_model(tiny_config(vocab_size=512, block_size=1024))
    batch = run(model, 2)
    (running,) = batch.start(batch.row([1, 2, 3], 500, is_done=lambda new: False))
    while len(running.new) < 3:
        batch.steps.acquire(timeout=5)
    prompt = torch.randint(500, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    seen = []
    (late,) = batch.start(batch.row(prompt, 2, wake=lambda row: seen.append(len(running.new))))
    at_start = len(running.new)
    while not late.ended:
        batch.steps.acquire(timeout=5)
    assert seen[0] - at_start >= 600 // PIECE_TOKENS
    batch.batcher.cancel([running])
    assert late.new == alone(model, prompt, 2, GREEDY)


def test_a_prefix_that_a_slot_holds_is_reused(run):
    """The next turn in the same slot, and a shared prefix of a slot that is in use, give the same tokens."""
    model = busy_model(tiny_config(vocab_size=512, block_size=256))
    batch, prompt = run(model, 2), prompts_of(1, longest=60, seed=3)[0] * 2
    (first,) = batch.start(batch.row(prompt, 20))
    batch.wait([first])
    longer = prompt + first.new + [9, 8]
    (second,) = batch.start(batch.row(longer, 20))
    batch.wait([second])
    assert second.cached == len(prompt + first.new) - 1, "the last token chosen was never read"
    assert second.new == alone(model, longer, 20, GREEDY)
    # Two rows at once: the second waits until the first has read the prompt, then copies it.
    fresh = prompts_of(1, longest=60, seed=4)[0] * 3
    one = batch.row(fresh, 30, Sampling(seed=1), number=0)
    two = batch.row(fresh, 30, Sampling(seed=1), number=1, first=one)
    batch.start(one, two)
    assert batch.wait([one, two]) == [alone(model, fresh, 30, Sampling(seed=1), number) for number in (0, 1)]
    assert two.cached == len(fresh) - 1


def test_a_cancelled_row_frees_its_slot(run):
    model = busy_model(tiny_config(vocab_size=512))
    batch = run(model, 1)
    endless, waiting, after = batch.start(
        batch.row([1, 2], 10**5, is_done=lambda new: False), batch.row([5], 10), batch.row([1, 3], 10))
    while len(endless.new) < 5:
        batch.steps.acquire(timeout=5)
    batch.batcher.cancel([endless, waiting])
    assert batch.wait([after]) == [alone(model, [1, 3], 10, GREEDY)]
    assert after.cached == 1 and not waiting.new and len(endless.new) < 10**4


def test_scores_are_the_log_probabilities_of_the_model(run):
    model = busy_model(tiny_config(vocab_size=512))
    batch, prompt = run(model, 2), prompts_of(1, seed=5)[0]
    row, empty = batch.start(batch.row(prompt, 5, top=3, echo=True), batch.row(prompt, 0, top=0, echo=True))
    batch.wait([row, empty])
    ids = torch.tensor(prompt + row.new)
    with torch.no_grad():
        log_probs = model(ids[None])[0, :-1, :500].log_softmax(-1)
    expected = log_probs.gather(1, ids[1:, None])[:, 0]
    assert torch.allclose(torch.tensor([score for score, _ in row.scores]), expected, atol=1e-5)
    best = log_probs.topk(3).indices.tolist()
    assert [list(likeliest) for _, likeliest in row.scores] == best
    assert [each[0] for each in empty.scores] == [each[0] for each in row.scores[:len(prompt) - 1]]
    assert empty.new == []


def test_a_failing_step_ends_its_rows_only(run, monkeypatch):
    model = busy_model(tiny_config(vocab_size=512))
    batch = run(model, 2)
    monkeypatch.setattr(batch.batcher, "step", lambda: 1 / 0)
    broken = batch.start(batch.row([1, 2], 5), batch.row([1, 3], 5))
    batch.wait(broken)
    assert all(isinstance(row.error, ZeroDivisionError) for row in broken)
    monkeypatch.undo()
    (fine,) = batch.start(batch.row([1, 2], 5))
    assert batch.wait([fine]) == [alone(model, [1, 2], 5, GREEDY)] and fine.cached == 0


def test_logits_that_are_not_finite_end_the_row(run):
    model = busy_model(tiny_config(vocab_size=512))
    with torch.no_grad():
        model.model["norm"].weight.fill_(float("nan"))
    batch = run(model, 1)
    (row,) = batch.start(batch.row([1, 2], 5))
    batch.wait([row])
    with pytest.raises(UserError, match="its logits are not finite"):
        raise row.error
