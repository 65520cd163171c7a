"""Text <-> token ids: one interface over Hugging Face's tokenizer.json (the file) and tiktoken (the speed).

    tokenizer = Tokenizer.load("gpt2")                   # or a folder with tokenizer.json, or that file
    tokenizer = Tokenizer.train(documents, 4096)         # byte-level BPE, split as Qwen2 splits
    ids = tokenizer.encode("Hello <|endoftext|>")        # text is text: never a special token
    tokenizer.save("out/base/step_000100")               # what transformers' AutoTokenizer reads

A byte-level BPE is encoded by tiktoken, built from the file's own ranks, several times faster and with equal
ids; any other tokenizer.json by the `tokenizers` library. Left out: training anything but BPE, and chat
(formats/chat_format.py).
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
END_OF_TURN = "<|im_end|>"  # in chats, which formats/chat_format.py writes
# How a text is cut before merging. Qwen2's: digits one by one, a word with one sign at most, newlines apart.
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters() -> dict[str, int]:
    """GPT-2's printable letter for each of the 256 bytes, as {letter: byte}: byte-level files spell tokens
    with them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


LETTER_TO_BYTE = byte_letters()
BYTE_TO_LETTER = {byte: letter for letter, byte in LETTER_TO_BYTE.items()}


class Tokenizer:
    """A tokenizer.json, and what its folder's tokenizer_config.json and chat_template.jinja say of it.

    vocab_size: highest id + 1. eot_id: the id between documents and at the end of a text; end_ids: that, or,
    where there is a chat template, those that end a turn or a text. bos_id: the one that opens a text, or
    None. special_ids: the ids that no text can become. prefix_ids: what the tokenizer's own template puts
    before a text (Llama's <s>; nothing for ours).
    """

    def __init__(self, definition: dict[str, Any], settings: dict[str, Any] | None = None):
        """definition, settings: the two files' contents. UserError if there is no end-of-text token."""
        self.definition = definition
        self.settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                                     "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
        self.hf = tokenizers.Tokenizer.from_str(json.dumps(definition))
        # The library finds added tokens in any text it is given: texts are encoded by a twin that has none.
        plain = definition | {"added_tokens": [], "post_processor": None}
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.fast = tiktoken_encoding(definition)
        self.special_ids = frozenset(self.hf.get_added_tokens_decoder())
        self.prefix_ids = list(takewhile(self.special_ids.__contains__, self.hf.encode("a").ids))
        self.vocab_size = 1 + max(self.hf.get_vocab().values())
        begin, end = (token["content"] if isinstance(token, dict) else token for token in (
            self.settings.get("bos_token"), self.settings.get("eos_token") or END_OF_TEXT))
        self.bos_id = self.hf.token_to_id(begin) if begin else None
        self.eot_id = self.hf.token_to_id(end)
        if self.eot_id is None:
            raise UserError(f"tokenizer: the end-of-text token {end!r} is not in the vocabulary")
        turn = self.hf.token_to_id(END_OF_TURN) if "chat_template" in self.settings else None
        self.end_ids = self.eot_id if turn in (None, self.eot_id) else [turn, self.eot_id]

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """`gpt2`, a folder that holds tokenizer.json, or such a file. UserError if it is none of them."""
        if str(source) == "gpt2":
            return cls(gpt2_definition())
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        settings, template = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        try:
            definition = json.loads(path.read_text(encoding="utf-8"))
            known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
            if known is not None and template.is_file():  # where transformers has it since 5, first of all
                known["chat_template"] = template.read_text(encoding="utf-8")
            return cls(definition, known)
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
        """Byte-level BPE of at most `vocab_size` ids, the last END_OF_TEXT. All bytes are tokens."""
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
        """A tokenizer that also has these special tokens, behind its last id, and these settings.

        A special token that it has keeps its id; a plain one of that name becomes special.
        """
        hf = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        hf.add_special_tokens(special_tokens)
        return Tokenizer(json.loads(hf.to_str()), self.settings | settings)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special. Raises UnicodeEncodeError for a lone surrogate."""
        text.encode("utf-8")
        if self.fast is not None and not has_long_blank(text):
            return self.fast.encode_ordinary(text)
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.hf.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, empty for special and unused ones: what "bits per byte" counts."""
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
        for name, content, indent in (("tokenizer.json", self.definition, None),  # many times faster without
                                      ("tokenizer_config.json", self.settings, 2)):
            text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
            (Path(folder) / name).write_text(text, encoding="utf-8")


def has_long_blank(text: str, window: int = 65536) -> bool:
    """Whether some aligned window is all white space: tiktoken's regex engine backtracks over such a run and
    gives up at a million characters (a Rust panic); `tokenizers` does not."""
    return any(text[start:start + window].isspace() for start in range(0, len(text) - window + 1, window))


def tiktoken_encoding(definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """The same byte-level BPE for tiktoken, or None where the file asks for what tiktoken does not do.

    tiktoken joins the pair whose union has the lowest id, `tokenizers` the pair that comes first in its list
    of merges. They agree when the merged tokens are numbered in the order of their merges, which is checked
    here.
    """
    model = definition["model"]
    split = split_pattern(definition.get("pre_tokenizer"))
    special = ("dropout", "byte_fallback", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    plain = not any(model.get(key) for key in special)
    if model.get("type") != "BPE" or not plain or split is None or definition.get("normalizer") is not None:
        return None
    added = {token["content"] for token in definition["added_tokens"]}
    vocab = {token: index for token, index in model["vocab"].items() if token not in added}
    spelled_in_bytes = set().union(*vocab) <= LETTER_TO_BYTE.keys() <= vocab.keys()
    if not spelled_in_bytes:
        return None
    merged = [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if merged != sorted(merged) or len(merged) + 256 != len(vocab):
        return None
    ranks = {bytes(LETTER_TO_BYTE[letter] for letter in token): index for token, index in vocab.items()}
    return tiktoken.Encoding("tokenizer.json", pat_str=split, mergeable_ranks=ranks, special_tokens={})


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression a byte-level pre-tokenizer splits by, or None if it does anything else."""
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


def gpt2_definition() -> dict[str, Any]:
    """GPT-2's tokenizer.json, from tiktoken's ranks: these need the network once, or TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raised
        raise UserError(f"tokenizer=gpt2: its ranks could not be had ({type(error).__name__}); without a "
                        "network, set TIKTOKEN_CACHE_DIR to a folder that has them") from None
    ranks = encoding._mergeable_ranks
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    hf = tokenizers.Tokenizer(models.BPE(
        vocab={letters(token): index for token, index in ranks.items()},
        merges=[tuple(map(letters, last_merge(token, ranks))) for token in merged]))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())


def letters(token: bytes) -> str:
    return "".join(BYTE_TO_LETTER[byte] for byte in token)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts a token was made of, by merging its bytes by rank: b"the" -> [b"t", b"he"], say."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        best = pairs.index(min(pairs))
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts
