"""Multiple choice: each row function reads the hub's form, makes the stated prompt, and refuses a row without
a clear answer; LAMBADA's figures by hand."""

import json
import math

import pytest

from configurator import UserError
from dataset.decontaminate import Index
from dataset.eval_items import item_text
from evals.likelihood import Likelihood
from evals.multiple_choice import Question, ask, lettered, shots_text
from evals.tasks import choice
from evals.tasks.choice import BENCHMARKS

HELLASWAG = {"activity_label": "Roofing", "ctx_a": "A man sits on a roof.", "ctx_b": "he", "label": "1",
             "endings": ["falls [step] off.", "lays tiles.", "sings.", "eats."]}
ARC = {"question": "Why is the sky blue?", "answerKey": "2",
       "choices": {"text": ["paint", "scattering"], "label": ["1", "2"]}}
OPENBOOKQA = {"question_stem": "Bees need", "answerKey": "B",
              "choices": {"text": ["ice", "flowers"], "label": ["A", "B"]}}
COMMONSENSE = {"question": " Where is a bank? ", "answerKey": "B",
               "choices": {"text": ["moon", "town"], "label": ["A", "B"]}}
MMLU_PRO = {"question": "2 + 2?", "options": ["3", "4", "5"], "answer": "B", "category": "math"}
PIQA = {"goal": "Boil water", "sol1": "Use a kettle.", "sol2": "Use a fridge.", "label": 0}
WINOGRANDE = {"sentence": "Ann thanked Eve because _ helped.", "option1": "Ann", "option2": "Eve",
              "answer": "2"}
BOOLQ = {"passage": "Cats purr.", "question": "do cats purr", "label": 1}
SCIQ = {"question": "What burns?", "support": " Wood burns.", "correct_answer": "wood", "distractor1": "ice",
        "distractor2": "salt", "distractor3": "iron"}
COPA = {"premise": "The man turned on the faucet. ", "question": "effect", "choice1": "It rained.",
        "choice2": "Water flowed.", "label": 1}
LAMBADA = {"text": "He said\nyes and no"}
MMLU = {"question": "2 + 2? ", "subject": "college_mathematics", "choices": ["3", "4"], "answer": 1}
ROWS = {"mmlu": (MMLU, Question(
            "2 + 2?\nA. 3\nB. 4\nAnswer:", ("A", "B"), (1,),
            "The following are multiple choice questions (with answers) about college mathematics.\n\n",
            "college_mathematics")),
        "hellaswag": (HELLASWAG, Question("Roofing: A man sits on a roof. He",
                                          ("falls off.", "lays tiles.", "sings.", "eats."), (1,))),
        "arc_easy": (ARC, Question("Question: Why is the sky blue?\nAnswer:", ("paint", "scattering"), (1,))),
        "arc_challenge": (ARC, Question("Question: Why is the sky blue?\nAnswer:", ("paint", "scattering"),
                                        (1,))),
        "openbookqa": (OPENBOOKQA, Question("Bees need", ("ice", "flowers"), (1,))),
        "commonsense_qa": (COMMONSENSE, Question(
            "Question: Where is a bank?\nA. moon\nB. town\nAnswer:", ("A", "B"), (1,))),
        "mmlu_pro": (MMLU_PRO, Question("2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:", ("A", "B", "C"), (1,))),
        "piqa": (PIQA, Question("Question: Boil water\nAnswer:", ("Use a kettle.", "Use a fridge."), (0,))),
        "winogrande": (WINOGRANDE, Question(
            "", ("Ann thanked Eve because Ann", "Ann thanked Eve because Eve"), (1,), ending="helped.")),
        "boolq": (BOOLQ, Question("Cats purr.\nQuestion: do cats purr?\nAnswer:", ("no", "yes"), (1,))),
        "sciq": (SCIQ, Question("Wood burns.\nQuestion: What burns?\nAnswer:",
                                ("ice", "salt", "iron", "wood"), (3,))),
        "copa": (COPA, Question("The man turned on the faucet therefore", (" it rained.", " water flowed."),
                                (1,))),
        "lambada": (LAMBADA, Question("He said\nyes and", ("no",), (0,)))}


def load(folder, name, rows, shots=0):
    (folder / f"{name}_x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return choice.load(str(folder / f"{name}_x.jsonl"), 100, shots, name)


def test_the_table_is_complete():
    assert ROWS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_hub(name, tmp_path):
    row, expected = ROWS[name]
    assert load(tmp_path, name, [row]) == [expected]
    assert any(" " in text for text in item_text(row).split("\n\n")), "decontamination sees its text"


@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"lambada", "sciq"}))
@pytest.mark.parametrize("label", [-1, "", None, True, 9, "9", 1.0])
def test_a_label_that_is_none_is_refused(name, label, tmp_path):
    """Test splits on the hub have the labels -1 and ""."""
    row = dict(ROWS[name][0])
    row[next(key for key in ("label", "answerKey", "answer") if key in row)] = label
    with pytest.raises(UserError, match=f"{name}_x.jsonl: row 1 does not fit this benchmark"):
        load(tmp_path, name, [row])


@pytest.mark.parametrize("name, changes", [
    ("winogrande", {"sentence": "No gap."}), ("winogrande", {"sentence": "Ends with _"}),
    ("sciq", {"correct_answer": " "}), ("sciq", {"support": None}), ("copa", {"choice1": ""}),
    ("copa", {"question": "why"}), ("lambada", {"text": "trailing "}), ("boolq", {"passage": 3}),
    ("mmlu_pro", {"options": []}), ("arc_easy", {"choices": {"text": ["a"], "label": ["1", "2"]}}),
    ("hellaswag", {"endings": "abcd"})])
def test_a_row_without_its_texts_is_refused(name, changes, tmp_path):
    with pytest.raises(UserError, match="row 1 does not fit this benchmark"):
        load(tmp_path, name, [ROWS[name][0] | changes])


def test_decontamination_finds_a_gap_that_is_filled():
    """Where WinoGrande's row has "_", a text has a word: a near-duplicate."""
    sentence = "The nurse thanked the doctor for the long letter because _ had explained each step clearly."
    rows = {"winogrande": WINOGRANDE | {"sentence": sentence},
            "lambada": {"text": "He looked at the old harbour, the boats and the gulls, and then he said no"}}
    index = Index([(name, [("x:1", item_text(row))]) for name, row in rows.items()])
    filled = sentence.replace("_", "she")
    found = index.find([f"Some text.\n{filled}\nMore.", f"A. {rows['lambada']['text']}.", "Nothing of it."])
    assert [{each["benchmark"] for each in overlaps} for overlaps in found] == [
        {"winogrande"}, {"lambada"}, set()]


def test_other_forms_of_rows(tmp_path):
    original = {"answerKey": "B", "question": {"stem": "Bees need", "choices": [
        {"text": "ice", "label": "A"}, {"text": "flowers", "label": "B"}]}}
    assert load(tmp_path, "openbookqa", [original]) == [ROWS["openbookqa"][1]]
    answer = {key: BOOLQ[key] for key in ("passage", "question")} | {"answer": True}
    assert load(tmp_path, "boolq", [answer]) == [ROWS["boolq"][1]]
    assert load(tmp_path, "hellaswag", [HELLASWAG | {"label": 1}]) == [ROWS["hellaswag"][1]]


def test_files_of_a_longer_name_belong_to_the_longer_task(tmp_path):
    rows = {"mmlu_pro_test": [MMLU_PRO], "mmlu_pro_validation": [MMLU_PRO | {"question": "Shot?"}] * 2,
            "mmlu_test": [{"subject": "anatomy", "question": "Q?", "choices": ["a", "b"], "answer": 0}]}
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    assert [question.group for question in choice.load(str(tmp_path), 9, 0, "mmlu")] == ["anatomy"]
    [question] = choice.load(str(tmp_path), 9, 2, "mmlu_pro")
    assert question.shots == "Shot?\nA. 3\nB. 4\nC. 5\nAnswer: B\n\n" * 2


# ---- Scores -----------------------------------------------------------------------------------------------

class Asked:
    """A stand-in for LM that keeps what it was asked; each continuation's score is its length."""

    def loglikelihood(self, requests):
        self.requests = requests
        return [Likelihood(-float(len(context) + len(each)), greedy=len(each) == 3)
                for context, each in requests]


def test_an_ending_is_scored_after_each_choice():
    lm, winogrande = Asked(), ROWS["winogrande"][1]
    rows = ask(lm, [ROWS["piqa"][1], winogrande])
    assert lm.requests == [("Question: Boil water\nAnswer:", " Use a kettle."),
                           ("Question: Boil water\nAnswer:", " Use a fridge."),
                           ("Ann thanked Eve because Ann", " helped."),
                           ("Ann thanked Eve because Eve", " helped.")]
    assert [len(row) for row in rows] == [2, 2]
    assert shots_text([winogrande], 1) == "Ann thanked Eve because Eve helped.\n\n"
    # As a worked example COPA has one space more than the choice: "therefore" + " " + " water flowed."
    assert shots_text([ROWS["copa"][1]], 1) == "The man turned on the faucet therefore  water flowed.\n\n"
    result = choice.score(lm, [winogrande], "winogrande")
    assert result.figures["accuracy"].value == 0.5 and result.details["chance"] == 0.5, "equal scores"


def test_the_last_word(tmp_path):
    """" no" is written by greedy decoding (three characters), " maybe" is not: by hand."""
    questions = load(tmp_path, "lambada", [LAMBADA, {"text": "He said maybe"}])
    result = choice.score(Asked(), questions, "lambada")
    assert result.figures["accuracy"][:1] + result.figures["accuracy"][2:] == (0.5, 2)
    nats = (len("He said\nyes and no") + len("He said maybe")) / 2
    assert result.figures["perplexity"].value == pytest.approx(math.exp(nats))
    assert [answer["right"] for answer in result.answers] == [1, 0]


def test_lettered():
    assert lettered("Q?", ["x", "y"], 1, "group") == Question("Q?\nA. x\nB. y\nAnswer:", ("A", "B"), (1,),
                                                             group="group")
