"""Load and save a model's parameters, for GPT.load and GPT.save_pretrained.

    load_into(model, model.config, folder, hf.read_tensors(folder))
    save_model(model, model.config, folder, eos_token_id=7)

formats/hf.py reads the tensors, from safetensors or a GGUF file; a LoRA adapter is merged into its base.
`save_model` writes config.json, generation_config.json and model.safetensors as transformers does.
In memory the tables of token ids are padded to P rows; files hold the V rows that are token ids.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError
from formats import hf
from modeling.devices import gather_full, shard_like
from modeling.ternary import TernaryLinear


def fit_table(table: Tensor, stored_rows: int, config: hf.GPTConfig) -> Tensor:
    """Grow a table of token ids, (rows, C), to the model's P rows; a table of unexpected size is unchanged.

    If the model has more token ids than the folder, each new id starts as the mean of the stored rows.
    """
    V, P = config.vocab_size, config.padded_vocab_size
    if len(table) == stored_rows < V:
        table = torch.cat((table, table.mean(0, keepdim=True).expand(V - stored_rows, -1)))  # (V, C)
    return F.pad(table, (0, 0, 0, P - V)) if len(table) == V else table  # (P, C)


@torch.no_grad()
def load_into(model: nn.Module, config: hf.GPTConfig, folder: Path,
              tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill the model's parameters, or this rank's shards of them, from `tensors`, one tensor at a time.

    config: the model's GPTConfig. folder: where the tensors come from. Raises UserError for a parameter that
    is missing, unknown or of another shape, and for an output table that is not the input table's copy where
    config ties both.
    """
    tied = None
    parameters = dict(model.named_parameters())
    missing = parameters.copy()
    stored_rows = hf.read_config(folder)["vocab_size"]
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_embeddings:
            tied = tensor  # some files hold the tied table twice
            continue
        parameter = missing.pop(name, None)
        if name in hf.VOCABULARY_TABLES:
            tensor = fit_table(tensor, stored_rows, config)
        if parameter is None or parameter.shape != tensor.shape:
            raise UserError(f"{folder}: {name} {tuple(tensor.shape)} has no place in this architecture")
        parameter.copy_(shard_like(parameter, tensor))
    if missing:
        raise UserError(f"{folder}: {min(missing)} is missing ({len(missing)} missing in all)")
    if tied is not None:
        table = gather_full(parameters["model.embed_tokens.weight"])
        if not torch.equal(table, fit_table(tied, stored_rows, config).to(table)):
            raise UserError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the table of "
                            "model.embed_tokens.weight")
    # Packed ternary weights are rounded already: they must be neither rounded again nor trained.
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.rounded = hf.is_packed(folder)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, which share the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_model(model: nn.Module, config: hf.GPTConfig, folder: Path, state: dict[str, Tensor] | None = None,
               eos_token_id: hf.EndIds = None) -> None:
    """Write the model's three files, in float32. See GPT.save_pretrained for the arguments and errors."""
    if any(isinstance(module, TernaryLinear) and module.rounded for module in model.modules()):
        raise UserError("packed ternary weights can only be written by export.py --format=ternary")
    hf.save_folder(folder, config, state or state_of(model), hf.special_token_ids(eos_token_id))
