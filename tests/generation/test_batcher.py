"""batcher.py: rows that join and leave a batch have the tokens of `generate`, whatever the others do."""

from dataclasses import replace

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


class Run(Batcher):
    """A batcher for token ids below 500, whose rows end with the token 7."""

    def __init__(self, model, slots, limits=None):
        super().__init__(model, 500, slots, model.config.block_size, limits)

    def start(self, prompt, count, sampling=GREEDY, **more):
        row = Row(prompt=prompt, max_new_tokens=count, sampling=sampling,
                  **{"is_done": lambda new: new[-1] == 7} | more)
        self.waiting.append(row)
        return row

    def go(self, steps=10**4):
        while steps and (self.waiting or self.live):
            self.admit()
            self.step()
            steps -= 1


def test_rows_have_the_tokens_of_generate():
    """20 rows of five samplings, in 4 slots, past the end of the context (64), arriving one by one."""
    model = busy_model(tiny_config(vocab_size=512))
    run, rows = Run(model, 4), []
    for number, prompt in enumerate(prompts_of(20, longest=64, seed=2)):
        rows.append(run.start(prompt, 10 + number, SAMPLINGS[number % len(SAMPLINGS)], number=number))
        run.go(number % 3)
    run.go()
    for number, row in enumerate(rows):
        assert row.error is None and row.ended
        assert row.new == alone(model, row.prompt, 10 + number, SAMPLINGS[number % len(SAMPLINGS)], number)


@pytest.mark.parametrize("sinks, window", [(3, 21), (0, 24)])
def test_rows_outgrow_the_context_with_sinks(sinks, window):
    """As above, with prompts shorter and longer than the cache; a text begins where another one was cut."""
    model = busy_model(tiny_config(vocab_size=512))
    run, rows = Run(model, 3, (sinks, window)), []
    samplings = [replace(each, sinks=sinks, window=window) for each in SAMPLINGS]
    for number, prompt in enumerate(prompts_of(8, longest=90, seed=2)):
        rows.append(run.start(prompt, 10 + 9 * number, samplings[number % 5], number=number))
        run.go(number % 3 * 30)
    run.go()
    for number, row in enumerate(rows):
        assert row.error is None and row.cached == 0
        assert row.new == alone(model, row.prompt, 10 + 9 * number, samplings[number % 5], number)
    assert max(len(row.context) for row in rows) > 3 * (sinks + window)
    again = run.start([*rows[0].prompt, *rows[0].new[:2]], 5, samplings[0])
    run.go()
    assert again.new == alone(model, again.prompt, 5, samplings[0])


def test_a_running_row_goes_on_while_a_long_prompt_is_read():
    """A prompt of 600 tokens is read in five pieces; the other row gets a token after each."""
    model = busy_model(tiny_config(vocab_size=512, block_size=1024))
    run = Run(model, 2)
    running = run.start([1, 2, 3], 500, is_done=lambda new: False)
    run.go(3)
    prompt = torch.randint(500, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    late, before = run.start(prompt, 2), len(running.new)
    while not late.new:
        run.go(1)
    assert len(running.new) - before == 600 // PIECE_TOKENS + 1
    run.go(1)
    assert late.ended and late.new == alone(model, prompt, 2, GREEDY)


def test_a_prefix_that_a_slot_holds_is_reused():
    """The next turn in the same slot, and a shared prefix of a slot that is in use, give the same tokens."""
    model = busy_model(tiny_config(vocab_size=512, block_size=256))
    run, prompt = Run(model, 2), prompts_of(1, longest=60, seed=3)[0] * 2
    first = run.start(prompt, 20)
    run.go()
    longer = prompt + first.new + [9, 8]
    second = run.start(longer, 20)
    run.go()
    assert second.cached == len(prompt + first.new) - 1, "the last token chosen was never read"
    assert second.new == alone(model, longer, 20, GREEDY)
    # Two rows at once: the second waits until the first has read the prompt, then copies it.
    fresh = prompts_of(1, longest=60, seed=4)[0] * 3
    rows = [run.start(fresh, 30, Sampling(seed=1), number=number) for number in (0, 1)]
    run.go()
    assert [row.new for row in rows] == [alone(model, fresh, 30, Sampling(seed=1), n) for n in (0, 1)]
    assert rows[1].cached == len(fresh) - 1


def test_texts_that_share_a_beginning_keep_their_slots():
    """All chats begin alike; that is no reason to overwrite one while other slots are empty."""
    run = Run(busy_model(tiny_config(vocab_size=512, block_size=256)), 4)
    texts = [[1, 2, 3, *range(first, first + 50)] for first in (100, 200)]
    for turn in range(2):
        for number, text in enumerate(texts):
            row = run.start(text, 8, is_done=lambda new: False)
            run.go()
            assert row.cached == (len(text) - 4 if turn else 3 * number)
            texts[number] = [*row.prompt, *row.new, 9, 8, 6]


def test_a_row_that_is_ended_from_outside_frees_its_slot():
    model = busy_model(tiny_config(vocab_size=512))
    run = Run(model, 1)
    endless = run.start([1, 2], 10**5, is_done=lambda new: False)
    waiting, after = run.start([5], 10), run.start([1, 3], 10)
    run.go(5)
    endless.fail(TimeoutError())
    waiting.ended = True
    run.go()
    assert after.new == alone(model, [1, 3], 10, GREEDY) and after.cached == 1
    assert isinstance(endless.error, TimeoutError) and len(endless.new) == 5 and not waiting.new


def test_scores_are_the_log_probabilities_of_the_model():
    model = busy_model(tiny_config(vocab_size=512))
    run, prompt = Run(model, 2), prompts_of(1, seed=5)[0]
    row, short = run.start(prompt, 5, top=3, echo=True), run.start(prompt, 1, top=0, echo=True)
    run.go()
    ids = torch.tensor(prompt + row.new)
    with torch.no_grad():
        log_probs = model(ids[None])[0, :-1, :500].log_softmax(-1)
    expected = log_probs.gather(1, ids[1:, None])[:, 0]
    assert torch.allclose(torch.tensor([score for score, _ in row.scores]), expected, atol=1e-5)
    best = log_probs.topk(3).indices.tolist()
    assert [list(likeliest) for _, likeliest in row.scores] == best
    assert [each[0] for each in short.scores] == pytest.approx(expected.tolist()[:len(prompt)], abs=1e-5)
    assert not any(likeliest for _, likeliest in short.scores)


def test_a_failing_step_ends_its_rows_only(monkeypatch):
    model = busy_model(tiny_config(vocab_size=512))
    run = Run(model, 2)
    monkeypatch.setattr(run, "decode", lambda rows: 1 / 0)
    broken = [run.start([1, 2], 5), run.start([1, 3], 5)]
    run.go()
    assert all(isinstance(row.error, ZeroDivisionError) for row in broken)
    monkeypatch.undo()
    fine = run.start([1, 2], 5)
    run.go()
    assert fine.new == alone(model, [1, 2], 5, GREEDY) and fine.cached == 0


def test_logits_that_are_not_finite_end_the_row():
    model = busy_model(tiny_config(vocab_size=512))
    with torch.no_grad():
        model.model["norm"].weight.fill_(float("nan"))
    run = Run(model, 1)
    row = run.start([1, 2], 5)
    run.go()
    with pytest.raises(UserError, match="its logits are not finite"):
        raise row.error
