"""Adapters: a new one is a no-op, only it is trained, merging is exact, and PEFT uses the same files."""

import json

import pytest
import torch
from safetensors.torch import load_file

from configurator import UserError
from formats import hf
from formats.peft import AdapterSpec, read_adapter, weights_sha256
from model import GPT
from modeling.linear import cast_frozen
from tests.conftest import busy_model, tiny_config
from training.lora import AdaptedGPT, targets_of

SPEC = AdapterSpec(4, 8.0, 0.0, ("q_proj", "down_proj"), False)
IDS = torch.arange(40).view(2, 20)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    model = busy_model(tiny_config())
    model.save_pretrained(folder, eos_token_id=0)
    return model, folder


def adapted(folder, spec=SPEC, vocab_size=500, seed=0, dtype=torch.float32):
    with torch.device("meta"):
        model = AdaptedGPT(
            tiny_config(vocab_size=vocab_size),
            spec,
            {"path": str(folder), "sha256": weights_sha256(folder)},
            seed,
        )
        cast_frozen(model, dtype)
    model.to_empty(device="cpu")
    model.load(folder)
    return model.eval()


def busy(model):
    """The model with an adapter whose every parameter is far from its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.is_trained(name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_a_new_adapter_is_a_no_op(base):
    model, folder = base
    assert torch.equal(adapted(folder)(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_frozen_matrices_changes_no_bit(base, dtype):
    """autocast rounds float32 matrices to the same numbers, in every product again."""
    _, folder = base
    results = []
    for each in (torch.float32, dtype):
        model = busy(adapted(folder, dtype=each))
        with torch.autocast("cpu", dtype):
            logits = model(IDS)
        logits.float().square().mean().backward()
        grads = [p.grad for name, p in model.named_parameters() if model.is_trained(name)]
        results.append([logits, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    halved = {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}
    assert halved == {name for name in GPT(tiny_config()).state_dict() if name.endswith("_proj.weight")}


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_merging_is_exact_and_the_base_stays(base, tmp_path, rslora):
    model, folder = base
    spec = AdapterSpec(4, 8.0, 0.0, ("q_proj", "down_proj"), rslora)
    assert spec.scale == (4.0 if rslora else 2.0)
    before = weights_sha256(folder)
    tuned = busy(adapted(folder, spec))
    tuned.save_pretrained(tmp_path / "a", eos_token_id=0)
    merged = GPT.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(merged(IDS), tuned(IDS), rtol=1e-5, atol=1e-5)
    assert (merged(IDS) - model(IDS)).abs().max() > 0.1
    tuned.use_adapter(False)
    assert torch.equal(tuned(IDS), model(IDS)) and weights_sha256(folder) == before
    weight = "model.layers.0.self_attn.q_proj"
    A, B = (tuned.get_parameter(f"{weight}.lora_{x}") for x in "AB")
    by_hand = model.get_parameter(f"{weight}.weight") + spec.scale * B @ A
    torch.testing.assert_close(merged.get_parameter(f"{weight}.weight"), by_hand)


@torch.no_grad()
def test_a_saved_adapter_loads_to_continue(base, tmp_path):
    _, folder = base
    tuned = busy(adapted(folder))
    tuned.save_pretrained(tmp_path / "a")
    again = adapted(folder, seed=3)
    again.load(tmp_path / "a")
    assert torch.equal(again(IDS), tuned(IDS))


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_the_same_logits(base, tmp_path, rslora):
    import peft
    import transformers

    _, folder = base
    tuned = busy(adapted(folder, AdapterSpec(4, 8.0, 0.0, ("q_proj", "up_proj"), rslora)))
    tuned.save_pretrained(tmp_path / "a", eos_token_id=0)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a"
    )
    torch.testing.assert_close(theirs.eval()(IDS).logits, tuned(IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_adapter_written_by_peft_loads(base, tmp_path):
    import peft
    import transformers

    _, folder = base
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


# ---- GPT-2, whose q, k and v are one matrix --------------------------------------------------------------

GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)


def gpt2_adapter(folder, spec):
    """A GPT-2 in `folder`, and a model with an adapter of it that is far from a new one."""
    busy_model(tiny_config(**GPT2)).save_pretrained(folder, eos_token_id=0)
    with torch.device("meta"):
        model = AdaptedGPT(tiny_config(**GPT2), spec, {"path": str(folder)})
    model.to_empty(device="cpu")
    model.load(folder)
    return busy(model.eval())


@torch.no_grad()
@pytest.mark.parametrize("targets, rslora", [
    (("q_proj", "k_proj", "v_proj"), False), (("q_proj", "v_proj", "o_proj", "down_proj"), True),
    (("up_proj",), False), (("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), False)])
def test_gpt2s_adapter_is_one_of_c_attn_for_peft(targets, rslora, tmp_path):
    import peft
    import transformers

    tuned = gpt2_adapter(tmp_path / "base", AdapterSpec(4, 8.0, 0.0, targets, rslora))
    tuned.save_pretrained(tmp_path / "a", eos_token_id=0)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a").eval()
    expected = tuned(IDS)
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "a").eval()(IDS), expected, rtol=0, atol=1e-5)
    tuned.use_adapter(False)
    assert (tuned(IDS) - expected).abs().max() > 0.1
    if "q_proj" in targets:
        layer = theirs.base_model.model.transformer.h[0].attn.c_attn
        assert layer.r["default"] == 12 and layer.fan_in_fan_out
        assert layer.scaling["default"] == pytest.approx(4.0 if rslora else 2.0)
        stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
        A, B = (stored[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"] for x in "AB")
        assert (A.shape, B.shape) == ((12, 64), (192, 12))
        assert torch.equal(A[:4], tuned.get_parameter("model.layers.0.self_attn.q_proj.lora_A"))
        assert torch.equal(B[128:, 8:], tuned.get_parameter("model.layers.0.self_attn.v_proj.lora_B"))
        assert not B[:64, 4:].any() and A[4:8].any() == ("k_proj" in targets)
    again = gpt2_adapter(tmp_path / "base", tuned.spec)
    again.load(tmp_path / "a")
    assert torch.equal(again(IDS), expected)  # training continues from the same adapter


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 6])
def test_an_adapter_of_c_attn_written_by_peft_loads(rank, tmp_path):
    """Its B is not block-diagonal, so q, k and v share A. With our settings, too."""
    import peft
    import transformers

    busy_model(tiny_config(**GPT2)).save_pretrained(tmp_path / "base", eos_token_id=0)
    more = {"rank_pattern": {"c_attn": 18}, "alpha_pattern": {"c_attn": 24}} if rank == 6 else {}
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["c_attn", "c_fc", "mlp.c_proj"],
                             task_type="CAUSAL_LM", fan_in_fan_out=True, **more)
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_new_tokens_start_as_the_mean_and_are_saved_with_the_adapter(base, tmp_path):
    model, folder = base
    tables = ("embed_tokens",)
    tuned = adapted(folder, AdapterSpec(4, 8.0, 0.0, ("q_proj",), False, tables), vocab_size=508)
    table = tuned.get_parameter("model.embed_tokens.weight")
    mean = model.get_parameter("model.embed_tokens.weight")[:500].mean(0)
    torch.testing.assert_close(table[500:508], mean.expand(8, -1))
    assert torch.equal(table[508:], torch.zeros(4, 64))
    torch.testing.assert_close(tuned(IDS)[..., :500], model(IDS), rtol=1e-5, atol=1e-5)
    busy(tuned).save_pretrained(tmp_path / "a")
    merged = GPT.from_pretrained(tmp_path / "a").eval()
    assert merged.config.vocab_size == 508
    torch.testing.assert_close(merged(IDS), tuned(IDS), rtol=1e-5, atol=1e-5)


def test_32000_tokens_become_32006_tied_and_untied(tmp_path):
    for tied in (True, False):
        config = tiny_config(vocab_size=32_000, n_embd=16, n_layer=1, n_head=2, tie_embeddings=tied)
        model = GPT(config).eval()
        model.save_pretrained(tmp_path / str(tied))
        with torch.device("meta"):
            grown = GPT(tiny_config(**{**vars(config), "vocab_size": 32_006}))
        grown.to_empty(device="cpu")
        grown.load(tmp_path / str(tied))
        with torch.no_grad():
            before, after = model(IDS), grown.eval()(IDS)
        torch.testing.assert_close(after[..., :32_000], before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[..., 32_000], before.mean(-1), rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_saved(base, tmp_path):
    _, folder = base
    adapted(folder).save_pretrained(tmp_path / "a", eos_token_id=[7, 0])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name.rsplit("lora_", 1)[1] for name in stored} == {"A.weight", "B.weight"} and len(stored) == 8
    assert hf.end_ids(tmp_path / "a") == [7, 0]
    assert read_adapter(tmp_path / "a")[1] == SPEC


def test_faults_are_named(base, tmp_path):
    model, folder = base
    adapted(folder).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="lora_targets=xyz: matches none of down_proj, gate_proj"):
        targets_of(model, "xyz")
    with pytest.raises(UserError, match="not a regular expression"):
        targets_of(model, "(")
    assert targets_of(model, "q|v_proj") == ("q_proj", "v_proj")
    busy_model(tiny_config(), seed=2).save_pretrained(folder)
    with pytest.raises(UserError, match="whose weights have changed since"):
        GPT.from_pretrained(tmp_path / "a")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="an adapter of .*no model here"):
        GPT.from_pretrained(tmp_path / "a")
    place = tmp_path / "a" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"alpha_pattern": {"q_proj": 64}}))
    with pytest.raises(UserError, match="only plain LoRA adapters are supported: .*no alpha_pattern"):
        read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="only plain LoRA adapters are supported"):
        read_adapter(tmp_path / "a")


def test_a_frozen_weight_costs_four_flops_and_a_trained_one_six(base):
    """Forward pass and the gradient of the input; a trained weight's own gradient too. The head is tied."""
    model = adapted(base[1], AdapterSpec(4, 8.0, 0.0, ("q_proj",), False))
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128  # q, k, v, o and the MLP
    adapter, attention = 2 * 4 * (64 + 64), 6 * 2 * 4 * 16 * 64
    assert model.flops_per_token(64) == 4 * (2 * block + 512 * 64) + 6 * adapter + attention


@torch.no_grad()
def test_four_bits(base, tmp_path):
    """What the quantised base computes, its distance from float32, and its size."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, folder = base
    spec = AdapterSpec(4, 8.0, 0.0, targets_of(model, "_proj$"), False)
    with torch.device("meta"):
        tuned = AdaptedGPT(
            model.config, spec, {"path": str(folder), "sha256": weights_sha256(folder)}, quantize=True
        )
    tuned.to_empty(device="cpu")
    tuned.load(folder)
    tuned.eval()
    assert len(tuned.quantized) == 14 and tuned.num_parameters() > model.num_parameters()
    assert not any(name in tuned.quantized for name, _ in tuned.named_parameters())
    rounded = GPT.from_pretrained(folder).eval()
    for name, module in tuned.quantized.items():
        weight = model.get_parameter(name)
        back = bitsandbytes.functional.dequantize_4bit(module.packed, module.scales)
        assert 0.05 < (back - weight).norm() / weight.norm() < 0.11
        stored = (module.packed, module.scales.absmax, module.scales.state2.absmax)  # 4 bits, and the scales
        assert sum(tensor.numel() * tensor.element_size() for tensor in stored) <= 0.3 * 2 * weight.numel()
        rounded.get_parameter(name).copy_(back)
    torch.testing.assert_close(tuned(IDS), rounded(IDS), rtol=1e-5, atol=1e-5)
    busy(tuned).save_pretrained(tmp_path / "a")
    again = AdaptedGPT(model.config, spec, tuned.base, quantize=True)
    again.load(tmp_path / "a")
    assert torch.equal(again.eval()(IDS), tuned(IDS))
