"""What an adapter is refused for."""

import pytest
import torch

from configurator import UserError
from model import GPT
from sft import SFTConfig
from tests.conftest import tiny_config
from training.finetuning import with_adapter


@pytest.mark.parametrize("settings, named", [
    ({"ternary": True}, "ternary=True"), ({"sink_logits": True}, "sink_logits=True"),
    ({"n_expert": 4}, "n_expert=4"), ({"qk_norm": True, "n_expert": 4}, "qk_norm=True, n_expert=4"),
    ({"position": "none"}, "position=none"),
    ({"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": "all", "n_head": 4, "n_kv_head": 2},
     "position=learned, norm=layernorm, mlp=gelu, bias=all, n_kv_head=2")])
def test_an_adapter_that_peft_cannot_represent_is_refused_by_the_settings(settings, named):
    with torch.device("meta"):
        model = GPT(tiny_config(**settings))
    with pytest.raises(UserError) as info:
        with_adapter(SFTConfig(lora_rank=2), model, {"path": "base"})
    assert str(info.value) == (f"lora_rank=2: PEFT cannot represent an adapter for a model with {named}; "
                               "without lora_rank all weights are trained")
