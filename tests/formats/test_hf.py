"""formats/hf.py, weights.py and peft.py: what is read, what is refused by name, and the modes of files."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import sample
from configurator import UserError
from formats import hf, peft
from formats.hf import find_folder
from formats.tokenizer import Tokenizer
from model import GPT
from modeling.rope import rope_frequencies
from tests.conftest import CODE, busy_model, tiny_config

IDS = torch.arange(8)[None]


@pytest.fixture
def folder(tmp_path):
    """A small untied Llama."""
    busy_model(tiny_config(tie_embeddings=False, n_layer=1)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


# ---- Weights ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "int64", "bool"])
def test_a_dtype_that_needs_a_scale_is_refused_by_name(folder, dtype):
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    tensors[f"{name}_scale"] = torch.tensor(0.5)
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"up_proj.weight is stored as {dtype}; only float32"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plain_floats_are_read(folder, dtype):
    file = folder / "model.safetensors"
    expected = {name: tensor.to(dtype).float() for name, tensor in load_file(file).items()}
    save_file({name: tensor.to(dtype) for name, tensor in expected.items()}, file)
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in hf.read_tensors(folder))


def test_the_single_file_wins_over_an_index(folder):
    """As in transformers."""
    from transformers import AutoModelForCausalLM

    other = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits
        assert (GPT.from_pretrained(folder).eval()(IDS) - theirs).abs().max() < 1e-4


def test_tied_tables_must_be_equal(folder):
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match="tie_word_embeddings is true, but lm_head.weight is not the table"):
        GPT.from_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert GPT.from_pretrained(folder)(IDS).isfinite().all()


# ---- Rotary settings --------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


@pytest.mark.parametrize("scaling", [YARN, LLAMA3])
@pytest.mark.parametrize("value", [0, -1, "2", None, True, float("nan"), float("inf"), 1e308, [], {}])
def test_rotary_scaling_must_be_positive_numbers(scaling, value):
    for key in scaling.keys() - {"rope_type"}:
        with pytest.raises(UserError, match=f"rope_scaling: {key}=.*must be a positive number"):
            rope_frequencies(16, 10000.0, scaling | {key: value})
        with pytest.raises(UserError, match=f"{key}=None: must be a positive number"):
            rope_frequencies(16, 10000.0, {name: scaling[name] for name in scaling if name != key})


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_rope_theta_must_be_above_1(theta):
    for scaling in (None, YARN, LLAMA3):
        with pytest.raises(UserError, match="rope_theta=.*must be above 1"):
            rope_frequencies(16, theta, scaling)


def test_other_rotary_settings():
    with pytest.raises(UserError, match="low_freq_factor must be below high_freq_factor"):
        rope_frequencies(16, 10000.0, LLAMA3 | {"low_freq_factor": 4.0})
    with pytest.raises(UserError, match="attention_factor=0: must be a positive number"):
        rope_frequencies(16, 10000.0, YARN | {"attention_factor": 0})
    plain = rope_frequencies(16, 10000.0, YARN)
    for optional in ({"beta_fast": None}, {"beta_slow": 0}, {"mscale": 0, "mscale_all_dim": None}):
        frequencies, factor = rope_frequencies(16, 10000.0, YARN | optional)
        assert torch.equal(frequencies, plain[0]) and factor == plain[1]


# ---- Adapters ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value", [
    ("r", 0), ("r", "4"), ("r", None), ("r", True), ("lora_alpha", float("nan")), ("lora_alpha", "8"),
    ("lora_dropout", 1), ("target_modules", [3]), ("modules_to_save", [None])])
def test_settings_that_no_adapter_has(folder, tmp_path, key, value):
    adapter = tmp_path / "adapter"
    state = {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 64),
             "model.layers.0.self_attn.q_proj.lora_B": torch.ones(64, 2)}
    peft.write_adapter(adapter, state, peft.AdapterSpec(2, 4, 0.0, ("q_proj",), False), {"path": str(folder)})
    assert GPT.from_pretrained(adapter)(IDS).isfinite().all()
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=f"adapter_config.json: {key} is not a setting"):
        GPT.from_pretrained(adapter)


# ---- Files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_mode_of_the_umask(trained, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        state = {"x.lora_A": torch.ones(2, 64)}
        spec = peft.AdapterSpec(2, 4, 0.0, ("x",), False)
        peft.write_adapter(tmp_path / "adapter", state, spec, {"path": "x"})
        for format in ("hf", "gguf"):
            argv = [f"--model={trained}", f"--format={format}", f"--out={tmp_path / format}"]
            export.main(argv)
        busy_model(tiny_config(ternary=True)).save_pretrained(tmp_path / "checkpoint")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}


def test_the_path_of_a_gguf_file_is_a_model(trained, tmp_path, capsys):
    """Two files of one export have different logits; each loads by its path, in every script."""
    out = tmp_path / "both"
    argv = [f"--model={trained}", "--format=gguf", "--quantize=f32,q8_0", "--name=x", f"--out={out}"]
    export.main(argv)
    full, small = out / "x-f32.gguf", out / "x-q8_0.gguf"
    with torch.no_grad():
        expected = GPT.from_pretrained(trained).eval()(IDS)
        one, two = (GPT.from_pretrained(path).eval()(IDS) for path in (full, small))
    assert torch.equal(one, expected)
    assert 0 < (two - expected).abs().max() < 0.1
    assert peft.weights_sha256(full) != peft.weights_sha256(small)
    assert hf.model_sha256(full) != hf.model_sha256(small)
    text = "import os\n\n<|endoftext|> caf\u00e9"
    assert Tokenizer.load(small).encode(text) == Tokenizer.load(find_folder(trained)).encode(text)
    # The file that the user names is the model, whatever is next to it.
    (out / "config.json").write_text('{"model_type": "gemma3"}')
    (out / "tokenizer.json").write_text("{}")
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="several .gguf files; give the path of one, such as .*x-f32.gguf"):
        GPT.from_pretrained(out)
    capsys.readouterr()
    words = ["--prompt=import", "--max_new_tokens=8", "--temperature=0", "--device=cpu"]
    texts = []
    for model in (trained, full):
        sample.main([f"--model={model}", *words])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    # An export of one of the files is another export than that of the other.
    export.main([f"--model={small}", f"--out={tmp_path / 'again'}", "--dtype=float32"])
    with torch.no_grad():
        assert torch.equal(GPT.from_pretrained(tmp_path / "again").eval()(IDS), two)
    with pytest.raises(UserError, match="made from other inputs"):
        export.main([f"--model={full}", f"--out={tmp_path / 'again'}", "--dtype=float32"])
    # Without the other files of the export, its header has all that is needed.
    shutil.copy(full, tmp_path / "alone.gguf")
    with torch.no_grad():
        assert torch.equal(GPT.from_pretrained(tmp_path / "alone.gguf").eval()(IDS), expected)
    sample.main([f"--model={tmp_path / 'alone.gguf'}", *words])
    assert capsys.readouterr().out.endswith(texts[0])


def test_a_tokenizer_with_more_ids_than_the_model(folder):
    tokenizer = Tokenizer.train([CODE], 600)
    tokenizer.save(folder)
    with pytest.raises(UserError, match="its tokenizer has 600 ids, the model 500"):
        sample.main([f"--model={folder}", "--device=cpu"])
    with pytest.raises(UserError, match="its tokenizer has 600 ids, the model 500"):
        export.main([f"--model={folder}", f"--out={folder.parent / 'out'}"])


def test_a_folder_whose_name_is_not_utf_8(folder, tmp_path, monkeypatch):
    """safetensors cannot open its files, and no card can name it."""
    Tokenizer.train([CODE], 500).save(folder)
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(odd)
    with pytest.raises(UserError, match="not UTF-8; rename the folder"):
        GPT.from_pretrained(odd)
    monkeypatch.chdir(odd)
    with pytest.raises(UserError, match="not UTF-8; give another with --name="):
        export.main(["--model=.", f"--out={tmp_path / 'out'}"])
    export.main(["--model=.", f"--out={tmp_path / 'out'}", "--name=cafe"])
