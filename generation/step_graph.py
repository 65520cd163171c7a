"""Decoding on a GPU: one step of all rows, the choice of the next tokens included, is one CUDA graph.

    steps = StepGraph(model, cache, [row[-1] for row in rows], choose)     # generation/generate.py
    for tokens in steps.tokens(100):                                       # one list of ids per step
        ...

Launching the many small kernels of a step one by one takes longer than running them. A CUDA graph is launched
as a whole, and nothing in it waits for the CPU: the chosen tokens are copied to the CPU while the next step
runs. All layers share one compiled block, so that it is compiled once and not once per layer.

The step sees the first S slots of the cache, where S is a power of two. A longer text needs another graph,
but nothing is compiled again. On a CPU the same steps run without a graph.

Shapes: B rows, S visible slots, K key/value heads, D head_dim, V vocab_size.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model import GPT, Block
from modeling.attention import Mask
from modeling.kv_cache import SPARE_SLOTS, KVCache
from modeling.rope import Rope

FIRST_SLOTS = 128  # visible slots of the smallest graph


def run_block(block: Block, x: Tensor, rope: Rope | None, mask: Mask, slots: tuple[Tensor, ...]) -> Tensor:
    """One block of a step, x (B, 1, C) -> (B, 1, C).

    mask: (B, 1, 1, S). slots: keys and values of the layer, (B, K, all slots, D) each, row numbers (B, 1),
    and the slot of each row's token (B, 1).
    """
    keys, values, rows, place = slots

    def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys[rows, :, place] = k.transpose(1, 2).to(keys.dtype)  # (B, 1, K, D)
        values[rows, :, place] = v.transpose(1, 2).to(values.dtype)
        S = mask.shape[-1]
        return keys.narrow(2, 0, S).to(k.dtype), values.narrow(2, 0, S).to(v.dtype)  # (B, K, S, D)

    return block(x, rope, mask, store)


compiled_block = functools.cache(lambda: torch.compile(run_block))


class StepGraph:
    """Steps of one token per row, after the tokens in a cache, until the cache is full."""

    def __init__(self, model: GPT, cache: KVCache, tokens: list[int],
                 choose: Callable[[Tensor, Tensor], Tensor]):
        """tokens: the next token of each row, (B,). choose(logits (B, V), step (1,)) -> ids (B,) int64, or -1
        for broken logits; it may read nothing on the CPU. The last SPARE_SLOTS slots of the cache stay free.
        """
        device = cache.rows.device
        self.model, self.cache, self.choose = model, cache, choose
        self.ids = torch.tensor(tokens, device=device)[:, None]  # (B, 1)
        self.place = torch.tensor(cache.lengths, device=device)[:, None]  # (B, 1): the slot of each token
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(len(tokens), dtype=torch.int64, device=device)
        self.all_slots = cache.k[0].shape[2] - SPARE_SLOTS
        self.numbers = torch.arange(self.all_slots, device=device)
        self.used, self.seen = cache.used, 0  # tokens in the longest row, and visible slots
        self.graph: torch.cuda.CUDAGraph | None = None
        for tensor in (*cache.k, *cache.v) if device.type == "cuda" else ():
            torch._dynamo.mark_dynamic(tensor, 2)

    def run(self) -> None:
        """Feed `ids` at `place`, choose the next tokens, and move on. All tensors keep their addresses."""
        layers, config = self.model.model, self.model.config
        mask = self.numbers[:self.seen] <= self.place[:, None, :, None]  # (B, 1, 1, S)
        block = run_block
        if self.ids.is_cuda:
            torch._dynamo.mark_dynamic(mask, 3)
            block = compiled_block()
        x = layers["embed_tokens"](self.ids)  # (B, 1, C)
        if config.position == "learned":
            x = x + layers["embed_positions"].weight[self.place]
        rope = self.model.rope(self.place) if self.model.rope is not None else None
        for layer, k, v in zip(layers["layers"], self.cache.k, self.cache.v, strict=True):
            x = block(layer, x, rope, mask, (k, v, self.cache.rows, self.place))
        logits = self.model.logits(layers["norm"](x)[:, 0])  # (B, V)
        self.chosen.copy_(self.choose(logits, self.step))
        self.ids.copy_(self.chosen.clamp(min=0)[:, None])
        # The slot of a row that has ended stays inside the cache.
        self.place.add_(1).clamp_(max=self.all_slots - 1)
        self.step.add_(1)

    def capture(self) -> None:
        """Record the graph of a step that sees `seen` slots."""
        state = [(tensor, tensor.clone()) for tensor in (self.ids, self.place, self.step)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets the libraries allocate what they need
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in state:
            tensor.copy_(before)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU while this one records.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.run()

    def launch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start a step. Returns its tokens (B,) on the CPU, and the event after which they are there."""
        self.used += 1
        if self.used > self.seen:
            self.seen = min(self.all_slots, max(FIRST_SLOTS, 2 ** (self.used - 1).bit_length()))
            self.graph = None
        if not self.ids.is_cuda:
            self.run()
            return self.chosen.clone(), None
        if self.graph is None:
            self.capture()
        self.graph.replay()
        tokens = torch.empty_like(self.chosen, device="cpu", pin_memory=True)
        tokens.copy_(self.chosen, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return tokens, event

    def tokens(self, steps: int) -> Iterator[list[int]]:
        """Yield the tokens of each step, (B,), for at most `steps` steps or until the cache is full.

        One step always runs ahead of the tokens that the caller sees.
        """
        steps = min(steps, self.all_slots - self.used)
        ahead = self.launch() if steps > 0 else None
        for step in range(1, steps + 1):
            (tokens, event), ahead = ahead, self.launch() if step < steps else None
            if event is not None:
                event.synchronize()
            yield tokens.tolist()
