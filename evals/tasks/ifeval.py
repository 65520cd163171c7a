"""IFEval: instructions whose obedience a program can check (arXiv 2311.07911).

    {"key": 1001, "prompt": "Plan a trip to Japan. You are not allowed to use any commas.",
     "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

The prompt is the user's message, without worked examples. An answer follows all, some or none of its
instructions. The figures are the paper's:

- prompt_strict: the share of prompts whose instructions are all followed;
- prompt_loose: the same, if the answer may lose its first line, its last line, or its stars first;
- instruction_strict, instruction_loose: the shares of the instructions.

The rules are those of google-research/instruction_following_eval, with one difference: sentences end at
.!? before white space, where the original has a trained tokenizer (NLTK's Punkt). 25 kinds of instruction are
checked, all of the paper's. Languages, and English in capitals or small letters, need the package langdetect.
Files: ifeval* (input_data.jsonl of the original); hub: google/IFEval.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from configurator import optional_import
from evals.benchmarks import Questions, convert, read, text_of, texts_of
from evals.lm import LM
from evals.results import Result, mean, means, truncated

HUB = "google/IFEval::train"
MAX_NEW_TOKENS = 1280  # lm-evaluation-harness's
NEED_LANGUAGE = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
Arguments = dict[str, Any]


# ---- The instructions -------------------------------------------------------------------------------------

def enough(count: int, most_or_least: str, number: int) -> bool:
    """count < number for "less than", else count >= number ("at least")."""
    return count < number if most_or_least == "less than" else count >= number


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def count_word(word: str, text: str, edge: str = "") -> int:
    """How often a word is in a text, in any case. edge: what has to be on both sides, as a pattern."""
    return len(re.findall(edge + re.escape(word) + edge, text, re.IGNORECASE))


def in_language(text: str, language: str) -> bool:
    """Whether a text is in this language; True if no language is found, as in the original."""
    langdetect = optional_import("langdetect", "ifeval")
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True


def parts(text: str, separator: str) -> list[str] | None:
    """The parts between separators, without an empty first or last one. None if another one is empty."""
    found = re.split(separator, text)
    found = found if found[0].strip() else found[1:]
    found = found[:-1] if found and not found[-1].strip() else found
    return found if all(part.strip() for part in found) else None


def highlights(text: str) -> int:
    """The number of *highlighted* and **highlighted** passages that are not blank."""
    found = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(each.strip("*").strip()) for each in found)


def is_json(text: str) -> bool:
    try:
        json.loads(re.sub(r"\A\s*```(?:json|Json|JSON)?|```\s*\Z", "", text))
        return True
    except (ValueError, RecursionError):
        return False


def first_word(text: str, k: Arguments) -> bool:
    """Whether there are num_paragraphs paragraphs, and paragraph nth_paragraph begins with first_word."""
    # Read before the text is looked at: question_of tries the rule with "a" to find missing arguments.
    wanted = k["num_paragraphs"], k["first_word"].lower()
    paragraphs = text.split("\n\n")
    number = sum(bool(each.strip()) for each in paragraphs)
    words = paragraphs[k["nth_paragraph"] - 1].split() if k["nth_paragraph"] <= number else []
    return bool(words) and wanted == (
        number, re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower())


def postscript(text: str, k: Arguments) -> bool:
    """Whether the text has the postscript_marker, such as P.S., in any case."""
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(k["postscript_marker"])
    return bool(count(marker or re.escape(k["postscript_marker"].lower()), text.lower()))


def two_responses(text: str, k: Arguments) -> bool:
    """Whether ****** separates exactly two different answers."""
    found = parts(text, re.escape("******")) or []
    return len(found) == 2 and found[0].strip() != found[1].strip()


RULES: dict[str, Callable[[str, Arguments], bool]] = {  # {instruction: whether a text follows it}
    "keywords:existence": lambda text, k: all(count_word(word, text) for word in k["keywords"]),
    "keywords:frequency": lambda text, k: enough(
        count_word(k["keyword"], text), k["relation"], k["frequency"]),
    "keywords:forbidden_words": lambda text, k: not any(
        count_word(word, text, r"\b") for word in k["forbidden_words"]),
    "keywords:letter_frequency": lambda text, k: enough(
        text.lower().count(k["letter"].lower()), k["let_relation"], k["let_frequency"]),
    "language:response_language": lambda text, k: in_language(text, k["language"]),
    "length_constraints:number_sentences": lambda text, k: enough(
        len(re.split(r"(?<=[.!?])\s+", text.strip())), k["relation"], k["num_sentences"]),
    "length_constraints:number_paragraphs": lambda text, k: len(
        parts(text, r"\s?\*\*\*\s?") or []) == k["num_paragraphs"],
    "length_constraints:number_words": lambda text, k: enough(
        count(r"\w+", text), k["relation"], k["num_words"]),
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": lambda text, k: count(
        r"\[.*?\]", text) >= k["num_placeholders"],
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda text, k: count(
        r"^\s*\*[^*].*$", text) + count(r"^\s*-.*$", text) == k["num_bullets"],
    "detectable_format:constrained_response": lambda text, k: any(each in text for each in RESPONSES),
    "detectable_format:number_highlighted_sections": lambda text, k: highlights(text) >= k["num_highlights"],
    "detectable_format:multiple_sections": lambda text, k: count(
        rf"\s?{re.escape(k['section_spliter'])}\s?\d+\s?", text) >= k["num_sections"],
    "detectable_format:json_format": lambda text, k: is_json(text),
    "detectable_format:title": lambda text, k: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text)),
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda text, k: text.strip().lower().startswith(
        k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda text, k: text.strip().strip('"').lower().endswith(
        k["end_phrase"].strip().lower()),
    "startend:quotation": lambda text, k: bool(re.fullmatch(r'\s*".*"\s*', text, re.DOTALL)),
    "change_case:capital_word_frequency": lambda text, k: enough(
        sum(word.isupper() for word in re.findall(r"\w[\w'-]*", text)), k["capital_relation"],
        k["capital_frequency"]),
    "change_case:english_capital": lambda text, k: text.isupper() and in_language(text, "en"),
    "change_case:english_lowercase": lambda text, k: text.islower() and in_language(text, "en"),
    "punctuation:no_comma": lambda text, k: "," not in text,
}


# ---- The task ---------------------------------------------------------------------------------------------

class Instructed(NamedTuple):
    prompt: str
    instructions: list[tuple[str, Arguments]]


def question_of(row: dict[str, Any]) -> Instructed:
    # On the hub, each instruction has all arguments, and those of the others are null.
    arguments = [{key: value for key, value in each.items() if value is not None} for each in row["kwargs"]]
    instructions = list(zip(texts_of(row["instruction_id_list"]), arguments, strict=True))
    for name, given in instructions:
        if name == "language:response_language":
            text_of(given["language"])
        elif name not in NEED_LANGUAGE:
            RULES[name]("a", given)  # KeyError for an unknown instruction, or if an argument is missing
    return Instructed(text_of(row["prompt"]), instructions)


def load(source: str | None, limit: int, shots: int | None) -> Questions:
    """The first `limit` prompts. There are no worked examples."""
    asked = convert(read(source, "ifeval", HUB)[:limit], question_of)
    if any(name in NEED_LANGUAGE for each in asked for name, _ in each.instructions):
        optional_import("langdetect", "ifeval")
    return Questions(asked, [])


def loosened(text: str) -> list[str]:
    """The text without its first line, its last line or both, each with and without stars."""
    lines = text.split("\n")
    shorter = [text, *("\n".join(each).strip() for each in (lines[1:], lines[:-1], lines[1:-1]))]
    return shorter + [each.replace("*", "") for each in shorter]


def followed(question: Instructed, texts: list[str]) -> list[bool]:
    """For each instruction, whether any of the texts follows it."""
    return [any(text.strip() and RULES[name](text, given) for text in texts)
            for name, given in question.instructions]


def score(lm: LM, questions: Questions) -> Result:
    """The shares of prompts and of instructions that are followed, strictly and loosely."""
    texts = lm.generate_until([question.prompt for question in questions.asked], [], MAX_NEW_TOKENS)
    answers = []
    for question, text in zip(questions.asked, texts, strict=True):
        strict, loose = followed(question, [text]), followed(question, loosened(text))
        answers.append({"prompt": question.prompt, "said": text, "strict": strict, "loose": loose,
                        "instructions": [name for name, _ in question.instructions],
                        "prompt_strict": all(strict), "prompt_loose": all(loose)})
    figures = means(answers, ("prompt_strict", "prompt_loose"))
    for kind in ("strict", "loose"):
        figures[f"instruction_{kind}"] = mean([each for answer in answers for each in answer[kind]])
    return Result(figures | truncated(lm.truncated), answers, {"first_prompt": questions.asked[0].prompt})
