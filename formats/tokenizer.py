"""Text <-> token ids: one interface to Hugging Face's tokenizer.json (the format) and tiktoken (the speed).

    tokenizer = Tokenizer.load("gpt2")                   # or a folder with tokenizer.json, or that file
    tokenizer = Tokenizer.train(documents, 4096)         # byte-level BPE that splits as Qwen2 does
    ids = tokenizer.encode("Hello <|endoftext|>")        # text stays text: never a special token
    tokenizer.save("out/base/step_000100")               # what transformers' AutoTokenizer reads

tiktoken encodes a byte-level BPE several times faster than the `tokenizers` library, with the same ids. It is
built from the merges in tokenizer.json. Every other tokenizer.json is encoded by `tokenizers`. The ids of a
text are those of transformers' AutoTokenizer, without truncation and padding.

Tokenizers of the sentencepiece kind (Llama 2, Mistral, Gemma) spell a space as the marker "\u2581", put one
before the first word of a text, and spell a byte that has no token of its own as "<0xE2>". Left out: training
anything but BPE, and chats (formats/chat_format.py).
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tiktoken.load import read_file_cached
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from configurator import UserError
from formats.files import content_errors, read_json, write_json
from formats.splits import GPT2_SPLIT, QWEN2_SPLIT, byte_level_bpe

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"  # in our chats (formats/chat_format.py)
TURN_ENDS = (END_OF_TURN, "<|eot_id|>", "<end_of_turn>", "<|end|>")  # in chat templates, other models' too
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
MAX_ID = 2**24  # no vocabulary is larger; a damaged file may have an id for which no memory is enough

# Byte-level files spell each byte of a token as one printable letter, by GPT-2's table. Printable bytes are
# their own letter; the n-th of the other bytes is the letter with code 256 + n.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_LETTER = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_LETTER |= {byte: chr(256 + n) for n, byte in enumerate(OTHERS)}
LETTER_TO_BYTE = {letter: byte for byte, letter in BYTE_TO_LETTER.items()}


# ---- GPT-2's own tokenizer --------------------------------------------------------------------------------

def gpt2_definition() -> dict[str, Any]:
    """GPT-2's tokenizer.json, from the merges that tiktoken downloads once, or has in TIKTOKEN_CACHE_DIR."""
    try:
        lines = read_file_cached(GPT2_MERGES, GPT2_SHA256).decode().split("\n")
    except Exception as error:  # whatever the download raises
        raise UserError(f"tokenizer=gpt2: no merges could be downloaded ({type(error).__name__}); without "
                        "a network, set TIKTOKEN_CACHE_DIR to a folder that contains them") from None
    merges = [(left, right) for left, right in map(str.split, lines[1:-1])]  # the first line is a version
    pieces = [*BYTE_TO_LETTER.values(), *map("".join, merges)]
    hf = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([END_OF_TEXT])
    return json.loads(hf.to_str())


# ---- Special tokens ---------------------------------------------------------------------------------------

def special_tokens(definition: dict[str, Any], settings: dict[str, Any]) -> set[str]:
    """The special tokens by the rule of transformers: those of tokenizer.json, and those that settings name.

    A single letter of the vocabulary stays a letter (some files have "!" as their padding token).
    """
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    names = {token["content"] if isinstance(token, dict) else token for token in named}
    names |= {token["content"] for token in definition["added_tokens"] if token["special"]}
    return {name for name in names if isinstance(name, str) and len(name) > 1}


def text_definition(definition: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """The tokenizer.json that texts are encoded with: no text becomes a special token.

    `tokenizers` finds added tokens in every text, so the special ones are left out. A special token that is
    also a piece of the model (in Unigram, a text could become it) gets a name that begins with a space. No
    text has such a piece, because every kind of pre-tokenizer replaces or removes spaces.
    """
    def hidden(piece: str) -> str:
        return f" {piece}" if piece in special else piece

    model = dict(definition["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden(piece): index for piece, index in vocab.items()}
    else:  # Unigram has a list
        model["vocab"] = [[hidden(piece), score] for piece, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = hidden(model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if special.isdisjoint([*pair, "".join(pair)])]
    added = [token for token in definition["added_tokens"] if token["content"] not in special]
    return definition | {"model": model, "added_tokens": added, "post_processor": None}


def without_first_marker(definition: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json for a text in the middle of another, whose first word has no marker."""
    text = json.dumps(definition.get("pre_tokenizer"))
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return definition | {"pre_tokenizer": json.loads(text)}


def as_llama_tokenizer(definition: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json that transformers 5 makes of a file whose tokenizer_class is LlamaTokenizer.

    It replaces the file's normalizer by its own rule for the marker.
    """
    scheme = "always" if settings.get("legacy") else "first"
    if settings.get("add_prefix_space") is False:
        scheme = "never"
    return definition | {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}}


def check_definition(definition: dict[str, Any]) -> None:
    """Raise UserError for values that end the process inside the library, or that no memory is enough for."""
    model = definition["model"]
    vocab, prefix = model["vocab"], model.get("continuing_subword_prefix")
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    added = [token["id"] for token in definition["added_tokens"]]
    if not all(type(index) is int and 0 <= index < MAX_ID for index in ids + added):
        raise UserError(f"tokenizer.json: an id is not an integer from 0 to {MAX_ID - 1:,}")
    if len(set(ids)) < len(ids):
        raise UserError("tokenizer.json: two tokens have the same id")
    if prefix and "merges" in model:
        seconds = [pair.split(" ")[1] if isinstance(pair, str) else pair[1] for pair in model["merges"]]
        if not all(second.startswith(prefix) for second in seconds):
            raise UserError("tokenizer.json: a merge does not have continuing_subword_prefix")


# Turns every error of the `tokenizers` library into a UserError of one line.
library_errors = functools.partial(content_errors, what="not a tokenizer.json")


# ---- The fast encoder -------------------------------------------------------------------------------------

def split_patterns(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions that a byte-level pre-tokenizer splits by, or () if it does anything else."""
    *before, last = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = []
    for step in before:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step.get("pattern", {}).get("Regex"))
        else:
            return ()
    patterns += [GPT2_SPLIT] if last.get("use_regex", True) else []
    is_byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    return tuple(patterns) if is_byte_level and None not in patterns else ()


def tiktoken_encoding(definition: dict[str, Any]) -> tiktoken.Encoding | None:
    """The same byte-level BPE for tiktoken, or None if the file needs something that tiktoken does not do.

    definition: a `text_definition`. Its added tokens are not found in texts.
    tiktoken merges the pair whose merged token has the lowest id. `tokenizers` merges the pair that comes
    first in its list of merges. Both agree if the merged tokens are numbered in the order of their merges,
    which is checked here.
    """
    model, patterns = definition["model"], split_patterns(definition.get("pre_tokenizer"))
    extras = ("dropout", "byte_fallback", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    has_extras = any(model.get(key) for key in extras) or definition.get("normalizer") is not None
    if model.get("type") != "BPE" or has_extras or len(patterns) != 1 or not patterns[0]:
        return None
    [pattern] = patterns
    added = {token["content"] for token in definition["added_tokens"]}
    vocab = {token: index for token, index in model["vocab"].items()
             if token not in added and " " not in token}  # a space: the hidden name of a special token
    if not set().union(*vocab) <= LETTER_TO_BYTE.keys() <= vocab.keys():  # tokens are not spelled in bytes
        return None
    merged = [vocab.get("".join(pair), -1) for pair in model["merges"]]
    if merged != sorted(merged) or -1 in merged or len(merged) + 256 != len(vocab):
        return None
    ranks = {bytes(LETTER_TO_BYTE[letter] for letter in token): index for token, index in vocab.items()}
    with library_errors("tokenizer.json"):  # a pattern that is no regular expression
        encoding = tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens={})
        # tiktoken drops what the pattern does not match, where `tokenizers` keeps it.
        if pattern not in (GPT2_SPLIT, QWEN2_SPLIT):
            letters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
            if encoding.decode_bytes(encoding.encode_ordinary(letters)) != letters.encode():
                return None
    return encoding


def has_long_blank(text: str) -> bool:
    """True if the text is all white space from a multiple of 65,536 characters to the next one.

    tiktoken's regular expressions backtrack over such a text and fail at a million characters (a panic in
    Rust); `tokenizers` does not.
    """
    size = 2**16
    return any(text[start:start + size].isspace() for start in range(0, len(text) - size + 1, size))


# ---- The tokenizer ----------------------------------------------------------------------------------------

class Tokenizer:
    """A tokenizer.json, with the settings of tokenizer_config.json and chat_template.jinja in its folder.

    vocab_size: the highest id + 1.
    eot_id: the id that separates documents and ends a text.
    end_ids: eot_id or, with a chat template, the list of the ids that end a turn or a text.
    bos_id: the id that begins a text, or None.
    special_ids: the ids that no text is encoded to.
    prefix_ids: the ids that every text and conversation begins with: Llama's <s>; none for ours, unless the
        model was trained with sink tokens.
    """

    def __init__(self, definition: dict[str, Any], settings: dict[str, Any] | None = None):
        """definition, settings: the content of the two files. UserError if there is no end-of-text token."""
        # The program that wrote the file left its own truncation and padding; transformers ignores them too.
        self.definition = definition | {key: None for key in ("truncation", "padding") if key in definition}
        self.settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                                     "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
        self.hf = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        special = special_tokens(self.definition, self.settings)
        plain = text_definition(self.definition, special)
        inside = without_first_marker(plain)
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.inside = self.plain if inside == plain else tokenizers.Tokenizer.from_str(json.dumps(inside))
        self.fast = tiktoken_encoding(plain)
        # Added tokens that are not special, such as GPT-NeoX's runs of spaces, are found in texts. Their ids
        # may differ in `plain`, which has fewer added tokens.
        self.added = [token["content"] for token in plain["added_tokens"]]
        ids = {self.plain.token_to_id(name): self.token_id(name) for name in self.added}
        self.moved = {theirs: index for theirs, index in ids.items() if theirs != index}
        self.special_ids = frozenset(map(self.hf.token_to_id, special)) - {None}
        self.vocab_size = 1 + max(self.hf.get_vocab().values())
        begin, end = self.named_token("bos_token"), self.named_token("eos_token") or END_OF_TEXT
        self.bos_id = self.hf.token_to_id(begin) if begin else None
        eot_id = self.hf.token_to_id(end)
        if eot_id is None:
            raise UserError(f"tokenizer: the end-of-text token {end!r} is not in the vocabulary")
        if eot_id not in self.special_ids:
            raise UserError(f"tokenizer: the end-of-text token {end!r} is a letter, which texts contain")
        self.eot_id: int = eot_id
        template = str(self.settings.get("chat_template", ""))
        known = self.hf.get_vocab()
        ends = {known[name] for name in TURN_ENDS if name in template and name in known} - {self.eot_id}
        self.end_ids = [*sorted(ends), self.eot_id] if ends else self.eot_id
        encoding = self.hf.encode("a")  # with what the post-processor adds, which the mask marks
        self.prefix_ids = encoding.ids[:encoding.special_tokens_mask.index(0)]
        # Byte-level tokens are letters for bytes. Other decoders drop the first space of a text, so `decode`
        # puts this token in front of ids that continue a text.
        self.is_byte_level = '"ByteLevel"' in json.dumps(self.definition.get("decoder"))
        self.anchor = [] if self.is_byte_level else self.plain.encode("a").ids[-1:]

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
        """Load `gpt2`, a folder with tokenizer.json, such a file, or a GGUF file. UserError otherwise."""
        if str(source) == "gpt2":
            return cls(gpt2_definition())
        from formats import gguf_reader  # imports torch; a new BPE does not need it

        path = Path(source)
        if gguf_reader.is_gguf(path):
            with library_errors(path):
                return cls(*gguf_reader.tokenizer(path))
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            hint = ("copy the model's into its folder" if Path(source).is_dir() else
                    "give gpt2, a .gguf file, or a folder with tokenizer.json")
            raise UserError(f"{path}: no tokenizer there ({hint})")
        config, template = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        definition, settings = read_json(path), read_json(config)
        if settings and template.is_file():  # transformers 5 saves it here and reads it first
            settings["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
        with library_errors(path):
            check_definition(definition)
            kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
            is_mistral = read_json(path.with_name("config.json")).get("model_type") == "mistral"
            is_byte_level = "ByteLevel" in json.dumps(definition.get("decoder"))
            if kind == "LlamaTokenizer" and not is_byte_level and not is_mistral:
                definition = as_llama_tokenizer(definition, settings)
            if settings:  # so that transformers reads the files that we save, and no class changes them
                settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            return cls(definition, settings)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` ids: all bytes, the merges, END_OF_TEXT last."""
        hf = byte_level_bpe(models.BPE(), (QWEN2_SPLIT,))
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

    def with_sinks(self, count: int) -> "Tokenizer":
        """A copy that begins every text with `count` end-of-text tokens, also in other programs.

        Raises UserError if this one begins texts with something else, or with another number of them.
        """
        end, ids = self.named_token("eos_token") or END_OF_TEXT, [self.eot_id] * count
        if self.prefix_ids == ids or not count and self.eot_id not in self.prefix_ids:
            return self
        if self.prefix_ids:
            raise UserError(f"sink_tokens={count}: the data's tokenizer begins every text with "
                            f"{self.decode(self.prefix_ids)}")
        hf = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        hf.post_processor = processors.TemplateProcessing(
            single=[end] * count + ["$A"], pair=[end] * count + ["$A", "$B:1"],
            special_tokens=[(end, self.eot_id)])
        return Tokenizer(json.loads(hf.to_str()), self.settings)

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """The ids of a text, none of them special, except for unk_token if the vocabulary needs it.

        inside: the text follows other tokens, as in a chat. Some tokenizers of the sentencepiece kind put a
        marker before the first word of a text only. Raises UnicodeEncodeError for a lone surrogate.
        """
        text.encode("utf-8")
        has_added = any(token in text for token in self.added)
        if self.fast is not None and not has_added and not has_long_blank(text):
            return self.fast.encode_ordinary(text)
        with library_errors("tokenizer"):
            ids = (self.inside if inside else self.plain).encode(text, add_special_tokens=False).ids
        return [self.moved.get(index, index) for index in ids] if self.moved else ids

    def decode(self, ids: Sequence[int], inside: bool = False) -> str:
        """The text of ids, with special tokens by name. Bytes that are not UTF-8 become U+FFFD.

        inside: the ids follow others, as a completion follows its prompt, so a space before them is kept.
        """
        if not inside or not self.anchor:
            return self.hf.decode(list(ids), skip_special_tokens=False)
        before = self.hf.decode(self.anchor, skip_special_tokens=False)
        return self.hf.decode([*self.anchor, *ids], skip_special_tokens=False).removeprefix(before)

    def piece_bytes(self, piece: str, index: int) -> bytes:
        """The bytes that a token adds to a text. "\u2581the" is b" the", and "<0xE2>" is b"\\xe2"."""
        if piece in self.added:
            return piece.encode()
        if self.is_byte_level:
            is_spelled = LETTER_TO_BYTE.keys() >= set(piece)
            return bytes(map(LETTER_TO_BYTE.__getitem__, piece)) if is_spelled else piece.encode()
        if self.definition["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return self.decode([index], inside=True).encode()

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, empty for special and unused ids. "Bits per byte" counts these bytes."""
        table = [b""] * self.vocab_size
        for piece, index in self.hf.get_vocab().items():
            if index not in self.special_ids:
                table[index] = self.piece_bytes(piece, index)
        return table

    def require_rows(self, rows: int, place: object) -> None:
        """Raise UserError if a model with `rows` rows in its embedding table lacks an id."""
        if self.vocab_size > rows:
            raise UserError(f"{place}: its tokenizer has {self.vocab_size:,} ids, the model {rows:,}")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        text = json.dumps(self.definition, ensure_ascii=False) + "\n"  # many times faster than with an indent
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        write_json(Path(folder) / "tokenizer_config.json", self.settings)
