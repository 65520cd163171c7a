"""IFEval: each instruction followed and not followed by hand; strict and loose; rows of the hub."""

import json

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import ifeval
from evals.tasks.ifeval import RULES

MOST, LEAST = {"relation": "less than"}, {"relation": "at least"}


@pytest.mark.parametrize("name, arguments, good, bad", [
    ("keywords:existence", {"keywords": ["war", "peace"]}, "Warm PEACE", "war"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2} | LEAST, "war warm", "war"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2} | MOST, "war", "war, war"),
    ("keywords:forbidden_words", {"forbidden_words": ["war"]}, "warm", "no War!"),
    ("keywords:letter_frequency", {"letter": "T", "let_relation": "at least", "let_frequency": 2}, "tT", "t"),
    ("length_constraints:number_sentences", {"num_sentences": 3} | MOST, "One. Two!", "One. Two! Three?"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3} | LEAST, "one two-three", "one two"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "tea"},
     "One.\n\n\"Tea, please.", "Tea.\n\nNo tea"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [ ]", "[name"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\np. s. more", "ps"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1 Part2",
     "Part 1 Part two"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:title", {}, "<<Title>> text", "<< >> text"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, " say it. No.", "No. Say it."),
    ("startend:end_checker", {"end_phrase": "The end. "}, '"So: the END."', "The end. Or not."),
    ("startend:quotation", {}, ' "a\nb" ', '"'),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2},
     "A TOP-10 hit", "A hit"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
])
def test_instructions(name, arguments, good, bad):
    assert RULES[name](good, arguments) is True and RULES[name](bad, arguments) is False


def test_languages():
    pytest.importorskip("langdetect")
    english = "This is a sentence of several English words."
    german = "Dies ist ein Satz aus mehreren deutschen W\u00f6rtern."
    assert RULES["language:response_language"](german, {"language": "de"})
    assert not RULES["language:response_language"](english, {"language": "de"})
    for name, change in (("capital", str.upper), ("lowercase", str.lower)):
        assert RULES[f"change_case:english_{name}"](change(english), {})
        assert not RULES[f"change_case:english_{name}"](english, {})
        assert not RULES[f"change_case:english_{name}"](change(german), {})
    assert RULES["language:response_language"]("12", {"language": "de"}), "no language is found"


def test_strict_and_loose(trained, tmp_path, monkeypatch):
    """An introduction breaks the rules strictly, not loosely. Null arguments are not used."""
    rows = [{"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
             "kwargs": [{"num_words": None}, {}]}] * 3
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm, asked = LM(str(trained), device="cpu"), []
    said = ['"I do."', 'Sure, here it is:\n*"I do."*', " "]
    monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or said)
    result = ifeval.score(lm, ifeval.load(str(tmp_path), 500, None))
    assert asked == [(["Say it."] * 3, [], 1280)]
    assert [answer["strict"] for answer in result.answers] == [[True, True], [False, False], [False, False]]
    assert [answer["loose"] for answer in result.answers] == [[True, True], [True, True], [False, False]]
    values = {key: round(figure.value, 3) for key, figure in result.figures.items()}
    assert values == {"prompt_strict": 0.333, "prompt_loose": 0.667, "instruction_strict": 0.333,
                      "instruction_loose": 0.667}
    for change, reason in (({"instruction_id_list": ["a:b", "c:d"]}, "KeyError: 'a:b'"),
                           ({"kwargs": [{}]}, "ValueError"),
                           ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]},
                            "KeyError: 'keywords'"),
                           ({"instruction_id_list": ["length_constraints:nth_paragraph_first_word"],
                             "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 2}]},
                            "KeyError: 'first_word'"),
                           ({"instruction_id_list": ["language:response_language"], "kwargs": [{}]},
                            "KeyError: 'language'")):
        (tmp_path / "ifeval.jsonl").write_text(json.dumps(rows[0] | change))
        with pytest.raises(UserError, match=f"row 1 does not fit this benchmark .{reason}"):
            ifeval.load(str(tmp_path), 500, None)
