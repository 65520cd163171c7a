"""The teacher of a distillation: any causal language model, frozen, whose token ids are those of the data.

    teacher = load_teacher("out/base", tokenizer, device, dtype, block_size=128)
    result = teacher(ids, document_ids=None, head=lambda hidden, weight: ...)     # called like a GPT

An architecture that model.py does not have is loaded by transformers. Its head is called with the logits and
None, in place of hidden states and an output matrix. A teacher may have more rows in its output matrix than
the tokenizer has ids; the loss ignores those rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configurator import UserError, optional_import
from formats import hf
from formats.files import read_json
from formats.peft import is_adapter
from formats.tokenizer import Tokenizer
from model import GPT


class ForeignTeacher(nn.Module):
    """A causal language model of transformers, called like a GPT. It cannot mask documents."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype):
        """Raises UserError if transformers is not installed or cannot load the folder."""
        super().__init__()
        transformers = optional_import("transformers", f"teacher={folder}, an architecture of its own")
        try:
            inner: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=dtype)
        except (ValueError, OSError) as error:  # the folder needs code of its own, or has no safetensors
            raise UserError(f"teacher={folder}: transformers cannot load it: {str(error).splitlines()[0]}"
                            ) from None
        self.inner, self.config = inner.to(device), inner.config

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None,
                head: Callable[[Tensor, None], Any] | None = None) -> Any:
        """input_ids (B, T) -> head(logits (B, T, V), None). Raises UserError if document_ids are given."""
        if document_ids is not None:
            raise UserError("teacher: a teacher loaded by transformers cannot mask documents; add "
                            "--packing=False (chats) or --document_mask=False (text)")
        logits = self.inner(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        return logits if head is None else head(logits, None)


def is_ours(folder: Path) -> bool:
    """True if model.py has the architecture. Raises UserError if config.json is damaged."""
    is_gguf = folder.is_file()
    return (is_adapter(folder) or is_gguf
            or read_json(folder / "config.json").get("model_type") in (*hf.DEFAULTS, "nanollama"))


def pieces(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: the token's text in the vocabulary}. Equal texts mean equal bytes."""
    return {i: piece for piece, i in tokenizer.hf.get_vocab().items()}


def check_teacher_ids(folder: Path, tokenizer: Tokenizer, key: str = "teacher") -> None:
    """Raises UserError, with up to three examples, if an id means another token to the teacher than in the
    data. key: the name of the setting, for messages."""
    theirs, ours = pieces(Tokenizer.load(folder)), pieces(tokenizer)
    different = [i for i in sorted(ours) if ours[i] != theirs.get(i)]  # more ids on their side do no harm
    if different and set(different) <= tokenizer.special_ids and not theirs.keys() & set(different):
        raise UserError(f"{key}={folder}: does not know the chat tokens; fine-tune it with sft.py first")
    if different:
        shown = "; ".join(f"{i} is {theirs.get(i)!r} there and {ours[i]!r} in the data"
                          for i in different[:3])
        raise UserError(f"{key}={folder}: {len(different):,} token ids mean something else: {shown} "
                        f"(prepare.py --tokenizer={folder} makes data with its ids; with --align=bytes they "
                        "may differ)")


def context_of(teacher: Any) -> int:
    """The most tokens that a teacher reads; a large number for a model of transformers without a limit."""
    config = teacher.config
    return getattr(config, "block_size", None) or getattr(config, "max_position_embeddings", None) or 2**24


def load_teacher(source: str, tokenizer: Tokenizer, device: torch.device | str, dtype: torch.dtype,
                 block_size: int, key: str = "teacher") -> nn.Module:
    """Load a model folder, an out_dir or a hub id, in eval mode and without gradients; weights in `dtype`.

    block_size: length of the longest rows that the teacher will read. key: the setting that holds `source`,
    for messages. Raises UserError if they are longer than its context, or if its vocabulary is not the
    tokenizer's.
    """
    folder = hf.find_folder(source)
    check_teacher_ids(folder, tokenizer, key)
    load = GPT.from_pretrained if is_ours(folder) else ForeignTeacher
    teacher: nn.Module = load(folder, device, dtype)
    config: Any = teacher.config  # a GPTConfig, or one of transformers
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{key}={source}: the model has {config.vocab_size:,} token ids, its tokenizer "
                        f"{tokenizer.vocab_size:,}")
    if context_of(teacher) < block_size:
        raise UserError(f"block_size={block_size}: {key}={source} has a context of {context_of(teacher)} "
                        "tokens")
    return teacher.eval().requires_grad_(False)
