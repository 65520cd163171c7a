"""GGUF files of others: logits as transformers reads them, ids as llama.cpp makes them, bad files."""

import argparse
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, trainers

import sample
from bench import llama_cpp
from configurator import UserError
from distillation.teacher import load_teacher
from formats import gguf as gguf_file
from formats import gguf_reader, hf, splits
from formats.gguf_tokenizer import vocabulary
from formats.peft import AdapterSpec, weights_sha256
from formats.tokenizer import Tokenizer, split_patterns
from model import GPT
from prepare import PrepareConfig, prepare
from tests.conftest import busy_model, smollm2, tiny_config
from tests.formats.test_gguf import bpe, needs_llama_cpp, state_of, strings
from training.lora import AdaptedGPT

# What transformers reads of each architecture: it knows neither qwen3's head_dim nor gpt2's two sizes, and
# takes their defaults.
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4, intermediate_size=256,
            block_size=1024)
ARCHITECTURES = {"llama": dict(n_head=6, n_kv_head=2, n_embd=96), "llama untied": dict(tie_embeddings=False),
                 "qwen2": dict(bias="qkv", rope_theta=1e6), "qwen3": dict(qk_norm=True, head_dim=128),
                 "gpt2": GPT2}
TYPES = sorted(gguf.quants._type_traits, key=lambda kind: kind.value)
IDS = torch.randint(499, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


def write(path, model, tokenizer, kind="f32", **metadata):
    """A file with no config.json next to it. metadata: entries to replace; "__" stands for a dot."""
    path.parent.mkdir(exist_ok=True)
    changes = {key.replace("__", "."): value for key, value in metadata.items()}
    content = vocabulary(tokenizer, model.config.vocab_size, "here") | changes
    gguf_file.write(path, model.config, state_of(model), content, kind)
    return path


def sentencepiece():
    """The metadata of a tokenizer of the sentencepiece kind: 256 bytes, pieces with scores, characters."""
    text = Path(argparse.__file__).read_text()
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", gguf_reader.SPACE)
    trained.train_from_iterator(text.splitlines(), trainers.BpeTrainer(vocab_size=700, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda pair: pair[1])]
    pieces = [*(each for each in pieces if len(each) > 1), *(each for each in pieces if len(each) == 1)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>", "<pad>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 5]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0, 0.0]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


# ---- Logits -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_transformers_reads_the_same_model(name, tokenizer, tmp_path):
    import transformers
    model = busy_model(tiny_config(**ARCHITECTURES[name]))
    path = write(tmp_path / "m.gguf", model, tokenizer, "q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ours = GPT.from_pretrained(path).eval()
    logits = ours(IDS)
    assert theirs.config.model_type == name.partition(" ")[0] and logits.std() > 0.1
    torch.testing.assert_close(theirs(IDS).logits.float(), logits, rtol=0, atol=1e-4)
    assert ours.config == GPT.from_pretrained(tmp_path).config  # the folder of a single file


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_of_the_package(kind, tmp_path):
    """Any bytes below 60, which make no float16 infinite."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (3, 2 * size * (256 // weights)), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = gguf.GGUFReader(tmp_path / "m.gguf").tensors[0]
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    (name, values), = gguf_reader.read_tensors(tmp_path / "m.gguf")
    assert name == "model.embed_tokens.weight" and values.shape == (3, 512) and values.dtype == torch.float32
    assert np.array_equal(values.numpy(), expected) and np.isfinite(expected).all()


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}])
@torch.no_grad()
def test_rotary_scaling_comes_back(scaling, tokenizer, tmp_path):
    model = busy_model(tiny_config(rope_scaling=scaling, rope_theta=5e5, head_dim=64))
    path = write(tmp_path / "m.gguf", model, tokenizer)
    torch.testing.assert_close(GPT.from_pretrained(path).eval()(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    kept = {key: value for key, value in hf.read_config(path)["rope_scaling"].items() if key in scaling}
    assert kept == pytest.approx(scaling)


# ---- Tokenizers -------------------------------------------------------------------------------------------

@needs_llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe", "dbrx", "smollm", "default"])
def test_llama_cpp_makes_the_same_ids(name, tokenizer, tmp_path):
    model = GPT(tiny_config(n_layer=1))
    path = write(tmp_path / "m.gguf", model, tokenizer, tokenizer__ggml__pre=name)
    ours = Tokenizer.load(path)
    assert ours.eot_id == tokenizer.eot_id and ours.vocab_size == 500
    with llama_cpp.Server(path, 64) as server:
        for text in strings(300):
            ids = server.post("/tokenize", {"content": text, "parse_special": False})["tokens"]
            assert ids == ours.encode(text), repr(text)


def test_a_tokenizer_of_a_file_is_exported_again(tokenizer, tmp_path):
    for name in ("smollm", "default"):
        model = GPT(tiny_config(n_layer=1))
        path = write(tmp_path / "m.gguf", model, tokenizer, tokenizer__ggml__pre=name)
        assert vocabulary(Tokenizer.load(path), 500, "here")["tokenizer.ggml.pre"] == name
    digits = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}
    assert split_patterns(digits) == splits.SPLITS["smollm"]
    assert split_patterns({"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, *digits["pretokenizers"]]}) == ()


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_makes_the_same_ids_of_the_sentencepiece_kind(prefix, tokenizer, tmp_path):
    metadata = sentencepiece() | {"tokenizer.ggml.add_space_prefix": prefix}
    rows = len(metadata["tokenizer.ggml.tokens"])
    path = tmp_path / "m.gguf"
    model = GPT(tiny_config(n_layer=1, vocab_size=rows))
    gguf_file.write(path, model.config, state_of(model), metadata, "f32")
    ours = Tokenizer.load(path)
    assert (ours.vocab_size, ours.prefix_ids, ours.end_ids) == (rows - 1, [1], 2)
    number = metadata["tokenizer.ggml.tokens"].index("self")
    assert ours.special_ids == {0, 1, 2} and ours.token_bytes()[number] == b"self"
    with llama_cpp.Server(path, 64) as server:
        for text in [*strings(600), "a <tool> b", "<s>", "  two  spaces ", "\u2581"]:
            ids = server.post("/tokenize", {"content": text, "parse_special": False})["tokens"]
            assert ids == ours.encode(text), repr(text)
            # As in llama.cpp, a space comes before the text that follows an added token.
            assert ours.decode(ids) == text or "\u2581" in text or "<tool>" in text


def test_names_of_one_group_split_alike():
    assert splits.SPLITS["starcoder"] == splits.SPLITS["smollm"] != splits.SPLITS["gpt-2"]
    assert splits.SPLITS["default"][1] + r"|\s+" == splits.GPT2_SPLIT


def test_what_a_file_says_about_its_tokenizer(tokenizer, tmp_path):
    """The template, the padding token, BOS at the beginning, and the tokens that end a text."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(tmp_path / "m.gguf", GPT(tiny_config(n_layer=1, vocab_size=510)), tokenizer,
                 tokenizer__chat_template=template, tokenizer__ggml__add_bos_token=True,
                 tokenizer__ggml__bos_token_id=7, tokenizer__ggml__eot_token_id=9,
                 tokenizer__ggml__padding_token_id=3)
    ours = Tokenizer.load(path)
    assert ours.settings["chat_template"] == template and ours.prefix_ids == [7] and ours.vocab_size == 500
    assert ours.named_token("pad_token") == ours.hf.id_to_token(3)
    assert hf.end_ids(path) == [9, tokenizer.eot_id]
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("a b") == ours.encode("a b")


def test_the_standard_key_of_the_padding_token(tokenizer):
    padded = tokenizer.extended(["<pad>"], {"pad_token": "<pad>"})
    assert vocabulary(padded, 501, "here")["tokenizer.ggml.padding_token_id"] == 500


# ---- Scripts ----------------------------------------------------------------------------------------------

def test_scripts_take_the_file(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "model" / "m.gguf", busy_model(tiny_config()), tokenizer)
    (tmp_path / "text.txt").write_text("import argparse\n" * 300)
    for model in (path, path.parent):
        data = prepare(PrepareConfig(source=str(tmp_path / "text.txt"), tokenizer=str(model),
                                     val_fraction=0.5, out=str(tmp_path / f"d_{model.name}")))
        assert data.meta["vocab_size"] == 500
        sample.main([f"--model={model}", "--prompt=import", "--max_new_tokens=4", "--device=cpu"])
    before = hf.model_sha256(path)
    path.write_bytes(path.read_bytes() + b"x")
    assert hf.model_sha256(path) != before


@torch.no_grad()
def test_an_adapter_and_a_teacher_of_a_file(tokenizer, tmp_path):
    path = write(tmp_path / "m.gguf", busy_model(tiny_config()), tokenizer, "q8_0")
    with torch.device("meta"):
        tuned = AdaptedGPT(GPT.from_pretrained(path).config, AdapterSpec(4, 8.0, 0.0, ("q_proj",), False),
                           {"path": str(path), "sha256": weights_sha256(path)})
    tuned.to_empty(device="cpu")
    tuned.load(path)
    for name, parameter in tuned.named_parameters():
        parameter += 0.1 if name.endswith("lora_B") else 0
    tuned.save_pretrained(tmp_path / "a")
    merged = GPT.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(merged(IDS), tuned.eval()(IDS), rtol=1e-5, atol=1e-5)
    teacher = load_teacher(str(path), Tokenizer.load(path), "cpu", torch.float32, 64)
    assert torch.equal(teacher(IDS), GPT.from_pretrained(path).eval()(IDS))
    assert (merged(IDS) - teacher(IDS)).abs().max() > 0.1


# ---- Bad files --------------------------------------------------------------------------------------------

def test_a_cut_file_is_one_line_wherever_it_is_cut(tokenizer, tmp_path):
    content = write(tmp_path / "whole.gguf", busy_model(tiny_config(n_layer=1)), tokenizer).read_bytes()
    path = tmp_path / "m.gguf"
    for size in [0, 3, 4, 7, 8, 23, 24, 40, *range(60, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="not a GGUF file that can be read") as raised:
            gguf_reader.read_header(path)
        assert "\n" not in str(raised.value) and ("cut: " in str(raised.value) or size < 4)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cut: .* of .* bytes"):
        GPT.from_pretrained(path)


def test_lengths_that_no_file_has(tokenizer, tmp_path):
    """Bits of the header are flipped: whatever happens is a UserError or a model, within seconds."""
    path = write(tmp_path / "m.gguf", GPT(tiny_config(n_layer=1)), tokenizer)
    content, draw = path.read_bytes(), random.Random(0)
    names = b"tokenizer.ggml.token_type"
    huge = content.index(names) + len(names) + 8  # the length of the list
    for place in [huge + 6, *(draw.randrange(4, 2000) for _ in range(60))]:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        for read in (hf.read_config, Tokenizer.load):
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("changes, message", [
    ({"general.architecture": "gemma3"}, "architecture 'gemma3' is not supported"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8 is not supported"),
    ({"llama.expert_count": 8}, "expert_count=8 is not supported"),
    ({"llama.attention.sliding_window": 32}, "attention.sliding_window=32 is not supported"),
    ({"split.count": 2}, "not supported"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "scaling.type=linear is not"),
    ({"llama.embedding_length": 2**31}, "must be an integer from 1 to"),
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model=bert is not supported"),
    ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre=bloom is not supported, only gpt-2"),
    ({"tokenizer.ggml.merges": ["zz zz"]}, "Token `zz` out of vocabulary"),
])  # fmt: skip
def test_what_is_not_supported(changes, message, tokenizer, tmp_path):
    model = GPT(tiny_config(n_layer=1))
    metadata = gguf_file.model_metadata(model.config, "f32") | vocabulary(tokenizer, 500, "here") | changes
    architecture = metadata.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, tensor in gguf_file.rename_tensors(model.config, state_of(model)):
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=message) as raised:
        GPT.from_pretrained(tmp_path / "m.gguf")
        Tokenizer.load(tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)


def test_big_endian_files_and_old_versions(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="big-endian"):
        GPT.from_pretrained(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(UserError, match="version 1"):
        GPT.from_pretrained(tmp_path / "m.gguf")


# ---- A real file (python -m tools.get_smollm2) ------------------------------------------------------------

def test_smollm2():
    path = smollm2()
    text = Path(argparse.__file__).read_text()[:400]
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 200
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.settings["chat_template"]
    fields = hf.read_config(path)
    assert (fields["n_layer"], fields["n_embd"], fields["rope_theta"]) == (30, 576, 1e5)
    assert hf.end_ids(path) == [2]
    if llama_cpp.has_server():
        with llama_cpp.Server(path, 64) as server:
            for text in strings(200):
                ids = server.post("/tokenize", {"content": text, "parse_special": False})["tokens"]
                assert ids == tokenizer.encode(text), repr(text)
