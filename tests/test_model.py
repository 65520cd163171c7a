"""model.py, formats/weights.py and formats/hf.py: the same logits as transformers, in both directions."""

import json
import subprocess
import sys

import pytest
import torch

from configurator import UserError
from formats import hf
from model import GPT, GPTConfig
from tests.conftest import ROOT, busy_model, tiny_config

GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
ARCHITECTURES = {
    "tied": ("LlamaForCausalLM", {}),
    "untied": ("LlamaForCausalLM", dict(tie_embeddings=False)),
    "heads 8/8": ("LlamaForCausalLM", dict(n_head=8, n_kv_head=8)),
    "heads 6/2": ("LlamaForCausalLM", dict(n_head=6, n_kv_head=2, n_embd=96)),
    "heads 9/3": ("LlamaForCausalLM", dict(n_head=9, n_kv_head=3, n_embd=144)),
    "head_dim of its own": ("LlamaForCausalLM", dict(head_dim=48)),
    "rope_theta 5e5": ("LlamaForCausalLM", dict(rope_theta=5e5)),
    "padded vocabulary": ("LlamaForCausalLM", dict(vocab_size=321, tie_embeddings=False)),
    "biases everywhere": ("LlamaForCausalLM", dict(bias="all")),
    "llama3 scaling": ("LlamaForCausalLM", dict(rope_scaling=LLAMA3)),
    "yarn scaling": ("LlamaForCausalLM", dict(rope_scaling=YARN)),
    "yarn with mscale": ("LlamaForCausalLM", dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.0))),
    "yarn with its factor": (
        "LlamaForCausalLM",
        dict(rope_scaling=YARN | dict(attention_factor=1.3, truncate=False)),
    ),
    "qwen2": ("Qwen2ForCausalLM", dict(bias="qkv")),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True)),
    "mixtral": ("MixtralForCausalLM", dict(n_expert=4)),
    "qwen3 moe": ("Qwen3MoeForCausalLM", dict(n_expert=8, qk_norm=True, expert_size=48, dense_layers=[1])),
    "qwen3 moe, top 1": (
        "Qwen3MoeForCausalLM",
        dict(n_expert=4, n_expert_per_token=1, norm_topk=False, qk_norm=True),
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", GPT2 | dict(tie_embeddings=False)),
}


def ids_for(config, B=2, T=64, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, tmp_path):
    """From our folder to transformers, and from its folder back."""
    from transformers import AutoModelForCausalLM

    expected_class, changes = ARCHITECTURES[name]
    config = tiny_config(**changes)
    model, ids = busy_model(config), ids_for(config)
    model.save_pretrained(tmp_path / "ours", eos_token_id=7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs).__name__ == expected_class
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 7
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")  # several files and an index
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    back = GPT.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        reference = theirs(ids).logits
        assert (model(ids) - reference).abs().max() <= 1e-5
        assert (back(ids) - reference).abs().max() <= 1e-5
    assert reference.std() > 0.1  # the logits are not all equal
    assert {**vars(back.config), "dropout": 0.0} == {**vars(config), "dropout": 0.0}


def test_mistral_loads_where_it_is_a_llama(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    plain = dict(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    theirs = MistralForCausalLM(MistralConfig(**plain, sliding_window=None)).eval()
    theirs.save_pretrained(tmp_path / "plain")
    ids = ids_for(tiny_config(vocab_size=100))
    with torch.no_grad():
        assert (GPT.from_pretrained(tmp_path / "plain")(ids) - theirs(ids).logits).abs().max() <= 1e-5
    MistralForCausalLM(MistralConfig(**plain, sliding_window=16)).save_pretrained(tmp_path / "window")
    with pytest.raises(UserError, match="sliding_window=16 is not supported"):
        GPT.from_pretrained(tmp_path / "window")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="mamba"), "model_type 'mamba' is not supported"),
        (dict(hidden_act="gelu"), "hidden_act=gelu"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (
            dict(rope_scaling=dict(rope_type="longrope", factor=2, original_max_position_embeddings=8)),
            "llama3 or yarn",
        ),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=2, original_max_position_embeddings=8)),
            "low_freq_factor",
        ),
        (dict(hidden_size=128), "no place in this architecture"),
        (dict(num_hidden_layers=3), "layers.2.* is missing"),
        (dict(num_hidden_layers=1), "no place"),
        (dict(num_key_value_heads=3), "divisible by n_kv_head"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    busy_model(tiny_config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["x", [], 3.5, None, True, {}])
def test_values_of_a_wrong_type_are_one_line(tmp_path, value):
    busy_model(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    keys = ["vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "model_type"]
    for key in keys:
        if (key, value) in (("rms_norm_eps", 3.5), ("tie_word_embeddings", True)):
            continue  # a valid value of this key
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    with pytest.raises(UserError, match="block_size=1000000000: must be an integer from 1 to 16,777,216"):
        GPT.from_pretrained(tmp_path)


def test_a_missing_size_is_an_error(tmp_path):
    """transformers has defaults of its own for these sizes. A size that it derives, we derive too."""
    busy_model(tiny_config(n_kv_head=4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key in ("num_attention_heads", "max_position_embeddings", "hidden_size"):
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(UserError, match=f"needs the key '{key}'"):
            GPT.from_pretrained(tmp_path)
    derived = ("num_key_value_heads", "head_dim")
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in derived}))
    assert GPT.from_pretrained(tmp_path).config.n_kv_head == 4


def test_damaged_or_missing_weights_are_one_line(tmp_path, monkeypatch):
    busy_model(tiny_config()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="never pickle"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no model here"):
        GPT.from_pretrained(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="python sft.py trains it"):
        GPT.from_pretrained("out/sft")


def test_a_combination_transformers_lacks_is_saved_with_the_reason(tmp_path):
    config = tiny_config(norm="layernorm", qk_norm=True)
    model = busy_model(config)
    model.save_pretrained(tmp_path)
    assert "only nanollama loads it" in json.loads((tmp_path / "config.json").read_text())["note"]
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids_for(config)), model(ids_for(config)))


def test_padding_rows_are_never_saved_and_never_seen(tmp_path):
    config = tiny_config(vocab_size=321)
    model = busy_model(config)
    model.save_pretrained(tmp_path)
    assert model.head_weight.shape == (384, 64) and model(ids_for(config)).shape == (2, 64, 321)
    assert dict(hf.read_tensors(tmp_path))["model.embed_tokens.weight"].shape == (321, 64)
    assert model.num_parameters() == sum(tensor.numel() for _, tensor in hf.read_tensors(tmp_path))


def test_weights_depend_on_the_seed_alone():
    with torch.device("meta"):
        later = GPT(tiny_config())
    later.materialize("cpu", seed=3)
    for (name, one), (_, two) in zip(
        GPT(tiny_config(), seed=3).named_parameters(), later.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    other = GPT(tiny_config(), seed=4)
    assert not torch.equal(other.head_weight, later.head_weight)
    std = later.model["layers"][0].mlp.down_proj.weight.std().item()
    assert std == pytest.approx(0.02 / 2, rel=0.05)  # two layers: divided by sqrt(4)


def test_activation_checkpointing_changes_no_gradient():
    config = tiny_config(dropout=0.1)
    model, ids = busy_model(config).train(), ids_for(config)
    gradients = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        model(ids).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_head_replaces_the_logits():
    config = tiny_config()
    model, ids = busy_model(config), ids_for(config)
    logits = model(ids, head=lambda hidden, weight: hidden @ weight.T)[..., : config.vocab_size]
    assert torch.allclose(logits, model(ids), atol=1e-5)


def test_context_may_change_in_a_trained_model(tmp_path):
    config = tiny_config()
    model = busy_model(config)
    model.reconfigure(rope_theta=5e5, block_size=128)
    fresh = GPT(tiny_config(rope_theta=5e5, block_size=128))
    assert torch.equal(model.rope.cos, fresh.rope.cos) and model.rope.cos.shape == (128, 16)
    model.save_pretrained(tmp_path)
    assert hf.read_config(tmp_path)["rope_theta"] == 5e5 and hf.read_config(tmp_path)["block_size"] == 128
    with pytest.raises(UserError, match="n_layer: cannot change"):
        model.reconfigure(n_layer=5)
    with pytest.raises(UserError, match="with position=learned"):
        GPT(tiny_config(**GPT2)).reconfigure(block_size=128)


def test_rotary_tables_are_float32_whatever_the_weights_are(tmp_path):
    """So a model in bfloat16 has the same tables before and after a change of its context."""
    busy_model(tiny_config()).save_pretrained(tmp_path)
    half = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.rope.cos.dtype == half.rope.sin.dtype == torch.float32
    ids = ids_for(half.config)
    before = half(ids)
    half.reconfigure(block_size=128)
    half.reconfigure(block_size=64)
    assert before.dtype == torch.bfloat16 and torch.equal(half(ids), before)


def test_more_tokens_than_the_context_is_an_error():
    with pytest.raises(ValueError, match="65 tokens do not fit block_size=64"):
        GPT(tiny_config())(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_head=3, n_kv_head=3), "n_embd=64"),
        (dict(n_kv_head=3), "divisible by n_kv_head"),
        (dict(n_layer=0), "positive"),
        (dict(head_dim=15), "even"),
        (dict(dropout=1.0), "dropout"),
        (dict(rope_scaling={}), "rope_type"),
        (dict(position="learned", rope_scaling={}), "rope_scaling={}: must be None with position=learned"),
        (dict(n_layer=2**12 + 1), "n_layer=4097: must be at most 4,096"),
        (dict(n_embd=2**26), "must be at most 16,777,216"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_counts_worked_by_hand():
    """2 layers, C 64, 4/2 heads of 16, inner 128, V 500 tied."""
    model = GPT(tiny_config())
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert model.num_parameters() == 500 * 64 + 2 * layer + 64
    matrices = 2 * (layer - 2 * 64) + 512 * 64  # padding rows of the output matrix are multiplied, too
    assert model.flops_per_token(64) == 6 * matrices + 6 * 2 * 4 * 16 * 64


def test_real_sizes():
    """GPT-2 124M and the 1.1B Llama, on the meta device, against their known parameter and FLOP counts."""
    with torch.device("meta"):
        small = GPT(
            GPTConfig(
                vocab_size=50257,
                n_layer=12,
                n_head=12,
                n_embd=768,
                intermediate_size=3072,
                block_size=1024,
                **(GPT2 | dict(n_kv_head=12)),
            )
        )
        large = GPT(
            GPTConfig(
                vocab_size=32000,
                n_layer=22,
                n_head=32,
                n_kv_head=4,
                n_embd=2048,
                intermediate_size=5632,
                block_size=4096,
                tie_embeddings=False,
            )
        )
    assert small.num_parameters() == 124_439_808
    assert small.flops_per_token(1024) == pytest.approx(0.80e9, rel=0.01)
    assert large.num_parameters() == 1_100_048_384  # TinyLlama's
    assert large.flops_per_token(4096) == pytest.approx(7.3e9, rel=0.01)


MEMORY = """
import re, torch
from model import GPT, GPTConfig
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
config = GPTConfig(vocab_size=32000, n_layer=12, n_head=12, n_embd=768, block_size=128)
with torch.device("meta"):
    small = GPT(GPTConfig())  # imports what a model needs
small.materialize("cpu", seed=1)
before = peak()
with torch.device("meta"):
    model = GPT(config)
print(peak() - before, sep=" ", end=" ")
model.materialize("cpu", seed=1)
print(peak() - before, model.num_parameters() * 4 / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells a process its peak memory")
def test_a_model_on_the_meta_device_is_filled_without_a_second_copy():
    """Peak memory of a new process, in MiB: almost nothing on meta, then the weights and one more matrix."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT, check=True
    )
    on_meta, filled, weights = map(float, done.stdout.split())
    largest = 32000 * 768 * 4 / 2**20
    assert on_meta < 0.05 * weights
    assert weights * 0.95 < filled < weights + 2 * largest  # the table's random values, and a copy of them
