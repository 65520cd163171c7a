"""The model: one GPT class that is a Llama by default, and a GPT-2, Qwen2 or Qwen3 by its settings.

    model = GPT(GPTConfig(n_layer=6, n_embd=256))
    logits = model(ids)                                # (B, T) int64 -> (B, T, V)
    loss = model(ids, head=loss_head)                  # loss_head(hidden, weight): no (B, T, V) tensor needed
    model = GPT.from_pretrained("out/base")            # our checkpoints are Hugging Face folders

Read it top down: GPTConfig, rotary positions, attention, MLP, block, GPT. Parameters carry the names of
Hugging Face's Llama (`model.layers.0.self_attn.q_proj.weight`) whatever the architecture; formats/hf.py
renames GPT-2's. Llama: arXiv 2302.13971. The model knows no loss, no optimizer and no tokenizer.

Shapes: B batch, T time, S keys, C n_embd, H query heads, K key/value heads, D head_dim, V vocab_size,
P the rows of the table in memory (V and padding), L layers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from configurator import UserError, coerce_field, require_positive
from formats import gguf as gguf_file
from formats import hf
from modeling.devices import named_generator, shard_like
from modeling.kv_cache import KVCache
from modeling.rope import rope_frequencies
from modeling.ternary import TernaryLinear


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The architecture. The defaults are the small Llama that `python train.py` trains; None is derived."""

    vocab_size: int = 4096  # token ids
    n_layer: int = 3  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int | None = None  # key and value heads, each shared by a group of query heads; None: n_head
    n_embd: int = 256  # width of the residual stream
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    intermediate_size: int | None = None  # width of the MLP; None: 8/3 (gelu: 4) n_embd, rounded up to 256s
    block_size: int = 128  # longest context, in tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # {"rope_type": "llama3"|"yarn", "factor": .., ..}: Hugging Face's keys
    norm_eps: float = 1e-5  # added to the variance in every norm
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches
    tie_embeddings: bool = True  # one table for input and output
    qk_norm: bool = False  # RMSNorm on every query and key head (Qwen3)
    position: Literal["rope", "learned"] = "rope"  # how a token knows its place; learned is GPT-2's
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm, with its bias, is GPT-2's
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu, in its tanh form, is GPT-2's
    bias: Literal["none", "qkv", "all"] = "none"  # which linear layers have one: qkv is Qwen2's, all GPT-2's
    ternary: bool = False  # 1.58-bit weights in the blocks' linear layers: -1, 0 or 1 times a scale

    def __post_init__(self) -> None:
        """Derive what is None; raise UserError for wrong types, and sizes that do not fit together."""
        for each in fields(self):
            coerce_field(type(self), each.name, getattr(self, each.name), "model")
        require_positive(self, "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size", "block_size", "rope_theta", "norm_eps")
        if self.block_size > 2**24:  # the rotary tables alone would fill gigabytes
            raise UserError(f"block_size={self.block_size}: must be at most {2**24:,}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd}: not divisible by n_head={self.n_head} (or give head_dim)")
        width = 4 * self.n_embd if self.mlp == "gelu" else 8 * self.n_embd / 3
        derived = {"n_kv_head": self.n_head, "head_dim": self.n_embd // self.n_head,
                   "intermediate_size": 256 * math.ceil(width / 256)}
        for key, value in derived.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)  # the way into a frozen dataclass, here and nowhere else
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head}: must be divisible by n_kv_head={self.n_kv_head}")
        if self.position == "rope":
            if self.head_dim % 2:
                raise UserError(f"head_dim={self.head_dim}: rotary positions turn pairs, so it must be even")
            rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)  # may refuse

    @classmethod
    def from_keys(cls, keys: Any, **changes: Any) -> "GPTConfig":
        """The architecture that a run's configuration `keys` describes, with `changes`. Raises UserError."""
        return cls(**{field.name: getattr(keys, field.name) for field in fields(cls)} | changes)

    @classmethod
    def read(cls, folder: Path) -> "GPTConfig":
        """That of a model's folder. Raises UserError, by name, for what this model does not compute."""
        try:
            return cls(**hf.read_config(folder))
        except TypeError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None

    @property
    def padded_vocab_size(self) -> int:
        """P: V up to a multiple of 64, which GPU matrix kernels want. The rows beyond V are never saved."""
        return 64 * math.ceil(self.vocab_size / 64)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of each head by their position's angle (half-rotation layout).

    x: (B, heads, T, D). rope: (cos, cos) and (-sin, sin) behind one another, (T, D) or (B, 1, T, D), float32.
    Shape and dtype are x's.
    """
    cos, sin = rope
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (B, heads, T, D)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (GQA, arXiv 2305.13245)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = make_linear(config, C, H * D, bias=config.bias != "none")
        self.k_proj = make_linear(config, C, K * D, bias=config.bias != "none")
        self.v_proj = make_linear(config, C, K * D, bias=config.bias != "none")
        self.o_proj = make_linear(config, H * D, C, bias=config.bias == "all")
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.layer, self.head_dim, self.dropout = layer, D, config.dropout
        self.attn_hook: Callable[[Tensor, Tensor, Tensor], None] | None = None  # is shown q, k, v of a forward

    def forward(self, x: Tensor, rope: Any, mask: Any, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        if self.attn_hook is not None:
            self.attn_hook(q, k, v)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (B, H, T, D) and twice (B, K, S, D) -> (B, H, T, D).

    mask: None (causal, S = T; or all S for a single query), bool (B, 1, T, S) where True may be seen, a
    BlockMask for FlexAttention, or (paths, slots): causal along each path (`GPT.forward`); slots (B, T) says
    where in the flattened paths a token's result is.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # where its backward pass is five times as slow
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)
    if isinstance(mask, tuple):
        return gather_tokens(attend(*(gather_tokens(x, mask[0]) for x in (q, k, v)), None, dropout), mask[1])
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if grouped and q.shape[2] == 1:  # the heads of a group are as so many queries of one head, and k, v stay
        queries = q.view(len(q), k.shape[1], -1, q.shape[3])  # (B, K, H / K, D)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, dropout_p=dropout)
        return y.reshape(q.shape)  # of a GPU's kernels, one gives y in another layout
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped,
                                          is_causal=q.shape[2] > 1 and mask is None)


def gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """(B, heads, T, D), at places (R, S) of the flattened (B, T) -> (R, heads, S, D)."""
    return x.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)


def document_mask(document_ids: Tensor, dense: bool = False) -> Tensor | BlockMask:
    """Causal attention within documents: (B, T) int64 -> a mask for `attend`.

    On a GPU FlexAttention's, which skips the blocks between documents; it has no backward pass on the CPU and
    no dropout, so there, and where `dense` asks for it, a bool tensor (B, 1, T, T).
    """
    B, T = document_ids.shape
    if document_ids.is_cuda and not dense:
        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (document_ids[b, q] == document_ids[b, kv])
        return create_block_mask(visible, B, None, T, T, device=document_ids.device)
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
    return same & torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202), or GPT-2's GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, inner, bias = config.n_embd, config.intermediate_size, config.bias == "all"
        self.gate_proj = make_linear(config, C, inner, bias=bias) if config.mlp == "swiglu" else None
        self.up_proj = make_linear(config, C, inner, bias=bias)
        self.down_proj = make_linear(config, inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """Two residual branches, each behind a norm."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = make_dropout(config)

    def forward(self, x: Tensor, rope: Any, mask: Any, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def make_linear(config: GPTConfig, n_in: int, n_out: int, bias: bool) -> nn.Linear:
    if config.ternary:
        return TernaryLinear(n_in, n_out, bias, eps=config.norm_eps)
    return nn.Linear(n_in, n_out, bias)


def make_norm(config: GPTConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.n_embd, eps=config.norm_eps)


def make_dropout(config: GPTConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


class GPT(nn.Module):
    """Token ids in, logits (or whatever a head makes of the hidden states) out."""

    def __init__(self, config: GPTConfig, seed: int = 0):
        """Random weights from `seed`; under `with torch.device("meta")` none, until `materialize`."""
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute blocks in the backward pass, to save memory
        self.compiled_steps = False  # compile what generation does for a token (generation/generate.py)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            "norm": make_norm(config)})
        if config.position == "learned":
            self.model["embed_positions"] = nn.Embedding(config.block_size, config.n_embd)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.dropout = make_dropout(config)
        if not self.head_weight.is_meta:
            self.init_weights(seed)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (P, C). Tied, it is the input table itself, so nothing is ever re-tied."""
        return self.model["embed_tokens"].weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None,
                head: Callable[[Tensor, Tensor], Any] | None = None, paths: Tensor | None = None) -> Any:
        """input_ids (B, T) int64 -> logits (B, T, V), or what `head` returns.

        head: called with the hidden states after the last norm, (B, T, C), and the output matrix, (P, C),
            inside forward, where FSDP has gathered it. Its rows from V on are padding, to be left out.
        document_ids: (B, T) int64, non-decreasing along a row: tokens see their own document only, and
            positions start at 0 in each, so that packed documents give the logits they give alone.
        cache: the tokens stand behind those it holds; the caller then says what it holds (`KVCache.set_lengths`).
        paths: (R, S) int64, the sequences to attend along, in place of the rows: of each token its number in
            the flattened (B, T). What several begin with alike is there once, and computed once. Every token
            stands on a path; a shorter one repeats its last token.
        Raises ValueError for more tokens, or a longer path, than block_size.
        """
        mask, positions = self.mask_and_positions(input_ids, document_ids, cache, paths)
        x = self.model["embed_tokens"](input_ids)  # (B, T, C)
        rope = None
        if self.config.position == "learned":
            x = x + self.model["embed_positions"].weight[positions]  # (T, C) or (B, T, C)
        else:
            rope = self.rope_cos[positions], self.rope_sin[positions]  # (T, D), or (B, T, D) ...
            if not isinstance(positions, slice):
                rope = rope[0][:, None], rope[1][:, None]  # ... -> (B, 1, T, D), for all heads
        x = self.dropout(x)
        for block in self.model["layers"]:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        x = self.model["norm"](x)
        if head is not None:
            return head(x, self.head_weight)
        return F.linear(x, self.head_weight)[..., :self.config.vocab_size]  # (B, T, V)

    def mask_and_positions(self, input_ids: Tensor, document_ids: Tensor | None, cache: KVCache | None,
                           paths: Tensor | None = None) -> tuple[Any, slice | Tensor]:
        """The mask for `attend`, and the tokens' positions: a slice that all rows share, or (B, T)."""
        if cache is not None:
            return cache.prepare(input_ids.shape[1])
        T = (input_ids if paths is None else paths).shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit block_size={self.config.block_size}")
        if paths is not None:
            places = torch.arange(paths.numel(), device=paths.device)
            slots = input_ids.new_zeros(input_ids.numel())  # of each token, its first place
            slots.scatter_reduce_(0, paths.flatten(), places, "amin", include_self=False)
            return (paths, slots.view_as(input_ids)), slots.view_as(input_ids) % T
        if document_ids is None:
            return None, slice(0, T)
        now = torch.arange(T, device=input_ids.device)  # (T,)
        begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)  # (B, T)
        positions = now - torch.where(begins, now, 0).cummax(dim=1).values  # (B, T)
        return document_mask(document_ids, dense=self.training and self.config.dropout > 0), positions

    # ---- Weights ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's scheme: matrices N(0, 0.02), those that write to the residual stream 1 / sqrt(2 L) of that.

        Norms start at 1, biases at 0. Each parameter draws from a generator of its own, seeded by (seed,
        name), so that one process and many get the same weights; under FSDP a rank draws one whole matrix at
        a time.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, device="cpu")
            if parameter.ndim == 1:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                generator = named_generator(seed, name)
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                value.normal_(0.0, residual_std if is_residual else 0.02, generator=generator)
            if name in hf.VOCABULARY_TABLES:
                value[self.config.vocab_size:] = 0  # padding
            parameter.copy_(shard_like(parameter, value))
        self.rebuild_rope()

    def materialize(self, device: Any, seed: int) -> None:
        """Give a model built on the meta device its memory and random weights, without a second copy."""
        self.to_empty(device=device)
        self.init_weights(seed)

    def rebuild_rope(self) -> None:
        """Compute the tables for `rotate`, float32 buffers (block_size, D), in float32 on the CPU."""
        config = self.config
        if config.position == "learned":
            return
        frequencies, factor = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        times = torch.arange(config.block_size, device="cpu").float()
        angles = times[:, None] * frequencies  # (block_size, D/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        for name, halves in (("rope_cos", (cos, cos)), ("rope_sin", (-sin, sin))):
            table = torch.cat(halves, dim=-1).to(self.head_weight.device)  # (block_size, D)
            before = getattr(self, name, table)
            if before is not table and before.shape == table.shape and before.device == table.device:
                before.copy_(table)  # in place, since a ramp of rope_theta comes by at every step
            else:
                self.register_buffer(name, table, persistent=False)

    def reconfigure(self, **changes: Any) -> None:
        """Change the context of a trained model: block_size, rope_theta, rope_scaling. UserError for anything
        else."""
        changes = {key: value for key, value in changes.items() if value != getattr(self.config, key)}
        if not changes:
            return
        learned = self.config.position == "learned"
        if learned or not changes.keys() <= {"block_size", "rope_theta", "rope_scaling"}:
            raise UserError(f"{', '.join(changes)}: cannot change in a trained model"
                            + " with learned positions" * learned)
        self.config = replace(self.config, **changes)
        self.rebuild_rope()

    # ---- Counts -------------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """All weights, a tied table counted once, padding rows not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        tables = 1 if self.config.tie_embeddings else 2
        return sum(parameter.numel() for parameter in self.parameters()) - tables * padding

    def num_saved(self) -> int:
        """Parameters in a checkpoint: all of them."""
        return self.num_parameters()

    def flops_per_token(self, T: int) -> float:
        """FLOPs of the forward and backward pass for one token in a context of T.

        6 for each weight that is multiplied (PaLM, arXiv 2204.02311, appendix B) and 12 H D a layer for each
        token attended to, of which there are T / 2 on average.
        """
        weights = sum(p.numel() for n, p in self.named_parameters() if p.ndim == 2 and "embed_" not in n)
        weights += self.head_weight.numel() if self.config.tie_embeddings else 0
        return 6 * weights + 6 * self.config.n_layer * self.config.n_head * self.config.head_dim * T

    # ---- Folders ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, device: Any = "cpu",
                        dtype: torch.dtype = torch.float32) -> "GPT":
        """Load a Hugging Face folder, an out_dir of ours or a hub id.

        dtype: of the weights; rotary tables are always float32. Raises UserError, by name, for an
        architecture or a setting that this model does not compute.
        """
        folder = hf.find_folder(path)
        with torch.device("meta"):
            model = cls(GPTConfig.read(folder))
        model.to(dtype).to_empty(device=device)
        model.load(folder)
        return model

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Fill the parameters, or this rank's shards of them, from a folder, one tensor at a time.

        A model that was built with more token ids than the folder's has the mean of the rows in the new ones.
        Raises UserError for a parameter that is missing, superfluous or of another shape.
        """
        missing, folder = dict(self.named_parameters()), Path(folder)
        V, P = self.config.vocab_size, self.config.padded_vocab_size
        stored = hf.read_config(folder)["vocab_size"]
        for name, tensor in self.tensors_of(folder):
            if name == "lm_head.weight" and self.config.tie_embeddings:
                continue  # some files hold the tied table twice
            parameter = missing.pop(name, None)
            if name in hf.VOCABULARY_TABLES and len(tensor) == stored < V:
                tensor = torch.cat((tensor, tensor.mean(0, keepdim=True).expand(V - stored, -1)))
            if name in hf.VOCABULARY_TABLES and len(tensor) == V:
                tensor = F.pad(tensor, (0, 0, 0, P - V))
            if parameter is None or parameter.shape != tensor.shape:
                raise UserError(f"{folder}: {name} {tuple(tensor.shape)} has no place in this architecture")
            parameter.copy_(shard_like(parameter, tensor))
        if missing:
            raise UserError(f"{folder}: {min(missing)} is missing ({len(missing)} parameters are)")
        for module in self.modules():
            if isinstance(module, TernaryLinear):
                module.rounded = hf.is_packed(folder)
        self.rebuild_rope()

    def tensors_of(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, stored tensor) of what `load` reads."""
        file = hf.gguf_of(folder)
        return gguf_file.read_tensors(file, self.config) if file else hf.read_tensors(folder)

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None,
                        eos_token_id: hf.EndIds = None) -> None:
        """Write config.json, generation_config.json and model.safetensors, in float32, as transformers does.

        state: the whole parameters by name, where this module holds only its shards of them. UserError for
        packed ternary weights: as plain ones they would be rounded again, by another scale.
        """
        if any(isinstance(module, TernaryLinear) and module.rounded for module in self.modules()):
            raise UserError("packed ternary weights: only export.py --format=ternary writes them")
        if state is None:
            state = {name: parameter.detach() for name, parameter in self.named_parameters()}
        hf.save_folder(Path(path), self.config, state, hf.special_token_ids(eos_token_id))
