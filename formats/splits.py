"""How byte-level tokenizers split a text before the merges: regular expressions, by llama.cpp's names.

    patterns = SPLITS["smollm"]      # applied one after another; each match becomes a piece of its own

A GGUF file has such a name, a tokenizer.json has the expressions.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Qwen2 splits off each digit, allows one punctuation mark in front of a word, and keeps newlines apart from
# other white space.
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3 splits as Qwen2 does, but keeps up to three digits together.
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
# Files without a name are older than the names; llama.cpp reads them as "default".
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")

# Only these tokenizers ignore the merges for a word that is a token itself, and begin a text with BOS unless
# the file says otherwise.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
SPLITS = {name: patterns for names, patterns in (
    (("gpt-2", "phi-2", "olmo", "jais", "trillion"), (GPT2_SPLIT,)),
    (("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (QWEN2_SPLIT,)),
    ((*LLAMA3_NAMES, "dbrx", "smaug-bpe"), (LLAMA3_SPLIT,)),
    (("smollm", "starcoder", "refact", "command-r", "codeshell"), (r"\p{N}", GPT2_SPLIT)),
    (("default",), DEFAULT)) for name in names}


def byte_level_bpe(model: models.BPE, patterns: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A byte-level BPE with this vocabulary that splits a text by these regular expressions."""
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    return hf
