"""Tokenizers of other models: ids, bytes and chats equal those of transformers' AutoTokenizer.

Each kind is trained here on a few texts with the `tokenizers` library, and saved as its model has it.
"""

import functools
import json
import unicodedata

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from configurator import UserError
from formats.chat_format import (
    CHAT_TOKENS,
    TEMPLATE,
    encode_answer,
    encode_chat,
    encode_content,
    encode_prompt,
    with_chat_tokens,
)
from formats.gguf_tokenizer import special_ids
from formats.tokenizer import QWEN2_SPLIT, Tokenizer
from tests.conftest import CODE

CORPUS = [CODE] * 3
TEXTS = ["Hello world", " two  spaces ", "def f(x):\n    return 12345\n", "caf\u00e9 \u4e2d\u6587 \U0001f600",
         "", " ", "\n\nx\n", "a" * 70, "e\u0301 \u2581 x", "user\nHello", "<s> is text", "no<unk>no", "!",
         "<0x41>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hello\n  world? "},
    {"role": "assistant", "thought": "two words", "content": "",
     "tool_calls": [{"name": "calculator", "arguments": {"expression": "1 + 1"}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2.\n\nCaf\u00e9!"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "  ok"},
]


def byte_level(*splits, prefix_space=False, special=("<|endoftext|>",), normalizer=None):
    """A byte-level BPE. splits: regular expressions; none is GPT-2's."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not splits)
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(split), "isolated") for split in splits), last]) if splits else last
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    hf.add_special_tokens(list(special))
    return hf


def sentencepiece(model, pre_tokenizer, normalizer=None, decoder=None):
    """A Unigram or a BPE with byte fallback, with the special tokens in the model, as Llama 2 has them."""
    hf = tokenizers.Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    hf.normalizer, hf.pre_tokenizer = normalizer, pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer if model == "bpe" else trainers.UnigramTrainer
    unknown = {} if model == "bpe" else {"unk_token": "<unk>"}
    hf.train_from_iterator(CORPUS, trainer(vocab_size=700, show_progress=False, **unknown,
                                           special_tokens=["<unk>", "<s>", "</s>", *BYTES]))
    definition = json.loads(hf.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    definition["model"]["byte_fallback"] = True
    if model == "bpe":
        definition["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    hf = tokenizers.Tokenizer.from_str(json.dumps(definition))
    hf.pre_tokenizer = pre_tokenizer
    hf.decoder = decoder or decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                      special_tokens=[("<s>", 1)])
    return hf


LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
LLAMA_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def ours():
    tokenizer = Tokenizer.train(CORPUS, 400)
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition)), tokenizer.settings


def gpt2():
    return byte_level(), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def prefix_space():
    hf = byte_level(prefix_space=True, special=("<s>", "</s>", "<pad>"))
    return hf, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "!"}


def neox():
    """GPT-NeoX: runs of spaces are added tokens, but not special ones."""
    hf = byte_level(normalizer=normalizers.NFC())
    hf.add_tokens([AddedToken(" " * n, normalized=False) for n in range(8, 1, -1)])
    hf.add_special_tokens(["<|padding|>"])
    return hf, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def llama3():
    split = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
    hf = byte_level(split, special=("<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>"))
    bos = hf.token_to_id("<|begin_of_text|>")
    hf.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.
                                             TemplateProcessing(single="<|begin_of_text|> $A", pair="$A $B",
                                                                special_tokens=[("<|begin_of_text|>", bos)])])
    definition = json.loads(hf.to_str())
    definition["model"]["ignore_merges"] = True
    return (tokenizers.Tokenizer.from_str(json.dumps(definition)),
            {"bos_token": "<|begin_of_text|>",
             "eos_token": {"__type": "AddedToken", "content": "<|end_of_text|>"}})


def qwen():
    """Qwen 3: two of the chat tokens are special; <think> and </think> are added after them, and are text."""
    hf = byte_level(QWEN2_SPLIT, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                    normalizer=normalizers.NFC())
    hf.add_tokens(["<think>", "</think>"])
    return hf, {"bos_token": None, "eos_token": "<|im_end|>", "extra_special_tokens": ["<|endoftext|>"]}


def llama2():
    return sentencepiece("bpe", None, LLAMA_NORMALIZER), LLAMA_SETTINGS


def llama2_by_class():
    """transformers replaces the normalizer of this class."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    return sentencepiece("bpe", None, LLAMA_NORMALIZER), LLAMA_SETTINGS | settings


def mistral():
    marker = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return sentencepiece("bpe", marker), LLAMA_SETTINGS


def first_only():
    return sentencepiece("bpe", pre_tokenizers.Metaspace(prepend_scheme="first", split=False)), LLAMA_SETTINGS


def gemma():
    """No marker before the first word."""
    return sentencepiece("bpe", None, normalizers.Replace(" ", "\u2581"), decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])), LLAMA_SETTINGS


def unigram():
    """The special tokens are pieces that Unigram would find in a text. No token begins a text.

    transformers ignores add_bos_token if there is a tokenizer.json.
    """
    hf = sentencepiece("unigram", pre_tokenizers.Metaspace(prepend_scheme="first"),
                       decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    hf.post_processor = None
    return hf, LLAMA_SETTINGS | {"add_bos_token": True}


KINDS = [ours, gpt2, prefix_space, neox, llama3, qwen, llama2, llama2_by_class, mistral, first_only, gemma,
         unigram]
BOS = {llama3, llama2, llama2_by_class, mistral, first_only, gemma}
NO_MARKER = {ours, gpt2, neox, llama3, qwen, gemma}  # a text has no space in front


@functools.cache
def files_of(kind):
    """The content of tokenizer.json and tokenizer_config.json."""
    hf, settings = kind()
    return hf.to_str(), json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def folder(request, tmp_path):
    definition, settings = files_of(request.param)
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def auto(folder):
    from transformers import AutoTokenizer
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


def kind_of(request):
    return request.node.callspec.params["folder"]


def test_ids_equal_auto_tokenizers(folder, request):
    tokenizer, theirs = Tokenizer.load(folder), auto(folder)
    names = theirs.all_special_tokens
    for text in [*TEXTS, *CORPUS[:1]]:
        ids = tokenizer.encode(text)
        if not any(name in text for name in names):
            assert ids == theirs(text, add_special_tokens=False).input_ids, text
            assert theirs(text or "x").input_ids == tokenizer.prefix_ids + (ids or tokenizer.encode("x"))
        assert not {*ids} & (tokenizer.special_ids - {theirs.unk_token_id}), text
    assert tokenizer.prefix_ids == ([theirs.bos_token_id] if kind_of(request) in BOS else [])


def surface(kind, text):
    """The text that the ids of `text` spell: with a space in front, if the kind puts one there."""
    if kind in {neox, qwen}:
        text = unicodedata.normalize("NFC", text)
    if kind in {llama2, mistral, first_only, llama2_by_class, gemma, unigram}:
        text = text.replace("\u2581", " ")
    puts_space = kind not in NO_MARKER and text and (kind is llama2 or not text.startswith(" "))
    return " " + text if puts_space else text


def test_bytes_add_up_to_the_text(folder, request):
    tokenizer = Tokenizer.load(folder)
    table = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        expected = surface(kind_of(request), text)
        is_quirk = kind_of(request) is unigram and text == "<0x41>"  # it finds its byte pieces in texts
        if tokenizer.hf.token_to_id("<unk>") not in ids and not is_quirk:
            assert b"".join(table[index] for index in ids).decode() == expected, text
            assert tokenizer.decode(ids, inside=True) == expected
    assert [table[index] for index in tokenizer.special_ids] == [b""] * len(tokenizer.special_ids)


def test_a_completion_keeps_its_first_space(folder):
    tokenizer = Tokenizer.load(folder)
    prompt, whole = tokenizer.encode("def f"), tokenizer.encode("def f of two  x\n")
    assert whole[:len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt):], inside=True) == " of two  x\n"


def test_chats_equal_the_saved_template(folder, request, tmp_path):
    tokenizer = with_chat_tokens(Tokenizer.load(folder))
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    theirs, reloaded = auto(saved), Tokenizer.load(saved)
    assert reloaded.definition == tokenizer.definition and reloaded.settings == tokenizer.settings
    expected = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(reloaded, CHAT)
    assert ids == expected["input_ids"] and mask == expected["assistant_masks"]
    opened = theirs.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(reloaded, CHAT[:2]) == opened
    # A prompt and an answer that are encoded apart, as in preferences, are the conversation.
    whole = encode_prompt(reloaded, CHAT[:4]) + encode_answer(reloaded, CHAT[4])
    assert encode_chat(reloaded, CHAT[:5])[0][:len(whole)] == whole
    user, text = encode_prompt(reloaded, [{"role": "user", "content": ""}]), "Hello world"
    content = encode_content(reloaded, "user", text)
    end = user.index(reloaded.token_id("<|im_end|>"))
    assert user[:end] + content + user[end:] == encode_prompt(reloaded, [{"role": "user", "content": text}])


def test_a_conversation_begins_as_a_text_does(folder, request):
    """One rule for training, the template and llama.cpp, which adds a BOS token if the file says so."""
    tokenizer = with_chat_tokens(Tokenizer.load(folder))
    prefix = tokenizer.prefix_ids
    assert encode_prompt(tokenizer, CHAT)[:len(prefix) + 1] == [*prefix, tokenizer.token_id("<|im_start|>")]
    assert special_ids(tokenizer, "x")["tokenizer.ggml.add_bos_token"] == (kind_of(request) in BOS)
    # A model that was trained without it keeps its prompts.
    old = Tokenizer(tokenizer.definition, tokenizer.settings | {"chat_template": TEMPLATE})
    assert encode_prompt(old, CHAT)[0] == tokenizer.token_id("<|im_start|>")
    assert not special_ids(old, "x")["tokenizer.ggml.add_bos_token"]


def test_no_text_becomes_a_special_token(folder):
    """Texts that spell special tokens have the ids of their letters."""
    tokenizer = with_chat_tokens(Tokenizer.load(folder))
    names = [tokenizer.hf.id_to_token(index) for index in sorted(tokenizer.special_ids)]
    unknown = tokenizer.hf.token_to_id("<unk>")
    for name in [*names, *CHAT_TOKENS, "".join(names), f"a {names[0]} b"]:
        ids = tokenizer.encode(name)
        assert ids and not {*ids} & (tokenizer.special_ids - {unknown})
        assert unknown in ids or tokenizer.decode(ids).strip() == name


@pytest.mark.parametrize("key, value", [
    ("truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    ("padding", {"strategy": {"Fixed": 50}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"})])
def test_truncation_and_padding_are_left_to_the_caller(folder, key, value):
    before = Tokenizer.load(folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(definition | {key: value}))
    tokenizer, theirs = Tokenizer.load(folder), auto(folder)
    assert tokenizer.definition == before.definition and tokenizer.prefix_ids == before.prefix_ids
    for text in ("a b c d e f g " * 9, "a"):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_an_ordinary_letter_cannot_end_a_text(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "e"}))
    with pytest.raises(UserError, match="'e' is a letter"):
        Tokenizer.load(folder)
