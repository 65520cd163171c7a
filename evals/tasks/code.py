"""Programs: HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732), judged by running their tests.

    python eval.py --model=out/base --tasks=humaneval,mbpp --allow_code=True

    {"task_id": "HumanEval/0", "prompt": "def add(a, b):\\n    \\"\\"\\"The sum.\\"\\"\\"\\n",
     "entry_point": "add", "test": "def check(candidate):\\n    assert candidate(1, 2) == 3\\n"}
    {"task_id": 11, "text": "Write a function to add two numbers.", "code": "def add(a, b):\\n  return a + b",
     "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}

HumanEval's prompt is the function's head; the text ends where the next top-level statement begins. MBPP's
prompt is that of its paper, with three worked examples, the tasks 2, 3 and 4; the tasks 11 to 510 are asked.

    You are an expert Python programmer, and here is your task: .. Your code should pass these tests:

    assert add(1, 2) == 3
    [BEGIN]

Both are those of lm-evaluation-harness. If the text has a Markdown block of code, as in chats, its first
block is the program. The figure is pass@1 of the greedy text: the program and its tests run to their end.

This executes what a model wrote, so it needs --allow_code=True. A program runs in a process of its own, with
at most 5 s of CPU time, 20 s in all, 1 GiB of memory and files of at most 1 MiB, no further processes, an
empty environment, a folder that is then deleted, and as the user "nobody" if eval.py runs as root. These
limits stop mistakes. They are NOT a sandbox against malice: the program can read files and use the network.
Use a container or a virtual machine for models that you do not trust. Files: humaneval*, mbpp*; on the hub:
openai/openai_humaneval, google-research-datasets/mbpp (full).
"""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from configurator import UserError, optional_import
from evals.benchmarks import Questions, convert, read, text_of, texts_of
from evals.lm import LM
from evals.results import Result, means, truncated

SECONDS = 20  # in all
# The process's limits: CPU seconds, bytes of memory, bytes per file, bytes of a core dump, child processes.
LIMITS = {"CPU": 5, "AS": 2**30, "FSIZE": 2**20, "CORE": 0, "NPROC": 0}
NOBODY = 65534
HUB = {"humaneval": ["openai/openai_humaneval::test"],
       "mbpp": [f"google-research-datasets/mbpp:full:{split}" for split in ("prompt", "test")]}
STOPS = {"humaneval": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "mbpp": ["[DONE]"]}
MAX_NEW_TOKENS = {"humaneval": 1024, "mbpp": 256}  # those of lm-evaluation-harness


# ---- Running a program ------------------------------------------------------------------------------------

# What the process does. Its limits are hard: without root, the program cannot raise them. The program has no
# names but its own, as in lm-eval: it is not "__main__". The file that says that the program has reached its
# end has an absolute path and is opened by a saved `open`, because the program may change the current folder
# and replace `open`.
LAUNCHER = f"""import resource, sys
end, make = sys.argv.pop(), open
for name, most in {LIMITS}.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {{}})
make(end, "w").close()
"""
# Interpreters without a virtual environment. The first may be in root's home, which "nobody" cannot read.
PYTHONS = (getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3")


def start(folder: str, end: Path, errors: BinaryIO) -> subprocess.Popen:
    """Start the program of a folder; the file `end` appears when it has reached its end.

    Raises UserError if "nobody" can run none of the interpreters.
    """
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        os.chown(folder, NOBODY, NOBODY)
    for python in PYTHONS:
        with contextlib.suppress(OSError):
            return subprocess.Popen([python, "-I", "-S", "-c", LAUNCHER, str(end)], cwd=folder, env={},
                                    stderr=errors, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                    start_new_session=True, **user)
    raise UserError(f"allow_code=True: no rights to run {' or '.join(PYTHONS)}; run eval.py without root")


def run_program(program: str) -> str:
    """Run a Python program within limits; returns "passed", or how it failed: the last line of its errors.

    A program passes if it reaches its end: a call of exit() before that does not.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        end = Path(folder, secrets.token_hex(16))
        Path(folder, "program.py").write_text(program, "utf-8", "replace")
        process = start(folder, end, errors)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"more than {SECONDS} s"
        finally:  # Ctrl-C as well
            process.kill()
            process.wait()
            # Python deletes no folders of 1,000 levels; find does.
            subprocess.run(["find", folder, "-mindepth", "2", "-delete"], stderr=subprocess.DEVNULL)
        if end.exists():
            return "passed"
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else f"ended by {process.returncode}"


# ---- The tasks --------------------------------------------------------------------------------------------

class CodeProblem(NamedTuple):
    prompt: str
    head: str  # code before the generated text
    tests: str  # code after it
    solution: str = ""  # for a worked example


def humaneval_problem(row: dict[str, Any]) -> CodeProblem:
    head = text_of(row["prompt"])
    return CodeProblem(head, head, f"{text_of(row['test'])}\ncheck({text_of(row['entry_point'])})")


def mbpp_problem(row: dict[str, Any]) -> CodeProblem:
    tests = "\n".join(texts_of(row["test_list"]))
    task = text_of(row["text"] if "text" in row else row["prompt"])  # in sanitized-mbpp
    setup = "\n".join([row.get("test_setup_code", ""), *row.get("test_imports", [])])
    prompt = (f"You are an expert Python programmer, and here is your task: {task} Your code should pass "
              f"these tests:\n\n{tests}\n[BEGIN]\n")
    return CodeProblem(prompt, "", f"{setup}\n{tests}", text_of(row["code"]))


def load(source: str | None, limit: int, shots: int | None, name: str, allow_code: bool = False) -> Questions:
    """The first `limit` problems; for MBPP, the examples are tasks 2 to 4. UserError without allow_code."""
    if not allow_code:
        raise UserError(f"{name} executes the programs that the model writes: --allow_code=True")
    optional_import("resource", "allow_code=True")  # Windows has no limits for processes
    rows = [row for hub in (HUB[name] if source is None else [""]) for row in read(source, name, hub)]
    if name == "humaneval":
        return Questions(convert(rows[:limit], humaneval_problem), [])
    numbered = list(zip(convert(rows, lambda row: int(row["task_id"])), rows, strict=True))
    examples = [row for number, row in numbered if 2 <= number < 2 + (3 if shots is None else shots)]
    asked = [row for number, row in numbered if 11 <= number <= 510]
    return Questions(convert(asked[:limit], mbpp_problem), convert(examples, mbpp_problem))


def program_of(problem: CodeProblem, text: str) -> str:
    """The program with its tests: the head and the text, or the first Markdown block of code in it."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return f"{problem.head}{block[1] if block else text}\n{problem.tests}"


def score(lm: LM, questions: Questions, name: str, allow_code: bool = False) -> Result:
    """pass@1: the share of programs that pass their tests."""
    shots = "".join(f"{each.prompt}{each.solution}\n[DONE]\n\n" for each in questions.shots)
    prompts = [shots + problem.prompt for problem in questions.asked]
    texts = lm.generate_until(prompts, [] if lm.chat else STOPS[name], MAX_NEW_TOKENS[name])
    answers = []
    for problem, text in zip(questions.asked, texts, strict=True):
        outcome = run_program(program_of(problem, text))
        answers.append({"prompt": problem.prompt, "said": text, "outcome": outcome,
                        "pass_at_1": outcome == "passed"})
    return Result(means(answers, ("pass_at_1",)) | truncated(lm.truncated), answers,
                  {"shots": len(questions.shots), "first_prompt": prompts[0]})
