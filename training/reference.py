"""The frozen reference of dpo.py and grpo.py: the model that the policy starts from.

    reference = ReferenceModel(policy, "out/sft", "device", run.device, dtype)
    log_probs = reference.compute(lambda model: token_log_probs(model, batch, vocab_size))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from configurator import UserError
from formats import hf
from model import GPT
from modeling.linear import cast_frozen
from training.finetuning import PostTrainingConfig
from training.lora import AdaptedGPT
from training.losses import linear_log_probs


def check_reference(cfg: PostTrainingConfig, reference: str, is_used: bool = True) -> None:
    """Raise UserError unless the reference of dpo.py or grpo.py fits the adapter of `cfg`."""
    if reference == "adapter_off" and not cfg.lora_rank:
        raise UserError("reference=adapter_off: needs an adapter; set lora_rank")
    if is_used and cfg.quantize_base and reference != "adapter_off":
        raise UserError(f"reference={reference}: would use the base in full precision; with "
                        "quantize_base set reference=adapter_off")
    if cfg.lora_dropout:
        raise UserError("lora_dropout: must be 0, because dropout would make policy and reference differ")


def token_log_probs(model: nn.Module, batch: dict[str, Any], vocab_size: int,
                    temperature: float = 1.0) -> Tensor:
    """log p(token) of every target of a `pair_batch` or a `group_batch`, (targets,) float32."""
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        # Only the positions that predict a target need logits.
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # (1, N, C) -> (targets, C)
        return linear_log_probs(hidden / temperature, weight, batch["targets"], vocab_size)

    return model(batch["input_ids"], paths=batch["paths"], head=head)


class ReferenceModel:
    """The frozen reference of a policy, the model that it starts from, for DPO and for a KL penalty.

    It is a second model in memory, or the policy itself with its adapter switched off.
    """

    def __init__(self, policy: GPT, source: str, kind: str, device: torch.device, dtype: torch.dtype):
        """source: the folder or hub id that the policy starts from. kind: adapter_off needs no second model;
        cpu keeps it there, which costs time and no GPU memory; anything else keeps it on `device`. dtype: of
        its matrix products. Raises UserError if the policy's adapter cannot be switched off."""
        if kind == "adapter_off" and isinstance(policy, AdaptedGPT) and policy.spec.tables:
            raise UserError(f"reference=adapter_off: {source} has no chat tokens, so new embeddings are "
                            "trained, which cannot be switched off; start from a model of sft.py")
        self.policy, self.source, self.adapter_off = policy, source, kind == "adapter_off"
        self.device, self.dtype = torch.device("cpu") if kind == "cpu" else device, dtype
        self.model: GPT | None = None  # loaded when it is needed

    def load(self) -> GPT:
        """The frozen model, with the policy's vocabulary."""
        if self.model is None:
            with torch.device("meta"):
                model = GPT(self.policy.config)
            cast_frozen(model, self.dtype)
            model.to_empty(device=self.device)
            model.load(hf.find_folder(self.source))
            self.model = model.eval().requires_grad_(False)
        return self.model

    @torch.no_grad()
    def compute(self, function: Callable[[GPT], Any]) -> Any:
        """function(reference), without gradients."""
        if isinstance(self.policy, AdaptedGPT) and self.adapter_off:
            self.policy.use_adapter(False)
            try:
                return function(self.policy)
            finally:
                self.policy.use_adapter(True)
        # The same precision as in training: a difference would look like a preference.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return function(self.load())
