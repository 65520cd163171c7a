"""The teacher of a distillation: any model folder, frozen, with the student's vocabulary.

    teacher = load_teacher("out/base", tokenizer, device, dtype, block_size=128)
    result = teacher(ids, document_ids=None, head=lambda hidden, weight: ...)     # as a GPT is called

Architectures that model.py does not have come in through transformers, whose logits stand for the hidden
states there (weight is None). Ids have to mean the same bytes on both sides; rows that a teacher has beyond
the tokenizer's ids are padding, and cut where the losses are computed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from configurator import UserError
from formats import hf
from formats.peft import is_adapter
from formats.tokenizer import Tokenizer
from model import GPT


def load_teacher(source: str, tokenizer: Tokenizer, device: Any, dtype: torch.dtype,
                 block_size: int) -> nn.Module:
    """The model of a folder, an out_dir or a hub id, in eval mode, without gradients, its weights in `dtype`.

    block_size: of the longest rows that it will read. Raises UserError where those are longer than its
    context, or its vocabulary is not the tokenizer's.
    """
    folder = hf.find_folder(source)
    check_vocabulary(folder, tokenizer)
    if is_ours(folder):
        teacher = GPT.from_pretrained(folder, device, dtype)
    else:
        teacher = ForeignTeacher(folder, device, dtype)
    config = teacher.config
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"teacher={source}: has {config.vocab_size:,} token ids, its tokenizer "
                        f"{tokenizer.vocab_size:,}")
    context = getattr(config, "block_size", None) or getattr(config, "max_position_embeddings", None)
    if context is not None and context < block_size:
        raise UserError(f"block_size={block_size}: teacher={source} has a context of {context} tokens")
    return teacher.eval().requires_grad_(False)




def is_ours(folder: Path) -> bool:
    """Whether model.py has the architecture. UserError for a config.json that is none."""
    if is_adapter(folder):
        return True
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] in (*hf.TIED_BY_DEFAULT,
                                                                                  "nanollama")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not a model's config ({type(error).__name__}: {error})"
                        ) from None


def check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """UserError with the first ids that mean something else to the teacher than to the data."""
    theirs, ours = spelled(Tokenizer.load(folder)), spelled(tokenizer)
    different = [i for i in sorted(ours) if ours[i] != theirs.get(i)]  # what it has beyond them is cut
    if different and set(different) <= tokenizer.special_ids and not theirs.keys() & set(different):
        raise UserError(f"teacher={folder}: does not know the chat tokens; fine-tune it with sft.py first")
    if different:
        shown = "; ".join(f"{i} is {theirs.get(i)!r} there and {ours[i]!r} in the data"
                          for i in different[:3])
        raise UserError(f"teacher={folder}: {len(different):,} token ids mean something else: {shown} "
                        f"(prepare.py --tokenizer={folder} makes data for it)")


def spelled(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: its piece}, which stands for its bytes one to one."""
    return {i: piece for piece, i in tokenizer.hf.get_vocab().items()}


class ForeignTeacher(nn.Module):
    """A causal language model of transformers, called as a GPT is. It sees no document borders."""

    def __init__(self, folder: Path, device: Any, dtype: torch.dtype):
        super().__init__()
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise UserError(f"teacher={folder}: an architecture that model.py does not have needs "
                            "transformers (pip install transformers)") from None
        try:
            self.inner = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=dtype).to(device)
        except (ValueError, OSError) as error:  # it needs code of its own, or has no safetensors
            raise UserError(f"teacher={folder}: transformers does not load it: {str(error).splitlines()[0]}"
                            ) from None
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None,
                head: Callable[[Tensor, None], Any] | None = None) -> Any:
        """input_ids (B, T) -> head(logits (B, T, V), None). UserError where documents are to be masked."""
        if document_ids is not None:
            raise UserError("teacher: an architecture of transformers cannot mask documents from each other; "
                            "use packing=False (of chats) or document_mask=False (of text)")
        logits = self.inner(input_ids=input_ids, use_cache=False).logits
        return logits if head is None else head(logits, None)


def shard_teacher(teacher: nn.Module, parallel: str, run: Any) -> None:
    """With parallel=fsdp, give each rank a shard of each block, as loop.py does with the student."""
    if parallel != "fsdp" or run.world_size == 1:
        return
    if not isinstance(teacher, GPT):
        raise UserError("parallel=fsdp: shards only teachers of an architecture that model.py has")
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for module in (*teacher.model["layers"], teacher):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
