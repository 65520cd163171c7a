"""The scoring of generated answers, compared with the programs that define it.

    git clone https://github.com/ShishirPatil/gorilla ../gorilla
    python -m bench.scoring --data=../benchmarks --gorilla=../gorilla --json=docs/results/scoring.json
    python -m bench.scoring --parts=ifeval --texts=100

Each part makes right and altered answers, and both sides judge them. No model is needed.

- math: the reference answers of MATH, rewritten or made wrong. Reference: is_equiv of lm-evaluation-harness
  (task hendrycks_math).
- ifeval: texts put together from fragments that matter to the rules. Reference: the harness's checkers. Left
  out are number_sentences and capital_word_frequency, for which the harness needs NLTK's data.
- bfcl: the right calls, reordered, shortened or changed. Reference: the Berkeley leaderboard's checker.
  Only ast_checker.py runs; stand-ins replace what it imports for Java, JavaScript and the names of models.
- humaneval: the file's canonical solutions must pass, and every fifth function must fail if it returns None.
  This runs the file's programs (evals/tasks/code.py describes the limits).
- conll: the names in BIO tags, as they are and changed. Reference: the package seqeval.
- triviaqa: the answers of bench/generated_rows.py, exact match. Reference: triviaqa_evaluation.py, of a clone
  of github.com/mandarjoshi90/triviaqa that --triviaqa names.

The folder --data has hendrycks_math*, bfcl_v4_*, humaneval*, conll2003* and triviaqa*. A part whose package
or file is missing is skipped, and the report says why. The table counts what only our side accepts and what
only theirs accepts.
"""

import copy
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench import generated_rows
from bench.measure import BenchConfig, run_benchmark, text_table
from configurator import UserError, optional_import, require_positive, run_script
from evals.benchmarks import read
from evals.tasks import bfcl, code, conll, ifeval, math_problems, open_qa

Verdicts = Iterator[tuple[bool, bool, Any]]  # our verdict, that of the reference, and what was judged
EXAMPLES = 5  # disagreements that the JSON shows


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    parts: str = "math,ifeval,bfcl,humaneval,conll,triviaqa"  # what to compare
    data: str = "../benchmarks"  # folder with the files of the benchmarks
    gorilla: str = "../gorilla"  # a clone of gorilla
    triviaqa: str = "../triviaqa"  # a clone of triviaqa
    limit: int = 1_000_000  # number of questions per file
    pairs: int = 4  # MATH: altered answers per problem
    calls: int = 20  # BFCL: answers per question; the first one is right
    texts: int = 1500  # IFEval: texts, each of which is judged by every rule

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "limit", "pairs", "calls", "texts")
        if unknown := [part for part in self.parts.split(",") if part not in PARTS]:
            raise UserError(f"parts: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")


# ---- MATH -------------------------------------------------------------------------------------------------

def altered_answer(answer: str, answers: list[str], draw: random.Random) -> str:
    """The answer as it is, written in another way, or changed."""
    return draw.choice([
        answer, answer.replace("\\frac", "\\dfrac"), answer.replace(" ", ""), "x=" + answer,
        "\\left" + answer if answer.startswith("(") else answer, draw.choice(answers),
        answer + "\\text{ cm}", answer.replace("1", "2", 1), answer.replace("\\sqrt", "2\\sqrt", 1)])


def compare_math(cfg: Config) -> Verdicts:
    """Answers, each compared with the right one."""
    harness = optional_import("lm_eval.tasks.hendrycks_math.utils", "parts=math")
    rows, draw = read(cfg.data, "hendrycks_math", "")[:cfg.limit], random.Random(1)
    answers = [harness.remove_boxed(harness.last_boxed_only_string(row["solution"])) for row in rows]
    for answer in answers:
        for _ in range(cfg.pairs):
            said = altered_answer(answer, answers, draw)
            yield math_problems.equal(said, answer), harness.is_equiv(said, answer), [said, answer]


# ---- IFEval -----------------------------------------------------------------------------------------------

FRAGMENTS = [
    "Hello world.", "I think, therefore", "*star*", "**bold**", "* point", "- point", "***", "******", "\n",
    "\n\n", "P.S. note", "p. p. s x", "<<title>>", "<< >>", "[name]", "[]", "SECTION 1", "Section 2",
    "Section3", '"', "My answer is no.", '{"a": 1}', "```json", "```", "WAR PEACE", "war", "warm",
    "Any other questions?", "!", "a b c d e f", '"Quote', "'tis", "Tea, please"]
JSON_TEXTS = ['{"a": [1]}', '```json\n{"a": [1]}\n```']
COMPARISONS = ["less than", "at least"]


def instructions(draw: random.Random) -> dict[str, dict[str, Any]]:
    """{instruction: drawn arguments} of the instructions that are compared."""
    number, compare = draw.randint, lambda: draw.choice(COMPARISONS)
    paragraphs = number(1, 3)
    return {
        "keywords:existence": {"keywords": draw.sample(["war", "tea", "hello"], 2)},
        "keywords:frequency": {"keyword": "war", "relation": compare(), "frequency": number(1, 3)},
        "keywords:forbidden_words": {"forbidden_words": ["war", "think"]},
        "keywords:letter_frequency": {
            "letter": "e", "let_relation": compare(), "let_frequency": number(1, 6)},
        "length_constraints:number_paragraphs": {"num_paragraphs": number(1, 3)},
        "length_constraints:number_words": {"relation": compare(), "num_words": number(1, 20)},
        "length_constraints:nth_paragraph_first_word": {
            "num_paragraphs": paragraphs, "nth_paragraph": number(1, paragraphs),
            "first_word": draw.choice(["hello", "war", "tis", "quote", "i"])},
        "detectable_content:number_placeholders": {"num_placeholders": number(1, 3)},
        "detectable_content:postscript": {"postscript_marker": draw.choice(["P.S.", "P.P.S"])},
        "detectable_format:number_bullet_lists": {"num_bullets": number(1, 3)},
        "detectable_format:constrained_response": {},
        "detectable_format:number_highlighted_sections": {"num_highlights": number(1, 4)},
        "detectable_format:multiple_sections": {
            "section_spliter": draw.choice(["Section", "SECTION"]), "num_sections": number(1, 2)},
        "detectable_format:json_format": {}, "detectable_format:title": {}, "combination:two_responses": {},
        "combination:repeat_prompt": {"prompt_to_repeat": "Hello"},
        "startend:end_checker": {"end_phrase": "Any other questions?"}, "startend:quotation": {},
        "punctuation:no_comma": {}, "change_case:english_capital": {}, "change_case:english_lowercase": {},
        "language:response_language": {"language": "en"}}


def drawn_text(draw: random.Random) -> str:
    """One to nine fragments; some texts are in small letters, in capitals, or JSON."""
    text = draw.choice([" ", "\n", "\n\n", ""]).join(draw.choices(FRAGMENTS, k=draw.randint(1, 9)))
    changed = [text.lower(), text.upper(), draw.choice(JSON_TEXTS)]
    return draw.choices([text, *changed], weights=[7, 1, 1, 1])[0]


def compare_ifeval(cfg: Config) -> Verdicts:
    """Texts that are not empty, each judged by every rule. Languages are detected in every fifth text."""
    nltk = optional_import("nltk", "parts=ifeval")
    langdetect = optional_import("langdetect", "parts=ifeval")
    with mock.patch.object(nltk.data, "find"):  # else the harness downloads NLTK's data
        registry = optional_import("lm_eval.tasks.ifeval.instructions_registry", "parts=ifeval",
                                   "lm_eval[ifeval]")
    draw = random.Random(3)
    for number in range(cfg.texts):
        text = drawn_text(draw)
        for name, arguments in instructions(draw).items() if text.strip() else ():
            if name in ifeval.NEED_LANGUAGE and number % 5:
                continue  # detecting a language is slow
            checker = registry.INSTRUCTION_DICT[name](name)
            checker.build_description(**arguments)
            langdetect.DetectorFactory.seed = 0
            yield (bool(ifeval.RULES[name](text, arguments)), bool(checker.check_following(text)),
                   [name, arguments, text])


# ---- BFCL -------------------------------------------------------------------------------------------------

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
STAND_INS = {
    "constants.enums": {"Language": SimpleNamespace(PYTHON="python", JAVA="java", JAVASCRIPT="javascript")},
    "constants.model_config": {"MODEL_CONFIG_MAPPING": {"any": SimpleNamespace(underscore_to_dot=False)}},
    "constants.type_mappings": {"JAVA_TYPE_CONVERSION": {}, "JS_TYPE_CONVERSION": {}},
    "eval_checker.ast_eval.type_convertor.java_type_converter": {"java_type_converter": None},
    "eval_checker.ast_eval.type_convertor.js_type_converter": {"js_type_converter": None}}


def import_file(key: str, folder: str, name: str, imported: dict[str, Any]) -> Any:
    """A module of a clone, with stand-ins for what it imports. UserError if the folder does not have it."""
    if not Path(folder, name).is_file():
        raise UserError(f"{key}={folder}: no file {name} in it")
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(folder, name))
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, imported):
        spec.loader.exec_module(module)
    return module


def import_ast_checker(folder: str) -> Callable[..., dict[str, Any]]:
    """The leaderboard's checker."""
    name = "berkeley-function-call-leaderboard/bfcl_eval/eval_checker/ast_eval/ast_checker.py"
    imported = {f"bfcl_eval.{each}": SimpleNamespace(**names) for each, names in STAND_INS.items()}
    return import_file("gorilla", folder, name, imported).ast_checker


def possible_value(values: list, draw: random.Random) -> Any:
    """One of the possible values; also inside objects, whose values are lists of possible values."""
    value = draw.choice([each for each in values if each != ""] or [""])
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [possible_value([each], draw) for each in value]
    if isinstance(value, dict):
        return {key: possible_value(each, draw) for key, each in value.items() if set(map(str, each)) != {""}}
    return copy.deepcopy(value)


def right_calls(question: bfcl.ToolQuestion, draw: random.Random) -> list[dict[str, Any]]:
    """The right calls. Each optional argument is left out with a probability of 30 %."""
    def given(values: list) -> bool:
        return values != [""] and not ("" in values and draw.random() < 0.3)

    return [{"name": name, "arguments": {key: possible_value(values, draw)
                                         for key, values in possible.items() if given(values)}}
            for name, possible in question.calls]


def altered_value(value: Any, draw: random.Random) -> Any:
    changed = [str(value), [value], None, 0, 1.5, "x", True, {}]
    if isinstance(value, (str, list)):
        changed.append(value * 2)
    if isinstance(value, str):
        changed.append(value.upper())
    if isinstance(value, int):
        changed.append(float(value))
    return draw.choice(changed)


def alter(calls: list[dict[str, Any]], names: list[str], draw: random.Random) -> None:
    """Change the calls in place, in one of eight ways; one of them is no change."""
    kind, call = draw.randrange(8), draw.choice(calls)
    if kind == 1:
        draw.shuffle(calls)
    elif kind == 2:
        calls.pop()
    elif kind == 3:
        calls.append(copy.deepcopy(call))
    elif kind == 4:
        call["name"] = draw.choice([*names, "unknown"])
    elif kind == 5:
        calls[draw.randrange(len(calls))] = copy.deepcopy(call)
        draw.shuffle(calls)
    elif kind > 5 and call["arguments"]:
        key = draw.choice([*call["arguments"]])
        value = call["arguments"].pop(key)
        if kind == 7:
            call["arguments"][key] = altered_value(value, draw)


def compare_bfcl(cfg: Config) -> Verdicts:
    """Answers to the questions of the categories, the first one right."""
    check, draw = import_ast_checker(cfg.gorilla), random.Random(0)
    for category in CATEGORIES:
        for question in bfcl.load(cfg.data, cfg.limit, None, category).asked:
            functions = [{"name": name, "parameters": each} for name, each in question.functions.items()]
            truth = [{name: possible} for name, possible in question.calls]
            for number in range(cfg.calls):
                calls = right_calls(question, draw)
                if number:
                    alter(calls, [*question.functions], draw)
                said = [{call["name"]: call["arguments"]} for call in calls]
                theirs = check(*copy.deepcopy((functions, said, truth)), "python", category, "any")
                yield (bfcl.judge_message(question, {"tool_calls": calls})["accuracy"], theirs["valid"],
                       [question.id, said])


# ---- HumanEval --------------------------------------------------------------------------------------------

def compare_humaneval(cfg: Config) -> Verdicts:
    """Programs: whether the tests pass, and whether the program is a canonical solution."""
    rows = read(cfg.data, "humaneval", "")[:cfg.limit]
    problems = code.load(cfg.data, cfg.limit, None, "humaneval", True).asked
    solutions = [(problem, row["canonical_solution"], True)
                 for problem, row in zip(problems, rows, strict=True)]
    for problem, text, right in [*solutions, *((each, "    return None\n", False) for each in problems[::5])]:
        outcome = code.run_program(code.program_of(problem, text))
        yield outcome == "passed", right, [problem.prompt, text, outcome]


# ---- CoNLL-2003 -------------------------------------------------------------------------------------------

def compare_conll(cfg: Config) -> Verdicts:
    """Names in the file's tags, and in the same tags with a fifth drawn at random, that either side finds."""
    seqeval = optional_import("seqeval.metrics.sequence_labeling", "parts=conll", "seqeval")
    draw = random.Random(1)
    for row in read(cfg.data, "conll2003", "")[:cfg.limit]:
        right = conll.tags_of(row)
        for tags in (right, [draw.choice(conll.TAGS) if draw.random() < 0.2 else tag for tag in right]):
            ours = conll.names_of(tags)
            theirs = {(kind, first, last + 1) for kind, first, last in seqeval.get_entities(tags)}
            for name in sorted(ours | theirs):
                yield name in ours, name in theirs, [name, tags]


# ---- TriviaQA ---------------------------------------------------------------------------------------------

def compare_triviaqa(cfg: Config) -> Verdicts:
    """Right and altered answers, each compared with all aliases."""
    script = import_file("triviaqa", cfg.triviaqa, "evaluation/triviaqa_evaluation.py", {
        name: SimpleNamespace(dataset_utils=None, utils=None)
        for name in ("utils", "utils.dataset_utils", "utils.utils")})
    for row in generated_rows.triviaqa_rows(cfg.data, "triviaqa")["test"][:cfg.limit]:
        aliases = row["answer"]["aliases"]
        for text in generated_rows.short_answers(row).values():
            yield (any(open_qa.exact_match(text, alias, trivia=True) for alias in aliases),
                   any(script.exact_match_score(text, alias) for alias in aliases), [text, aliases[0]])


# ---- The command ------------------------------------------------------------------------------------------

PARTS = {"math": compare_math, "ifeval": compare_ifeval, "bfcl": compare_bfcl, "humaneval": compare_humaneval,
         "conll": compare_conll, "triviaqa": compare_triviaqa}


def tally(verdicts: Verdicts) -> dict[str, Any]:
    """How many answers were compared, how many the reference accepts, and who alone accepts how many."""
    seen = list(verdicts)
    differ = [[ours, theirs, what] for ours, theirs, what in seen if ours != theirs]
    return {"compared": len(seen), "accepted": sum(theirs for _, theirs, _ in seen),
            "only_ours": sum(ours for ours, _, _ in differ),
            "only_theirs": sum(theirs for _, theirs, _ in differ), "examples": differ[:EXAMPLES]}


def measure(cfg: Config) -> dict[str, Any]:
    """Compare the parts. UserError if every part has to be skipped."""
    results: dict[str, Any] = {"parts": {}, "skipped": {}}
    for part in cfg.parts.split(","):
        try:
            results["parts"][part] = tally(PARTS[part](cfg))
        except UserError as error:
            results["skipped"][part] = str(error)
    if not results["parts"]:
        raise UserError("; ".join(f"{part} is skipped: {why}" for part, why in results["skipped"].items()))
    return results


def report(results: dict[str, Any]) -> str:
    """One line per part, then the parts that were skipped and why."""
    keys = ["compared", "accepted", "only_ours", "only_theirs"]
    lines = [[part, *(f"{result[key]:,}" for key in keys)] for part, result in results["parts"].items()]
    table = text_table(["", "compared", "reference accepts", "only we accept", "only it accepts"], lines)
    return "\n".join([table, *(f"{part} is skipped: {why}" for part, why in results["skipped"].items())])


def main(argv: list[str]) -> int:
    run_benchmark("bench.scoring", Config, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
