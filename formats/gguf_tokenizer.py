"""A tokenizer as GGUF's metadata: tokens, their kinds, merges, special ids, the chat template.

    described = vocabulary(tokenizer, vocab_size=4102, place="out/dpo")

llama.cpp has the ways of splitting a text before merging built in, and a file names one of them; what is no
byte-level BPE, or splits otherwise, is refused.
"""

from typing import Any

from configurator import UserError
from formats.chat_format import end_of_turn
from formats.tokenizer import GPT2_SPLIT, QWEN2_SPLIT, Tokenizer, split_pattern

# Llama 3's: as Qwen2's, but up to three digits together.
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
# llama.cpp's names. Only llama-bpe takes a word that is in the vocabulary whole, whatever the merges say.
SPLITS = {GPT2_SPLIT: "gpt-2", QWEN2_SPLIT: "qwen2", LLAMA3_SPLIT: "llama-bpe"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def vocabulary(tokenizer: Tokenizer, vocab_size: int, place: str) -> dict[str, Any]:
    """The entries of a header. vocab_size: rows of the model's table; those without a token are unused.
    UserError, naming `place`, for a tokenizer that llama.cpp cannot be told."""
    ids = {token: index for token, index in tokenizer.hf.get_vocab().items()}
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{place}: its tokenizer has {tokenizer.vocab_size:,} ids, the model {vocab_size:,}")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in ids.items():
        tokens[index], kinds[index] = token, NORMAL
    for added in tokenizer.definition["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair)
              for pair in tokenizer.definition["model"]["merges"]]
    described = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre_tokenizer(tokenizer, place),
                 "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
                 "tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": tokenizer.eot_id}
    return described | gguf_special_ids(tokenizer, place) | chat_template(tokenizer, place)


def pre_tokenizer(tokenizer: Tokenizer, place: str) -> str:
    """llama.cpp's name for how the tokenizer splits a text. UserError where it has none."""
    definition, model = tokenizer.definition, tokenizer.definition["model"]
    others = [key for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
              if model.get(key)]
    normalizer = (definition.get("normalizer") or {}).get("type", "NFC")  # which llama.cpp leaves out
    if model.get("type") != "BPE" or others or normalizer != "NFC":
        kind = ", ".join([str(model.get("type")), *others, *[normalizer] * (normalizer != "NFC")])
        raise UserError(f"{place}: a tokenizer of the kind {kind} is not written; byte-level BPE is")
    split = split_pattern(definition.get("pre_tokenizer"))
    name = SPLITS.get(split)
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise UserError(f"{place}: its tokenizer splits text in a way that is none of llama.cpp's "
                        f"{', '.join(SPLITS.values())}: {split or definition.get('pre_tokenizer')}")
    return name


def gguf_special_ids(tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """The tokens that begin and end things. llama.cpp stops at the end of a text, and at that of a turn."""
    named = {}
    for key in ("bos", "pad"):
        token = tokenizer.settings.get(f"{key}_token")
        index = tokenizer.hf.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        if index is not None:
            named[f"tokenizer.ggml.{key}_token_id"] = index
    turn = end_of_turn(tokenizer)
    if turn is not None:
        named["tokenizer.ggml.eot_token_id"] = turn
    if tokenizer.prefix_ids not in ([], [named.get("tokenizer.ggml.bos_token_id")]):
        raise UserError(f"{place}: its tokenizer puts {tokenizer.prefix_ids} before a text; only a single "
                        "token, bos_token, can be said")
    return named | {"tokenizer.ggml.add_bos_token": bool(tokenizer.prefix_ids)}


def chat_template(tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """The template as it is: llama.cpp runs Jinja, and passes over transformers' marks for training."""
    template = tokenizer.settings.get("chat_template")
    if template is None:
        return {}
    if not isinstance(template, str):
        raise UserError(f"{place}: has several chat templates; keep one in tokenizer_config.json")
    return {"tokenizer.chat_template": template}
