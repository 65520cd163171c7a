"""A model as a benchmark sees it: prompts in, text out; or choices in, log-probabilities out.

    lm = LM("out/sft", chat=True)
    lm.generate_until(["Q: 2 + 2?\nA:"], stops=["\n"], max_new_tokens=16)     # [" 4"]
    lm.loglikelihood([("Q: 2 + 2?\nA:", [" 4", " 5"])])                      # [[Likelihood(-0.1, ..), ..]]

The names are those of the `lm_eval` package. With chat=True a prompt is a user's message, and what is read is
the assistant's answer to it, or how likely it would begin with a choice.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tqdm import tqdm

from configurator import UserError
from evals.likelihood import Likelihood, encode_plain, encode_turn, fitting, text_log_probs
from formats import hf
from formats.chat_format import encode_prompt, end_of_turn, read_answer, require_chat
from formats.tokenizer import Tokenizer
from generation.assistant import MOST_CALLS, Assistant, Message
from generation.generate import Sampling, generate
from model import GPT
from modeling.devices import DTYPES, pick_device

MAX_BATCH_TOKENS = 2**17  # tokens of the prompts of a batch: at 16,384 tokens eight prompts, whatever batch_size says


class LM:
    """A model folder, loaded to be measured. Everything is greedy.

    tokens: how many it has written. truncated: of each prompt of the last call, whether it lost its
    beginning. before, after: the ids around those of a prompt, which a chat needs.
    """

    def __init__(self, path: str, device: str | None = None,
                 dtype: Literal["float32", "bfloat16"] = "float32", chat: bool = False, batch_size: int = 64):
        self.folder, self.chat, self.batch_size = hf.find_folder(path), chat, batch_size
        self.tokenizer = Tokenizer.load(self.folder)
        self.before, self.after = self.tokenizer.prefix_ids, []
        if chat:
            require_chat(self.tokenizer, path)
            turn = encode_prompt(self.tokenizer, [{"role": "user", "content": ""}])
            end = turn.index(end_of_turn(self.tokenizer))
            self.before, self.after = turn[:end], turn[end:]
        self.model = GPT.from_pretrained(self.folder, pick_device(device), DTYPES[dtype]).eval()
        self.end_ids = {self.tokenizer.eot_id, end_of_turn(self.tokenizer), *hf.end_ids(self.folder)} - {None}
        self.tokens, self.truncated = 0, []

    # ---- Text ---------------------------------------------------------------------------------------------

    def generate_until(self, prompts: Sequence[str | list[int]], stops: list[str],
                       max_new_tokens: int) -> list[str]:
        """What is written behind each prompt, up to a stop text, which is not part of it. An assistant is
        not interrupted by a stop text: its answer is cut there.

        prompts: texts, or ids of texts. One that leaves no room for max_new_tokens in the context loses its
        beginning; half of the context is always its own.
        """
        self.truncated = []
        asked = [self.prompt_ids(prompt, max_new_tokens) for prompt in prompts]
        texts = [""] * len(asked)
        for batch in self.batches([len(ids) for ids in asked]):
            new = self.write([asked[number] for number in batch], stops, max_new_tokens)
            for number, ids in zip(batch, new, strict=True):
                texts[number] = cut(self.read(ids), stops)
        return texts

    def room(self, max_new_tokens: int) -> int:
        """The most tokens of a prompt that are read."""
        block_size = self.model.config.block_size
        return max(1, max(block_size - max_new_tokens, block_size // 2) - len(self.before) - len(self.after))

    def prompt_ids(self, prompt: str | list[int], max_new_tokens: int) -> list[int]:
        """The ids that are read of a prompt, with those around it."""
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt.strip() if self.chat else prompt)
        kept = prompt[-self.room(max_new_tokens):]
        self.truncated.append(len(kept) < len(prompt))
        return self.before + kept + self.after or [self.tokenizer.eot_id]

    def batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """The numbers of prompts of these lengths, in batches of like lengths, the longest first: what does
        not fit the memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        with tqdm(total=len(order), unit="prompt", leave=False, disable=None) as bar:
            while order:
                size = max(1, min(self.batch_size, MAX_BATCH_TOKENS // lengths[order[0]]))
                yield order[:size]
                bar.update(len(order[:size]))
                order = order[size:]

    def write(self, asked: list[list[int]], stops: list[str], max_new_tokens: int) -> list[list[int]]:
        """The ids that follow those of each prompt of a batch, up to an end or, in plain text, a stop."""
        new: list[list[int]] = [[] for _ in asked]
        # A stop that the last token completes lies within as many tokens as it has bytes; one more, since a
        # tokenizer may drop a space from the first token that it decodes.
        window = 1 + max((len(stop.encode()) for stop in stops), default=0)

        def is_done(row: int, written: list[int]) -> bool:
            if written[-1] in self.end_ids or self.chat or not stops:
                return written[-1] in self.end_ids
            tail = self.tokenizer.decode(written[-window:])
            return any(stop in tail for stop in stops)

        for tokens in generate(self.model, asked, max_new_tokens, Sampling(temperature=0), is_done,
                               self.tokenizer.vocab_size):
            for row, token in enumerate(tokens):
                new[row] += [] if token is None else [token]
        self.tokens += sum(map(len, new))
        return new

    def read(self, ids: list[int]) -> str:
        """The text of what was written, without special tokens; of an assistant what it says, without its
        thoughts and calls."""
        if self.chat:
            return read_answer(self.tokenizer, ids)["content"]
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.special_ids])

    # ---- Conversations ------------------------------------------------------------------------------------

    def reply(self, conversations: list[list[Message]], max_new_tokens: int,
              most_calls: int = MOST_CALLS) -> list[list[dict[str, Any]]]:
        """The messages that follow each conversation: the answer, behind at most so many rounds of calls of
        the calculator and their results (generation/assistant.py). With most_calls=0 it is what the assistant
        says first, calls and all."""
        assistant = Assistant(self.model, self.tokenizer, Sampling(temperature=0), max_new_tokens)
        replies: list[list[dict[str, Any]]] = [[] for _ in conversations]
        lengths = [len(encode_prompt(self.tokenizer, conversation)) for conversation in conversations]
        for batch in self.batches(lengths):
            answers = assistant.reply([conversations[number] for number in batch], most_calls=most_calls)
            for number, messages in zip(batch, answers, strict=True):
                replies[number] = messages
        self.tokens += assistant.tokens
        self.truncated = [length > self.model.config.block_size for length in lengths]
        return replies

    def loglikelihood(self, requests: list[tuple[str, list[str]]]) -> list[list[Likelihood]]:
        """Of each context, how likely each of the continuations follows it. UserError where the model gives
        no number."""
        texts, owners, found = [], [], []  # owners: of each text, the place of its continuation in `found`
        for context, continuations in requests:
            encode = encode_turn if self.chat else encode_plain
            request = encode(self.tokenizer, context, continuations)
            row = []
            for continuation, ids in zip(continuations, request.continuations, strict=True):
                parts, lost = fitting(request, ids, self.model.config.block_size)
                texts += parts
                owners += [(len(found), len(row))] * len(parts)
                row.append(Likelihood(0.0, len(ids), True, len(continuation.encode()), lost))
            found.append(row)
        for (row, column), (log_prob, greedy) in zip(owners, text_log_probs(self.model, texts), strict=True):
            if not math.isfinite(log_prob):
                raise UserError(f"{self.folder}: a log-probability of {log_prob}: its weights are broken")
            each = found[row][column]
            found[row][column] = each._replace(log_prob=each.log_prob + log_prob,
                                               greedy=each.greedy and greedy)
        return found


def cut(text: str, stops: list[str]) -> str:
    """Text up to the first of the stop texts in it."""
    return text[:min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]
