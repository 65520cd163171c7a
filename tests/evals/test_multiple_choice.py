"""Multiple choice: the prompts of every task from rows of every form; guessing scores chance, an oracle 1.

tests/bench/test_harness.py compares the prompts with those of lm-evaluation-harness.
"""

import dataclasses
import gzip
import itertools
import json
import random

import pytest

import eval as evaluation
from configurator import UserError
from evals.likelihood import Likelihood
from evals.multiple_choice import Question, credit, per_character, shots_text, splits
from evals.tasks import choice, glue, truthfulqa
from tests.conftest import SHARED

TASKS = ("mmlu", "hellaswag", "arc_easy", "arc_challenge", "truthfulqa", "sst2", "cola", "rte", "sst2_few",
         "cola_few", "rte_few")


class Scorer:
    """A stand-in for LM: rule(context, continuation) is the log-probability."""

    def __init__(self, rule):
        self.rule = rule

    def loglikelihood(self, requests):
        return [Likelihood(self.rule(context, each)) for context, each in requests]


def write_rows(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def whole(question):
    return question.shots + question.prompt


# ---- Prompts ----------------------------------------------------------------------------------------------

def test_mmlu(tmp_path):
    rows = [{"subject": subject, "split": split, "question": f" {subject} {split} {number}? ",
             "choices": ["1", "2", "3", "4"], "answer": "ABCD"[number]}
            for subject in ("world_religions", "anatomy") for split in ("dev", "test") for number in range(4)]
    with gzip.open(tmp_path / "mmlu_dev_test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    found = choice.load(str(tmp_path), 3, 1, "mmlu")
    assert [question.group for question in found] == ["anatomy", "world_religions", "anatomy"]
    before = ("The following are multiple choice questions (with answers) about world religions.\n\n"
              "world_religions dev 0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n")
    assert found[1] == Question("world_religions test 0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", tuple("ABCD"),
                                (0,), before, "world_religions")
    assert len(choice.load(str(tmp_path), 100, 4, "mmlu")) == 8
    assert "dev" not in choice.load(str(tmp_path), 1, 0, "mmlu")[0].shots
    for row in rows:  # as on the hub
        row["answer"] = "ABCD".index(row["answer"])
    assert choice.load(write_rows(tmp_path / "..", mmlu=rows) + "/mmlu.jsonl", 3, 1, "mmlu") == found
    with pytest.raises(UserError, match="shots=5: there are 4 examples of world_religions"):
        choice.load(str(tmp_path), 3, None, "mmlu")


def test_mmlu_by_subject():
    questions = [Question("?", tuple("ABCD"), (0,), group=group) for group in
                 ("anatomy", "anatomy", "virology", "econometrics")]
    right = iter((1, 0, 1, 1))
    lm = Scorer(lambda context, choice: (choice == " A" and next(right)) + 0.5 * (choice == " B"))
    details = choice.score(lm, questions, "mmlu").details
    assert details["subjects"]["anatomy"] == {"value": 0.5, "stderr": 0.5, "n": 2}
    assert {name: (each["value"], each["n"]) for name, each in details["groups"].items()} == {
        "STEM": (0.5, 2), "social sciences": (1.0, 1), "other": (1.0, 1)}
    assert sum(map(len, choice.SUBJECTS.values())) == 57 and details["chance"] == 0.25


def test_hellaswag(tmp_path):
    row = {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
           "ctx_b": "he", "ctx": "A man is sitting on a roof. he", "split": "val", "label": "3",
           "endings": ["is using wrap.", "is  [step] ripping.", "[title] holds [x]a cube.", "starts."]}
    expected = Question("Roof shingle removal: A man is sitting on a roof. He",
                        ("is using wrap.", "is ripping.", "holds a cube.", "starts."), (3,))
    found = choice.load(write_rows(tmp_path, hellaswag_val=[row]), 5, None, "hellaswag")
    assert found[0].prompt == expected.prompt and found[0].gold == (3,)
    assert choice.without_markup(" [header] How to [title] Begin [step] Now. ") == " How to. Begin Now."
    other = {"question": "[header] How to sew [title] Cut. [step] Fold", "answer": "B", "id": 1,
             "choices": {"B": "[title] two", "A": "one", "C": "three", "D": "four"}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "hellaswag_2.json").write_text(json.dumps({"dev": [other], "test": [other, other]}))
    found = choice.load(str(tmp_path / "other"), 5, 1, "hellaswag")
    assert found[0] == Question(" How to sew. Cut. Fold", ("one", " two", "three", "four"), (1,),
                                " How to sew. Cut. Fold  two\n\n") and len(found) == 2


def test_arc(tmp_path):
    local = {"id": "1", "answerKey": "2", "question": {"stem": "Why?", "choices": [
        {"text": "so", "label": "1"}, {"text": "thus", "label": "2"}, {"text": "no", "label": "3"}]}}
    hub = {"id": "1", "question": "Why?", "answerKey": "2",
           "choices": {"text": ["so", "thus", "no"], "label": ["1", "2", "3"]}}
    flat = {"query": "Question: Why?", "choices": ["so", "thus", "no"], "gold": 1}
    expected = Question("Question: Why?\nAnswer:", ("so", "thus", "no"), (1,),
                        "Question: Why?\nAnswer: thus\n\n" * 2)
    for number, row in enumerate((local, hub)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_rows(folder, arc_challenge_dev=[row] * 3, arc_challenge_test=[row] * 2)
        assert choice.load(str(folder), 9, 2, "arc_challenge") == [expected] * 2
    write_rows(tmp_path, arc_easy=[flat] * 5)
    assert choice.load(str(tmp_path), 9, 2, "arc_easy") == [expected] * 3, "the examples are not asked"
    with pytest.raises(UserError, match="shots=25: there are 5 examples"):
        choice.load(str(tmp_path), 9, None, "arc_easy")


def test_truthfulqa(tmp_path):
    local = {"question": "Why?", "mc1_targets": {"so": 1, "no": 0},
             "mc2_targets": {"so": 1, "thus": 1, "no": 0}}
    hub = {"question": "Why?", **{key: {"choices": list(local[key]), "labels": list(local[key].values())}
                                  for key in ("mc1_targets", "mc2_targets")}}
    for row in (local, hub):
        found = truthfulqa.load(write_rows(tmp_path, truthfulqa=[row]), 5, 3)
        assert found.one[0].prompt == "Q: Why?\nA:" and found.one[0].shots.count("Q: ") == 6
        assert (found.one[0].choices, found.one[0].gold) == (("so", "no"), (0,))
        assert (found.many[0].choices, found.many[0].gold) == (("so", "thus", "no"), (0, 1))
    likely = {" so": -1.0, " thus": -2.0, " no": -1.5}
    figures = truthfulqa.score(Scorer(lambda context, choice: likely[choice] - 900), found).figures
    share = (0.36788 + 0.13534) / (0.36788 + 0.13534 + 0.22313)  # e^-1, e^-2, e^-1.5, without underflow
    assert figures["mc1"].value == 1.0 and figures["mc2"].value == pytest.approx(share, abs=1e-4)


def test_glue(tmp_path):
    lines = {"sst2_dev": ["a b\t1", "c\t0"], "sst2_train": ["sentence\tlabel", "g\t1", "h\t1", "i\t0"],
             "cola_dev": ["gj04\t1\t\tThe x.", "gj04\t0\t*\tX the."],
             "rte_val": ["2\tOne.\tTwo.\tentailment", "3\tOne.\tTwo?\tnot_entailment"],
             "rte_train": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment"]}
    for name, rows in lines.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    data = str(tmp_path)
    ask = "\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert glue.load(data, 9, None, "sst2") == [Question(f"{text}{ask}", ("negative", "positive"), (gold,))
                                                for text, gold in (("a b", 1), ("c", 0))]
    assert glue.load(data, 1, None, "sst2", few=3)[0].shots == (
        f"i{ask} negative\n\ng{ask} positive\n\nh{ask} positive\n\n"), "the two answers alternate"
    found = glue.load(data, 9, None, "cola")
    assert [question.gold for question in found] == [(1,), (0,)]
    assert found[1].prompt == "X the.\nQuestion: Does this sentence make sense?\nAnswer:"
    assert glue.load(data, 9, 1, "rte") == [
        Question(f"One.\nQuestion: {text} True or False?\nAnswer:", ("True", "False"), (gold,),
                 "A.\nQuestion: B. True or False?\nAnswer: False\n\n")
        for text, gold in (("Two.", 0), ("Two?", 1))]
    hub = [{"sentence": "{c} ", "label": 0, "idx": 0, "fields": 7}]  # .tsv files have "fields"
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub", sst2_validation=hub)
    assert glue.load(str(tmp_path / "hub"), 9, 0, "sst2")[0].prompt == f"{{c}} {ask}"


def test_the_other_tasks_of_glue(tmp_path):
    """Rows of the hub and lines of GLUE's files; MNLI's hypothesis ends with one dot."""
    pairs = {"mnli": ({"premise": "A.", "hypothesis": "B ", "label": 1},
                      Question("A.\nQuestion: B. True, False or Neither?\nAnswer:",
                               ("True", "Neither", "False"), (1,))),
             "qnli": ({"question": "Q?", "sentence": "S.", "label": 1},
                      Question("Q?\nS.\nQuestion: Does this response answer the question?\nAnswer:",
                               ("yes", "no"), (1,))),
             "wnli": ({"sentence1": "A.", "sentence2": "B.", "label": 1},
                      Question("A.\nQuestion: B. True or False?\nAnswer:", ("False", "True"), (1,))),
             "qqp": ({"question1": "A?", "question2": "B?", "label": 0},
                     Question("Question 1: A?\nQuestion 2: B?\n"
                              "Question: Do both questions ask the same thing?\nAnswer:",
                              ("no", "yes"), (0,))),
             "mrpc": ({"sentence1": "A.", "sentence2": "B.", "label": 1},
                      Question("Sentence 1: A.\nSentence 2: B.\n"
                               "Question: Do both sentences mean the same thing?\nAnswer:",
                               ("no", "yes"), (1,))),
             "stsb": ({"sentence1": "A.", "sentence2": "B.", "label": 2.6},
                      Question("Sentence 1: A.\nSentence 2: B.\n"
                               "Question: How similar are the two sentences in meaning, from 0 to 5?\n"
                               "Answer:", tuple("012345"), (3,), value=2.6))}
    tables = {"qnli": "index\tquestion\tsentence\tlabel\n7\tQ?\tS.\tnot_entailment\n",
              "wnli": "index\tsentence1\tsentence2\tlabel\n7\tA.\tB.\t1\n",
              "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t6\t7\tA?\tB?\t0\n",
              "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tA.\tB.\n"}
    for name, (row, expected) in pairs.items():
        data = write_rows(tmp_path, **{name: [row]})
        assert glue.load(f"{data}/{name}.jsonl", 9, None, name) == [expected]
        (tmp_path / f"{name}.tsv").write_text(tables.get(name, ""))
        assert name not in tables or glue.load(f"{data}/{name}.tsv", 9, None, name) == [expected]
        for label in (-1, "", None, True, 6, "entailed"):
            write_rows(tmp_path, **{name: [row | {"label": label}]})
            with pytest.raises(UserError, match=f"{name}.jsonl: row 1 does not fit"):
                glue.load(f"{data}/{name}.jsonl", 9, None, name)
    row = pairs["mnli"][0] | {"hypothesis": "B."}
    assert glue.load(write_rows(tmp_path, mnli=[row]) + "/mnli.jsonl", 9, None, "mnli")[0] == pairs["mnli"][1]


def test_similarity_is_correlated_with_the_labels():
    """Three questions; the grade is the mean of 0 to 5 under the model's probabilities: by hand."""
    questions = [Question("a", tuple("012345"), (0,), value=value) for value in (0.0, 2.0, 5.0)]
    likely = iter([[0, -900, -900, -900, -900, -900], [0] * 6, [-900, -900, -900, -900, 0, 0]])
    lm = Scorer(lambda context, choice: next(scores))
    scores = itertools.chain.from_iterable(likely)
    result = glue.score(lm, questions, "stsb")
    assert [answer["grade"] for answer in result.answers] == pytest.approx([0, 2.5, 4.5])
    # Deviations from the means 7/3 and 7/3: products 49/9 - 1/18 + 52/9, squares 61/6 and 38/3.
    expected = (49 / 9 - 1 / 18 + 52 / 9) / (61 / 6 * 38 / 3) ** 0.5
    assert result.figures["pearson"].value == pytest.approx(expected)
    assert result.figures["spearman"].value == pytest.approx(1)
    assert list(result.figures) == ["pearson", "spearman"]
    assert glue.ranks(glue.np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    assert glue.pearson(glue.np.ones(3), glue.np.arange(3.0)).value == 0


def test_the_hub_is_read_like_files(tmp_path, monkeypatch):
    """`datasets` reads a local folder in place of the hub."""
    rows = {split: [{"sentence": f"{split} {number}", "label": number % 2} for number in range(4)]
            for split in ("train", "validation")}
    write_rows(tmp_path, **rows)
    monkeypatch.setattr(glue, "splits", lambda source, name, hub: splits(
        source, name, {split: f"{tmp_path}::{place.rpartition(':')[2]}" for split, place in hub.items()}))
    found = glue.load(None, 3, 2, "cola")
    assert [whole(question).count("train") for question in found] == [2, 2, 2]
    assert [question.prompt[:14] for question in found] == [f"validation {number}\nQ" for number in range(3)]


@pytest.mark.parametrize("row, message", [
    ({"query": "Question: x", "choices": ["a"]}, "easy.jsonl: row 1 does not fit this benchmark .Key"),
    ({"query": "Question: x", "choices": ["a"], "gold": 3}, "the label 3 is not a whole number from 0 to 0"),
    ({"query": "Question: x", "choices": 3, "gold": 0}, "TypeError"),
])
def test_a_row_that_does_not_fit_is_reported(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        choice.load(write_rows(tmp_path, arc_easy=[row]), 5, 0, "arc_easy")


def test_which_split_the_questions_come_from(tmp_path):
    """Questions come from the split of the protocol if it is there; a test split may have no answers."""
    for number, (hub, names, expected) in enumerate([
            ({"dev": "", "test": ""}, ["auxiliary_train", "dev", "validation", "test"], ("dev", "test")),
            ({"train": "", "validation": ""}, ["train", "val", "test"], ("train", "val")),
            ({"validation": ""}, ["TEST", "dev"], ("dev", "TEST")),
            ({"dev": ""}, ["TEST", "dev"], (None, "dev")),
            ({"train": "", "test": ""}, ["dev", "test"], ("dev", "test")),
            ({"train": "", "test": ""}, ["other"], (None, "other"))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            write_rows(folder, **{f"quiz_{name}": [{"of": name}]})
        examples, asked = splits(str(folder), "quiz", hub)
        assert ([row["of"] for row in examples] or [None], [row["of"] for row in asked]) == (
            [expected[0]], [expected[1]])
    rows = {split: [{"of": split}] for split in ("auxiliary_train", "dev", "test")}
    (tmp_path / "all.json").write_text(json.dumps(rows))
    examples, asked = splits(str(tmp_path / "all.json"), "quiz", {"dev": "", "test": ""})
    assert [row["of"] for row in examples + asked] == ["dev", "test"]


def test_the_answer_is_the_choice_that_was_scored(tmp_path):
    """After "Why?", " so" is more likely, but " thus it is" is more likely per character."""
    row = {"query": "Why?", "choices": ["so", "thus it is"], "gold": 1}
    questions = choice.load(write_rows(tmp_path, arc_easy=[row]), 1, 0, "arc_easy")
    likely = {" so": -4.0, " thus it is": -5.0}
    found = choice.score(Scorer(lambda context, text: likely[text]), questions, "arc_easy")
    assert found.figures["accuracy_norm"].value == 1 and found.figures["accuracy"].value == 0
    assert (found.answers[0]["said"], found.answers[0]["right"]) == (1, 1)


# ---- Points -----------------------------------------------------------------------------------------------

def test_equal_choices_share_the_point():
    assert credit([-1.0, -2.0, -3.0], (0,)) == 1 and credit([-1.0, -2.0, -3.0], (1, 2)) == 0
    assert credit([-1.0, -1.0, -1.0, -1.0], (0,)) == 0.25 and credit([-1.0, -1.0, -3.0], (2,)) == 0
    assert credit([-1.0, -1.0, -3.0], (0, 1)) == 1
    row = [Likelihood(-6.0), Likelihood(-8.0)]
    assert per_character(row, ["abc", "abcdefgh"]) == [-2, -1], "only characters of the choice count"
    assert shots_text([], 0) == ""


def test_matthews_correlation():
    gold, said = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 1, 0, 1, 1, 0, 1]
    found = glue.jackknife(gold, said, glue.correlation)
    # By hand: tp 4, tn 2, fp 1, fn 1: (8 - 1) / sqrt(5 * 5 * 3 * 3) = 7 / 15.
    assert found.value == pytest.approx(7 / 15) and found.n == 8
    without = [glue.jackknife(gold[:i] + gold[i + 1:], said[:i] + said[i + 1:], glue.correlation).value
               for i in range(8)]
    average = sum(without) / 8
    assert found.stderr == pytest.approx((7 / 8 * sum((each - average) ** 2 for each in without)) ** 0.5)
    assert glue.jackknife([1, 0, 1], [1, 1, 1], glue.correlation) == (0, 0, 3)
    assert glue.jackknife([1, 0], [0, 1], glue.correlation).value == -1
    assert glue.jackknife(gold, said, glue.f1).value == pytest.approx(8 / 10), "2 * 4 / (2 * 4 + 1 + 1)"
    assert glue.jackknife([0, 0], [0, 0], glue.f1) == (0, 0, 2)


# ---- Guessing and knowing ---------------------------------------------------------------------------------

def load(name, limit=1000):
    if not (SHARED / "eval").is_dir():
        pytest.skip("the benchmarks are not at hand (public data beside the repository)")
    task = evaluation.TASKS[name]
    return task.module, task.settings, task.module.load(str(SHARED), limit, None, **task.settings)


@pytest.mark.parametrize("name", TASKS)
def test_guessing_scores_at_chance(name):
    """Random log-probabilities score at chance: sums, sums of three values (many ties), sums per character.

    The sums have the same distribution for all choices of a question.
    """
    module, settings, questions = load(name)
    draw = random.Random(name)
    numbers = {"sums": lambda context, choice: draw.gauss(-50, 10),
               "ties": lambda context, choice: draw.randrange(3),
               "per character": lambda context, choice: draw.gauss(-5, 1) * (len(choice) - 1)}
    for kind, rule in numbers.items():
        result = module.score(Scorer(rule), questions, **settings)
        keys = ["accuracy_norm"] if kind == "per character" else ["accuracy", "mc1", "matthews"]
        for key in set(keys) & result.figures.keys():
            figure = result.figures[key]
            chance = 0 if key == "matthews" else result.details["chance"]
            assert abs(figure.value - chance) < 3 * figure.stderr, (kind, key, figure, chance)


@pytest.mark.parametrize("name", TASKS)
def test_equal_choices_score_at_chance_in_any_order(name):
    """All choices are equally likely: no figure may depend on the place of the right choice."""
    module, settings, questions = load(name)
    result = module.score(Scorer(lambda context, choice: -1.0), questions, **settings)
    key = "mc1" if "mc1" in result.figures else "accuracy"
    assert result.figures[key].value == pytest.approx(result.details["chance"])


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_is_always_right(name):
    """The right choice is in the prompt: a model that reads it there is always right."""
    module, settings, questions = load(name)

    def leaked(asked):
        return [dataclasses.replace(each, prompt=f"{each.prompt}\0" + "\0".join(
            f" {each.choices[gold]}" for gold in each.gold)) for each in asked]

    questions = truthfulqa.BothForms(*map(leaked, questions)) if name == "truthfulqa" else leaked(questions)
    result = module.score(Scorer(lambda context, choice: 0.0 if choice in context.split("\0")[1:] else -1e4),
                          questions, **settings)
    twins = sum(len(set(each.choices)) < len(each.choices) for each in itertools.chain(
        *(questions if name == "truthfulqa" else [questions])))
    for key, figure in result.figures.items():
        assert figure.value == pytest.approx(1.0, abs=twins / figure.n), (key, figure, twins)
        assert twins <= 4
