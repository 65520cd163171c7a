"""GGUF: the content of a file, read by the package gguf, by us, and by llama.cpp if it is installed."""

import argparse
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from bench import llama_cpp
from configurator import UserError
from formats import gguf as gguf_file
from formats import hf
from formats.chat_format import CHAT_TOKENS, encode_prompt, with_chat_tokens
from formats.gguf_reader import read_tensors, separate_pairs
from formats.gguf_tokenizer import vocabulary
from formats.splits import LLAMA3_SPLIT
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from tests.conftest import busy_model, shared, tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)
SHAPES = {
    "tied": {}, "untied": dict(tie_embeddings=False), "6/2": dict(n_head=6, n_embd=96),
    "9/3": dict(n_head=9, n_kv_head=3, n_embd=144), "wide heads": dict(head_dim=32), "bias": dict(bias="all"),
    "qwen2": dict(bias="qkv"), "qwen3": dict(qk_norm=True, head_dim=32), "gpt2": GPT2,
    "llama3": dict(rope_scaling=LLAMA3), "theta": dict(rope_theta=500.0),
}
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.has_server(), reason="xllamacpp is not installed")


def model_of(**changes):
    """A random model whose greedy text does not repeat one token."""
    model = busy_model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim == 2 else 1
    return model


def log_probs(server, prompt, vocab_size):
    """llama.cpp's log-probability of every id after a prompt, (V,)."""
    # The bias forces a complete letter: the server returns nothing for a part of a character.
    letter = server.post("/tokenize", {"content": "a"})["tokens"]
    answer = server.post("/completion", {"prompt": prompt, "n_predict": 1, "n_probs": vocab_size,
                                         "temperature": 0, "logit_bias": [[letter[-1], 1e4]]})
    result = np.full(vocab_size, np.nan)
    for token in answer["completion_probabilities"][0]["top_logprobs"]:
        result[token["id"]] = token["logprob"]
    return result


def state_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def bpe(vocab_size=500, split=None, **settings):
    """A byte-level BPE trained on the source of argparse. split: a pattern instead of Qwen2's."""
    text = Path(argparse.__file__).read_text()
    if split is None:
        return Tokenizer.train([text], vocab_size)
    hf_tokenizer = tokenizers.Tokenizer(models.BPE(**settings))
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf_tokenizer.decoder = decoders.ByteLevel()
    hf_tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    hf_tokenizer.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(json.loads(hf_tokenizer.to_str()))


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
        return Tokenizer.load("gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


def write(path, model, tokenizer, kind="f32"):
    metadata = vocabulary(tokenizer, model.config.vocab_size, "here")
    return gguf_file.write(path, model.config, state_of(model), metadata, kind)


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


# ---- The content of a file ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_comes_back(name, tokenizer, tmp_path):
    model = model_of(**SHAPES[name])
    gguf_file.require_supported(model.config)  # must not raise
    write(tmp_path / "m.gguf", model, tokenizer)
    read = dict(read_tensors(tmp_path / "m.gguf"))
    expected = state_of(model)
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(read[key], value[:500] if key in hf.VOCABULARY_TABLES else value), key


def test_rows_of_a_head_by_hand():
    """The pairs (0, 2) and (1, 3) of each head of four rows become neighbours."""
    rows = torch.arange(8.0)
    assert gguf_file.interleave_pairs(rows, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert separate_pairs(gguf_file.interleave_pairs(rows, 4), 4).tolist() == rows.tolist()


def test_only_llamas_rows_are_reordered(tokenizer, tmp_path):
    for name, same in (("tied", False), ("qwen2", True), ("qwen3", True)):
        model = model_of(**SHAPES[name])
        write(tmp_path / "m.gguf", model, tokenizer)
        stored = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        for part in "qkv":
            ours = model.state_dict()[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
            assert np.array_equal(stored[f"blk.1.attn_{part}.weight"], ours) == (same or part == "v")


def test_the_header(tmp_path):
    tokenizer = with_chat_tokens(bpe())
    model = model_of(vocab_size=510)
    write(tmp_path / "m.gguf", model, tokenizer, "q8_0")
    header = fields(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama", "general.file_type": 7, "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 64,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.vocab_size": 510,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id, "tokenizer.ggml.bos_token_id": tokenizer.eot_id,
        "tokenizer.ggml.eot_token_id": tokenizer.hf.token_to_id("<|im_end|>"),
        "tokenizer.chat_template": tokenizer.settings["chat_template"]}
    assert {key: header[key] for key in expected} == expected
    assert header["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert not any(each.name == "output.weight" for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    tokens, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 510
    assert tokens[-4:] == ["[PAD506]", "[PAD507]", "[PAD508]", "[PAD509]"] and kinds[-4:] == [5] * 4
    assert {tokens[i] for i, kind in enumerate(kinds) if kind == 3} == {"<|endoftext|>", *CHAT_TOKENS}
    assert header["tokenizer.ggml.merges"][0].count(" ") == 1


def test_gpt2s_tokenizer(gpt2):
    metadata = vocabulary(gpt2, 50257, "here")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and len(metadata["tokenizer.ggml.merges"]) == 50000
    assert metadata["tokenizer.ggml.tokens"][50256] == "<|endoftext|>"


# ---- Types ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers, more", [
    (3, {2}), (8, {0, 3, 6, 7}), (12, {0, 3, 6, 9, 10, 11}),
    (32, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31})])  # fmt: skip
def test_q4_k_m_gives_half_of_the_layers_more_bits(layers, more):
    """The first eighth, the last eighth and every third between. The lists are llama.cpp's own."""
    config = tiny_config(n_layer=layers)
    for name in ("attn_v", "ffn_down"):
        larger = {i for i in range(layers)
                  if gguf_file.wanted_type(f"blk.{i}.{name}.weight", config, "q4_k_m") == "Q6_K"}
        assert larger == more
    for name in ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        assert gguf_file.wanted_type(f"blk.0.{name}.weight", config, "q4_k_m") == "Q4_K"


def test_the_tables_types():
    tied, untied = tiny_config(), tiny_config(tie_embeddings=False)
    assert gguf_file.wanted_type("token_embd.weight", tied, "q4_k_m") == "Q6_K"
    assert gguf_file.wanted_type("token_embd.weight", untied, "q4_k_m") == "Q4_K"
    assert gguf_file.wanted_type("output.weight", untied, "q4_k_m") == "Q6_K"


@pytest.mark.parametrize("wanted, columns, expected", [
    ("Q4_K", 512, "Q4_K"), ("Q4_K", 192, "Q5_0"), ("Q4_K", 40, "F16"), ("Q5_K", 192, "Q5_1"),
    ("Q6_K", 192, "Q8_0"), ("Q6_K", 40, "F16"), ("Q8_0", 96, "Q8_0"), ("Q8_0", 40, "F16"), ("F32", 7, "F32"),
])  # fmt: skip
def test_rows_that_do_not_divide(wanted, columns, expected):
    assert gguf_file.fitting_type(wanted, columns) == expected


def test_the_table_of_types(tokenizer, tmp_path):
    """A block of 256 divides neither rows of 192 nor rows of 40; a block of 32 divides rows of 192."""
    model = model_of(n_embd=192, intermediate_size=40, n_layer=1)
    infos = write(tmp_path / "m.gguf", model, tokenizer, "q4_k_m")
    stored = {each.name: each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name: each.tensor_type.name for name, each in stored.items()} == {
        each.name: each.type for each in infos}
    assert all(stored[each.name].n_bytes == each.bytes for each in infos)
    types = {each.name: each.type for each in infos}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "F16" and types["output_norm.weight"] == "F32"
    table = gguf_file.type_table(infos)
    assert "ffn_down.weight (1 x): rows of 40 do not divide into blocks of Q6_K, so F16" in table
    assert f"{sum(each.bytes for each in infos):,}" in table.splitlines()[5]
    for name, tensor in read_tensors(tmp_path / "m.gguf"):
        expected = model.state_dict()[name][:len(tensor)]
        assert (tensor - expected).norm() < 0.05 * expected.norm(), name


# ---- Refusals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(ternary=True), "no architecture with ternary=True"),
    (dict(position="learned"), "no architecture with position=learned"),
    (GPT2 | dict(n_kv_head=2), "no architecture with .*n_kv_head=2"),
    (dict(bias="qkv", head_dim=32), r"qwen2 needs n_embd = n_head \* head_dim, .* has 64 and 4 \* 32"),
    (dict(qk_norm=True, rope_scaling=LLAMA3), "rope_scaling of type llama3 is not written for qwen3"),
    (dict(rope_scaling=YARN), "rope_scaling of type yarn is not written for llama"),
])  # fmt: skip
def test_what_llama_cpp_does_not_compute(changes, message):
    with pytest.raises(UserError, match=message):
        gguf_file.require_supported(tiny_config(**changes))


@pytest.mark.parametrize("change, message", [
    (lambda d: d["model"].update(byte_fallback=True), "a tokenizer of type BPE, byte_fallback to GGUF"),
    (lambda d: d.update(normalizer={"type": "Lowercase"}), "of type BPE, Lowercase"),
    (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "x+"}), "splits text .*: x+"),
    (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "splits text in a way.*Whitespace"),
    (lambda d: d["model"].update(ignore_merges=True), "splits text in a way"),
    (lambda d: d["model"].update(merges=[]), "its tokenizer has no merges"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_have(change, message, tokenizer):
    definition = json.loads(json.dumps(tokenizer.definition))
    change(definition)
    with pytest.raises(UserError, match=f"here: .*{message}"):
        vocabulary(Tokenizer(definition), 500, "here")


def test_more_tokens_than_rows(tokenizer):
    with pytest.raises(UserError, match="here: its tokenizer has 500 ids, the model 400"):
        vocabulary(tokenizer, 400, "here")


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 9)
    with pytest.raises(UserError, match="not a GGUF file"):
        list(read_tensors(tmp_path / "m.gguf"))


# ---- A real llama.cpp -------------------------------------------------------------------------------------

@needs_llama_cpp
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_our_model(name, tokenizer, tmp_path):
    """Log-probabilities after 60 tokens, and greedy ids after ten. llama.cpp's GELU is a float16 table."""
    model = model_of(**SHAPES[name])
    write(tmp_path / "m.gguf", model, tokenizer)
    ids = torch.randint(499, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with llama_cpp.Server(tmp_path / "m.gguf", 64, exact=True) as server:
        theirs = log_probs(server, ids, 500)
        text = server.write([ids[:10]], 40)[0]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1).numpy()
    assert abs(theirs - ours).max() < (1e-2 if name == "gpt2" else 1e-4)
    expected = [token for token, in generate(model, [ids[:10]], 40, Sampling(temperature=0))]
    length = 5 if name == "gpt2" else len(text)
    assert text[:length] == expected[:length] and (499 in expected or len(text) == 40)
    assert len(set(expected)) > 10


@needs_llama_cpp
@pytest.mark.parametrize("kind, most", [
    ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.15), ("q6_k", 0.2), ("q4_k_m", 0.2)])  # fmt: skip
def test_llama_cpp_computes_every_type(kind, most, tokenizer, tmp_path):
    """Compared with our model on the file's rounded weights: llama.cpp also rounds activations."""
    model = busy_model(tiny_config(n_embd=256, intermediate_size=256, n_layer=3))
    write(tmp_path / "m.gguf", model, tokenizer, kind)
    ids = torch.randint(499, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with llama_cpp.Server(tmp_path / "m.gguf", 64) as server:
        theirs = log_probs(server, ids, 500)
    rounded = GPT(model.config).eval()
    with torch.no_grad():
        for key, tensor in read_tensors(tmp_path / "m.gguf"):
            rounded.get_parameter(key)[:len(tensor)] = tensor
        ours = rounded(torch.tensor([ids]))[0, -1].log_softmax(-1).numpy()
    assert abs(theirs - ours).max() < most and ours.std() > 0.8


def strings(count, seed=0):
    """Random texts: many scripts, code, blanks, digits, names of special tokens, and any characters."""
    draw = random.Random(seed)
    code = Path(argparse.__file__).read_text()
    ranges = [(32, 127), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xA00), (0x4E00, 0x4F00), (0xAC00, 0xAD00),
              (0x1F300, 0x1F650)]
    pieces = ["<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "hello ", "'s", "'LL", "I'm", "<|", "|>"]
    blanks = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "a", "\n\n   "]

    def some(most, one):
        return "".join(one() for _ in range(draw.randint(1, most)))

    def any_character():
        code_point = draw.randrange(1, 0x110000)
        return "" if 0xD800 <= code_point < 0xE000 else chr(code_point)

    kinds = [
        lambda: some(60, lambda: chr(draw.randrange(*draw.choice(ranges)))),
        lambda: code[(start := draw.randrange(len(code) - 200)):start + draw.randint(1, 200)],
        lambda: some(30, lambda: draw.choice(blanks)),
        lambda: some(40, lambda: draw.choice("0123456789.,+-=/ ")),
        lambda: some(12, lambda: draw.choice(pieces)),
        lambda: some(20, any_character),
    ]  # fmt: skip
    return [kinds[number % len(kinds)]() for number in range(count)]


@needs_llama_cpp
@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3"])
def test_llama_cpp_cuts_text_as_we_do(name, tmp_path, request):
    tokenizer = {"ours": lambda: with_chat_tokens(bpe(1000)), "gpt2": lambda: request.getfixturevalue("gpt2"),
                 "llama3": lambda: bpe(1000, LLAMA3_SPLIT, ignore_merges=True)}[name]()
    model = GPT(tiny_config(vocab_size=tokenizer.vocab_size, n_layer=1))
    write(tmp_path / "m.gguf", model, tokenizer)
    with llama_cpp.Server(tmp_path / "m.gguf", 64) as server:
        for text in strings(1000):
            ids = server.post("/tokenize", {"content": text, "parse_special": False})["tokens"]
            assert ids == tokenizer.encode(text), repr(text)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_writes_what_we_write(kind, trained, tmp_path):
    """Greedy text of a trained model after three prompts."""
    folder = hf.find_folder(trained)
    model, tokenizer = GPT.from_pretrained(folder).eval(), Tokenizer.load(folder)
    write(tmp_path / "m.gguf", model, tokenizer, kind)
    with llama_cpp.Server(tmp_path / "m.gguf", 64, exact=True) as server:
        for prompt in ("def ", "import os\n", "    return self."):
            answer = server.post("/completion", {"prompt": prompt, "n_predict": 50, "temperature": 0})
            ids = tokenizer.encode(prompt)
            ours = [token for token, in generate(model, [ids], 50, Sampling(temperature=0),
                                                 lambda row, new: new[-1] == tokenizer.eot_id)]
            assert answer["content"] == tokenizer.decode([i for i in ours if i != tokenizer.eot_id])


@needs_llama_cpp
def test_llama_cpp_fills_our_chat_template(tmp_path):
    tokenizer = with_chat_tokens(bpe())
    write(tmp_path / "m.gguf", model_of(vocab_size=tokenizer.vocab_size), tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1? "},
                {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2?"}]
    with llama_cpp.Server(tmp_path / "m.gguf", 64) as server:
        prompt = server.post("/apply-template", {"messages": messages})["prompt"]
        ids = server.post("/tokenize", {"content": prompt, "parse_special": True})["tokens"]
    assert ids == encode_prompt(tokenizer, messages)


@pytest.mark.skipif(not llama_cpp.has_logits(), reason="llama-cpp-python is not installed")
def test_llama_cpps_own_quantiser_is_not_better(tokenizer, tmp_path):
    """The same types for the same tensors, and a squared error that is not larger than llama.cpp's."""
    import ctypes

    import llama_cpp as library

    model = busy_model(tiny_config(n_embd=256, intermediate_size=512, n_layer=8))
    write(tmp_path / "exact.gguf", model, tokenizer)
    exact = {each.name: np.array(each.data) for each in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for kind, number in (("q4_k_m", 15), ("q6_k", 18), ("q8_0", 7)):  # llama.h's LLAMA_FTYPE_MOSTLY_..
        write(tmp_path / "ours.gguf", model, tokenizer, kind)
        settings = library.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, 1
        names = (str(tmp_path / name).encode() for name in ("exact.gguf", "theirs.gguf"))
        assert library.llama_model_quantize(*names, ctypes.byref(settings)) == 0
        ours, theirs = ({each.name: each for each in gguf.GGUFReader(tmp_path / name).tensors}
                        for name in ("ours.gguf", "theirs.gguf"))
        assert {name: each.tensor_type for name, each in ours.items()} == {
            name: each.tensor_type for name, each in theirs.items()}
        errors = [sum(((gguf.quants.dequantize(each.data, each.tensor_type) - exact[name]) ** 2).sum()
                      for name, each in side.items()) for side in (ours, theirs)]
        assert errors[0] <= errors[1] * (1 if kind != "q8_0" else 1.00001)
