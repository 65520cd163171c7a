"""Estimators of several samples per question, by hand; every method on a model with known answers."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import evals.lm
from configurator import UserError
from evals.benchmarks import Questions
from evals.results import Result, mean
from evals.votes import (
    METHODS,
    Asker,
    Sample,
    VoteSettings,
    add_votes,
    all_methods,
    best_scored,
    draw,
    in_blocks,
    pass_at_k,
    vote,
)
from formats.tokenizer import Tokenizer


def sample(answer, right="7", tokens=10, score=0.5):
    return Sample(answer, answer == right, tokens, score)


# ---- One question -----------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    """Five samples, two of them right. 3 of the 10 pairs have none of the right ones."""
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 2, 4) == 1, "of four samples at least one is right"
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 5, 1) == 1


@pytest.mark.parametrize("n, right, k", [(6, 2, 3), (8, 1, 4), (7, 5, 2)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, right, k):
    subsets = [any(each) for each in itertools.combinations([True] * right + [False] * (n - right), k)]
    assert pass_at_k(n, right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_is_unbiased():
    """The expectation over n draws, each right with probability p, is 1 - (1 - p)^k exactly."""
    n, k, p = 8, 3, 0.2
    expected = sum(math.comb(n, c) * p**c * (1 - p)**(n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p)**k)


def test_votes_by_hand():
    maj = METHODS["maj"][0]
    assert maj([sample("7"), sample("8"), sample("7")]) == 1
    assert maj([sample("7"), sample("8"), sample("8")]) == 0
    assert maj([sample("7"), sample("8")]) == 0.5, "equally many votes share the point"
    assert maj([sample("7"), sample("8"), sample("9")]) == pytest.approx(1 / 3)
    assert maj([sample("7"), sample(""), sample("")]) == 1, "no answer is no vote"
    assert maj([sample(""), sample("")]) == 0


def test_weighted_votes_by_hand():
    """One sure answer (.9) against two doubtful ones (.3 + .3)."""
    samples = [sample("7", score=0.9), sample("8", score=0.3), sample("8", score=0.3)]
    assert METHODS["weighted"][0](samples) == 1 and METHODS["maj"][0](samples) == 0
    assert vote(samples, [1, 1, 0.5]) == 0
    assert vote(samples, [1.5, 1, 0.5]) == 0.5


def test_the_best_scored_sample_by_hand():
    assert best_scored([sample("7", score=0.9), sample("8", score=0.8)]) == 1
    assert best_scored([sample("7", score=0.9), sample("8", score=0.9)]) == 0.5


def test_blocks_of_samples_by_hand():
    """Two blocks of two: the first shares its point, the second wins; a fifth sample is left over."""
    samples = [[sample("7", tokens=1), sample("8", tokens=2), sample("7", tokens=4), sample("7", tokens=8),
                sample("8", tokens=99)]]
    assert in_blocks(samples, 2, "maj") == ([0.75], [7.5]), "(1 + 2 + 4 + 8) / 2 tokens"
    assert in_blocks(samples, 2, "verified").tokens == [15], "the verifier reads them as well"


# ---- All questions ----------------------------------------------------------------------------------------


class FakeLM:
    """Answers question q with the next of its scripted answers, by the kind of the call."""

    def __init__(self):
        self.temperature, self.seed, self.copies, self.budget, self.attempts = 0.0, 0, 1, 1, []
        self.calls = []

    def score(self, questions):
        asked = questions.asked if isinstance(questions, Questions) else questions
        self.calls.append((self.temperature, self.copies, self.budget, len(self.attempts), list(asked)))
        said, places = [], {}
        for question in asked:
            place = places[question["name"]] = places.get(question["name"], -1) + 1
            kind = "sampled" if self.temperature else "long" if self.budget > 1 else (
                f"revised{len(self.attempts[0]) // 2}" if self.attempts else "greedy")
            said.append(question[kind][place])
        self.rows = [[9, round(100 * score), 0] for _, score in said]  # the second id is the score
        self.cut = [answer.endswith("...") for answer, _ in said]
        self.sampled = [[False, True, True] for _ in said]
        self.replies = [[*(self.attempts[i] if self.attempts else []), {"content": answer}]
                        + [{"content": "?"}] * bool(self.attempts) for i, (answer, _) in enumerate(said)]
        answers = [{"vote": answer, "right": answer == "7"} for answer, _ in said]
        return Result({"accuracy": mean([answer["right"] for answer in answers])}, answers)


VERIFIER = SimpleNamespace(score_rows=lambda rows, sampled: torch.tensor([row[1] / 100 for row in rows]))
EASY = {"name": "easy", "greedy": [("7", 0.9)], "sampled": [("7", 0.9)] * 4}
HARD = {"name": "hard", "greedy": [("8...", 0.2)], "long": [("7", 0.6)],
        "sampled": [("8", 0.3), ("8", 0.4), ("7", 0.6), ("9", 0.5)],
        "revised0": [("9", 0.3)], "revised1": [("7", 0.8)]}


def run(questions, verifier=VERIFIER, **settings):
    lm = FakeLM()
    asker = Asker(lm, lambda lm, questions: lm.score(questions), questions,
                  VoteSettings(num_samples=4, temperature=0.7, seed=5, **settings), verifier)
    result = lm.score(questions)
    return lm, asker, result


@pytest.mark.parametrize("wrapped", [False, True])
def test_every_method_by_hand(wrapped):
    questions = [EASY, HARD]
    lm, asker, result = run(Questions(questions, ["a shot"]) if wrapped else questions)
    found = all_methods(asker, result)
    right = {name: points.right for name, points in found.items()}
    assert right["greedy"] == [1, 0]
    assert right["pass@1"] == [1, 0.25] and right["pass@4"] == right["oracle@4"] == [1, 1]
    assert right["pass@2"] == [1, pytest.approx(0.5)]
    assert right["maj@4"] == [1, 0] and right["weighted@4"] == [1, 0], "8 has two of four votes, and .7"
    assert right["verified@4"] == [1, 1] and right["verified@2"] == [1, 0.5]
    assert "verified@1" not in right, "one sample is no choice"
    assert right["longer"] == [1, 1], "the cut answer is generated again"
    assert right["revise"] == [1, 1], "the second revision is accepted"
    tokens = {name: points.tokens for name, points in found.items()}
    assert tokens["greedy"] == [2, 2] and tokens["maj@4"] == [8, 8] and tokens["verified@4"] == [16, 16]
    assert tokens["longer"] == [2, 4] and tokens["revise"] == [4, 24]
    # Two tokens each: generated and scored (2 * 2), after 2 earlier ones (2 * 4), and after 4 (2 * 6).
    assert lm.calls[1][:4] == (0.7, 4, 1, 0) and len(lm.calls[1][4]) == 8, "each question comes four times"
    assert lm.calls[2] == (0.0, 1, 4, 0, [HARD]) and lm.temperature == 0 and lm.copies == 1


def test_figures_gains_and_tokens():
    _, asker, result = run([EASY, HARD], retries=0)
    add_votes(asker, result)
    assert list(result.figures) == ["accuracy", "pass@1", "pass@4", "maj@4", "weighted@4", "verified@4",
                                    "oracle@4", "longer", "revise"]
    assert result.figures["pass@1"] == mean([1, 0.25])
    best = result.details["methods"]["verified@4"]
    # Gains of the two questions: 0 and 1, so 1/2 with a standard error of 1/2.
    assert best == {"accuracy": 1, "stderr": 0, "gain": 0.5, "gain_stderr": pytest.approx(0.5), "tokens": 16}


def test_without_a_verifier_only_votes_are_counted():
    _, asker, result = run([EASY, HARD], verifier=None)
    assert set(all_methods(asker, result)) == {"greedy", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4",
                                               "oracle@4", "longer"}


def test_the_picture_has_a_curve_per_method():
    _, asker, result = run([EASY, HARD])
    add_votes(asker, result)
    assert draw({"a": {"families": {}}}) is None
    figure = draw({"a": result.details, "b": result.details})
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(figure.axes) == 2 and labels == ["greedy", "pass@k", "maj@k", "weighted@k", "verified@k",
                                                "longer", "revise"]
    greedy = result.details["methods"]["greedy"]["accuracy"]
    assert set(axes.lines[0].get_ydata()) == {greedy}, "a line that no other method hides"
    assert axes.containers[1].lines[0].get_xdata().tolist() == [4, 8], "tokens of maj@2 and maj@4"


def test_word_problems_and_rows_of_question_and_answer(chat_folder, tmp_path, monkeypatch, capsys):
    """The tasks' own prompts and checks, with a model that says one thing greedily and samples another."""
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "It is\n#### 2"}))
    row = {"question": "Capital of France?", "answer": "Paris"}
    (tmp_path / "triviaqa.jsonl").write_text(json.dumps(row))
    (tmp_path / "math500.jsonl").write_text(json.dumps({"problem": "5 / 2?", "solution": "\\boxed{5/2}"}))
    tokenizer = Tokenizer.load(chat_folder)
    said = {"gsm8k": ("#### 3", "#### 2.0"), "triviaqa": ("Rome", "the paris"),  # greedily, sampled
            "math500": ("\\boxed{2}", "\\boxed{2.5}")}

    def generate(model, prompts, max_new_tokens, sampling, *rest):
        prompt = tokenizer.decode(prompts[0])
        name = "triviaqa" if "France" in prompt else "math500" if "Problem" in prompt else "gsm8k"
        for token in tokenizer.encode(said[name][sampling.temperature > 0] + "\n"):
            yield [token] * len(prompts)

    monkeypatch.setattr(evals.lm, "generate", generate)
    data = ",".join(f"{name}={tmp_path / name}.jsonl" for name in said)
    evaluation.main([f"--model={chat_folder}", f"--tasks={','.join(said)}", f"--data={data}", "--shots=0",
                     "--num_samples=3", "--device=cpu", f"--out_dir={tmp_path / 'e'}"])
    tasks = json.loads((tmp_path / "e" / "results.json").read_text())["models"][0]["tasks"]
    for task in tasks.values():
        found = {name: each["accuracy"] for name, each in task["details"]["methods"].items()}
        assert found == {"greedy": 0, "pass@1": 1, "pass@2": 1, "maj@2": 1, "pass@3": 1, "maj@3": 1,
                         "oracle@3": 1, "longer": 0}, found
        # A stop text ended the answers, so none is generated again with more tokens.
        methods = task["details"]["methods"]
        assert methods["longer"]["tokens"] == methods["greedy"]["tokens"]


@pytest.mark.parametrize("words, message", [
    (["--verifier=x"], "verifier=x: only chooses among samples; set num_samples"),
    (["--num_samples=-1"], "num_samples"),
    (["--temperature=0"], "temperature"),
    (["--threshold=1.5"], "threshold"),
    (["--num_samples=2", "--constrain=tools"], "num_samples does not work with constrain"),
])
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        evaluation.main(words)
