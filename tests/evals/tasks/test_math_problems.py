r"""MATH: equal and different answers by hand, the last \boxed, hostile answers; the prompt."""

import json
import time

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import math_problems
from evals.tasks.math_problems import boxed, equal


@pytest.mark.parametrize("said, answer, verdict", [
    (r"\frac12", "0.5", True), (r"\dfrac{1}{2}", "1/2", True), (r"-\frac{1}{3}", r"\frac{-1}{3}", True),
    ("0.333", r"\frac{1}{3}", False), (r"3\frac{1}{2}", "3.5", True), ("x=5", "5", True),
    ("y = 5.", "x=5", True), ("10,000", "10000", True), (r"1{,}000", "1000", True),
    ("12345678901", "12345678902", False),
    (r"2\sqrt{2}", r"\sqrt8", True), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}", True),
    (r"\sqrt[3]{27}", "3", True), ("x^2+2x+1", "(x+1)^2", True), ("x^2+2x+2", "(x+1)^2", False),
    ("2x", "x2", True), (r"\frac{x^{2}}{\sqrt{y}}", "x^2/y^{1/2}", True), (r"2\pi", r"\pi\cdot 2", True),
    ("2+3i", "3i + 2", True), ("(1,2)", r"\left(1, 2\right)", True), ("(1,2)", "(2,1)", False),
    ("[1,2)", "(1,2)", False), (r"(-\infty,\frac{1}{2}]", r"(-\infty, 0.5]", True), ("1,2", "2, 1", True),
    (r"\{1,0.5\}", r"\{\frac12,1\}", True), ("(1,2),(3,4)", "(3,4),(1,2)", True), ("1,2", "1,2,2", False),
    (r"\text{east}", "east", True), ("east", "seat", False), (r"90^\circ", "90", True), (r"\$5", "5", True),
    (r"50\%", "50", True), (r"5\text{ cm}^2", "5", True), (r"x=\text{E}", "E", True), ("", "5", False),
    ("300, 200, 100", "100, 200, 300", True), ("(100, 200)", "(100.0,200)", True),
    ("(0,100)", "(0, 100)", True), ("100, 200", "100, 300", False), ("1, 2, 300", "300, 1, 2", True),
    (r"11,\! 111,\! 100", "11111100", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
])
def test_answers(said, answer, verdict):
    assert equal(said, answer) is verdict and equal(answer, said) is verdict


@pytest.mark.parametrize("hostile", [
    "9^{9^{9^9}}", "((9^{99})^{99})^{99}", "(" * 150, "{" * 190, "-" * 199 + "1", r"\frac{1}{0}",
    r"\sqrt{-1}", "1**1**" * 30, "__import__('os').abort()", "exec", "x.real",
    "9" * 10_000, "1," * 5000, ")(", r"\frac", "^",
    "0x10", "1_0", "1e9", "lambda:0", "\ud800", "2" + "!" * 100, r"\frac{" * 40])
def test_hostile_answers(hostile):
    begin = time.process_time()
    assert not equal(hostile, "7")
    assert equal(hostile, hostile)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("text, content", [
    (r"so $\boxed{\frac{5}{6}}$.", r"\frac{5}{6}"), (r"\boxed{1} or \boxed{2}", "2"), (r"\fbox{3}", "3"),
    (r"$\boxed 5$", "5"), (r"\boxed{1", None), ("5", None), (r"\boxed{}", ""), (r"\boxed", None)])
def test_the_last_box(text, content):
    assert boxed(text) == content


def test_prompt_oracle_and_wrong_answers(trained, tmp_path, monkeypatch):
    rows = [{"problem": f"What is {n}/2?", "solution": f"It is \\boxed{{\\frac{{{n}}}{{2}}}}."}
            for n in range(6)]
    (tmp_path / "hendrycks_math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm, asked = LM(str(trained), device="cpu"), []
    questions = math_problems.load(str(tmp_path), 500, None, "hendrycks_math")

    def scored(texts):
        monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or texts)
        return math_problems.score(lm, questions, "hendrycks_math").figures

    assert scored([r"\boxed{0}", r"$\boxed{0.5}$"]) == {"accuracy": (1, 0, 2), "boxed": (1, 0, 2)}
    assert scored(["0", r"\boxed{1}"]) == {"accuracy": (0, 0, 2), "boxed": (0.5, 0.5, 2)}
    shots = "".join(f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}\n\n" for row in rows[2:])
    prompts = [f"{shots}Problem:\n{row['problem']}\n\nSolution:" for row in rows[:2]]
    assert asked[0] == (prompts, ["Problem:"], 512)
    (tmp_path / "hendrycks_math.jsonl").write_text(json.dumps({"problem": "?", "solution": "5"}))
    with pytest.raises(UserError, match="row 1 does not fit this benchmark .TypeError: None is not a text"):
        math_problems.load(str(tmp_path), 500, 0, "hendrycks_math")
