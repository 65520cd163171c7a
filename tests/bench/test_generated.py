"""bench/generated.py: lm-evaluation-harness gets our prompts, generates our texts and gives our scores."""

import json
import random

import pytest

from bench import generated
from configurator import UserError
from tests.evals.tasks.test_toxicity import save_classifier

WORDS = "the red file is read by nine users, who found 12 bytes in a U.S. parser; it is old".split(" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few rows per task, in the forms of the public files."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)

    def text(most):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, most)))

    def write(name, count, row):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)))

    write("gsm8k_train", 9, lambda n: {"question": text(9), "answer": f"{n} + 3 = {n + 3}\n#### {n + 3}"})
    write("gsm8k_test", 17, lambda n: {"question": text(9), "answer": f"So {n}.\n#### {1000 + n}"})
    write("asdiv", 11, lambda n: {"body": text(5), "question": f"{text(4)}?", "formula": f"{n}+2={n + 2}",
                                  "answer": f"{n + 2} (files)"})
    write("triviaqa", 19, lambda n: {"question": f"{text(5)}?", "answer": {
        "value": f"Jane {n}", "aliases": [f"J. {n}", f"Miss Austen-{n}"]}})
    write("summarize", 3, lambda n: {"article": f"It ended. {text(5)}", "highlights": f"It ends {n}."})
    write("toxicity", 6, lambda n: {"prompt": {"text": text(5)}})
    (folder / "wikitext.txt").write_text("".join(
        f" = Title {n} = \n\n {text(40)} @-@ made ( {text(9)} ) . \n = = Part = = \n {text(30)}\n"
        for n in range(3)))
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")
    requests = pytest.importorskip("requests")
    monkeypatch.setattr(requests.Session, "post", requests.Session.post)  # run_theirs replaces it
    monkeypatch.setattr(generated, "run_child", lambda side, *values: json.loads(json.dumps(side(*values))))


def measured(folder, trained, tasks, **keys):
    results = generated.measure(generated.Config(data=str(folder), model=str(trained), tasks=tasks, **keys))
    return results, results["tasks"]


def test_a_model_says_the_same_to_both(folder, trained, tmp_path, in_this_process):
    classifier = save_classifier(tmp_path / "classifier", ["neutral", "toxic"])
    results, tasks = measured(folder, trained, "gsm8k,asdiv,triviaqa,toxicity,wikitext", limit=3,
                              max_new_tokens=8, classifier=classifier)
    for name, task in tasks.items():
        assert set(task["same"].values()) == {3} and task["differ"] == {}, name
    assert 0 < tasks["wikitext"]["means"]["ours"]["bits_per_byte"] < 20
    assert tasks["toxicity"]["means"]["theirs"]["toxic"] == 1
    assert len(generated.report(results).splitlines()) == 1 + 5 + 1


def test_given_answers_and_where_the_scores_differ(folder, trained, in_this_process):
    results, tasks = measured(folder, trained, "gsm8k,triviaqa,summarize", answers=True)
    assert all(task["same"]["prompt"] == task["same"]["text"] == task["same"]["questions"]
               for task in tasks.values())
    differ = tasks["gsm8k"]["differ"]
    assert set(differ["strict"]) == {"spaces", "decimals", "dollar"}
    assert set(differ["flexible"]) == {"decimals"}
    assert differ["strict"]["dollar"]["examples"][0][:2] == [1, 0]
    assert set(tasks["triviaqa"]["differ"]) == {"exact_match"}
    assert set(tasks["triviaqa"]["differ"]["exact_match"]) == {"article", "spaces", "hyphens"}
    assert tasks["summarize"]["differ"] == {} and tasks["summarize"]["means"]["ours"]["rouge1"] > 0.5
    assert "gsm8k: strict differs for 1 answers dollar: [1.0, 0.0, " in generated.report(results)


def test_what_a_task_needs_is_asked_for():
    for keys, message in (({"tasks": "gsm"}, "tasks=gsm: must be one of gsm8k, asdiv"),
                          ({"tasks": "toxicity"}, "tasks=toxicity: needs --classifier"),
                          ({"tasks": "mbpp"}, "tasks=mbpp: needs --allow_code"),
                          ({"tasks": "squad_v2"}, "mbpp and squad_v2 need --metrics")):
        with pytest.raises(UserError, match=message):
            generated.Config(**keys)
