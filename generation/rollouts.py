"""Rollouts: several sampled answers per prompt with their log-probabilities, for reinforcement learning.

    sampler = RolloutSampler(model, tokenizer, Limits(max_new_tokens=100, block_size=128))
    rollouts = sampler.sample([prompt_ids], row_numbers=range(8), group_size=8, with_tools=[True])

It is faster than `generate` for this purpose. Each prompt is read once for its whole group, rows that have
ended leave the batch, and a token is chosen by inverting the cumulative distribution without sorting it.
There are no filters such as top_k: the log-probabilities are those of the distribution that was sampled from.

Calls of a tool are executed, and the answer goes on after the result. The policy did not sample the result,
so `sampled` is False for its tokens:

    ids        <call> {"name": ...} <end> \\n <tool> 56088 <end> \\n <assistant>   56088 <end>
    sampled      1         1          1     0    0     0     0    0       0           1     1

A rollout depends on the weights, the seed and its row number. Other rows in the batch change it by rounding
only. Shapes: P prompts, B rows, V vocab_size, S tokens of the longest prompt and answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from dataset.chat_rows import prefix_batch
from formats.chat_format import answer_ends, encode_chat, encode_prompt, end_of_turn
from formats.tokenizer import Tokenizer
from generation.assistant import MOST_CALLS, Message, read_turn
from generation.generate import MIN_TEMPERATURE, NO_TOKEN, forward_last, uniform_numbers
from model import GPT
from modeling.devices import autocast_dtype
from modeling.kv_cache import KVCache

KEEP_SHARE = 0.8  # the batch is compacted when fewer of its rows than this are still open
TOOL_STRIDE = 2**48  # row numbers after a tool call, for other random numbers


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a rollout, and how its tokens are sampled."""

    max_new_tokens: int  # tokens that a rollout may sample
    block_size: int  # tokens of the prompt and the rollout, without the last one
    temperature: float = 1.0  # divides the logits; below 1e-5 the most likely token is chosen
    seed: int = 0


@dataclass
class Rollout:
    """An answer to a prompt: its tokens in three lists of one length, its messages, reward and advantage."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # after the prompt
    sampled: list[bool] = field(default_factory=list)  # False for the tokens of a tool's result
    log_probs: list[float] = field(default_factory=list)  # at the sampling temperature; 0 if not sampled
    messages: list[Message] = field(default_factory=list)  # the last one has "cut": True if it has no end
    terms: dict[str, float] = field(default_factory=dict)  # their sum is the reward
    advantage: float = 0.0

    @property
    def reward(self) -> float:
        return sum(self.terms.values())

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    def append(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """Append tokens: sampled ones with their log-probabilities, or those of a tool's result."""
        self.ids += ids
        self.sampled += [log_probs is not None] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)


def is_even(group: list[Rollout]) -> bool:
    """Whether all answers of a group have the same reward."""
    return len({rollout.reward for rollout in group}) == 1


def group_batch(groups: list[list[Rollout]]) -> dict[str, Tensor]:
    """Groups of answers as a `prefix_batch`, whose targets are the sampled tokens alone.

    Adds "old" and "advantages", (targets,) float32: the tokens' log-probabilities when they were sampled, and
    the advantages of their answers. One prompt p with two answers: a, where a tool writes t after a0, and b:

        slot         0   1   2   3   4   5
        input_ids   p0  p1  a0  t0  t1  b0      an answer's last token is no input
        paths       0 1 2 3 4                   positions   1  4   1  5
                    0 1 5 5 5                   targets    a0 a1  b0 b1
    """
    answers = [rollout for group in groups for rollout in group]
    batch = prefix_batch([(np.array(group[0].prompt), [np.array(each.ids) for each in group])
                          for group in groups])
    sampled = torch.tensor([mark for each in answers for mark in each.sampled])  # (answers' tokens,)
    advantages = torch.tensor([each.advantage for each in answers])
    batch |= {"old": torch.tensor([value for each in answers for value in each.log_probs]),
              "advantages": advantages.repeat_interleave(batch.pop("lengths"))}
    return batch | {key: batch[key][sampled] for key in ("positions", "targets", "old", "advantages")}


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Choose one token per row: logits (B, V), uniform (B,) in [0, 1) -> ids (B,), log-probabilities (B,).

    The cumulative distribution, in the order of the ids, is inverted at `uniform`. A row whose logits are not
    finite gets NO_TOKEN.
    """
    logits = logits.float()
    broken = ~logits.amax(dim=-1).isfinite()  # (B,): NaN, or an infinity
    if temperature < MIN_TEMPERATURE:
        chosen = logits.argmax(dim=-1)
    else:
        logits = logits / temperature
        mass = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
        chosen = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
    log_probs = logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return chosen.masked_fill(broken, NO_TOKEN), log_probs


def tool_turns(tokenizer: Tokenizer, results: list[Message]) -> list[int]:
    """The ids between the end of an assistant's turn with tool calls and the beginning of its next turn."""
    before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    ids, end = encode_prompt(tokenizer, [*before, *results]), end_of_turn(tokenizer)
    ends = [place for place, index in enumerate(ids) if index == end]
    return ids[ends[encode_chat(tokenizer, before)[0].count(end) - 1] + 1:]


class RolloutSampler:
    """Samples rollouts from a model within the limits."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, limits: Limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.end_ids = answer_ends(tokenizer)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], row_numbers: Sequence[int], group_size: int,
               with_tools: Sequence[bool]) -> list[Rollout]:
        """group_size rollouts of each prompt, those of the first prompt first: a list of P * group_size.

        row_numbers: one per rollout, for its random numbers. with_tools: whether the tool calls of a prompt's
        rollouts are executed. Raises UserError if the logits of the model are not finite.
        """
        rollouts = [Rollout(prompt) for prompt in prompts for _ in range(group_size)]
        training, open_rows = self.model.training, list(range(len(rollouts)))
        self.model.eval()
        for turn in range(MOST_CALLS + 1):
            self.sample_turns([rollouts[row] for row in open_rows], 1 if turn else group_size,
                              [row_numbers[row] + turn * TOOL_STRIDE for row in open_rows])
            open_rows = [row for row in open_rows if self.goes_on(
                rollouts[row], with_tools[row // group_size] and turn < MOST_CALLS)]
            if not open_rows:
                break
        self.model.train(training)
        torch.clear_autocast_cache()  # weights that were cast under no_grad have no gradient
        return rollouts

    def room(self, rollout: Rollout) -> int:
        """The number of tokens that may still be sampled."""
        return min(self.limits.max_new_tokens - rollout.num_sampled,
                   self.limits.block_size + 1 - len(rollout.prompt) - len(rollout.ids))

    def goes_on(self, rollout: Rollout, may_call: bool) -> bool:
        """Read the turn that has just been sampled as a message; True if tool results follow it."""
        begin = len(rollout.ids) - [*rollout.sampled[::-1], False].index(False)  # after the last tool result
        turn = rollout.ids[begin:]
        message, *results = read_turn(self.tokenizer, turn, self.end_ids, may_call)
        rollout.messages += [message, *results]
        if not results:
            return False
        rollout.append(tool_turns(self.tokenizer, results))
        if self.room(rollout) > 0:
            return True
        rollout.messages.append({"role": "assistant", "content": "", "cut": True})
        return False

    def sample_turns(self, rollouts: list[Rollout], copies: int, row_numbers: list[int]) -> None:
        """Sample each rollout to the end of its turn. Every `copies` rollouts have the same context."""
        contexts = [rollout.prompt + rollout.ids for rollout in rollouts[::copies]]
        rooms = [self.room(rollout) for rollout in rollouts]
        weight = self.model.head_weight
        cache = KVCache(self.model.config, len(contexts), max(map(len, contexts)) + max(rooms) - 1,
                        weight.device, autocast_dtype(weight))
        uniform = uniform_numbers(self.limits.seed, row_numbers, max(rooms)).to(weight.device)  # (B, steps)
        logits = forward_last(self.model, contexts, cache)  # (P, V)
        cache.set_lengths(list(map(len, contexts)))
        rows = list(range(len(rollouts)))  # the rollout in each row of the batch
        places = [row // copies for row in rows]
        cache.select_rows(places)  # each context once per rollout: P rows become B
        logits = logits[places]  # (P, V) -> (B, V)
        live = [True] * len(rows)
        for step in range(max(rooms)):
            chosen, log_probs = choose_tokens(logits[:, :self.tokenizer.vocab_size], uniform[rows, step],
                                              self.limits.temperature)
            tokens = chosen.tolist()
            if NO_TOKEN in tokens:
                raise UserError(f"{self.model.source}: its logits are not finite, so its weights are broken")
            for row, token, log_prob in zip(rows, tokens, log_probs.tolist(), strict=True):
                if live[row]:
                    rollouts[row].append([token], [log_prob])
                    live[row] = token not in self.end_ids and step + 1 < rooms[row]
            if not any(live):
                return
            # Compact the batch now and then. Until then a row that has ended computes one useless token.
            kept = [place for place, row in enumerate(rows) if live[row]]
            if len(kept) < KEEP_SHARE * len(rows):
                cache.select_rows(kept)
                rows, tokens = [rows[place] for place in kept], [tokens[place] for place in kept]
            cache.set_lengths([len(rollouts[row].prompt) + len(rollouts[row].ids) - 1 if live[row] else 0
                               for row in rows])
            logits = forward_last(self.model, [[token] for token in tokens], cache)  # (B, V)
