"""formats/tokenizer.py: equal ids from both back ends, no special tokens from text, lossless round trips."""

import inspect
import json
import random
import unicodedata

import pytest

from configurator import UserError
from formats.tokenizer import END_OF_TEXT, Tokenizer, has_long_blank
from tests.conftest import shared

AWKWARD = [
    "👩‍👩‍👧 emoji 🇩🇪",
    "中文 without 空格",
    "crlf\r\nand\rcr",
    "e\u0301 and a lone \u0301",
    "\u0085\u2028\u2029",
    "<|endoftext|>",
    "'S 'ſ it's IT'LL",
    "\t \n  x",
    "1234567",
    "\u00a0\ufeff\u200b",
    "\x00\x01",
    "Ⅷ٣½ǅ",
    "don't  stop ",
    "   ",
    "\n\n\n",
    "a" * 300,
    "",
    "ﬁ ligature",
    "\U0001f1e6",
]


@pytest.fixture(scope="module")
def trained_bpe():
    return Tokenizer.train([inspect.getsource(random)], 400)


def hf_ids(tokenizer, text):
    return tokenizer.plain.encode(text, add_special_tokens=False).ids


def random_text(generator):
    parts = [
        generator.choice(AWKWARD)
        if generator.random() < 0.4
        else chr(
            generator.choice(
                [
                    generator.randrange(32, 127),
                    generator.randrange(0xD800),
                    generator.randrange(0xE000, 0x110000),
                ]
            )
        )
        for _ in range(generator.randrange(30))
    ]
    return "".join(parts)


def test_back_ends_agree_and_texts_round_trip(trained_bpe):
    generator, table = random.Random(0), trained_bpe.token_bytes()
    assert trained_bpe.fast is not None
    for text in AWKWARD + [random_text(generator) for _ in range(2000)]:
        ids = trained_bpe.encode(text)
        assert ids == hf_ids(trained_bpe, text), repr(text)
        assert trained_bpe.decode(ids) == text
        assert b"".join(table[i] for i in ids) == text.encode()
        assert not trained_bpe.special_ids & set(ids)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "text",
    [
        "a" * 2**20,
        " " * 2**20 + "x",
        pytest.param("\n" * 2**20, marks=SLOW),
        pytest.param("^" * 2**20, marks=SLOW),
        pytest.param("7" * 2**20, marks=SLOW),
        pytest.param("中" * 350_000, marks=SLOW),
    ],
    ids=["letters", "blanks", "newlines", "signs", "digits", "chinese"],
)
def test_a_megabyte_without_a_space(trained_bpe, text):
    assert trained_bpe.encode(text) == hf_ids(trained_bpe, text)


def test_long_blanks_are_found_before_the_regex_engine_gives_up():
    assert has_long_blank(" " * 131_072) and has_long_blank("x" * 1000 + "\n" * 200_000)
    assert not has_long_blank("x " * 100_000) and not has_long_blank("")


def test_gpt2_equals_tiktoken_and_its_own_file(monkeypatch, tmp_path):
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    gpt2 = Tokenizer.load("gpt2")
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    gpt2.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = shared("text/tinyshakespeare.txt").read_text()[:50_000] + "".join(AWKWARD)
    ids = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert loaded.encode(text) == ids == hf_ids(loaded, text)
    assert loaded.decode(ids) == text


def test_gpt2_without_its_ranks_is_one_line(monkeypatch):
    def offline(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr("formats.tokenizer.read_file_cached", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("gpt2")


def test_auto_tokenizer_gives_our_ids(trained_bpe, tmp_path):
    from transformers import AutoTokenizer

    trained_bpe.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD:
        if END_OF_TEXT not in text:  # transformers finds the special token in a text; we do not
            assert theirs(text).input_ids == trained_bpe.encode(text)
    assert theirs.eos_token_id == theirs.bos_token_id == trained_bpe.eot_id
    assert theirs(END_OF_TEXT).input_ids == [trained_bpe.eot_id] != trained_bpe.encode(END_OF_TEXT)


def test_a_chat_template_in_a_file_of_its_own(trained_bpe, tmp_path):
    """transformers saves it there. If both files have a template, we read the one that transformers reads."""
    from transformers import AutoTokenizer

    Tokenizer(trained_bpe.definition, trained_bpe.settings | {"chat_template": "old"}).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(tmp_path / "theirs")
    assert "chat_template" not in json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path / "theirs").settings["chat_template"] == theirs.chat_template
    (tmp_path / "chat_template.jinja").write_text("new")
    ours = Tokenizer.load(tmp_path).settings["chat_template"]
    assert ours == AutoTokenizer.from_pretrained(tmp_path).chat_template == "new"


def test_training_is_repeatable_and_ends_with_the_end_of_text(trained_bpe):
    texts = ["one two three two one"] * 50
    one, two = Tokenizer.train(texts, 270), Tokenizer.train(texts, 270)
    assert one.definition == two.definition
    assert trained_bpe.vocab_size == 400 and trained_bpe.eot_id == 399 and trained_bpe.special_ids == {399}


def test_other_tokenizer_files_use_the_slower_back_end():
    """tiktoken has no normalizer, and no merges whose ids are in another order than the merges."""
    definition = Tokenizer.train(["the cat the hat the bat"] * 9, 270).definition
    nfc = Tokenizer(definition | {"normalizer": {"type": "NFC"}})
    assert nfc.fast is None
    assert nfc.encode("e\u0301") == nfc.encode(unicodedata.normalize("NFC", "e\u0301"))
    swapped = json.loads(json.dumps(definition))
    swapped["model"]["merges"][0], swapped["model"]["merges"][1] = (
        swapped["model"]["merges"][1],
        swapped["model"]["merges"][0],
    )
    other = Tokenizer(swapped)
    assert other.fast is None and other.decode(other.encode("the cat")) == "the cat"
    assert other.token_bytes()[other.encode("a")[0]] == b"a"


def test_the_prefix_of_a_post_processor_is_known(trained_bpe):
    """Llama's, for example, puts <s> before every text."""
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [trained_bpe.eot_id], "tokens": [END_OF_TEXT]}
        },
    }
    tokenizer = Tokenizer(trained_bpe.definition | {"post_processor": template})
    assert tokenizer.prefix_ids == [trained_bpe.eot_id] and trained_bpe.prefix_ids == []
    assert tokenizer.encode("word") == trained_bpe.encode("word")


def test_sink_tokens_begin_every_text(trained_bpe, tmp_path):
    """Here, after saving, and in transformers."""
    tokenizer = trained_bpe.with_sinks(3)
    sinks = [trained_bpe.eot_id] * 3
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.prefix_ids == sinks and again.definition == tokenizer.definition
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat").input_ids == sinks + trained_bpe.encode("the cat")
    assert again.encode("the cat") == trained_bpe.encode("the cat")
    assert again.with_sinks(3) is again and trained_bpe.with_sinks(0) is trained_bpe
    for count in (0, 2):
        with pytest.raises(UserError, match=f"sink_tokens={count}: the data's tokenizer begins every text"):
            again.with_sinks(count)


@pytest.mark.parametrize(
    "content, message",
    [(None, "there .copy the model's"), ("{", "tokenizer.json: damaged"), ("{}", "not a tokenizer.json")],
)
def test_a_file_that_is_not_a_tokenizer_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_lone_surrogate_is_not_text(trained_bpe):
    with pytest.raises(UnicodeEncodeError):
        trained_bpe.encode("\ud800")


def test_a_pattern_that_leaves_letters_out_uses_the_slower_back_end(trained_bpe):
    """tiktoken would drop what the pattern does not match."""
    definition = json.loads(json.dumps(trained_bpe.definition))
    for pattern, is_fast in ((r"\w+|\s+", False), ("0", False), ("", False), (r"\p{L}+|[^\p{L}]", True)):
        definition["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        tokenizer = Tokenizer(definition)
        assert (tokenizer.fast is not None) == is_fast
        assert tokenizer.decode(tokenizer.encode("a, b.")) == "a, b."
