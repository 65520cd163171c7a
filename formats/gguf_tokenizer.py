"""A tokenizer as GGUF metadata: tokens, their types, merges, special ids and the chat template.

    metadata = vocabulary(tokenizer, vocab_size=4102, place="out/dpo")

llama.cpp has a fixed set of rules for splitting a text before the merges, and a file names one of them. A
tokenizer that is not a byte-level BPE, or that splits in another way, is refused.
"""

from typing import Any

from configurator import UserError
from formats.chat_format import TEMPLATE, end_of_turn
from formats.gguf_reader import CONTROL, NORMAL, UNUSED, USER_DEFINED
from formats.splits import SPLITS
from formats.tokenizer import Tokenizer, split_patterns

# The first name of each way of splitting.
NAMES: dict[tuple[str, ...], str] = {patterns: name for name, patterns in reversed(SPLITS.items())}


def pre_tokenizer(tokenizer: Tokenizer, place: str) -> str:
    """llama.cpp's name for the way the tokenizer splits a text. Raises UserError if it has none."""
    definition, model = tokenizer.definition, tokenizer.definition["model"]
    extras = [key for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
              if model.get(key)]
    normalizer = (definition.get("normalizer") or {}).get("type", "NFC")
    extras += [] if normalizer == "NFC" else [normalizer]  # NFC is accepted, although llama.cpp skips it
    if model.get("type") != "BPE" or extras:
        kind = ", ".join([str(model.get("type")), *extras])
        raise UserError(f"{place}: cannot export a tokenizer of type {kind} to GGUF; only byte-level BPE is "
                        "supported")
    patterns = split_patterns(definition.get("pre_tokenizer"))
    name = NAMES.get(patterns)
    # Only llama-bpe ignores the merges for a word that is a token itself.
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        found = " ".join(patterns) or definition.get("pre_tokenizer")
        raise UserError(f"{place}: its tokenizer splits text in a way that llama.cpp does not know (only "
                        f"{', '.join(NAMES.values())}): {found}")
    return name


def special_ids(tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """The ids of the special tokens. llama.cpp stops at the end of a text and at the end of a turn.

    add_bos_token makes it begin every prompt with bos_token, as our texts and conversations begin.
    """
    pad = tokenizer.hf.token_to_id(tokenizer.named_token("pad_token") or "")
    ids = {"eos": tokenizer.eot_id, "bos": tokenizer.bos_id, "padding": pad, "eot": end_of_turn(tokenizer)}
    if tokenizer.prefix_ids not in ([], [tokenizer.bos_id]):
        raise UserError(f"{place}: its tokenizer puts {tokenizer.prefix_ids} before a text; GGUF allows only "
                        "one token there, bos_token")
    known = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    # A model that was trained with our template alone has no such token before a conversation.
    begins = bool(tokenizer.prefix_ids) and tokenizer.settings.get("chat_template") != TEMPLATE
    return known | {"tokenizer.ggml.add_bos_token": begins}


def vocabulary(tokenizer: Tokenizer, vocab_size: int, place: str) -> dict[str, Any]:
    """The header entries of a tokenizer. Raises UserError, which names `place`, if llama.cpp cannot have it.

    vocab_size: rows of the model's embedding table. Rows without a token become unused tokens.
    """
    tokenizer.require_rows(vocab_size, place)
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in tokenizer.hf.get_vocab().items():
        tokens[index], kinds[index] = token, NORMAL
    for added in tokenizer.definition["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair)
              for pair in tokenizer.definition["model"]["merges"]]
    if not merges:  # a list in a GGUF file must not be empty
        raise UserError(f"{place}: its tokenizer has no merges; a GGUF file needs at least one")
    template = tokenizer.settings.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{place}: has several chat templates; keep one in tokenizer_config.json")
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre_tokenizer(tokenizer, place),
                "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.merges": merges, **special_ids(tokenizer, place)}
    # llama.cpp runs Jinja, and ignores the marks that transformers uses in training.
    return metadata | ({} if template is None else {"tokenizer.chat_template": template})
