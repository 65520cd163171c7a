"""The network: one GPT class that is a Llama by default, and a GPT-2, Qwen2 or Qwen3 by its settings.

    model = GPT(GPTConfig(n_layer=6, n_embd=256))
    logits = model(ids)                                # (B, T) int64 -> (B, T, V)
    loss = model(ids, head=loss_head)                  # loss_head(hidden, weight): no (B, T, V) tensor needed
    model = GPT.from_pretrained("out/base")            # our checkpoints are Hugging Face folders
    ids = model.eval().generate(ids, 20)               # (B, T) -> (B, T + 20)

Read it from top to bottom: GPTConfig, norms and rotary positions, attention, MLP, block, GPT. Parameters have
the names of Hugging Face's Llama in every architecture, as `model.layers.0.self_attn.q_proj.weight`. The
masks are in modeling/attention.py, the cache for generation is in modeling/kv_cache.py, and loading and
saving are in formats/weights.py. The model knows no loss, no optimizer and no tokenizer.

Llama: arXiv 2302.13971. GPT-2: Radford et al., 2019.

Shapes: B batch, T time, S keys, C n_embd, H query heads, K key/value heads, D head_dim, V vocab_size,
P rows of the token table in memory (V and padding), L layers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configurator import UserError, coerce_field, require, require_positive
from formats import hf
from formats.weights import load_into, save_model
from modeling.attention import Mask, attend, mask_and_positions
from modeling.devices import named_generator, shard_like
from modeling.kv_cache import KVCache, Store
from modeling.linear import Linear, linear, products
from modeling.moe import MoE, check_experts
from modeling.rope import Rope, RotaryTables, rope_frequencies
from modeling.sinks import attend_with_sink
from modeling.ternary import TernaryLinear

# A size that may be left at None: GPTConfig fills it in, so type checkers need not expect None.
if TYPE_CHECKING:
    Derived = Any
else:
    Derived = int | None


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture. The defaults are the small Llama that `python train.py` trains; sizes left at None
    are derived."""

    vocab_size: int = 4096  # number of token ids
    n_layer: int = 3  # number of blocks
    n_head: int = 4  # number of query heads
    n_kv_head: Derived = None  # number of key/value heads (grouped-query attention); None is n_head
    n_embd: int = 256  # width of the residual stream
    head_dim: Derived = None  # width of one head; None is n_embd / n_head
    intermediate_size: Derived = None  # MLP width; None is 8/3 n_embd (gelu: 4), the next multiple of 256
    block_size: int = 128  # longest context, in tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "llama3"|"yarn", "factor": .., ..}, Hugging Face's keys
    norm_eps: float = 1e-5  # added to the variance in every norm
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    tie_embeddings: bool = True  # use one table for input and output
    qk_norm: bool = False  # normalise every query and key head with RMSNorm (Qwen3)
    position: Literal["rope", "learned", "none"] = "rope"  # learned is GPT-2's table; none is the mask alone
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm, with a bias, is GPT-2's
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu, in its tanh form, is GPT-2's
    bias: Literal["none", "qkv", "all"] = "none"  # linear layers with a bias: qkv is Qwen2's, all is GPT-2's
    ternary: bool = False  # 1.58-bit weights in the blocks' linear layers: -1, 0 or 1 times a scale
    sink_logits: bool = False  # a learned logit per head for attending to nothing (modeling/sinks.py)
    n_expert: int = 0  # experts per block: MLPs of which a token uses a few (modeling/moe.py); 0 is one MLP
    n_expert_per_token: int = 2  # experts that a token uses
    expert_size: Derived = None  # width of an expert; None is intermediate_size
    dense_layers: list = field(default_factory=list)  # blocks (from 0) with one MLP in place of experts
    capacity_factor: float | None = None  # in training, limit on an expert's load / mean load; None: no limit
    norm_topk: bool = True  # divide the weights of a token's experts by their sum
    balance: Literal["aux", "bias"] = "aux"  # how to balance the experts: by a loss, or a bias when choosing
    balance_weight: float = 0.01  # weight of that loss, or step of the bias
    router_z_loss: float = 0.001  # weight of the router's logsumexp^2

    def __post_init__(self) -> None:
        """Derive what is None; raise UserError for wrong types and for sizes that do not fit together."""
        for each in fields(self):
            coerce_field(type(self), each.name, getattr(self, each.name), "model")
        require_positive(self, "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim",
                         "intermediate_size", "block_size", "rope_theta", "norm_eps", "expert_size")
        # Far above any model: a mistyped size must not fill the memory, or build blocks for hours.
        for key, most in (("n_layer", 2**12), ("n_head", 2**24), ("n_embd", 2**24), ("vocab_size", 2**24),
                          ("block_size", 2**24)):
            require(self, key, getattr(self, key) <= most, f"at most {most:,}")
        require(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        # If head_dim is not given, the heads divide the width among them.
        fits = self.head_dim is not None or self.n_embd % self.n_head == 0
        require(self, "n_embd", fits, f"divisible by n_head={self.n_head} (or set head_dim)")
        # SwiGLU has three matrices and GELU has two: at 8/3 and 4 times the width both have 8 C^2 weights.
        width = 4 * self.n_embd if self.mlp == "gelu" else 8 * self.n_embd / 3
        derived = {"n_kv_head": self.n_head, "head_dim": self.n_embd // self.n_head,
                   "intermediate_size": self.intermediate_size or 256 * math.ceil(width / 256)}
        derived["expert_size"] = derived["intermediate_size"]
        for key, value in derived.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)  # a frozen dataclass refuses a plain assignment
        check_experts(self)
        require(self, "n_head", self.n_head % self.n_kv_head == 0, f"divisible by n_kv_head={self.n_kv_head}")
        if self.position == "rope":
            require(self, "head_dim", self.head_dim % 2 == 0, "even, because rotary positions rotate pairs")
            rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)  # raises for a bad scaling
        else:
            require(self, "rope_scaling", self.rope_scaling is None, f"None with position={self.position}")

    @classmethod
    def from_keys(cls, keys: Any, **changes: Any) -> "GPTConfig":
        """Return the architecture that a run's configuration describes, with `changes`. Raises UserError.

        keys: any object that has this class's fields as attributes.
        """
        return cls(**{field.name: getattr(keys, field.name) for field in fields(cls)} | changes)

    @classmethod
    def read(cls, folder: Path) -> "GPTConfig":
        """Return the architecture of a model folder. UserError names what this model does not compute."""
        try:
            return cls(**hf.read_config(folder))
        except TypeError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None

    @property
    def padded_vocab_size(self) -> int:
        """P: V rounded up to a multiple of 64, which GPU matrix kernels want. Rows beyond V are not saved."""
        return 64 * math.ceil(self.vocab_size / 64)


# ---- Layers -----------------------------------------------------------------------------------------------

def make_linear(config: GPTConfig, n_in: int, n_out: int, bias: bool) -> nn.Linear:
    if config.ternary:
        return TernaryLinear(n_in, n_out, bias, eps=config.norm_eps)
    return Linear(n_in, n_out, bias)


def make_norm(config: GPTConfig) -> nn.Module:
    """RMSNorm divides x by its root mean square and multiplies by a learned weight. LayerNorm also subtracts
    the mean first and adds a learned bias."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.n_embd, eps=config.norm_eps)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE: rotate each pair (x[i], x[i + D/2]) of a head by an angle proportional to the token's position.

    x: (B, heads, T, D). rope: float32 tables (cos, cos) and (-sin, sin), so that the first half becomes
    x1 cos - x2 sin and the second half x2 cos + x1 sin. Returns a tensor like x.
    """
    cos, sin = rope
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (B, heads, T, D): the halves of D change places
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (GQA, arXiv 2305.13245): H / K query heads share k and v."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        # Keys and values have K heads: with K < H, the cache of generation is H / K times smaller.
        self.q_proj = make_linear(config, C, H * D, bias=config.bias != "none")
        self.k_proj = make_linear(config, C, K * D, bias=config.bias != "none")
        self.v_proj = make_linear(config, C, K * D, bias=config.bias != "none")
        self.o_proj = make_linear(config, H * D, C, bias=config.bias == "all")
        # Normalised heads keep q . k small, so the softmax does not saturate in large models.
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        # One more logit per head, without a value: attention that goes to it adds nothing to the stream.
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sink_logits else None
        self.head_dim, self.dropout = D, config.dropout
        self.qkv_hook: Callable[[nn.Module, Tensor, Tensor, Tensor], None] | None = None

    def register_qkv_hook(self, hook: Callable[[nn.Module, Tensor, Tensor, Tensor], None]) -> None:
        """Call hook(self, q, k, v), (B, heads, T, D) each, in every forward pass, for layer losses."""
        self.qkv_hook = hook

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask, store: Store | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). store: this layer's part of the cache in generation."""
        B, T, _ = x.shape
        # Queries, keys and values of all heads. The kernel wants the head dimension before time.
        q, k, v = products(x, (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        # After the rotation, q . k depends on the positions only through their difference.
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # In generation, the cache adds the keys and values of the tokens it has already seen.
        if store is not None:
            k, v = store(k, v)  # (B, K, S, D)
        if self.qkv_hook is not None:
            self.qkv_hook(self, q, k, v)
        # Each query takes a weighted mean of the values: softmax(q k^T / sqrt(D)) v.
        dropout = self.dropout if self.training else 0.0
        y = (attend(q, k, v, mask, dropout) if self.sinks is None else
             attend_with_sink(q, k, v, mask, dropout, self.sinks))  # (B, H, T, D)
        # Concatenate the heads, then mix them.
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv 2002.05202), or GPT-2's GELU, down(gelu(up(x)))."""

    def __init__(self, config: GPTConfig, inner: int):
        """inner: the width of the hidden layer."""
        super().__init__()
        C, bias = config.n_embd, config.bias == "all"
        self.gate_proj = make_linear(config, C, inner, bias=bias) if config.mlp == "swiglu" else None
        self.up_proj = make_linear(config, C, inner, bias=bias)
        self.down_proj = make_linear(config, inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            # The gate decides, element by element, how much of `up` passes.
            gate, up = products(x, (self.gate_proj, self.up_proj))  # (B, T, inner) each
            return self.down_proj(F.silu(gate) * up)  # (B, T, C)
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # (B, T, C)


class Block(nn.Module):
    """Tokens exchange information in the attention, then each is processed alone in the MLP.

    Both are residual branches: they read the normalised stream and add their output to it.
    """

    def __init__(self, config: GPTConfig, is_dense: bool):
        """is_dense: one MLP, also if the config has experts."""
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = (MLP(config, config.intermediate_size) if is_dense else
                    MoE(config, [MLP(config, config.expert_size) for _ in range(config.n_expert)]))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask, store: Store | None) -> Tensor:
        # The norms are inside the branches: gradients pass along the stream itself unchanged.
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, store))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


# ---- The model --------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """Token ids in, logits (or whatever a head computes from the hidden states) out."""

    model: Any  # an nn.ModuleDict: embed_tokens, layers, norm, and embed_positions if they are learned

    def __init__(self, config: GPTConfig, seed: int = 0):
        """Draw random weights from `seed`; on the meta device there are none until `materialize`."""
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute blocks in the backward pass, to save memory
        self.compiled_steps = False  # compile the decoding step of one token (generation/generate.py)
        self.source = "the model"  # the folder of its weights, for messages
        # These names become the names of the parameters, which are those of Hugging Face's files.
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config, not config.n_expert or layer in config.dense_layers)
                                    for layer in range(config.n_layer)),
            "norm": make_norm(config)})  # the stream grows with each block, so it needs a last norm
        if config.position == "learned":
            self.model["embed_positions"] = nn.Embedding(config.block_size, config.n_embd)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.rope = RotaryTables() if config.position == "rope" else None
        self.dropout = nn.Dropout(config.dropout)
        if not self.head_weight.is_meta:  # a tensor on the meta device has a shape and no memory to fill
            self.init_weights(seed)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (P, C). With tied embeddings it is the input table itself."""
        return self.model["embed_tokens"].weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None,
                head: Callable[[Tensor, Tensor], Any] | None = None, paths: Tensor | None = None) -> Any:
        """input_ids (B, T) int64 -> logits (B, T, V), or what `head` returns.

        head: called with the hidden states after the last norm, (B, T, C), and the output matrix, (P, C),
            inside forward, where FSDP has gathered the matrix. Rows from V on are padding: ignore them.
        document_ids: (B, T) int64, non-decreasing along a row. Tokens attend within their own document and
            positions start at 0 in each, so packed documents have the logits that they have alone.
        cache: the tokens follow those in the cache. Call `KVCache.set_lengths` after the forward pass.
        paths: (R, S) int64, lists of token numbers. A token attends to the earlier tokens of its path, not of
            its row. A prefix that paths share is stored, and computed, only once (example in
            modeling/attention.py). Every token is on a path; a shorter path repeats its last token.
        Raises ValueError for more tokens, or a longer path, than block_size.
        """
        # Who may attend to whom, and where each token is. A plain batch: causal, positions 0 to T - 1.
        if cache is None:
            mask, positions = mask_and_positions(input_ids, self.config.block_size, document_ids, paths,
                                                 dense=self.training and self.config.dropout > 0)
        else:
            mask, positions = cache.prepare(input_ids.shape[1])
        x = self.model["embed_tokens"](input_ids)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.model["embed_positions"].weight[positions]  # (T, C) or (B, T, C)
        rope = self.rope(positions) if self.rope is not None else None
        x = self.dropout(x)
        # The residual stream x passes through the blocks; each adds to it.
        for layer, block in enumerate(self.model["layers"]):
            store = None if cache is None else partial(cache.update, layer)
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, rope, mask, store, use_reentrant=False)
            else:
                x = block(x, rope, mask, store)
        x = self.model["norm"](x)
        # The loss head of training never materialises the (B, T, V) logits.
        if head is not None:
            return head(x, self.head_weight)
        return self.logits(x)  # (B, T, V)

    def logits(self, x: Tensor) -> Tensor:
        """The output layer: hidden states after the last norm (..., C) -> logits (..., V)."""
        # A product with all P rows, then without those that only pad the table.
        return linear(x, self.head_weight)[..., :self.config.vocab_size]

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None) -> Tensor:
        """Continue texts of one length: ids (B, T) -> (B, T + max_new_tokens), drawn with torch's generator.

        temperature=0 takes the most likely token. generation/generate.py also has rows of different lengths,
        end tokens, and more ways to sample. Raises ValueError beyond block_size.
        """
        (B, T), new = ids.shape, ids  # new: what the cache does not have yet, at first the whole text
        cache = KVCache(self.config, B, T + max_new_tokens, ids.device, self.head_weight.dtype)
        for length in range(T, T + max_new_tokens):
            logits = self(new, cache=cache)[:, -1].float()  # (B, V): only the last token predicts a new one
            cache.set_lengths([length] * B)  # of every row: keep what was just read
            if top_k is not None:  # exp(-inf) = 0: the other tokens cannot be drawn
                logits[logits < logits.topk(top_k).values[:, -1:]] = float("-inf")
            new = (logits / temperature).softmax(-1).multinomial(1) if temperature > 0 else \
                logits.argmax(-1, keepdim=True)  # (B, 1)
            ids = torch.cat((ids, new), dim=1)
        return ids

    # ---- Weights ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initialisation: std 0.02 for matrices, over sqrt(2 L) for those that write to the residual
        stream.

        Norms start at 1, biases at 0. Each parameter has its own generator, seeded by (seed, name), so that
        any number of processes gets the same weights. Under FSDP a rank draws one full matrix at a time.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            # Drawn on the CPU, so that a GPU starts from the same weights.
            value = torch.empty(parameter.shape, device="cpu")
            if parameter.ndim == 1:  # norms, biases and sink logits
                value.fill_(0.0 if name.endswith(("bias", "sinks")) else 1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                value.normal_(0.0, std, generator=named_generator(seed, name))
            if name in hf.VOCABULARY_TABLES:
                value[self.config.vocab_size:] = 0  # padding
            parameter.copy_(shard_like(parameter, value))
        self.rebuild_rope()

    def materialize(self, device: Any, seed: int) -> None:
        """Give a model built on the meta device its memory and random weights, without a second copy."""
        self.to_empty(device=device)
        self.init_weights(seed)

    def rebuild_rope(self) -> None:
        """Compute the rotary tables of this context, where the weights are."""
        c = self.config
        if self.rope is not None:
            self.rope.rebuild(c.block_size, c.head_dim, c.rope_theta, c.rope_scaling, self.head_weight.device)

    def reconfigure(self, **changes: Any) -> None:
        """Change the context of a trained model: block_size, rope_theta or rope_scaling.

        Raises UserError for any other key, and for a model with learned positions.
        """
        # A value that stays is no change, whatever its key.
        changes = {key: value for key, value in changes.items() if value != getattr(self.config, key)}
        if not changes:
            return
        if self.rope is None or not changes.keys() <= {"block_size", "rope_theta", "rope_scaling"}:
            reason = f" with position={self.config.position}" if self.rope is None else ""
            raise UserError(f"{', '.join(changes)}: cannot change in a trained model{reason}")
        self.config = replace(self.config, **changes)
        self.rebuild_rope()

    def num_parameters(self, active: bool = False) -> int:
        """Count all weights: a tied table once, padding rows not at all. active: leave out the experts that a
        token does not use."""
        c, experts = self.config, sum(p.numel() for n, p in self.named_parameters() if ".experts." in n)
        # All experts have the same size, and a token uses n_expert_per_token of n_expert.
        idle = experts - experts * c.n_expert_per_token // max(c.n_expert, 1) if active else 0
        padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd * (1 if c.tie_embeddings else 2)
        return sum(parameter.numel() for parameter in self.parameters()) - padding - idle

    def is_trained(self, name: str) -> bool:
        """Whether an optimizer may train this parameter. modeling/moe.py moves the bias of the experts."""
        return not name.endswith("expert_bias")

    def num_saved(self) -> int:
        """Count the parameters that a checkpoint stores; a LoRA run overrides this."""
        return self.num_parameters()

    def flops_per_token(self, T: float) -> float:
        """Return the FLOPs of the forward and backward pass per token, in a context of T tokens.

        6 per weight that is multiplied (PaLM, arXiv 2204.02311, appendix B), and 12 H D per layer and
        attended token, of which there are T / 2 on average.
        """
        # Reading a row of the token table multiplies nothing. As an output matrix the same table does.
        weights = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2 and "embed_" not in n)
        weights += self.head_weight.numel() if self.config.tie_embeddings else 0
        weights -= self.num_parameters() - self.num_parameters(active=True)  # experts that a token skips
        return 6 * weights + 6 * self.config.n_layer * self.config.n_head * self.config.head_dim * T

    # ---- Folders (formats/weights.py) ---------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, device: Any = "cpu",
                        dtype: torch.dtype = torch.float32) -> "GPT":
        """Load a Hugging Face folder, an out_dir of ours or a hub id, with weights in `dtype`.

        Raises UserError that names an architecture or a setting that this model does not compute.
        """
        folder = hf.find_folder(path)
        # Without memory first: random weights would only be overwritten, and no weight exists twice.
        with torch.device("meta"):
            model = cls(GPTConfig.read(folder))
        model.source = str(folder)
        model.to(dtype).to_empty(device=device)
        model.load(folder)
        return model

    def load(self, folder: str | Path) -> None:
        """Fill the parameters, or this rank's shards of them, from a folder. Raises UserError if one is
        missing, unknown or of another shape. New token ids start as the mean of the stored rows."""
        load_into(self, self.config, Path(folder), self.tensors_of(Path(folder)))
        self.rebuild_rope()

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the (parameter name, tensor) pairs that `load` copies; subclasses add theirs."""
        return hf.read_tensors(folder)

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None,
                        eos_token_id: hf.EndIds = None) -> None:
        """Write config.json, generation_config.json and model.safetensors, in float32, as transformers does.

        state: the full parameters by name, if this module holds only its shards of them. Raises UserError for
        packed ternary weights, which would be rounded a second time, with another scale.
        """
        save_model(self, self.config, Path(path), state, eos_token_id)
