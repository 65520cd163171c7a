"""A model as a benchmark sees it: prompts in, text out; or choices in, log-probabilities out.

    lm = LM("out/sft", chat=True)          # or LM((model, tokenizer)), a model in memory
    lm.generate_until(["Q: 2 + 2?\nA:"], stops=["\n"], max_new_tokens=16)     # [" 4"]
    lm.loglikelihood([("Q: 2 + 2?\nA:", " 4"), ("Q: 2 + 2?\nA:", " 5")])    # [Likelihood(-0.1), ..]

The method names are those of the package `lm_eval`. With chat=True, a prompt becomes a user's message, and
the text or the choice is read as the assistant's answer. Decoding is greedy unless `temperature` is set.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from configurator import ProgressBar, UserError
from evals.likelihood import Likelihood, encode_plain, encode_turn, fit_context, score_texts
from formats import chat_format, hf
from formats.tokenizer import Tokenizer
from generation.assistant import MOST_CALLS, Assistant, Message
from generation.constraints import ConstraintKeys, constraint_of
from generation.generate import Options, Sampling, TextEnd, append_tokens, generate, visible_text
from generation.rollouts import Limits, Rollout, RolloutSampler
from model import GPT
from modeling.devices import DTYPES, pick_device

MAX_BATCH_TOKENS = 2**17  # prompt tokens per batch: long prompts (16,384 tokens) go eight at a time


class LM:
    """A model for evaluation: of a folder, or one that is in memory and in eval mode.

    tokens: number of tokens generated so far. truncated: for each prompt of the last call, whether it lost
    its beginning. prefix, suffix: ids that the chat format puts around a prompt. sinks: the sink tokens
    that the model was trained with. rows, sampled: for each prompt of the last call that generated, the ids
    that were read and generated, and True for the generated.
    replies: after `reply`, the messages that follow each conversation. cut: whether the limit of new tokens
    has ended each answer.

    evals/votes.py sets the following. temperature, seed: of samples; temperature 0 is greedy. copies: how
    many times each prompt is repeated in a row. budget: all limits of new tokens are multiplied by it.
    attempts: earlier replies; each conversation continues with its attempt, and then its last message, the
    question, is asked again. They only work with temperature 0.
    """

    def __init__(self, source: str | tuple[GPT, Tokenizer], device: str | None = None,
                 dtype: Literal["float32", "bfloat16"] = "float32", chat: bool = False, batch_size: int = 64,
                 keys: ConstraintKeys | None = None):
        """source: a folder, or a model with its tokenizer; then device and dtype have no effect.

        Raises UserError if there is no model, or if chat=True and it has no chat tokens.
        """
        self.chat, self.batch_size = chat, batch_size
        if isinstance(source, str):
            self.folder = hf.find_folder(source)
            self.tokenizer, end_ids = Tokenizer.load(self.folder), hf.end_ids(self.folder)
        else:
            self.model, self.tokenizer = source
            self.folder, end_ids = Path(self.model.source), []
        self.prefix, self.suffix = self.tokenizer.prefix_ids, []
        self.sinks = [index for index in self.prefix if index == self.tokenizer.eot_id]
        if chat:
            chat_format.require_chat(self.tokenizer, str(self.folder))
            self.prefix, self.suffix = chat_format.turn_frame(self.tokenizer)
        if isinstance(source, str):  # after the checks, because loading takes long
            self.model = GPT.from_pretrained(self.folder, pick_device(device), DTYPES[dtype]).eval()
        turn_end = chat_format.end_of_turn(self.tokenizer)
        self.end_ids = {self.tokenizer.eot_id, turn_end, *end_ids} - {None}
        self.tokenizer.require_rows(self.model.config.vocab_size, str(self.folder))
        self.constraint = constraint_of(self.tokenizer, self.end_ids, keys)
        self.tokens, self.truncated, self.cut = 0, list[bool](), list[bool]()
        self.rows, self.sampled, self.replies = list[list[int]](), list[list[bool]](), list[list[Message]]()
        self.temperature, self.seed, self.copies, self.budget = 0.0, 1337, 1, 1
        self.attempts: list[list[Message]] = []

    @contextlib.contextmanager
    def extended_context(self, length: int) -> Iterator[None]:
        """Inside, the model has a context of at least `length` tokens, by more positions of the rotary table.

        Raises UserError if its positions are learned: there are none beyond the trained ones.
        """
        config = self.model.config
        if length > config.block_size and config.position == "learned":
            raise UserError(f"context_length={length}: {self.folder} has learned positions, "
                            f"at most {config.block_size}")
        self.model.reconfigure(block_size=max(length, config.block_size))
        try:
            yield
        finally:
            self.model.reconfigure(block_size=config.block_size)

    # ---- Text ---------------------------------------------------------------------------------------------

    def room(self, max_new_tokens: int) -> int:
        """The largest number of prompt tokens that fit."""
        context = self.model.config.block_size
        return max(1, max(context - max_new_tokens, context // 2) - len(self.prefix) - len(self.suffix))

    def prompt_ids(self, prompt: str | list[int], max_new_tokens: int) -> list[int]:
        """The ids that the model reads for a prompt: its last `room` ids in the frame of the chat format.

        Appends to `truncated` whether the prompt lost its beginning.
        """
        if isinstance(prompt, str):
            prompt = (chat_format.encode_content(self.tokenizer, "user", prompt.strip()) if self.chat else
                      self.tokenizer.encode(prompt))
        kept = prompt[-self.room(max_new_tokens):]
        self.truncated.append(len(kept) < len(prompt))
        return self.prefix + kept + self.suffix or [self.tokenizer.eot_id]

    def in_batches(self, lengths: list[int], answer: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Call answer(indices) for batches of prompts of similar length; returns one answer per prompt.

        lengths: tokens of each prompt. The longest prompts come first, so a run that needs too much memory
        fails at once.
        """
        answers: list[Any] = [None] * len(lengths)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        with ProgressBar(total=len(order), unit="prompt") as bar:
            while order:
                size = max(1, min(self.batch_size, MAX_BATCH_TOKENS // lengths[order[0]]))
                batch, order = order[:size], order[size:]
                for index, each in zip(batch, answer(batch), strict=True):
                    answers[index] = each
                bar.update(len(batch))
        return answers

    def generate_ids(self, prompts: list[list[int]], stops: list[str], max_new_tokens: int,
                     numbers: Sequence[int] | None = None) -> list[list[int]]:
        """The ids generated after each prompt, up to an end token or, outside chats, a stop text.

        numbers: of the prompts, for their random numbers.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        guide = self.constraint and self.constraint.guide([[] if self.chat else None] * len(prompts))
        end = TextEnd(self.tokenizer, self.end_ids, [] if self.chat else stops)
        sampling = Sampling(temperature=self.temperature, seed=self.seed)
        options = Options(vocab_size=self.tokenizer.vocab_size, row_numbers=numbers, guide=guide)
        for tokens in generate(self.model, prompts, max_new_tokens, sampling,
                               lambda row, new: end.is_reached(new), options):
            append_tokens(answers, tokens)
        self.tokens += sum(map(len, answers))
        return answers

    def answer_text(self, ids: list[int]) -> str:
        """Generated ids as text without special tokens; in chats without thoughts and tool calls as well."""
        if self.chat:
            return chat_format.read_answer(self.tokenizer, ids)["content"]
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.special_ids], inside=True)

    def generate_until(self, prompts: Sequence[str | list[int]], stops: list[str],
                       max_new_tokens: int) -> list[str]:
        """The text generated after each prompt, up to but not including the first stop text.

        prompts: texts, or ids of texts. A prompt that leaves no room for max_new_tokens in the context loses
        its beginning, but keeps at least half of the context. In chats a stop text does not end generation:
        the whole answer is generated and then cut.
        """
        self.truncated, max_new_tokens = [], max_new_tokens * self.budget
        prompts = [self.prompt_ids(prompt, max_new_tokens) for prompt in prompts]
        answers = self.in_batches([len(ids) for ids in prompts], lambda batch: self.generate_ids(
            [prompts[index] for index in batch], stops, max_new_tokens, batch))
        self.rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        self.sampled = [[False] * len(prompt) + [True] * len(answer)
                        for prompt, answer in zip(prompts, answers, strict=True)]
        self.replies = []
        self.cut = [len(answer) == max_new_tokens and answer[-1] not in self.end_ids for answer in answers]
        return [visible_text(self.answer_text(ids), stops) for ids in answers]

    # ---- Conversations ------------------------------------------------------------------------------------

    def reply(self, conversations: list[list[Message]], max_new_tokens: int,
              most_calls: int = MOST_CALLS) -> list[list[dict[str, Any]]]:
        """The messages that follow each conversation: calculator calls, their results and the answer.

        There are at most `most_calls` rounds of calls (generation/assistant.py). With most_calls=0 the first
        answer is returned as it is, with its calls.
        """
        max_new_tokens *= self.budget
        if self.temperature:
            return self.sample_replies(conversations, max_new_tokens)
        attempts = self.attempts or [[]] * len(conversations)
        earlier = [[*attempt, talk[-1]] if attempt else []  # the question again, after an attempt
                   for talk, attempt in zip(conversations, attempts, strict=True)]
        conversations = [one + more for one, more in zip(conversations, earlier, strict=True)]
        assistant = Assistant(self.model, self.tokenizer, Sampling(temperature=0), max_new_tokens,
                              self.constraint)
        lengths = [len(chat_format.encode_prompt(self.tokenizer, each)) for each in conversations]

        def answer(batch: list[int]) -> list[Any]:
            replies = assistant.reply([conversations[index] for index in batch], most_calls=most_calls)
            return list(zip(replies, assistant.rows, assistant.sampled, strict=True))

        replies, self.rows, self.sampled = map(list, zip(*self.in_batches(lengths, answer), strict=True))
        self.replies = [one + more for one, more in zip(earlier, replies, strict=True)]
        self.cut = ["cut" in reply[-1] for reply in replies]
        self.tokens += assistant.tokens
        self.truncated = [length > self.model.config.block_size for length in lengths]
        return replies

    def sample_replies(self, conversations: list[list[Message]],
                       max_new_tokens: int) -> list[list[dict[str, Any]]]:
        """`reply` with sampling; max_new_tokens is for a whole reply, with its calls."""
        limits = Limits(max_new_tokens=max_new_tokens, block_size=self.model.config.block_size,
                        temperature=self.temperature, seed=self.seed)
        sampler, n = RolloutSampler(self.model, self.tokenizer, limits), self.copies
        # The n copies of a conversation are equal.
        prompts = [chat_format.encode_prompt(self.tokenizer, each) for each in conversations[::n]]

        def answer(batch: list[int]) -> list[list[Rollout]]:
            numbers = [index * n + copy for index in batch for copy in range(n)]
            rollouts = sampler.sample([prompts[index] for index in batch], numbers, n, [True] * len(batch))
            return [rollouts[first:first + n] for first in range(0, len(rollouts), n)]

        groups = self.in_batches(list(map(len, prompts)), answer)
        rollouts = [rollout for group in groups for rollout in group]
        self.tokens += sum(each.num_sampled for each in rollouts)
        self.rows = [each.prompt + each.ids for each in rollouts]
        self.sampled = [[False] * len(each.prompt) + each.sampled for each in rollouts]
        self.replies = [each.messages for each in rollouts]
        self.cut = ["cut" in messages[-1] for messages in self.replies]
        return self.replies

    def loglikelihood(self, requests: list[tuple[str, str]]) -> list[Likelihood]:
        """How likely the continuation is after its context, for each (context, continuation).

        Raises UserError if a log-probability is not finite.
        """
        encode, block_size = encode_turn if self.chat else encode_plain, self.model.config.block_size
        fitted = [fit_context(encode(self.tokenizer, *request), block_size) for request in requests]
        scores = iter(score_texts(self.model, [text for texts, _ in fitted for text in texts]))
        found = []
        for texts, lost in fitted:  # a long continuation is scored as several texts
            parts = [next(scores) for _ in texts]
            found.append(Likelihood(sum(part.log_prob for part in parts), lost,
                                    all(part.greedy for part in parts)))
        return found
