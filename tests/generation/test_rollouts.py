"""Rollouts: the assistant's own text, its log-probabilities, tool results, and the row that a loss reads."""

import numpy as np
import pytest
import torch

from configurator import UserError
from formats.chat_format import encode_prompt
from formats.tokenizer import Tokenizer
from generation import rollouts as module
from generation.assistant import Assistant
from generation.generate import Sampling, uniform_numbers
from generation.rollouts import Limits, Rollout, RolloutSampler, choose_tokens, group_batch
from model import GPT

QUESTIONS = ["2 + 2?", "What is 15 * 24, and why?", "Sort 3 1 2."]
CALL = '{"name": "calculator", "arguments": {"expression": "12 * 30"}}'


@pytest.fixture
def chat(chat_folder):
    model, tokenizer = GPT.from_pretrained(chat_folder), Tokenizer.load(chat_folder)
    model.reconfigure(block_size=256)  # a tool call of this tokenizer takes about 60 tokens
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return model, tokenizer, conversations, [encode_prompt(tokenizer, each) for each in conversations]


def sample(chat, group_size=4, prompts=None, numbers=None, **limits):
    model, tokenizer, _, ids = chat
    prompts = ids if prompts is None else prompts
    numbers = range(len(prompts) * group_size) if numbers is None else numbers
    limits = Limits(**dict(max_new_tokens=12, block_size=64, seed=5) | limits)
    sampler = RolloutSampler(model, tokenizer, limits)
    return sampler.sample(prompts, numbers, group_size, [True] * len(prompts))


def forced(monkeypatch, chat, texts):
    """Make the sampler write these texts, one per turn, in every row."""
    tokenizer, turns = chat[1], []
    for text in texts:
        parts = [tokenizer.token_id(part) if part.startswith("<|") else part for part in text]
        turns.append([i for part in parts for i in ([part] if isinstance(part, int)
                                                    else tokenizer.encode(part, inside=True))])
    script = [token for turn in turns for token in turn]

    def choose(logits, uniform, temperature):
        ids = torch.full((len(logits),), script.pop(0))
        return ids, logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    monkeypatch.setattr(module, "choose_tokens", choose)
    return turns


def test_greedy_answers_are_the_assistants(chat):
    model, tokenizer, conversations, _ = chat
    found = sample(chat, 1, temperature=0.0)
    expected = Assistant(model, tokenizer, Sampling(temperature=0), 12).reply(conversations)
    assert [rollout.messages for rollout in found] == expected


def test_log_probs_are_the_learners(chat):
    """At the sampling temperature, for rows of unequal length, before and after the batch is compacted."""
    model, found = chat[0], sample(chat, group_size=16, temperature=1.5)
    assert len({len(rollout.ids) for rollout in found}) > 1
    for rollout in found:
        logits = model(torch.tensor([rollout.prompt + rollout.ids[:-1]]))[0, len(rollout.prompt) - 1:]
        logits = logits[:, :chat[1].vocab_size] / 1.5
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.log_probs, expected.detach(), atol=2e-5)
        assert all(rollout.sampled) and rollout.num_sampled == len(rollout.ids) <= 12


def test_a_rollout_depends_on_its_number_and_not_on_its_neighbours(chat, monkeypatch):
    everything = sample(chat)
    alone = sample(chat, 1, chat[3][1:2], [6])
    assert alone[0].ids == everything[6].ids
    assert len({tuple(rollout.ids) for rollout in everything[4:8]}) > 1
    monkeypatch.setattr(module, "KEEP_SHARE", 0.0)  # ended rows stay in the batch
    assert [rollout.ids for rollout in sample(chat)] == [rollout.ids for rollout in everything]


def test_tokens_follow_the_distribution():
    """The cumulative distribution by hand, and the frequencies of 20,000 draws."""
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(5, 4)
    ids, log_probs = choose_tokens(logits, torch.tensor([0.0, 0.49, 0.5, 0.75, 0.9999]), 1.0)
    assert ids.tolist() == [0, 0, 1, 3, 3]
    np.testing.assert_allclose(log_probs, np.log([0.5, 0.5, 0.25, 0.25, 0.25]), rtol=1e-6)
    many = choose_tokens(logits[:1].expand(20_000, 4), uniform_numbers(1, [0], 20_000)[0], 1.0)[0]
    np.testing.assert_allclose(many.bincount(minlength=4) / 20_000, [0.5, 0.25, 0, 0.25], atol=0.01)
    squared = choose_tokens(logits[:1], torch.tensor([0.7]), 0.5)  # p^2 is 4 : 1 : 0 : 1
    assert squared[0].tolist() == [1] and squared[1].item() == pytest.approx(np.log(1 / 6))


def test_a_tools_result_is_read_and_not_sampled(chat, monkeypatch):
    turns = forced(monkeypatch, chat, [["<|tool_call|>", CALL, "<|im_end|>"], ["360", "<|im_end|>"]])
    (rollout,) = sample(chat, 1, chat[3][:1], max_new_tokens=100, block_size=200)
    tokenizer = chat[1]
    text = tokenizer.decode(rollout.ids)
    assert text == (f"<|tool_call|>{CALL}<|im_end|>\n<|im_start|>tool\n<|tool_response|>360<|im_end|>\n"
                    "<|im_start|>assistant\n360<|im_end|>")
    written = [i for i, is_sampled in zip(rollout.ids, rollout.sampled, strict=True) if is_sampled]
    assert written == sum(turns, [])
    assert [message["content"] for message in rollout.messages] == ["", "360", "360"]
    # The ids are those of the conversation, as training has them.
    assert rollout.prompt + rollout.ids == encode_prompt(tokenizer, [
        {"role": "user", "content": QUESTIONS[0]}, *rollout.messages])[:len(rollout.prompt + rollout.ids)]
    batch = group_batch([[rollout]])
    assert len(batch["targets"]) == rollout.num_sampled < len(rollout.ids)


@pytest.mark.parametrize("offered", [False, True])
def test_a_call_that_cannot_be_answered_is_cut(chat, monkeypatch, offered):
    """The prompt offers no tool; or it does, but the call has used all tokens."""
    (turn,) = forced(monkeypatch, chat, [["360", "<|tool_call|>", CALL, "<|im_end|>"]])
    model, tokenizer, _, ids = chat
    limits = Limits(max_new_tokens=len(turn) if offered else 200, block_size=200)
    (rollout,) = RolloutSampler(model, tokenizer, limits).sample(ids[:1], [0], 1, [offered])
    assert rollout.messages[-1]["cut"] is True and rollout.num_sampled == len(turn)


def test_the_length_limits(chat):
    """max_new_tokens; and block_size, of which the last token of a row is not read."""
    for rollout in sample(chat, max_new_tokens=3):
        assert len(rollout.ids) <= 3
    longest = max(map(len, chat[3]))
    found = sample(chat, max_new_tokens=1000)
    cut = [rollout for rollout in found if "cut" in rollout.messages[-1]]
    assert cut and all(len(rollout.prompt) + len(rollout.ids) == 65 for rollout in cut) and longest < 64
    assert all(rollout.ids[-1] in (chat[1].eot_id, chat[1].token_id("<|im_end|>"))
               for rollout in found if "cut" not in rollout.messages[-1])


def test_broken_weights_are_one_line(chat):
    with torch.no_grad():
        chat[0].model["norm"].weight[0] = torch.nan
    with pytest.raises(UserError, match="its logits are not finite"):
        sample(chat)


def test_the_example_in_the_docstring():
    """p = 10 11; a = 20, the tool's 21 22, and 23; b = 30 31."""
    first = Rollout([10, 11], [20, 21, 22, 23], [True, False, False, True], [-1.0, 0.0, 0.0, -2.0],
                    advantage=0.5)
    second = Rollout([10, 11], [30, 31], [True, True], [-3.0, -4.0], advantage=-0.5)
    batch = group_batch([[first, second]])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[10, 11, 20, 21, 22, 30]], "paths": [[0, 1, 2, 3, 4], [0, 1, 5, 5, 5]],
        "positions": [1, 4, 1, 5], "targets": [20, 23, 30, 31], "old": [-1.0, -2.0, -3.0, -4.0],
        "advantages": [0.5, 0.5, -0.5, -0.5]}


def test_a_batch_has_the_samplers_log_probs(chat):
    found = sample(chat)
    batch = group_batch([found[i:i + 4] for i in range(0, 12, 4)])
    logits = chat[0](batch["input_ids"], paths=batch["paths"])[0, batch["positions"], :chat[1].vocab_size]
    one = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    np.testing.assert_allclose(one.detach(), batch["old"], atol=2e-5)
