"""Text <-> token ids: one interface to Hugging Face's tokenizer.json (the format) and tiktoken (the speed).

    tokenizer = Tokenizer.load("gpt2")                   # or a folder with tokenizer.json, or that file
    tokenizer = Tokenizer.train(documents, 4096)         # byte-level BPE that splits as Qwen2 does
    ids = tokenizer.encode("Hello <|endoftext|>")        # text stays text: never a special token
    tokenizer.save("out/base/step_000100")               # what transformers' AutoTokenizer reads

tiktoken encodes a byte-level BPE several times faster than the `tokenizers` library, with the same ids. It is
built from the merges in tokenizer.json. Every other tokenizer.json is encoded by `tokenizers`. Left out:
training anything but BPE, and chats (formats/chat_format.py).
"""

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configurator import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"  # in chats (formats/chat_format.py)
# How a text is split before merging. Qwen2 splits off each digit, allows one punctuation mark in front of a
# word, and keeps newlines apart from other white space.
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Byte-level files spell each byte of a token as one printable letter, by GPT-2's table. Printable bytes are
# their own letter; the n-th of the other bytes is the letter with code 256 + n.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_LETTER = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_LETTER |= {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
LETTER_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_LETTER.items()}


# ---- GPT-2's own tokenizer --------------------------------------------------------------------------------

def letters(token: bytes) -> str:
    return "".join(BYTE_TO_LETTER[byte] for byte in token)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that were merged into a token last, found by merging its bytes in the order of the ranks.

    For example, b"the" -> [b"t", b"he"] if b"he" has a lower rank than b"th".
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        best = pairs.index(min(pairs))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def gpt2_definition() -> dict[str, Any]:
    """GPT-2's tokenizer.json, built from tiktoken's ranks. Needs the network once, or TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises
        raise UserError(f"tokenizer=gpt2: no merges could be downloaded ({type(error).__name__}); without "
                        "a network, set TIKTOKEN_CACHE_DIR to a folder that contains them") from None
    ranks = encoding._mergeable_ranks
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    hf = tokenizers.Tokenizer(models.BPE(
        vocab={letters(token): index for token, index in ranks.items()},
        merges=[(letters(left), letters(right)) for left, right in (last_merge(t, ranks) for t in merged)]))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())


# ---- The fast encoder -------------------------------------------------------------------------------------

def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that a byte-level pre-tokenizer splits by, or None if it does anything else."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before and last.get("use_regex", True):
        return GPT2_SPLIT
    if len(before) != 1 or last.get("use_regex", True) or before[0].get("type") != "Split":
        return None
    split = before[0]
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    return split["pattern"].get("Regex") if isolated else None


def tiktoken_encoding(definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """The same byte-level BPE for tiktoken, or None if the file needs something that tiktoken does not do.

    tiktoken merges the pair whose merged token has the lowest id. `tokenizers` merges the pair that comes
    first in its list of merges. Both agree if the merged tokens are numbered in the order of their merges,
    which is checked here.
    """
    model = definition["model"]
    pattern = split_pattern(definition.get("pre_tokenizer"))
    extras = ("dropout", "byte_fallback", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    has_extras = any(model.get(key) for key in extras) or definition.get("normalizer") is not None
    if model.get("type") != "BPE" or has_extras or pattern is None:
        return None
    added = {token["content"] for token in definition["added_tokens"]}
    vocab = {token: index for token, index in model["vocab"].items() if token not in added}
    if not set().union(*vocab) <= LETTER_TO_BYTE.keys() <= vocab.keys():  # tokens are not spelled in bytes
        return None
    merged = [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if merged != sorted(merged) or len(merged) + 256 != len(vocab):
        return None
    ranks = {bytes(LETTER_TO_BYTE[letter] for letter in token): index for token, index in vocab.items()}
    return tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def has_long_blank(text: str, window: int = 65536) -> bool:
    """True if some aligned window of the text is all white space.

    tiktoken's regular expressions backtrack over such a text and fail at a million characters (a panic in
    Rust); `tokenizers` does not.
    """
    return any(text[start:start + window].isspace() for start in range(0, len(text) - window + 1, window))


# ---- The tokenizer ----------------------------------------------------------------------------------------

class Tokenizer:
    """A tokenizer.json, with the settings of tokenizer_config.json and chat_template.jinja in its folder.

    vocab_size: the highest id + 1.
    eot_id: the id that separates documents and ends a text.
    end_ids: eot_id or, with a chat template, the list of the ids that end a turn or a text.
    bos_id: the id that begins a text, or None.
    special_ids: the ids that no text is encoded to.
    prefix_ids: the ids that the file's post-processor puts before a text: Llama's <s>; none for ours.
    """

    def __init__(self, definition: dict[str, Any], settings: dict[str, Any] | None = None):
        """definition, settings: the content of the two files. UserError if there is no end-of-text token."""
        self.definition = definition
        self.settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                                     "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
        self.hf = tokenizers.Tokenizer.from_str(json.dumps(definition))
        # The library finds added tokens in every text, so texts are encoded by a copy without added tokens.
        plain = definition | {"added_tokens": [], "post_processor": None}
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.fast = tiktoken_encoding(definition)
        self.special_ids = frozenset(self.hf.get_added_tokens_decoder())
        self.prefix_ids = list(takewhile(self.special_ids.__contains__, self.hf.encode("a").ids))
        self.vocab_size = 1 + max(self.hf.get_vocab().values())
        begin, end = self.named_token("bos_token"), self.named_token("eos_token") or END_OF_TEXT
        self.bos_id = self.hf.token_to_id(begin) if begin else None
        eot_id = self.hf.token_to_id(end)
        if eot_id is None:
            raise UserError(f"tokenizer: the end-of-text token {end!r} is not in the vocabulary")
        self.eot_id: int = eot_id
        turn = self.hf.token_to_id(END_OF_TURN) if "chat_template" in self.settings else None
        self.end_ids = self.eot_id if turn in (None, self.eot_id) else [turn, self.eot_id]

    def named_token(self, key: str) -> str | None:
        """The token of a setting such as eos_token, or None. Some files store an object, not a string."""
        token = self.settings.get(key)
        return token["content"] if isinstance(token, dict) else token

    def token_id(self, token: str) -> int:
        """The id of a token that is known to exist."""
        index = self.hf.token_to_id(token)
        assert index is not None, token
        return index

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Load `gpt2`, a folder that contains tokenizer.json, or such a file. Raises UserError otherwise."""
        if str(source) == "gpt2":
            return cls(gpt2_definition())
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        config, template = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        try:
            definition = json.loads(path.read_text(encoding="utf-8"))
            settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
            if settings is not None and template.is_file():  # transformers 5 saves it here and reads it first
                settings["chat_template"] = template.read_text(encoding="utf-8")
            return cls(definition, settings)
        except FileNotFoundError:
            hint = ("copy the model's into its folder" if Path(source).is_dir() else
                    "give gpt2, or a folder with tokenizer.json")
            raise UserError(f"{path}: no tokenizer there ({hint})") from None
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` ids: all bytes, the merges, END_OF_TEXT last."""
        hf = tokenizers.Tokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        hf.decoder = decoders.ByteLevel()
        hf.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size - 1, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        hf.add_special_tokens([END_OF_TEXT])
        return cls(json.loads(hf.to_str()))

    def extended(self, special_tokens: list[str], settings: dict[str, Any]) -> "Tokenizer":
        """A copy with more special tokens, after its last id, and with more settings.

        A special token that exists keeps its id. A plain token of that name becomes special.
        """
        hf = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        hf.add_special_tokens(special_tokens)
        return Tokenizer(json.loads(hf.to_str()), self.settings | settings)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them special. Raises UnicodeEncodeError for a lone surrogate."""
        text.encode("utf-8")
        if self.fast is not None and not has_long_blank(text):
            return self.fast.encode_ordinary(text)
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with special tokens by name. Bytes that are not UTF-8 become U+FFFD."""
        return self.hf.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, empty for special and unused ids. "Bits per byte" counts these bytes."""
        table = [b""] * self.vocab_size
        for token, index in self.hf.get_vocab().items():
            if index in self.special_ids:
                continue
            if self.fast:
                table[index] = bytes(LETTER_TO_BYTE[letter] for letter in token)
            else:
                table[index] = self.hf.decode([index]).encode()
        return table

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        for name, content, indent in (("tokenizer.json", self.definition, None),  # many times faster than 2
                                      ("tokenizer_config.json", self.settings, 2)):
            text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
            (Path(folder) / name).write_text(text, encoding="utf-8")
