"""bench/scoring.py: agreement and disagreement are counted, and absent parts are skipped with a reason."""

import json
from types import SimpleNamespace

import pytest

from bench import scoring
from configurator import UserError
from evals.tasks import code, conll, ifeval, math_problems

# The imports and the interface of gorilla's ast_checker.py. It accepts every answer with the right names.
CHECKER = """
from bfcl_eval.constants.enums import Language
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING
from bfcl_eval.constants.type_mappings import JAVA_TYPE_CONVERSION, JS_TYPE_CONVERSION
from bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter import java_type_converter
from bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter import js_type_converter

def ast_checker(functions, said, truth, language: Language, category, model):
    assert functions[0]["parameters"]["properties"] and language == Language.PYTHON
    assert not MODEL_CONFIG_MAPPING[model].underscore_to_dot
    return {"valid": sorted(map(list, said)) == sorted(map(list, truth))}
"""


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(part, folder, **keys):
    cfg = scoring.Config(parts=part, data=str(folder), gorilla=str(folder), **keys)
    return scoring.measure(cfg)["parts"][part]


def test_math_and_a_comparison_that_is_too_kind(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    write(tmp_path / "hendrycks_math.jsonl",
          *({"problem": "?", "solution": f"\\boxed{{{answer}}}"}
            for answer in ("\\frac{1}{2}", "(1, 2)", "21")))
    result = measured("math", tmp_path, pairs=10)
    assert (result["compared"], result["only_ours"], result["only_theirs"]) == (30, 0, 0)
    assert 0 < result["accepted"] < 30
    monkeypatch.setattr(math_problems, "equal", lambda said, answer: True)
    assert measured("math", tmp_path, pairs=10)["only_ours"] == 30 - result["accepted"]


def test_ifeval_and_a_rule_that_is_too_strict(tmp_path, monkeypatch):
    for package in ("nltk", "langdetect", "immutabledict", "lm_eval"):
        pytest.importorskip(package)
    result = measured("ifeval", tmp_path, texts=12)
    assert result["compared"] > 200 and result["accepted"] > 20
    assert result["only_ours"] == result["only_theirs"] == 0
    monkeypatch.setitem(ifeval.RULES, "punctuation:no_comma", lambda text, arguments: False)
    result = measured("ifeval", tmp_path, texts=12)
    assert result["only_theirs"] > 0
    assert result["examples"][0][2][0] == "punctuation:no_comma" and "," not in result["examples"][0][2][2]


def test_bfcl_with_a_checker_that_ignores_arguments(tmp_path):
    parameters = {"type": "dict", "required": ["base"], "properties": {"base": {"type": "integer"}}}
    for category in scoring.CATEGORIES:
        row = {"id": f"{category}_0", "question": [[{"role": "user", "content": "?"}]],
               "function": [{"name": "area", "description": "", "parameters": parameters}]}
        write(tmp_path / f"bfcl_v4_{category}.jsonl", row)
        write(tmp_path / f"bfcl_v4_{category}.answers.jsonl",
              {"id": row["id"], "ground_truth": [{"area": {"base": [10]}}]})
    with pytest.raises(UserError, match=r"bfcl is skipped: gorilla=.*no file berkeley-function"):
        measured("bfcl", tmp_path)
    path = tmp_path / "berkeley-function-call-leaderboard/bfcl_eval/eval_checker/ast_eval/ast_checker.py"
    path.parent.mkdir(parents=True)
    path.write_text(CHECKER)
    result = measured("bfcl", tmp_path, calls=1)
    assert (result["compared"], result["accepted"], result["examples"]) == (4, 4, [])
    result = measured("bfcl", tmp_path, calls=20)
    assert result["compared"] == 80 and result["only_theirs"] > 0 == result["only_ours"]
    assert all(said != [{"area": {"base": 10}}] for _, _, (_, said) in result["examples"])


def test_conll_with_a_reference_that_knows_one_kind(tmp_path, monkeypatch):
    """The reference finds persons alone, so all other names are ours alone."""
    write(tmp_path / "conll2003.jsonl", {"tokens": ["Ann", "Lee", "Rome"], "ner_tags": [1, 2, 5]},
          {"tokens": ["Rome", "."], "ner_tags": ["B-LOC", "O"]})

    def get_entities(tags):
        return [(kind, first, end - 1) for kind, first, end in conll.names_of(tags) if kind == "PER"]

    module = SimpleNamespace(get_entities=get_entities)
    monkeypatch.setattr(scoring, "optional_import", lambda *names: module)
    found = measured("conll", tmp_path)
    assert found["only_theirs"] == 0 and found["only_ours"] == found["compared"] - found["accepted"] > 1
    assert found["accepted"] >= 1 and ["LOC", 2, 3] in [list(example[2][0]) for example in found["examples"]]


def test_triviaqa_with_a_script_that_keeps_articles(tmp_path):
    write(tmp_path / "triviaqa.jsonl", *(
        {"question": "Who?", "answer": {"value": f"Jane {n}", "aliases": ["J."]}} for n in range(6)))
    script = tmp_path / "evaluation" / "triviaqa_evaluation.py"
    script.parent.mkdir()
    script.write_text("""import string, utils.dataset_utils, utils.utils
def exact_match_score(said, answer):
    said, answer = ("".join(" " if c in string.punctuation else c for c in text.lower()).split()
                    for text in (said, answer))
    return said == answer
""")
    cfg = scoring.Config(data=str(tmp_path), triviaqa=str(tmp_path))
    result = scoring.tally(scoring.compare_triviaqa(cfg))
    assert (result["compared"], result["only_ours"], result["only_theirs"]) == (14, 1, 0)
    assert result["examples"] == [[True, False, [" the Jane 0", "Jane 0"]]]


def test_humaneval_and_parts_that_are_skipped(tmp_path, monkeypatch):
    write(tmp_path / "humaneval.jsonl", *(
        {"task_id": f"HumanEval/{number}", "prompt": "def add(a, b):\n", "entry_point": "add",
         "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    pass\n"}
        for number in range(6)))
    monkeypatch.setattr(code, "run_program", lambda program: "passed" if "a + b" in program else "failed")
    results = scoring.measure(scoring.Config(parts="bfcl,humaneval", data=str(tmp_path), gorilla="none"))
    assert results["parts"]["humaneval"] == {"compared": 8, "accepted": 6, "only_ours": 0, "only_theirs": 0,
                                             "examples": []}
    assert "gorilla=none: no file" in results["skipped"]["bfcl"]
    assert scoring.report(results).splitlines()[-1].startswith("bfcl is skipped: gorilla=none")
    with pytest.raises(UserError, match="there is no part 'mbpp'; there are math, ifeval, bfcl, humaneval"):
        scoring.Config(parts="mbpp")
